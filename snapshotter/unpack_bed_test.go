//go:build bed

package snapshotter

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	containerds "github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/continuity/sysx"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/containerd-pve/containerd-pve/snapshotter/apply"
	"github.com/containerd-pve/containerd-pve/snapshotter/compare"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// unpacked is what the layers of TestUnpack make, as tree prints it.
//
//go:embed testdata/unpacked.txt
var unpacked string

// entry is a header with its file.
type entry struct {
	tar.Header
	data string
}

var written = time.Unix(1_000_000_000, 123_456_789)

func regular(name, data string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: written}, data}
}

func directory(name string) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: written}, ""}
}

func symlink(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: written}, ""}
}

// link is a hard link: what its header says is the file's as well.
func link(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644, ModTime: written}, ""}
}

func device(kind byte, name string, major, minor int64) entry {
	return entry{tar.Header{Typeflag: kind, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor, ModTime: written}, ""}
}

// owned gives an entry an owner and a mode, the latter with setuid and its like.
func (e entry) owned(uid, gid int, mode int64) entry {
	e.Uid, e.Gid, e.Mode = uid, gid, mode
	return e
}

// with gives an entry extended attributes: names and values.
func (e entry) with(attributes ...string) entry {
	e.PAXRecords = map[string]string{}
	for i := 0; i < len(attributes); i += 2 {
		e.PAXRecords["SCHILY.xattr."+attributes[i]] = attributes[i+1]
	}
	return e
}

