//go:build bed

package zfs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

// zfsSays is what the zfs program prints, in one line.
func zfsSays(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("zfs", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("zfs %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}

// TestAtOnce: a snapshot and its clone with their properties, both or neither; where the module cannot, nothing is tried.
func TestAtOnce(t *testing.T) {
	const pool = "atonce"
	testPool(t, pool)
	ctx, n, must := context.Background(), openNative(t), orFail(t)
	must(n.Create(ctx, pool+"/a", nil))
	must(n.Create(ctx, pool+"/b", nil))
	before := n.Calls()
	err := n.SnapshotAndClone(ctx, pool+"/a@1", Properties{"x:s": "one"}, pool+"/c", Properties{"x:c": "two", "x:d": strings.Repeat("d", 8000)})
	if !n.ClonesAtOnce() {
		if !errdefs.IsNotImplemented(err) || n.Calls() != before {
			t.Errorf("%v, %d ioctls", err, n.Calls()-before)
		}
		version, _ := Module()
		t.Skipf("ZFS %s clones no snapshot that it takes in the same transaction group (BED_ZFS=trixie-backports has one that does)", version)
	}
	must(err)
	if calls := n.Calls() - before; calls != 1 {
		t.Errorf("%d ioctls", calls)
	}
	for name, want := range map[string][3]string{pool + "/a@1": {"x:s", "one", Unset}, pool + "/c": {"x:c", "two", pool + "/a@1"}} {
		d, err := n.Stat(ctx, name)
		must(err)
		if d.Property(want[0]) != want[1] || d.Property("origin") != want[2] {
			t.Errorf("%s: %q, origin %q", name, d.Property(want[0]), d.Property("origin"))
		}
	}
	if v, err := n.Property(ctx, pool+"/c", "x:d"); err != nil || len(v) != 8000 {
		t.Errorf("a long value: %d, %v", len(v), err)
	}
	for _, c := range []struct{ snapshot, clone string }{{pool + "/a@1", pool + "/d"}, {pool + "/a@2", pool + "/b"}} {
		if err := n.SnapshotAndClone(ctx, c.snapshot, nil, c.clone, nil); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%v: %v", c, err)
		}
	}
	if err := n.SnapshotAndClone(ctx, pool+"/none@1", nil, pool+"/d", nil); !errdefs.IsNotFound(err) {
		t.Errorf("of nothing: %v", err)
	}
	for _, name := range []string{pool + "/a@2", pool + "/d"} {
		if _, err := n.Stat(ctx, name); !errdefs.IsNotFound(err) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	for _, name := range []string{pool + "/a@1", pool + "/b"} {
		if _, err := n.Stat(ctx, name); err != nil {
			t.Error(err)
		}
	}
}

// TestNative: what the ioctls do is what the zfs program sees afterwards.
func TestNative(t *testing.T) {
	const pool = "zfsops"
	testPool(t, pool)
	ctx, n := context.Background(), openNative(t)
	must := orFail(t)
	is := func(want string, args ...string) {
		t.Helper()
		if got := zfsSays(t, args...); got != want {
			t.Errorf("zfs %s: %q, want %q", strings.Join(args, " "), got, want)
		}
	}
	a, b, c := pool+"/a", pool+"/b", pool+"/c"
	must(n.Create(ctx, a, Properties{
		"mountpoint": "legacy", "acltype": "posixacl", "xattr": "sa", "atime": "off", "readonly": "on",
		"refquota": "67108864", "canmount": "noauto", "x:y": "a b\nc",
	}))
	is("legacy posix off on 67108864 noauto", "get", "-Hpo", "value", "mountpoint,acltype,atime,readonly,refquota,canmount", a)
	for property, want := range map[string]string{"acltype": "posix", "xattr": "sa", "readonly": "on", "refquota": "67108864", "x:y": "a b\nc", "x:none": Unset} {
		if v, err := n.Property(ctx, a, property); err != nil || v != want {
			t.Errorf("%s is %q, %v; want %q", property, v, err, want)
		}
	}
	must(n.Set(ctx, a, Properties{"readonly": "off", "refquota": "none", "x:z": "1"}))
	must(n.Inherit(ctx, a, "x:y"))
	is("off 0 - 1", "get", "-Hpo", "value", "readonly,refquota,x:y,x:z", a)

	must(n.Create(ctx, pool+"/z", nil))
	must(n.Create(ctx, pool+"/m", Properties{"mountpoint": "/nowhere/m", "canmount": "noauto"}))
	must(n.Create(ctx, pool+"/m/c", nil))
	for _, name := range []string{pool, a, pool + "/z", pool + "/m", pool + "/m/c"} {
		v, err := n.Property(ctx, name, "mountpoint")
		if err != nil {
			t.Error(err)
		}
		is(v, "get", "-Ho", "value", "mountpoint", name)
	}
	must(n.Destroy(ctx, pool+"/m/c"))
	must(n.Destroy(ctx, pool+"/m"))
	must(n.Snapshots(ctx, []string{a + "@1", pool + "/z@1"}, nil))
	must(n.Snapshots(ctx, []string{a + "@2", pool + "/z@2"}, Properties{"x:s": "t"}))
	must(n.DestroySnapshots(ctx, []string{pool + "/z@1", pool + "/z@2", pool + "/z@none"}, false))
	is("", "list", "-Ht", "snapshot", "-o", "name", "-r", pool+"/z")
	is(a+"@1 "+a+"@2", "list", "-Ht", "snapshot", "-o", "name", "-r", a)
	is("t", "get", "-Ho", "value", "x:s", a+"@2")
	if err := n.Snapshots(ctx, []string{pool + "/z@3", a + "@1"}, nil); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), a+"@1") {
		t.Errorf("snapshots of which one exists: %v", err)
	}
	is(a+"@1 "+a+"@2", "list", "-Ht", "snapshot", "-o", "name", "-r", a)

	must(n.Clone(ctx, a+"@2", b, Properties{"mountpoint": "legacy"}))
	if d, err := n.Stat(ctx, b); err != nil || d.Origin != a+"@2" || !d.Filesystem || d.Snapshot {
		t.Errorf("%+v, %v", d, err)
	}
	if err := n.DestroySnapshots(ctx, []string{a + "@1", a + "@2"}, false); ReasonOf(err) != HasDependents || !strings.Contains(err.Error(), a+"@2") {
		t.Errorf("destroy of a cloned snapshot: %v", err)
	}
	must(n.Promote(ctx, b))
	is(b+"@2", "get", "-Ho", "value", "origin", a)
	must(n.Rename(ctx, a, c))
	is(b+"@2", "get", "-Ho", "value", "origin", c)

	must(n.Hold(ctx, map[string]string{b + "@1": "keep"}))
	if h, err := n.Holds(ctx, b+"@1"); err != nil || len(h) != 1 || h["keep"].IsZero() {
		t.Errorf("holds %v, %v", h, err)
	}
	if err := n.Destroy(ctx, b+"@1"); ReasonOf(err) != Busy || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("destroy of a held snapshot: %v", err)
	}
	must(n.DestroySnapshots(ctx, []string{b + "@1"}, true))
	is("on", "get", "-Ho", "value", "defer_destroy", b+"@1")
	must(n.Release(ctx, map[string]string{b + "@1": "keep"}))
	if err := n.Destroy(ctx, b+"@1"); !errdefs.IsNotFound(err) {
		t.Errorf("destroy of what is gone: %v", err)
	}

	must(n.Snapshot(ctx, b+"@3", nil))
	if err := n.Rollback(ctx, b+"@2"); ReasonOf(err) != HasDependents {
		t.Errorf("rollback past a snapshot: %v", err)
	}
	must(n.Rollback(ctx, b+"@3"))
	must(n.Bookmark(ctx, map[string]string{b + "#mark": b + "@2"}))
	if names, err := n.Bookmarks(ctx, b); err != nil || !slices.Equal(names, []string{"mark"}) {
		t.Errorf("bookmarks %v, %v", names, err)
	}

	sent := func(from, to string) {
		t.Helper()
		read, write, err := os.Pipe()
		must(err)
		failed := make(chan error, 1)
		go func() {
			err := n.Send(ctx, b+"@3", from, write)
			write.Close()
			failed <- err
		}()
		must(n.Receive(ctx, to, "", read))
		must(<-failed)
		read.Close()
	}
	sent("", pool+"/copy@3")
	is(zfsSays(t, "get", "-Ho", "value", "guid", b+"@3"), "get", "-Ho", "value", "guid", pool+"/copy@3")
	must(n.DestroyBookmarks(ctx, []string{b + "#mark"}))
	is("", "list", "-Ht", "bookmark", "-o", "name", "-r", b)

	calls := n.Calls()
	if names, err := n.Children(ctx, pool); err != nil || n.Calls() != calls+1 || !slices.Equal(slices.Sorted(slices.Values(names)), []string{b, c, pool + "/copy", pool + "/z"}) {
		t.Errorf("children %v, %v, with %d ioctls", names, err, n.Calls()-calls)
	}
	if names, err := n.Children(ctx, pool+"/copy"); err != nil || len(names) != 0 {
		t.Errorf("children of one that has none: %v, %v", names, err)
	}
	if names, err := n.SnapshotsOf(ctx, b); err != nil || !slices.Equal(slices.Sorted(slices.Values(names)), []string{b + "@2", b + "@3"}) {
		t.Errorf("snapshots %v, %v", names, err)
	}
	answer, err := n.ChannelProgram(ctx, pool, `
		args = ...
		used = {}
		for child in zfs.list.children(args["of"]) do
			used[child] = zfs.get_prop(child, "used")
		end
		return used`, nvlist.List{"of": pool}, true)
	if used, ok := answer["return"].(nvlist.List); err != nil || !ok || len(used) != 4 || used[b] == nil {
		t.Errorf("channel program: %v, %v", answer, err)
	}
	if _, err := n.ChannelProgram(ctx, pool, "this is no Lua", nil, true); err == nil || !strings.Contains(err.Error(), "syntax") {
		t.Errorf("a program that is none: %v", err)
	}
	must(n.Destroy(ctx, c))
	if err := n.Destroy(ctx, b); ReasonOf(err) != HasDependents {
		t.Errorf("destroy with snapshots: %v", err)
	}

	// What a call costs.
	for _, budget := range []struct {
		what  string
		calls int64
		f     func() error
	}{
		{"create", 1, func() error { return n.Create(ctx, pool+"/n", nil) }},
		{"snapshot", 1, func() error { return n.Snapshot(ctx, pool+"/n@s", nil) }},
		{"clone", 1, func() error { return n.Clone(ctx, pool+"/n@s", pool+"/m", nil) }},
		{"space", 1, func() error { _, err := n.Space(ctx, pool+"/m"); return err }},
		{"set", 1, func() error { return n.Set(ctx, pool+"/m", Properties{"a:b": "c"}) }},
		{"destroy", 1, func() error { return n.Destroy(ctx, pool+"/m") }},
	} {
		before := n.Calls()
		must(budget.f())
		if made := n.Calls() - before; made != budget.calls {
			t.Errorf("%s made %d ioctls, want %d", budget.what, made, budget.calls)
		}
	}
}

