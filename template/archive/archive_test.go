package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	metadatadb "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newImporter is one for amd64 with containerd's own store.
func newImporter(t testing.TB) (*Importer, context.Context) {
	t.Helper()
	dir := t.TempDir()
	blobs, err := local.NewStore(filepath.Join(dir, "blobs"))
	must(t, err)
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, &bolt.Options{NoSync: true})
	must(t, err)
	t.Cleanup(func() { db.Close() })
	m := metadatadb.NewDB(db, blobs, nil)
	must(t, m.Init(context.Background()))
	return &Importer{
		Store: m.ContentStore(), Limits: Limits{Bytes: 1 << 30, Entries: 1000, Ratio: 250}, Platform: platforms.Only(platforms.MustParse("linux/amd64")),
	}, namespaces.WithNamespace(context.Background(), "test")
}

// take imports files.
func (i *Importer) take(ctx context.Context, t testing.TB, choice string, names ...string) (Image, error) {
	t.Helper()
	var of [2]*Source
	for n, name := range names {
		s, err := Open(name)
		if err != nil {
			return Image{}, err
		}
		defer s.Close()
		of[n] = s
	}
	key, err := Key(ctx, of[0], of[1], nil)
	must(t, err)
	image, err := i.Import(ctx, of[0], of[1], key, choice)
	if err != nil {
		must(t, Abandon(ctx, i.Store, key))
	}
	return image, err
}

// file is an entry of a tar.
type file struct {
	tar.Header
	data string
}

func (f file) size() int64 {
	if f.Size != 0 {
		return f.Size
	}
	return int64(len(f.data))
}

func regular(name, data string) file {
	return file{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data}
}

