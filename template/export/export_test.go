package export

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	layers "github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/continuity/sysx"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// acl lets user 7 read and write.
var acl = []byte("\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x06\x00\x07\x00\x00\x00" + "\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x06\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff")

// treeOf has entries of all kinds.
func treeOf(t *testing.T) *os.File {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes devices and gives files away")
	}
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) { must(t, os.WriteFile(in(name), []byte(text), 0o600)) }
	must(t, os.Mkdir(in("etc"), 0o755))
	must(t, os.Mkdir(in("tmp"), 0o700))
	must(t, os.MkdirAll(in(".containerd-pve"), 0o755))
	write(".containerd-pve/init", "program")
	must(t, os.Link(in(".containerd-pve/init"), in("zz-same-init")))
	write("etc/a", "first")
	must(t, os.Link(in("etc/a"), in("etc/b")))
	must(t, os.Link(in("etc/a"), in("linked")))
	must(t, os.Symlink("../b\xffad", in("etc/sym")))
	must(t, os.Link(in("etc/sym"), in("etc/sym2")))
	write("etc/\xff\xfe not utf-8", "x")
	write("etc/empty", "")
	write(strings.Repeat("long", 60), "long name")
	write("etc/line\nfeed =", "y")
	must(t, os.WriteFile(in("suid"), []byte("s"), 0o600))
	must(t, unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(in("disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(8, 300))))
	must(t, unix.Mkfifo(in("fifo"), 0o640))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err)
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: in("socket")}); err != nil {
		t.Logf("no socket: %v", err)
	}
	f, err := os.Create(in("sparse"))
	must(t, err)
	_, err = f.WriteAt([]byte("end"), 2<<20)
	must(t, errors.Join(err, f.Truncate(3<<20), f.Close()))
	must(t, unix.Lchown(in("suid"), 1234, 56789)) // takes a capability away
	for name, value := range map[string]string{"user.a": "b\x00c", "security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "system.posix_acl_access": string(acl)} {
		if err := unix.Lsetxattr(in("suid"), name, []byte(value), 0); err != nil {
			t.Skipf("this filesystem has no %s: %v", name, err)
		}
	}
	must(t, unix.Lsetxattr(in("tmp"), "system.posix_acl_default", acl, 0))
	must(t, unix.Chmod(in("suid"), 0o4765))
	must(t, unix.Chmod(in("tmp"), 0o1777))
	must(t, os.Lchown(in("etc/sym"), 3_000_000, 7))
	must(t, os.Chmod(dir, 0o751))
	n := int64(0)
	must(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, _ error) error {
		n++
		when := []unix.Timespec{unix.NsecToTimespec(n), unix.NsecToTimespec((1_000_000_000+n)*1e9 + 123_456_789)}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, when, unix.AT_SYMLINK_NOFOLLOW)
	}))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, in("etc/empty"), []unix.Timespec{{}, {Sec: -5, Nsec: 500}}, 0))
	root, err := os.OpenFile(dir, unix.O_PATH, 0)
	must(t, err)
	t.Cleanup(func() { root.Close() })
	return root
}

// look is all that there is to a tree of files.
func look(t *testing.T, dir string, without ...string) map[string]string {
	t.Helper()
	all, first := map[string]string{}, map[uint64]string{}
	must(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		must(t, err)
		name := strings.TrimPrefix(p, dir)
		info, err := os.Lstat(p)
		must(t, err)
		if slices.Contains(without, name) {
			if info.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		st := info.Sys().(*syscall.Stat_t)
		text := fmt.Sprintf("%o %d:%d %x size %d time %d.%d", st.Mode, st.Uid, st.Gid, st.Rdev, st.Size, st.Mtim.Sec, st.Mtim.Nsec)
		if info.IsDir() {
			text = fmt.Sprintf("%o %d:%d time %d.%d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		}
		if !info.IsDir() {
			if f, ok := first[st.Ino]; ok {
				text += " is " + f
			} else {
				first[st.Ino] = name
			}
		}
		names, err := sysx.LListxattr(p)
		must(t, err)
		slices.Sort(names)
		for _, n := range names {
			v, err := sysx.LGetxattr(p, n)
			must(t, err)
			text += fmt.Sprintf(" %s=%x", n, v)
		}
		switch info.Mode().Type() {
		case 0:
			data, err := os.ReadFile(p)
			must(t, err)
			text += " " + digest.FromBytes(data).String()
		case fs.ModeSymlink:
			to, err := os.Readlink(p)
			must(t, err)
			text += fmt.Sprintf(" to %q", to)
		}
		all[name] = text
		return nil
	}))
	return all
}

func headers(t *testing.T, r io.Reader) []*tar.Header {
	t.Helper()
	var all []*tar.Header
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		must(t, err)
		all = append(all, h)
	}
}

