//go:build bed

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/compare"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// comparing is a store with a comparer for it.
type comparing struct {
	snapshots.Snapshotter
	diff.Comparer
	diff.Applier
	content content.Store
	zfs     *asked
}

// asked counts the comparisons that ZFS was asked for.
type asked struct {
	*zfs.Native
	diffs int
	taken []string
}

func (w *asked) Diff(ctx context.Context, from, to string, f func(zfs.Change) error) error {
	w.diffs++
	return w.Native.Diff(ctx, from, to, f)
}

func (w *asked) TemporarySnapshot(ctx context.Context, filesystem, prefix string) (string, func() error, error) {
	name, end, err := w.Native.TemporarySnapshot(ctx, filesystem, prefix)
	w.taken = append(w.taken, name)
	return name, end, err
}

func openComparing(t *testing.T) *comparing {
	t.Helper()
	pool, dir := makePoolOf(t, 1<<30)
	s := openStore(t, zfs.NativeOnly, pool+"/ours")
	n, err := zfs.OpenNative()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	db := contentDB(t, dir)
	w := &asked{Native: n}
	return &comparing{
		Snapshotter: s, content: db.ContentStore(), zfs: w, Applier: apply.NewFileSystemApplier(db.ContentStore()),
		Comparer: compare.New(w, s.Owns, db.ContentStore(), metadata.NewLeaseManager(db)),
	}
}

// prepare makes an active snapshot and mounts it until the test ends.
func (c *comparing) prepare(ctx context.Context, t *testing.T, key, parent string) ([]mount.Mount, string) {
	t.Helper()
	m, err := c.Prepare(ctx, key, parent)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := unix.Mount(m[0].Source, dir, "zfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	return m, dir
}

// changeSomething does something at random below dir.
func changeSomething(t *testing.T, r *rand.Rand, dir string, n int) {
	t.Helper()
	dirs, all := []string{dir}, []string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && p != dir {
			if all = append(all, p); d.IsDir() {
				dirs = append(dirs, p)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dirs[r.IntN(len(dirs))], string(rune('a'+r.IntN(8))))
	some := name
	if len(all) > 0 {
		some = all[r.IntN(len(all))]
	}
	info, _ := os.Lstat(some)
	regular := info != nil && info.Mode().IsRegular()
	link := info != nil && info.Mode()&os.ModeSymlink != 0
	// What cannot be done, by the names that were drawn, is left undone.
	switch r.IntN(12) {
	case 0, 1:
		_ = os.WriteFile(name, fmt.Appendf(nil, "%d %s", n, strings.Repeat("x", r.IntN(200_000))), 0o644)
	case 2:
		_ = os.Mkdir(name, 0o755)
	case 3:
		_ = os.Symlink(fmt.Sprint("target-", n), name)
	case 4:
		_ = unix.Mknod(name, unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(n))))
	case 5:
		_ = os.RemoveAll(some)
	case 6:
		_ = os.Rename(some, name)
	case 7:
		if !link {
			_ = os.Link(some, name)
		}
	case 8:
		if !regular {
			break
		}
		if f, err := os.OpenFile(some, os.O_WRONLY|os.O_APPEND, 0); err == nil {
			fmt.Fprint(f, n)
			f.Close()
		}
	case 9:
		if !link {
			_ = os.Chmod(some, 0o600+os.FileMode(n%64))
		}
	case 10:
		_ = os.Lchown(some, n, n)
	case 11:
		if regular {
			// The longer does not fit into its file's node: ZFS makes an object of it.
			_ = unix.Setxattr(some, "user.n", fmt.Append(nil, n, strings.Repeat("x", r.IntN(2)*40_000)), 0)
		}
	}
}

// TestCompare: the layer that is made of an active snapshot, mounted and in use,
// makes the same of its parent, whatever was done in it. ZFS was asked each time.
func TestCompare(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), "test")
	c := openComparing(t)
	const rounds = 12
	for seed := range uint64(rounds) {
		r := rand.New(rand.NewPCG(seed, 1))
		n := int(seed) * 1000
		base := fmt.Sprint("base-", seed)
		_, dir := c.prepare(ctx, t, "make-"+base, "")
		for range 60 {
			n++
			changeSomething(t, r, dir, n)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if err := c.Commit(ctx, base, "make-"+base); err != nil {
			t.Fatal(err)
		}
		lower, err := c.View(ctx, "lower-"+base, base)
		if err != nil {
			t.Fatal(err)
		}
		upper, dir := c.prepare(ctx, t, "upper-"+base, base)
		for range 1 + r.IntN(30) {
			n++
			changeSomething(t, r, dir, n)
		}
		want := tree(t, dir)
		layer, err := c.Compare(ctx, lower, upper)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		again, other := c.prepare(ctx, t, "again-"+base, base)
		if _, err := c.Apply(ctx, layer, again); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if d := cmp.Diff(strings.Split(want, "\n"), strings.Split(tree(t, other), "\n")); d != "" {
			t.Fatalf("seed %d: the layer makes this (+), not that (-):\n%s", seed, d)
		}
	}
	if c.zfs.diffs != rounds {
		t.Errorf("ZFS was asked %d times in %d comparisons", c.zfs.diffs, rounds)
	}
	for _, name := range c.zfs.taken {
		if _, err := c.zfs.Stat(ctx, name); !errdefs.IsNotFound(err) {
			t.Errorf("the temporary snapshot %s is there: %v", name, err)
		}
	}
}