func dir(name string) file {
	return file{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

func link(kind byte, name, target string) file {
	return file{tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func device(kind byte, name string, major, minor int64) file {
	return file{tar.Header{Typeflag: kind, Name: name, Devmajor: major, Devminor: minor, Mode: 0o666}, ""}
}

func tarOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := f.Header
		h.Size, h.Format = f.size(), tar.FormatPAX
		must(t, w.WriteHeader(&h))
		_, err := io.WriteString(w, f.data)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// write keeps data under a name that tells nothing.
func write(t testing.TB, data []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "Some File.iso")
	must(t, os.WriteFile(name, data, 0o644))
	return name
}

// pack compresses: in Go, or by the program that everybody uses, if it is here.
func pack(t testing.TB, how string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	switch how {
	case "":
		return data
	case "gzip":
		w := gzip.NewWriter(&b)
		_, err := w.Write(data)
		must(t, err)
		must(t, w.Close())
	case "zstd":
		w, err := zstd.NewWriter(&b)
		must(t, err)
		_, err = w.Write(data)
		must(t, err)
		must(t, w.Close())
	default:
		if _, err := exec.LookPath(how); err != nil {
			t.Skip(err)
		}
		cmd := exec.Command(how, "-c")
		cmd.Stdin, cmd.Stdout = bytes.NewReader(data), &b
		must(t, cmd.Run())
	}
	return b.Bytes()
}

var elf = "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 11) + "\x3e\x00" + "the rest"

// root is one with all that a tar can tell of files.
func root() []file {
	at := time.Unix(1700000000, 123456789)
	all := []file{
		dir("./"), dir("./bin"), {tar.Header{Typeflag: tar.TypeReg, Name: "./bin/su", Mode: 0o4755, ModTime: at}, elf}, link(tar.TypeLink, "./bin/sudo", "./bin/su"),
		link(tar.TypeSymlink, "./sbin", "/bin"), link(tar.TypeSymlink, "./up", "../../.."),
		{tar.Header{Typeflag: tar.TypeDir, Name: "./home/", Mode: 0o1777, Uid: 1000, Gid: 100000, Uname: "nobody-knows", ModTime: at}, ""},
		{tar.Header{Typeflag: tar.TypeReg, Name: "./home/a file\nof two lines", Mode: 0o600, Uid: 4000000000, Gid: 4000000001, ModTime: time.Unix(-5, 0), PAXRecords: map[string]string{
			"SCHILY.xattr.user.text": "a\x00b=c\n", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		}}, strings.Repeat("x", 5000)},
		dir("./dev"), device(tar.TypeChar, "./dev/null", 1, 3), device(tar.TypeChar, "./dev/tty7", 4, 7), {tar.Header{Typeflag: tar.TypeFifo, Name: "./run/initctl", Mode: 0o600}, ""},
		regular("./"+strings.Repeat("long/", 60)+"name", "deep"), regular("./etc/metadata.yaml", "no metadata"),
	}
	return all
}

// layerOf reads an image's one layer back.
func layerOf(ctx context.Context, t testing.TB, i *Importer, target ocispec.Descriptor) (config ocispec.Image, files []file) {
	t.Helper()
	m, err := images.Manifest(ctx, i.Store, target, i.Platform)
	must(t, err)
	must(t, i.read(ctx, m.Config, &config))
	if len(m.Layers) != 1 || len(config.RootFS.DiffIDs) != 1 {
		t.Fatalf("%+v, %+v", m, config)
	}
	blob, err := content.ReadBlob(ctx, i.Store, m.Layers[0])
	must(t, err)
	if digest.FromBytes(blob) != m.Layers[0].Digest {
		t.Error("the layer is not what its digest says")
	}
	r, done, err := decompress(bufio.NewReader(bytes.NewReader(blob)))
	must(t, err)
	defer done()
	plain, err := io.ReadAll(r)
	must(t, err)
	if got := digest.FromBytes(plain); got != config.RootFS.DiffIDs[0] {
		t.Errorf("the layer unpacks to %s, not to %s", got, config.RootFS.DiffIDs[0])
	}
	tr := tar.NewReader(bytes.NewReader(plain))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return config, files
		}
		must(t, err)
		data, err := io.ReadAll(tr)
		must(t, err)
		files = append(files, file{*h, string(data)})
	}
}

// said is what is compared of a file.
type said struct {
	Name, Link, Data string
	Kind             byte
	Mode             int64
	UID, GID         int
	Time             time.Time
	Major, Minor     int64
	Attributes       map[string]string
}

func saidOf(files []file) (all []said) {
	for _, f := range files {
		name := strings.TrimSuffix(strings.TrimPrefix(f.Name, "./"), "/")
		if name == "" {
			continue
		}
		s := said{name, f.Linkname, f.data, f.Typeflag, f.Mode, f.Uid, f.Gid, f.ModTime.UTC(), f.Devmajor, f.Devminor, map[string]string{}}
		if f.ModTime.IsZero() {
			s.Time = time.Unix(0, 0).UTC()
		}
		if f.Typeflag == tar.TypeLink {
			s.Link = strings.TrimPrefix(s.Link, "./")
		}
		for k, v := range f.PAXRecords {
			if strings.HasPrefix(k, paxAttribute) {
				s.Attributes[k] = v
			}
		}
		all = append(all, s)
	}
	return all
}

const yamlText = `architecture: x86_64
creation_date: 1600000000
expiry_date: 1700000000
properties:
  description: Debian trixie amd64
  os: debian
  release: trixie
templates:
  /etc/hostname:
    when: [create]
    template: hostname.tpl
`

func TestRootfsRoundTrip(t *testing.T) {
	for _, how := range []string{"", "gzip", "zstd", "xz", "bzip2"} {
		t.Run("compressed with "+how, func(t *testing.T) {
			i, ctx := newImporter(t)
			name := write(t, pack(t, how, tarOf(t, root()...)))
			image, err := i.take(ctx, t, "", name)
			must(t, err)
			config, files := layerOf(ctx, t, i, image.Target)
			if d := cmp.Diff(saidOf(root()), saidOf(files)); d != "" {
				t.Error(d)
			}
			if config.Architecture != "amd64" || config.OS != "linux" || len(config.Config.Entrypoint)+len(config.Config.Cmd) != 0 || config.Created.Unix() != 1700000000 {
				t.Errorf("%+v", config)
			}
			again, err := i.take(ctx, t, "", name)
			must(t, err)
			if image.Found || !again.Found || again.Target.Digest != image.Target.Digest {
				t.Errorf("again: %+v, %+v", image, again)
			}
			info, err := i.Store.Info(ctx, image.Target.Digest)
			must(t, err)
			if info.Labels["containerd.io/gc.ref.content.config"] == "" || info.Labels["containerd.io/gc.ref.content.l.0"] == "" {
				t.Errorf("labels: %v", info.Labels)
			}
		})
	}
}

func TestSourcesWithoutHoles(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	must(t, err)
	_, err = f.WriteAt([]byte("end"), 1<<20)
	must(t, err)
	must(t, f.Close())
	for _, format := range []string{"gnu", "posix"} {
		out, err := exec.Command("tar", "-C", dir, "--format="+format, "--sparse", "-cf", dir+".tar", ".").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		i, ctx := newImporter(t)
		image, err := i.take(ctx, t, "", dir+".tar")
		must(t, err)
		if _, files := layerOf(ctx, t, i, image.Target); len(files) != 1 || len(files[0].data) != 1<<20+3 || !strings.HasSuffix(files[0].data, "\x00end") {
			t.Errorf("%s: %d files", format, len(files))
		}
	}
}

func TestLXC(t *testing.T) {
	inside := []file{dir("rootfs/")}
	for _, f := range root()[1:] {
		f.Name = "rootfs/" + strings.TrimPrefix(f.Name, "./")
		if f.Typeflag == tar.TypeLink {
			f.Linkname = "rootfs/" + strings.TrimPrefix(f.Linkname, "./")
		}
		inside = append(inside, f)
	}
	meta, templates := regular("metadata.yaml", yamlText), []file{dir("templates/"), regular("templates/hostname.tpl", "{{ container.name }}")}
	unified := slices.Concat([]file{meta}, inside, templates)
	last := slices.Concat(inside, templates, []file{meta})
	split := slices.Concat([]file{meta}, templates)
	for name, halves := range map[string][][]byte{
		"unified": {tarOf(t, unified...)}, "metadata last": {pack(t, "gzip", tarOf(t, last...))}, "split": {pack(t, "zstd", tarOf(t, root()...)), pack(t, "gzip", tarOf(t, split...))},
	} {
		t.Run(name, func(t *testing.T) {
			i, ctx := newImporter(t)
			var names []string
			for _, h := range halves {
				names = append(names, write(t, h))
			}
			image, err := i.take(ctx, t, "", names...)
			must(t, err)
			config, files := layerOf(ctx, t, i, image.Target)
			if d := cmp.Diff(saidOf(root()), saidOf(files)); d != "" {
				t.Error(d)
			}
			if config.Created.Unix() != 1600000000 || config.Architecture != "amd64" || config.Config.Labels["org.opencontainers.image.description"] != "Debian trixie amd64" || config.Config.Labels["io.containerd.pve.lxc.os"] != "debian" {
				t.Errorf("%+v", config)
			}
		})
	}
	i, ctx := newImporter(t)
	for name, c := range map[string]struct {
		files []file
		want  string
	}{
		"half":         {split, "give both"},
		"no metadata":  {inside, "no metadata.yaml"},
		"other host":   {append([]file{regular("metadata.yaml", "architecture: aarch64")}, inside...), "linux/arm64"},
		"bad yaml":     {append([]file{regular("metadata.yaml", ":\n\t-")}, inside...), `entry 1 "metadata.yaml" at byte 0`},
		"no machine":   {append([]file{regular("metadata.yaml", "architecture: pdp11/x/y/z")}, inside...), "is none"},
		"twice":        {slices.Concat([]file{meta}, inside, []file{meta}), `"metadata.yaml" at byte`},
		"link leaves":  {append([]file{meta, regular("rootfs/a", ""), link(tar.TypeLink, "rootfs/b", "metadata.yaml")}, inside...), `entry 3 "rootfs/b"`},
		"root is link": {[]file{meta, link(tar.TypeSymlink, "rootfs", "/etc"), regular("rootfs/a", "")}, `entry 2 "rootfs"`},
		"leaves":       {[]file{meta, regular("rootfs/../rootfs/a", "")}, `entry 2 "rootfs/../rootfs/a"`},
	} {
		if _, err := i.take(ctx, t, "", write(t, tarOf(t, c.files...))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := i.take(ctx, t, "", write(t, tarOf(t, root()...)), write(t, tarOf(t, unified...))); err == nil || !strings.Contains(err.Error(), "give it alone") {
		t.Errorf("a whole image as the other half: %v", err)
	}
	if _, err := i.take(ctx, t, "", write(t, tarOf(t, split...)), write(t, tarOf(t, root()...))); !errdefs.IsInvalidArgument(err) {
		t.Errorf("two halves the wrong way round: %v", err)
	}
}

func TestSquashfs(t *testing.T) {
	for _, p := range []string{"tar2sqfs", unpacker} {
		if _, err := exec.LookPath(p); err != nil {
			i, ctx := newImporter(t)
			if _, err := i.take(ctx, t, "", write(t, append([]byte("hsqs"), make([]byte, 1000)...))); p == unpacker && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "squashfs-tools-ng")) {
				t.Errorf("without the program: %v", err)
			}
			t.Skip(err)
		}
	}
	dir := t.TempDir()
	name := filepath.Join(dir, "squashfs")
	cmd := exec.Command("tar2sqfs", "--no-tail-packing", name)
	cmd.Stdin = bytes.NewReader(tarOf(t, root()...))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	i, ctx := newImporter(t)
	image, err := i.take(ctx, t, "", name)
	must(t, err)
	_, files := layerOf(ctx, t, i, image.Target)
	// It keeps no fractions of a second, no time before 1970, and the directories that were only told of.
	want := map[string]said{}
	for _, s := range saidOf(root()) {
		s.Time = s.Time.Truncate(time.Second)
		want[s.Name] = s
	}
	found := 0
	for _, s := range saidOf(files) {
		w, ok := want[s.Name]
		if !ok {
			continue
		}
		found++
		if s.Name == "bin/su" || s.Name == "bin/sudo" { // which is the link does not matter
			w.Kind, w.Link, w.Data = s.Kind, s.Link, s.Data
		}
		if w.Time.Unix() <= 0 {
			w.Time = s.Time
		}
		if s.Kind == tar.TypeLink || s.Kind == tar.TypeSymlink {
			w.Mode = s.Mode
		}
		if d := cmp.Diff(w, s); d != "" {
			t.Error(d)
		}
	}
	if found != len(want) {
		t.Errorf("%d of %d", found, len(want))
	}
	// A damaged one says so.
	data, err := os.ReadFile(name)
	must(t, err)
	if _, err := i.take(ctx, t, "", write(t, data[:200])); !errdefs.IsInvalidArgument(err) {
		t.Errorf("half of it: %v", err)
	}
}

// blobs is an OCI layout, by file name.
type blobs map[string][]byte

func (b blobs) add(t testing.TB, media string, v any) ocispec.Descriptor {
	t.Helper()
	data, ok := v.([]byte)
	if !ok {
		var err error
		data, err = json.Marshal(v)
		must(t, err)
	}
	d := ocispec.Descriptor{MediaType: media, Digest: digest.FromBytes(data), Size: int64(len(data))}
	b["blobs/sha256/"+d.Digest.Encoded()] = data
	return d
}

// image adds one with a layer.
func (b blobs) image(t testing.TB, arch string, layer []byte) ocispec.Descriptor {
	t.Helper()
	config := b.add(t, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}}, Config: ocispec.ImageConfig{Cmd: []string{"/bin/su"}},
	})
	d := b.add(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{b.add(t, ocispec.MediaTypeImageLayerGzip, pack(t, "gzip", layer))},
	})
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return d
}