// TestRootfs: as Proxmox's own templates, of files of all kinds.
func TestRootfs(t *testing.T) {
	root := treeOf(t)
	var b, again bytes.Buffer
	must(t, Rootfs(t.Context(), &b, root, compression.Uncompressed))
	must(t, Rootfs(t.Context(), &again, root, compression.Uncompressed))
	if !bytes.Equal(b.Bytes(), again.Bytes()) {
		t.Error("the same files gave other bytes")
	}
	all := headers(t, bytes.NewReader(b.Bytes()))
	var names []string
	of := map[string]*tar.Header{}
	for _, h := range all {
		names = append(names, h.Name)
		of[h.Name] = h
		if h.Uname != "" || h.Gname != "" || !h.AccessTime.IsZero() || !h.ChangeTime.IsZero() {
			t.Errorf("%q has what is this host's: %+v", h.Name, h)
		}
	}
	want := []string{
		"./", "./.containerd-pve/", "./.containerd-pve/init", "./disk", "./etc/", "./etc/a", "./etc/b", "./etc/empty", "./etc/line\nfeed =", "./etc/sym", "./etc/sym2", "./etc/\xff\xfe not utf-8",
		"./fifo", "./linked", "./" + strings.Repeat("long", 60), "./null", "./sparse", "./suid", "./tmp/", "./zz-same-init",
	}
	if d := cmp.Diff(want, names); d != "" {
		t.Fatal(d)
	}
	for name, to := range map[string]string{"./etc/b": "./etc/a", "./linked": "./etc/a", "./etc/sym2": "./etc/sym", "./zz-same-init": "./.containerd-pve/init"} {
		if of[name].Typeflag != tar.TypeLink || of[name].Linkname != to {
			t.Errorf("%s: %c to %s", name, of[name].Typeflag, of[name].Linkname)
		}
	}
	if h := of["./suid"]; h.Mode != 0o4765 || h.Uid != 1234 || h.Gid != 56789 || h.ModTime.Nanosecond() != 123_456_789 || h.PAXRecords["SCHILY.acl.access"] != "user::rwx,user:7:rw-,group::r--,mask::rw-,other::r-x" || h.PAXRecords["SCHILY.xattr.user.a"] != "b\x00c" || len(h.PAXRecords["SCHILY.xattr.security.capability"]) != 20 {
		t.Errorf("%+v", h)
	}
	if h := of["./disk"]; h.Typeflag != tar.TypeBlock || h.Devmajor != 8 || h.Devminor != 300 {
		t.Errorf("%+v", h)
	}
	if h := of["./etc/empty"]; h.ModTime.Unix() != -5 || h.ModTime.Nanosecond() != 500 {
		t.Errorf("before 1970: %v", h.ModTime)
	}
	if h := of["./sparse"]; h.Size != 3<<20 {
		t.Errorf("%+v", h)
	}
	for kind, limit := range map[compression.Compression]int{compression.Gzip: 100_000, compression.Zstd: 100_000} {
		var z, again bytes.Buffer
		must(t, Rootfs(t.Context(), &z, root, kind))
		must(t, Rootfs(t.Context(), &again, root, kind))
		if !bytes.Equal(z.Bytes(), again.Bytes()) || z.Len() > limit {
			t.Errorf("%s: %d bytes, or others each time", kind.Extension(), z.Len())
		}
		r, err := compression.DecompressStream(&z)
		must(t, err)
		plain, err := io.ReadAll(r)
		must(t, err)
		if !bytes.Equal(plain, b.Bytes()) {
			t.Errorf("%s: what it unpacks to is another tarball", kind.Extension())
		}
	}
}