// acl is the value of system.posix_acl_*: the owner's and the group's rights, and
// the right of user 1000 to read (acl(5), include/uapi/linux/posix_acl_xattr.h).
func acl(t *testing.T) string {
	const none = ^uint32(0)
	var b bytes.Buffer
	write := func(v any) {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	write(uint32(2))
	for _, e := range []struct {
		Tag, Perm uint16
		ID        uint32
	}{{1, 6, none}, {2, 4, 1000}, {4, 4, none}, {0x10, 4, none}, {0x20, 0, none}} {
		write(e)
	}
	return b.String()
}

// netBind is security.capability with cap_net_bind_service permitted and
// effective (struct vfs_cap_data, revision 2).
const netBind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// unpackLayers are two layers with all that a layer may hold.
func unpackLayers(t *testing.T) [][]entry {
	long := strings.Repeat("long", 63) + "255"
	return [][]entry{
		{
			directory("d").owned(1000, 1001, 0o2750), regular("d/kept", "kept"), regular("d/removed", "removed"),
			directory("opaque"), regular("opaque/old", "old"), directory("opaque/sub"), regular("opaque/sub/old", "old"),
			directory("gone"), regular("gone/x", "x"),
			regular("to-directory", "file"), directory("to-file"), regular("to-file/x", "x"),
			regular("a", "linked").owned(33, 34, 0o4755), link("b", "a").owned(33, 34, 0o4755), link("c", "a").owned(33, 34, 0o4755),
			regular("capability", "elf").owned(1, 1, 0o755).with("security.capability", netBind),
			regular("attributes", "x").with("user.text", "value", "user.binary", "\x00\x01\xff", "trusted.overlay.opaque", "y"),
			regular("large-attribute", "x").with("user.large", strings.Repeat("x", 32<<10)),
			directory("attributes-of-directory").with("user.text", "value"),
			regular("acl", "x").owned(0, 0, 0o640).with("system.posix_acl_access", acl(t)),
			directory("acl-of-directory").owned(0, 0, 0o750).with("system.posix_acl_default", acl(t)), regular("acl-of-directory/none-said", "x"),
			symlink("link", "/d/kept").owned(7, 8, 0o777), symlink("nowhere", "../../nowhere"),
			device(tar.TypeChar, "null", 1, 3), device(tar.TypeBlock, "loop", 7, 0), device(tar.TypeFifo, "fifo", 0, 0),
			regular("latin-1-\xe9", "1"), regular("no-utf-8-\xff\xfe", "2"), regular("line\nfeed", "3"),
			regular("composed-\u00e9", "4"), regular("composed-e\u0301", "5"), regular("Case", "6"), regular("case", "7"),
			directory(long), regular(long+"/"+long, "8"),
			regular("empty", ""), regular("sticky", "").owned(1<<31-1, 1<<31-1, 0o1000),
		}, {
			directory("d").owned(1000, 1001, 0o2750), regular("d/.wh.removed", ""), link("d/link-of-kept", "d/kept"),
			directory("opaque").owned(5, 5, 0o700), regular("opaque/.wh..wh..opq", ""), regular("opaque/new", "new"),
			regular(".wh.gone", ""), directory("to-directory"), regular("to-directory/x", "x"), regular("to-file", "file"),
			regular("b", "no more linked"),
		},
	}
}

func tarOf(t *testing.T, entries []entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Format = tar.FormatPAX
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatalf("%q: %v", e.Name, err)
		}
		if _, err := w.Write([]byte(e.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tree prints all that is in a directory, but for its own attributes.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return err
		}
		short, _ := filepath.Rel(dir, name)
		if other, ok := first[st.Ino]; ok {
			fmt.Fprintf(&out, "%q is %q\n", short, other)
			return nil
		}
		first[st.Ino] = short
		fmt.Fprintf(&out, "%q %o %d:%d %d.%09d", short, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, " links=%d", st.Nlink)
			if len(data) <= 16 {
				fmt.Fprintf(&out, " %q", data)
			} else {
				fmt.Fprintf(&out, " %d bytes %x", len(data), sha256.Sum256(data))
			}
		case unix.S_IFLNK:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, " -> %q", target)
		case unix.S_IFCHR, unix.S_IFBLK:
			fmt.Fprintf(&out, " %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		attributes, err := sysx.LListxattr(name)
		if err != nil {
			return fmt.Errorf("the attributes of %q: %w", name, err)
		}
		slices.Sort(attributes)
		for _, a := range attributes {
			value, err := sysx.LGetxattr(name, a)
			if err != nil {
				return fmt.Errorf("attribute %s of %q: %w", a, name, err)
			}
			if len(value) > 64 {
				fmt.Fprintf(&out, " %s=%d bytes %x", a, len(value), sha256.Sum256(value))
			} else {
				fmt.Fprintf(&out, " %s=%q", a, value)
			}
		}
		out.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// TestUnpack unpacks layers with all that a layer may hold, by our differ and by containerd's own, on a
// pool whose properties are what the guides for a root on ZFS say and worse:
// what of them matters to a layer is ours to set. What is exported as the
// difference of two snapshots makes the second of the first.
func TestUnpack(t *testing.T) {
	for _, c := range []struct {
		way  string
		ours bool
	}{{zfs.NativeOnly, true}, {zfs.NativeOnly, false}, {zfs.GoZFS, true}} {
		by := "containerd"
		if c.ours {
			by = "ours"
		}
		t.Run(c.way+"/"+by, func(t *testing.T) {
			pool, dir := makePoolOf(t, 1<<30, "-O", "normalization=formD", "-O", "casesensitivity=insensitive",
				"-O", "acltype=off", "-O", "xattr=off", "-O", "compression=on")
			// The administrator's own dataset, with what it inherits.
			command(t, "zfs", "create", pool+"/made")
			unpackAll(t, c.way, pool+"/made", dir, c.ours)
		})
	}
}

func unpackAll(t *testing.T, way, dataset, dir string, ours bool) {
	s, z := openStore(t, way, dataset), open(t, way)
	ctx := namespaces.WithNamespace(t.Context(), "test")
	db := contentDB(t, dir)
	store := db.ContentStore()
	applier := containerds.NewFileSystemApplier(store)
	if ours {
		applier = apply.New(s.Owns, contentClient(t, store))
	}
	parent, number := "", 0
	plain := map[digest.Digest][]byte{} // of the layers that are packed here
	unpack := func(d ocispec.Descriptor) {
		t.Helper()
		number++
		key, name := fmt.Sprintf("extract-%d", number), fmt.Sprintf("layer-%d", number)
		mounts, err := s.Prepare(ctx, key, parent, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: name}))
		if err != nil {
			t.Fatal(err)
		}
		applied, err := applier.Apply(ctx, d, mounts)
		if err != nil {
			t.Fatal(err)
		}
		if want := plain[d.Digest]; want != nil {
			if applied.MediaType != ocispec.MediaTypeImageLayer || applied.Size != int64(len(want)) || applied.Digest != digest.FromBytes(want) {
				t.Errorf("%s: %+v was unpacked, not %d bytes, %s", name, applied, len(want), digest.FromBytes(want))
			}
		}
		if err := s.Commit(ctx, name, key); err != nil {
			t.Fatal(err)
		}
		parent = name
	}
	layerOf := func(blob []byte) ocispec.Descriptor {
		t.Helper()
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		if _, err := z.Write(blob); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(packed.Bytes()), Size: int64(packed.Len())}
		if err := content.WriteBlob(ctx, store, d.Digest.String(), &packed, d); err != nil {
			t.Fatal(err)
		}
		plain[d.Digest] = blob
		return d
	}
	for _, l := range unpackLayers(t) {
		unpack(layerOf(tarOf(t, l)))
	}
	unpack(layerOf(sparseLayer(t, dir)))

	show := func(name string) (text string) {
		view, err := s.View(ctx, "look-at-"+name, name)
		if err != nil {
			t.Fatal(err)
		}
		mounted(t, view[0].Source, unix.MS_RDONLY, func(dir string) {
			checkSparse(t, filepath.Join(dir, "sparse"))
			text = tree(t, dir)
		})
		return text
	}
	if got := show("layer-3"); got != unpacked {
		t.Errorf("this is unpacked (-), not testdata/unpacked.txt (+):\n%s\nin whole:\n%s", cmp.Diff(strings.Split(got, "\n"), strings.Split(unpacked, "\n")), got)
	}

	lower, err := s.View(ctx, "lower", "layer-1")
	if err != nil {
		t.Fatal(err)
	}
	upper, err := s.View(ctx, "upper", "layer-3")
	if err != nil {
		t.Fatal(err)
	}
	// Of what changed containerd's differ keeps whole seconds, and of the
	// attributes security.capability.
	whole := regexp.MustCompile(`(:\d+ \d+)\.\d{9}`)
	for _, by := range []struct {
		name string
		diff.Comparer
		keeps func(string) string
	}{
		{"containerd", walking.NewWalkingDiff(store), func(text string) string { return whole.ReplaceAllString(text, "$1") }},
		{"ours", compare.New(z, s.Owns, store, metadata.NewLeaseManager(db)), func(text string) string { return text }},
	} {
		exported, err := by.Compare(ctx, lower, upper, diff.WithMediaType(ocispec.MediaTypeImageLayer))
		if err != nil {
			t.Fatal(err)
		}
		parent = "layer-1"
		unpack(exported)
		got, want := by.keeps(show(parent)), by.keeps(unpacked)
		if got != want {
			t.Errorf("the difference exported by %s makes this (-), not what it was made of (+):\n%s", by.name, cmp.Diff(strings.Split(got, "\n"), strings.Split(want, "\n")))
		}
	}

	parent = "layer-3"
	unpack(layerOf(tarOf(t, []entry{regular(".wh..wh..opq", ""), regular("only", "")})))
	view, err := s.View(ctx, "look-at-only", parent)
	if err != nil {
		t.Fatal(err)
	}
	mounted(t, view[0].Source, unix.MS_RDONLY, func(dir string) {
		if names, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || !slices.Equal(names, []string{filepath.Join(dir, "only")}) {
			t.Errorf("after an opaque root there are %q, %v", names, err)
		}
	})
}