func named(d ocispec.Descriptor, name string) ocispec.Descriptor {
	d.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	return d
}

func index(of ...ocispec.Descriptor) ocispec.Index {
	return ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: of}
}

func (b blobs) layout(t testing.TB, of ...ocispec.Descriptor) blobs {
	data, err := json.Marshal(index(of...))
	must(t, err)
	b["index.json"], b["oci-layout"] = data, []byte(`{"imageLayoutVersion":"1.0.0"}`)
	return b
}

func (b blobs) tar(t testing.TB) []byte {
	files := []file{dir("./")}
	for name, data := range b {
		files = append(files, regular("./"+name, string(data)))
	}
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.Name, b.Name) })
	return tarOf(t, files...)
}

func (b blobs) directory(t testing.TB) string {
	to := t.TempDir()
	for name, data := range b {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(to, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(to, name), data, 0o644))
	}
	return to
}

func TestOCI(t *testing.T) {
	b := blobs{}
	amd, arm := b.image(t, "amd64", tarOf(t, root()...)), b.image(t, "arm64", tarOf(t, regular("arm", "")))
	multi := b.add(t, ocispec.MediaTypeImageIndex, index(arm, amd))
	b.layout(t, named(multi, "registry.example.org/x:1"))
	for name, source := range map[string]string{"tar": write(t, b.tar(t)), "compressed": write(t, pack(t, "zstd", b.tar(t))), "directory": b.directory(t)} {
		i, ctx := newImporter(t)
		image, err := i.take(ctx, t, "", source)
		must(t, err)
		if image.Target.Digest != amd.Digest || image.Name != "registry.example.org/x:1" || image.Found {
			t.Errorf("%s: %+v", name, image)
		}
		config, files := layerOf(ctx, t, i, image.Target)
		if !slices.Equal(config.Config.Cmd, []string{"/bin/su"}) || len(files) != len(root()) {
			t.Errorf("%s: %+v", name, config)
		}
		info, err := i.Store.Info(ctx, amd.Digest)
		must(t, err)
		if len(info.Labels) < 2 {
			t.Errorf("%s: labels %v", name, info.Labels)
		}
		// As after an interruption: what is there is found.
		if image, err = i.take(ctx, t, "", source); err != nil || !image.Found || image.Target.Digest != amd.Digest {
			t.Errorf("%s again: %+v, %v", name, image, err)
		}
	}
}