// TestSince: what changed in a filesystem in use since its snapshot is told by ZFS as by
// a walk through both.
func TestSince(t *testing.T) {
	ctx := t.Context()
	c := openComparing(t)
	paths := func(dir string) map[string]bool {
		all := map[string]bool{}
		err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
			all[strings.TrimPrefix(p, dir)] = true
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		delete(all, "")
		return all
	}
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(seed, 2))
		n := int(seed) * 1000
		m, dir := c.prepare(ctx, t, fmt.Sprint("since-", seed), "")
		for range 60 {
			n++
			changeSomething(t, r, dir, n)
		}
		snapshot := m[0].Source + "@then"
		if err := c.zfs.Snapshot(ctx, snapshot, nil); err != nil {
			t.Fatal(err)
		}
		before := paths(dir)
		if all, err := compare.Since(ctx, c.zfs, snapshot); err != nil || len(all) > 0 {
			t.Errorf("seed %d: %v, %v where nothing changed", seed, all, err)
		}
		for range 20 {
			n++
			changeSomething(t, r, dir, n)
		}
		after := paths(dir)
		asked := c.zfs.diffs
		told, err := compare.Since(ctx, c.zfs, snapshot)
		if err != nil || c.zfs.diffs != asked+1 {
			t.Fatalf("seed %d: %v, ZFS was asked %d times", seed, err, c.zfs.diffs-asked)
		}
		walked, err := compare.Since(ctx, struct{ compare.ZFS }{c.zfs}, snapshot)
		if err != nil {
			t.Fatal(err)
		}
		// A walk does not see all that was changed of a file.
		if d := cmp.Diff(walked, slices.DeleteFunc(slices.Clone(told), func(d compare.Difference) bool {
			return d.Kind == compare.Modified && !slices.Contains(walked, d)
		})); d != "" {
			t.Errorf("seed %d: walked (-), told by ZFS (+):\n%s", seed, d)
		}
		for _, d := range told {
			was, is := before[d.Path], after[d.Path]
			if d.Path == "/" {
				was, is = true, true
			}
			if want := map[compare.Kind][2]bool{compare.Added: {false, true}, compare.Modified: {true, true}, compare.Deleted: {true, false}}[d.Kind]; want != [2]bool{was, is} {
				t.Errorf("seed %d: %+v was there %v, is there %v", seed, d, was, is)
			}
		}
	}
	if _, err := compare.Since(ctx, c.zfs, "none/of@them"); !errors.Is(err, unix.ENOENT) {
		t.Error("none was compared")
	}
}

// TestCompareLittle: a layer of one file costs the same, whatever the image holds,
// and is what containerd expects of a differ.
func TestCompareLittle(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), "test")
	c := openComparing(t)
	_, dir := c.prepare(ctx, t, "make", "")
	for i := range 2000 {
		name := filepath.Join(dir, fmt.Sprint(i%40), fmt.Sprint(i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Commit(ctx, "base", "make"); err != nil {
		t.Fatal(err)
	}
	lower, err := c.View(ctx, "lower", "base")
	if err != nil {
		t.Fatal(err)
	}
	upper, dir := c.prepare(ctx, t, "upper", "base")
	if err := os.WriteFile(filepath.Join(dir, "7", "47"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := c.zfs.Calls()
	for media, magic := range map[string]string{
		ocispec.MediaTypeImageLayer: "7/", ocispec.MediaTypeImageLayerGzip: "\x1f\x8b", ocispec.MediaTypeImageLayerZstd: "\x28\xb5\x2f\xfd",
	} {
		d, err := c.Compare(ctx, lower, upper, diff.WithMediaType(media), diff.WithLabels(map[string]string{"mine": "1"}))
		if err != nil {
			t.Fatal(err)
		}
		blob, err := content.ReadBlob(ctx, c.content, d)
		if err != nil {
			t.Fatal(err)
		}
		if d.MediaType != media || d.Size != int64(len(blob)) || d.Digest != digest.FromBytes(blob) || !strings.HasPrefix(string(blob), magic) {
			t.Errorf("%s: %+v of %.20q", media, d, blob)
		}
		info, err := c.content.Info(ctx, d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if info.Labels["mine"] != "1" || info.Labels[labels.LabelUncompressed] == "" {
			t.Errorf("%s has the labels %v", media, info.Labels)
		}
	}
	if n := (c.zfs.Calls() - before) / 3; n > 80 {
		t.Errorf("%d ioctls for one changed file: ZFS tells of a block of 32 nodes, and each is asked for twice", n)
	}

	// The reason why this differ is needed: ZFS mounts nothing read-only that is mounted for writing.
	if _, err := walking.NewWalkingDiff(c.content).Compare(ctx, lower, upper); !errors.Is(err, unix.EBUSY) {
		t.Errorf("containerd's own differ, of a snapshot in use: %v", err)
	}

	// Without a parent, and backwards: no view of what the other was cloned from.
	for _, sides := range [][2][]mount.Mount{{nil, upper}, {upper, lower}} {
		if _, err := c.Compare(ctx, sides[0], sides[1]); err != nil {
			t.Errorf("%v: %v", sides, err)
		}
	}
	for _, foreign := range []mount.Mount{
		{Type: "overlay", Source: "overlay"}, {Type: "zfs", Source: "other/dataset"}, {Type: "zfs", Source: upper[0].Source + "@snapshot"},
	} {
		if _, err := c.Compare(ctx, lower, []mount.Mount{foreign}); !errdefs.IsNotImplemented(err) {
			t.Errorf("%v: %v, not NotImplemented", foreign, err)
		}
	}
	if _, err := c.Compare(ctx, lower, upper, diff.WithMediaType("application/x-other")); !errdefs.IsNotImplemented(err) {
		t.Errorf("another media type: %v", err)
	}
}