// TestRootfsUnpacks: tar makes the same files of it, called as in the documents, and as Proxmox does.
func TestRootfsUnpacks(t *testing.T) {
	root := treeOf(t)
	for name, args := range map[string][]string{
		"all attributes": {"--numeric-owner", "--xattrs", "--xattrs-include=*"},
		"Proxmox":        {"--numeric-owner", "--acls", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability", "--skip-old-files", "--anchored", "--exclude", "./dev/*"},
	} {
		to := t.TempDir()
		var b bytes.Buffer
		must(t, Rootfs(t.Context(), &b, root, compression.Uncompressed))
		if out, err := run(&b, append([]string{"tar", "-xp", "-f", "-", "-C", to}, args...)...); err != nil {
			if strings.Contains(out, "not compiled") {
				t.Skip(out)
			}
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		want, got := look(t, root.Name(), "/socket"), look(t, to)
		if name == "Proxmox" { // which leaves the directory itself as it is
			got[""] = want[""]
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// TestRootfsOfSparse: what is a hole is nowhere in memory.
func TestRootfsOfSparse(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	must(t, err)
	must(t, errors.Join(f.Truncate(256<<20), f.Close()))
	root, err := os.Open(dir)
	must(t, err)
	defer root.Close()
	before := allocated()
	n := counter(0)
	must(t, Rootfs(t.Context(), &n, root, compression.Uncompressed))
	if got := allocated() - before; n < 256<<20 || got > 16<<20 {
		t.Errorf("%d bytes written, %d allocated", n, got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Rootfs(ctx, io.Discard, root, compression.Zstd); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

func TestACLText(t *testing.T) {
	if got, err := aclText(acl); err != nil || got != "user::rw-,user:7:rw-,group::r--,mask::rw-,other::---" {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []string{"", "\x02\x00\x00", "\x01\x00\x00\x00", "\x02\x00\x00\x00\x01", "\x02\x00\x00\x00\x03\x00\x06\x00\xff\xff\xff\xff", "\x02\x00\x00\x00\x01\x00\x08\x00\xff\xff\xff\xff"} {
		if got, err := aclText([]byte(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%x: %q, %v", bad, got, err)
		}
	}
}

func FuzzACLText(f *testing.F) {
	f.Add(acl)
	f.Fuzz(func(t *testing.T, value []byte) {
		text, err := aclText(value)
		if err != nil {
			return
		}
		if n := len(strings.FieldsFunc(text, func(r rune) bool { return r == ',' })); n != len(value)/8 {
			t.Errorf("%x has %d entries: %s", value, n, text)
		}
	})
}

// imageIn is an image for two platforms in a store, of which one is not there.
func imageIn(t *testing.T) (blobs, Image, ocispec.Descriptor) {
	t.Helper()
	b := blobs{}
	put := func(media string, v any) ocispec.Descriptor {
		text, err := json.Marshal(v)
		must(t, err)
		return b.add(media, text)
	}
	config := []byte(`{"architecture":"amd64","os":"linux","created":"2026-01-02T03:04:05Z","config":{"Cmd":["x"],"Healthcheck":{"Test":["y"]}},"rootfs":{"type":"layers","diff_ids":["sha256:1"]},"history":[{},{}],"x-unknown":{"big":12345678901234567890}}`)
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: b.add(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{b.add(ocispec.MediaTypeImageLayer, []byte("layer one")), b.add(ocispec.MediaTypeImageLayer, []byte("layer two"))}}
	m.SchemaVersion = 2
	manifest := put(m.MediaType, m)
	other := manifest
	other.Digest = digest.FromString("of another platform")
	broken := m
	broken.Layers = []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("absent"), Size: 6}}
	attestation := ocispec.Manifest{MediaType: m.MediaType, Config: b.add(ocispec.MediaTypeImageConfig, []byte("{}"))}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{other, put(m.MediaType, attestation), put(m.MediaType, broken), manifest}}
	index.SchemaVersion = 2
	return b, Image{Name: "docker.io/library/web:1.2", Digest: put(index.MediaType, index).Digest, Config: config}, manifest
}

func TestFind(t *testing.T) {
	b, i, manifest := imageIn(t)
	if got, err := Find(t.Context(), b, i); err != nil || got.Digest != manifest.Digest || got.MediaType != manifest.MediaType {
		t.Errorf("by its index: %+v, %v", got, err)
	}
	i.Digest = manifest.Digest
	if got, err := Find(t.Context(), b, i); err != nil || got.Digest != manifest.Digest || got.MediaType != manifest.MediaType || got.Size != manifest.Size {
		t.Errorf("by its manifest: %+v, %v", got, err)
	}
	for name, gone := range map[string]digest.Digest{"a layer": digest.FromString("layer two"), "the config": digest.FromBytes(i.Config), "the manifest": manifest.Digest} {
		b, i, _ := imageIn(t)
		delete(b, gone)
		if _, err := Find(t.Context(), b, i); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), gone.String()) {
			t.Errorf("without %s: %v", name, err)
		}
	}
	i.Digest = b.add("", []byte("no JSON")).Digest
	if _, err := Find(t.Context(), b, i); !errdefs.IsDataLoss(err) {
		t.Errorf("no index: %v", err)
	}
}

// read is what containerd's own importer makes of an archive: what it names, and the store with it.
func read(t *testing.T, r io.Reader) (ocispec.Descriptor, content.Store) {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	must(t, err)
	d, err := archive.ImportIndex(t.Context(), store, r)
	must(t, err)
	var index ocispec.Index
	blob, err := content.ReadBlob(t.Context(), store, d)
	must(t, err)
	must(t, json.Unmarshal(blob, &index))
	if len(index.Manifests) != 1 {
		t.Fatalf("%s", blob)
	}
	return index.Manifests[0], store
}

// TestArchive: the image is what it was.
func TestArchive(t *testing.T) {
	b, i, manifest := imageIn(t)
	for _, name := range []string{i.Name, "no reference: UPPER"} {
		var out, again bytes.Buffer
		must(t, Archive(t.Context(), &out, b, manifest, name))
		must(t, Archive(t.Context(), &again, b, manifest, name))
		if !bytes.Equal(out.Bytes(), again.Bytes()) {
			t.Error("the same image gave other bytes")
		}
		got, store := read(t, &out)
		if got.Digest != manifest.Digest || got.Annotations[images.AnnotationImageName] != name {
			t.Errorf("%+v", got)
		}
		blob, err := content.ReadBlob(t.Context(), store, ocispec.Descriptor{Digest: digest.FromString("layer two"), Size: 9})
		if string(blob) != "layer two" {
			t.Errorf("%q, %v", blob, err)
		}
	}
	delete(b, manifest.Digest)
	if err := Archive(t.Context(), io.Discard, b, manifest, i.Name); !errdefs.IsNotFound(err) {
		t.Errorf("one that is gone: %v", err)
	}
}

// TestFlat: one layer that containerd unpacks to the same files, with the image's config.
func TestFlat(t *testing.T) {
	root := treeOf(t)
	_, i, _ := imageIn(t)
	dir := t.TempDir()
	var out, again bytes.Buffer
	d, err := Flat(t.Context(), &out, root, dir, i)
	must(t, err)
	_, err = Flat(t.Context(), &again, root, dir, i)
	must(t, err)
	if !bytes.Equal(out.Bytes(), again.Bytes()) {
		t.Error("the same template gave other bytes")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
	got, store := read(t, &out)
	if got.Digest != d.Digest || got.Annotations[images.AnnotationImageName] != i.Name {
		t.Errorf("%+v is not %+v", got, d)
	}
	m, err := images.Manifest(t.Context(), store, got, nil)
	must(t, err)
	text, err := content.ReadBlob(t.Context(), store, m.Config)
	must(t, err)
	var config ocispec.Image
	must(t, json.Unmarshal(text, &config))
	if !slices.Equal(config.Config.Cmd, []string{"x"}) || len(config.RootFS.DiffIDs) != 1 || len(config.History) != 1 || !config.History[0].Created.Equal(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)) || !strings.Contains(config.History[0].Comment, i.Digest.String()) {
		t.Errorf("%s", text)
	}
	for _, kept := range []string{`"Healthcheck":{"Test":["y"]}`, `"x-unknown":{"big":12345678901234567890}`} {
		if !strings.Contains(string(text), kept) {
			t.Errorf("it lacks %s: %s", kept, text)
		}
	}
	ra, err := store.ReaderAt(t.Context(), m.Layers[0])
	must(t, err)
	defer ra.Close()
	z, err := compression.DecompressStream(content.NewReader(ra))
	must(t, err)
	plain, err := io.ReadAll(z)
	must(t, err)
	if digest.FromBytes(plain) != config.RootFS.DiffIDs[0] {
		t.Error("its diff id is another's")
	}
	to := t.TempDir()
	_, err = layers.Apply(t.Context(), to, bytes.NewReader(plain))
	must(t, err)
	want, unpacked := look(t, root.Name(), "/socket", "/.containerd-pve", "/etc/empty"), look(t, to, "/etc/empty")
	unpacked[""] = want[""] // containerd leaves the root as it is, and knows no time before 1970
	if d := cmp.Diff(want, unpacked); d != "" {
		t.Error(d)
	}
	i.Config = []byte("null")
	if _, err := Flat(t.Context(), io.Discard, root, dir, i); !errdefs.IsDataLoss(err) {
		t.Errorf("no config: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(root.Name(), "etc", ".wh.passwd"), nil, 0o600))
	if _, err := Flat(t.Context(), io.Discard, root, dir, i); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "/etc/.wh.passwd") {
		t.Errorf("a whiteout: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// TestFlatForOthers: skopeo copies it, and umoci unpacks it to the same files.
func TestFlatForOthers(t *testing.T) {
	for _, program := range []string{"skopeo", "umoci"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	root := treeOf(t)
	_, i, _ := imageIn(t)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	must(t, ToFile(t.Context(), in("web.tar"), false, func(w io.Writer) error {
		_, err := Flat(t.Context(), w, root, dir, i)
		return err
	}))
	for _, argv := range [][]string{
		{"skopeo", "--insecure-policy", "copy", "oci-archive:" + in("web.tar"), "oci:" + in("layout") + ":web"}, {"umoci", "unpack", "--image", in("layout") + ":web", in("bundle")},
	} {
		if out, err := run(nil, argv...); err != nil {
			t.Fatalf("%q: %v: %s", argv, err, out)
		}
	}
	want, got := look(t, root.Name(), "/socket", "/.containerd-pve"), look(t, in("bundle/rootfs"))
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