func TestChoice(t *testing.T) {
	b := blobs{}
	one, two, arm := b.image(t, "amd64", tarOf(t, regular("1", ""))), b.image(t, "amd64", tarOf(t, regular("2", ""))), b.image(t, "arm64", tarOf(t, regular("3", "")))
	source := write(t, b.layout(t, named(one, "one:1"), named(one, "one:latest"), named(two, "docker.io/library/two:latest"), named(arm, "arm:1")).tar(t))
	i, ctx := newImporter(t)
	_, err := i.take(ctx, t, "", source)
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "--select") || !strings.Contains(err.Error(), "one:1") || !strings.Contains(err.Error(), two.Digest.String()) {
		t.Errorf("of two: %v", err)
	}
	for choice, want := range map[string]ocispec.Descriptor{"one:latest": one, "two": two, two.Digest.String(): two, one.Digest.Encoded()[:12]: one} {
		image, err := i.take(ctx, t, choice, source)
		if err != nil || image.Target.Digest != want.Digest {
			t.Errorf("%s: %+v, %v", choice, image, err)
		}
	}
	if _, err := i.take(ctx, t, "three", source); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "one:1") {
		t.Errorf("one that is not there: %v", err)
	}
	only := blobs{}
	if _, err := i.take(ctx, t, "", write(t, only.layout(t, only.image(t, "arm64", tarOf(t, regular("3", "")))).tar(t))); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("of another platform: %v", err)
	}
	if _, err := i.take(ctx, t, "x", write(t, tarOf(t, root()...))); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a choice of one: %v", err)
	}
}