// TestDestroyAll: in order, at once, and what is in the way of one stops no other.
func TestDestroyAll(t *testing.T) {
	const pool = "zfsdestroy"
	testPool(t, pool)
	n := openNative(t)
	for _, z := range []ZFS{n, goZFS{}} {
		ctx := context.Background()
		must := orFail(t)
		name := func(i int) string { return fmt.Sprintf("%s/%d", pool, i) }
		must(z.Create(ctx, name(0), Properties{"mountpoint": "legacy"}))
		for i := range 4 {
			must(z.Snapshot(ctx, name(i)+"@s", Properties{"a:b": "c d"}))
			must(z.Clone(ctx, name(i)+"@s", name(i+1), nil))
		}
		if v, err := z.Property(ctx, name(3)+"@s", "a:b"); err != nil || v != "c d" {
			t.Errorf("property of the snapshot %q, %v", v, err)
		}
		must(z.Create(ctx, name(7), Properties{"mountpoint": "legacy"}))
		dir := t.TempDir()
		if out, err := exec.Command("mount", "-t", "zfs", name(7), dir).CombinedOutput(); err != nil {
			t.Fatalf("mount: %v: %s", err, out)
		}
		busy, err := os.Create(dir + "/open")
		must(err)
		must(z.Snapshot(ctx, name(4)+"@held", nil))
		must(n.Hold(ctx, map[string]string{name(4) + "@held": "tag"}))

		// Of the chain the last is held, so that nothing goes, and the mounted one is
		// in use; the others do not mind.
		must(z.Create(ctx, name(8), nil))
		before := n.Calls()
		names := []string{name(9), name(8), name(7), name(4) + "@held", name(4), name(3) + "@s", name(3)}
		failed, err := z.DestroyAll(ctx, names)
		must(err)
		var got []string
		for name, err := range failed {
			if !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%s: %v", name, err)
			}
			got = append(got, strings.TrimPrefix(name, pool+"/"))
		}
		slices.Sort(got)
		if want := []string{"3", "3@s", "4", "4@held", "7"}; !slices.Equal(got, want) {
			t.Errorf("failed %q, want %q", got, want)
		}
		if z == ZFS(n) {
			// The program, and then for each that it left one call or two, and why.
			t.Logf("%d ioctls", n.Calls()-before)
		}
		busy.Close()
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Fatalf("umount: %v: %s", err, out)
		}
		must(n.Release(ctx, map[string]string{name(4) + "@held": "tag"}))

		names = []string{name(7), name(4) + "@held", name(4) + "@s", name(4), name(3) + "@s", name(3), name(2) + "@s", name(2), name(1) + "@s", name(1), name(0) + "@s", name(0)}
		before = n.Calls()
		failed, err = z.DestroyAll(ctx, names)
		must(err)
		if len(failed) > 0 {
			t.Errorf("failed %v", failed)
		}
		if calls := n.Calls() - before; z == ZFS(n) && calls != 1 {
			t.Errorf("%d ioctls, want 1", calls)
		}
		if left, err := z.Children(ctx, pool); err != nil || len(left) > 0 {
			t.Errorf("left %q, %v", left, err)
		}
	}
}