// contentDB has a content store as containerd's, with the labels that a differ wants to write.
func contentDB(t *testing.T, dir string) *metadata.DB {
	t.Helper()
	blobs, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "content.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	m := metadata.NewDB(db, blobs, nil)
	if err := m.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m
}

// contentClient asks a content store by a socket, as our daemon asks containerd's.
func contentClient(t *testing.T, store content.Store) contentapi.ContentClient {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "content.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	contentapi.RegisterContentServer(server, contentserver.New(store))
	go func() { _ = server.Serve(l) }() // an error of it is seen by the caller
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return contentapi.NewContentClient(conn)
}

const sparseSize = 8 << 20

// sparseLayer has a file with a hole, as GNU's tar writes it and Go's does not.
func sparseLayer(t *testing.T, dir string) []byte {
	t.Helper()
	name := filepath.Join(dir, "sparse")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("end"), sparseSize-3); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(name, written, written); err != nil {
		t.Fatal(err)
	}
	blob, err := exec.Command("tar", "-C", dir, "--sparse", "--format=posix", "--owner=0", "--group=0", "--mode=0644", "-c", "sparse").Output()
	if err != nil {
		t.Fatal(err)
	}
	return blob
}

// checkSparse looks that the hole takes no space.
func checkSparse(t *testing.T, name string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != sparseSize || st.Blocks*512 > sparseSize/16 {
		t.Errorf("the file with a hole has %d bytes and takes %d", st.Size, st.Blocks*512)
	}
}