func TestDockerArchive(t *testing.T) {
	layer := tarOf(t, root()...)
	config, err := json.Marshal(ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}}})
	must(t, err)
	id := digest.FromBytes(config).Encoded()
	manifest := fmt.Sprintf(`[{"Config":"%s.json","RepoTags":["web:1","web:2"],"Layers":["%[1]s/layer.tar"]}]`, id)
	name := write(t, tarOf(t, dir(id+"/"), regular(id+"/layer.tar", string(layer)), regular(id+".json", string(config)), regular("manifest.json", manifest), regular("repositories", "{}")))
	i, ctx := newImporter(t)
	image, err := i.take(ctx, t, "", name)
	must(t, err)
	if image.Name != "docker.io/library/web:1" {
		t.Errorf("%+v", image)
	}
	if _, files := layerOf(ctx, t, i, image.Target); len(files) != len(root()) {
		t.Errorf("%d files", len(files))
	}
	if image, err = i.take(ctx, t, "web:2", name); err != nil || image.Name != "docker.io/library/web:2" {
		t.Errorf("by its other name: %+v, %v", image, err)
	}
}

func TestDamagedImages(t *testing.T) {
	whole := func() (blobs, ocispec.Descriptor) {
		b := blobs{}
		d := b.image(t, "amd64", tarOf(t, root()...))
		return b.layout(t, d), d
	}
	layerName := func(b blobs, d ocispec.Descriptor) string {
		var m ocispec.Manifest
		must(t, json.Unmarshal(b["blobs/sha256/"+d.Digest.Encoded()], &m))
		return "blobs/sha256/" + m.Layers[0].Digest.Encoded()
	}
	for name, c := range map[string]struct {
		edit func(b blobs, d ocispec.Descriptor)
		want string
	}{
		"a layer is missing":      {func(b blobs, d ocispec.Descriptor) { delete(b, layerName(b, d)) }, "the archive lacks it"},
		"a layer is another":      {func(b blobs, d ocispec.Descriptor) { b[layerName(b, d)] = []byte("x") }, "the archive lacks it"},
		"the manifest is missing": {func(b blobs, d ocispec.Descriptor) { delete(b, "blobs/sha256/"+d.Digest.Encoded()) }, "the archive lacks it"},
		"no index":                {func(b blobs, _ ocispec.Descriptor) { delete(b, "index.json") }, "index.json"},
		"index is no JSON":        {func(b blobs, _ ocispec.Descriptor) { b["index.json"] = []byte("x") }, "invalid"},
		"an empty index":          {func(b blobs, _ ocispec.Descriptor) { b.layout(t) }, "no image"},
		"an index of itself":      {func(b blobs, _ ocispec.Descriptor) { b.layout(t, b.add(t, ocispec.MediaTypeImageIndex, []byte("{}"))) }, "no image"},
		"a config of no layers":   {func(b blobs, _ ocispec.Descriptor) { b.layout(t, b.odd(t, 0)) }, "layers"},
		"the wrong diff ids":      {func(b blobs, _ ocispec.Descriptor) { b.layout(t, b.odd(t, 1)) }, "it unpacks to"},
		"a digest that is none":   {func(b blobs, d ocispec.Descriptor) { d.Digest = "sha256:../../x"; b.layout(t, d) }, "digest"},
		"a manifest of many bytes": {func(b blobs, _ ocispec.Descriptor) {
			b.layout(t, b.add(t, ocispec.MediaTypeImageManifest, make([]byte, maxJSON+1)))
		}, "bytes"},
	} {
		b, d := whole()
		c.edit(b, d)
		i, ctx := newImporter(t)
		if _, err := i.take(ctx, t, "", write(t, b.tar(t))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		} else {
			t.Log(name, err)
		}
		if all, err := i.Store.ListStatuses(ctx); err != nil || len(all) != 0 {
			t.Errorf("%s: what was begun is left: %v, %v", name, all, err)
		}
	}
}