// TestObjects counts files of several owners.
func TestObjects(t *testing.T) {
	const pool = "zfsobjects"
	testPool(t, pool)
	n, ctx := openNative(t), context.Background()
	must := orFail(t)
	must(n.Create(ctx, pool+"/a", Properties{"mountpoint": "legacy"}))
	must(n.Snapshot(ctx, pool+"/a@empty", nil))
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "zfs", pool+"/a", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	const owners = 300 // more than one call brings
	for i := range owners {
		file := fmt.Sprintf("%s/%d", dir, i)
		must(os.WriteFile(file, nil, 0o600))
		must(os.Chown(file, i, i))
	}
	must(os.Mkdir(dir+"/dir", 0o700))
	must(n.Snapshot(ctx, pool+"/a@full", nil))
	empty, err := n.Objects(ctx, pool+"/a@empty")
	must(err)
	full, err := n.Objects(ctx, pool+"/a@full")
	must(err)
	mounted, err := n.Objects(ctx, pool+"/a")
	must(err)
	if full-empty != owners+1 || mounted != full {
		t.Errorf("%d, then %d, mounted %d", empty, full, mounted)
	}
	if _, err := n.Objects(ctx, pool+"/none"); !errdefs.IsNotFound(err) {
		t.Errorf("of none: %v", err)
	}
	if _, err := (goZFS{}).Objects(ctx, pool+"/a"); !errdefs.IsNotImplemented(err) {
		t.Errorf("by go-zfs: %v", err)
	}
}