// odd is an image whose config tells of n layers that are not its own.
func (b blobs) odd(t testing.TB, n int) ocispec.Descriptor {
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}
	for range n {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromString("another"))
	}
	return b.add(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: b.add(t, ocispec.MediaTypeImageConfig, config),
		Layers: []ocispec.Descriptor{b.add(t, ocispec.MediaTypeImageLayer, tarOf(t, regular("x", "")))},
	})
}

func TestInterrupted(t *testing.T) {
	i, ctx := newImporter(t)
	name := write(t, tarOf(t, append(root(), regular("large", strings.Repeat("x", 1<<20)))...))
	within, cancel := context.WithCancel(ctx)
	i.Progress = func(what string, n, _ int64) {
		if what == "read" && n > 1<<19 {
			cancel()
		}
	}
	s, err := Open(name)
	must(t, err)
	defer s.Close()
	key, err := Key(ctx, s, nil, nil)
	must(t, err)
	if _, err := i.Import(within, s, nil, key, ""); err == nil || within.Err() == nil {
		t.Errorf("%v", err)
	}
	if all, err := i.Store.ListStatuses(ctx); err != nil || len(all) != 0 {
		t.Errorf("what was begun is left: %v, %v", all, err)
	}
	i.Progress = nil
	if _, err := i.take(ctx, t, "", name); err != nil {
		t.Error(err)
	}
	if err := s.Lock(); err != nil {
		t.Error(err)
	}
	other, err := Open(name)
	must(t, err)
	defer other.Close()
	if err := other.Lock(); !errdefs.IsUnavailable(err) {
		t.Errorf("imported twice at once: %v", err)
	}
	// One that changes after it was hashed is not what it is taken for.
	must(t, os.WriteFile(name, tarOf(t, append(root(), regular("large", strings.Repeat("y", 1<<20)))...), 0o644))
	if _, err := i.Import(ctx, s, nil, digest.FromString("x"), ""); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "changed") {
		t.Errorf("changed: %v", err)
	}
}

func TestRecognise(t *testing.T) {
	sha := strings.Repeat("ab", 32)
	for _, c := range []struct {
		files []file
		want  Kind
	}{
		{root(), Rootfs},
		{[]file{regular("bin/sh", "")}, Rootfs},
		{[]file{dir("./"), dir("./blobs")}, Images},
		{[]file{regular("index.json", "")}, Images},
		{[]file{regular("sha256:"+sha, "")}, Images},
		{[]file{regular(sha+".tar.gz", "")}, Images},
		{[]file{dir(sha + "/")}, Images},
		{[]file{dir("etc"), regular("etc/manifest.json", "")}, Rootfs},
		{[]file{regular("metadata.yaml", "")}, LXC},
		{[]file{dir("./"), dir("./templates/")}, LXC},
		{[]file{dir("rootfs")}, LXC},
		{[]file{regular("rootfs", "")}, Rootfs},
	} {
		if got, err := Recognise(bytes.NewReader(tarOf(t, c.files...))); err != nil || got != c.want {
			t.Errorf("%s: %q, %v, not %q", c.files[len(c.files)-1].Name, got, err, c.want)
		}
	}
	for name, data := range map[string][]byte{
		"empty": {}, "short": []byte("x"), "zeros": make([]byte, 4096), "text": bytes.Repeat([]byte("text "), 1000), "qcow2": append([]byte("QFI\xfb"), make([]byte, 4096)...),
		"a gzip of text": pack(t, "gzip", bytes.Repeat([]byte("x"), 4096)), "half a gzip": pack(t, "gzip", tarOf(t, root()...))[:20], "empty tar": tarOf(t), "only the root": tarOf(t, dir("./")),
	} {
		if got, err := Recognise(bytes.NewReader(data)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "vztmpl") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{t.TempDir(), "/dev/null"} {
		if _, err := Open(name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReference(t *testing.T) {
	for _, c := range [][4]string{
		{"", "", "/var/lib/vz/debian-12-standard_12.7-1_amd64.tar.zst", "localhost/debian-12-standard_12.7-1_amd64:latest"},
		{"", "", "My Image (1).TAR.GZ", "localhost/my-image-1:latest"},
		{"", "", "...", "localhost/image:latest"},
		{"", "latest", "dir", "localhost/dir:latest"},
		{"", "3.1", "dir", "localhost/dir:3.1"},
		{"", "no tag", "a__b___c", "localhost/a__b-c:latest"},
		{"", "quay.io/x/y:2", "dir", "quay.io/x/y:2"},
		{"", "docker.io/library/web:1", "dir", "docker.io/library/web:1"},
		{"web", "quay.io/x/y:2", "dir", "docker.io/library/web:latest"},
		{"localhost:5000/web:1", "", "dir", "localhost:5000/web:1"},
	} {
		if got, err := Reference(c[0], c[1], c[2]); err != nil || got != c[3] {
			t.Errorf("%q: %q, %v", c, got, err)
		}
	}
	if got, err := Reference("A B", "", "x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%q, %v", got, err)
	}
}
