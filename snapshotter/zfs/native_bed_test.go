//go:build bed

package zfs

import (
	"context"
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

// TestNative: what the ioctls do is what the zfs program sees afterwards.
func TestNative(t *testing.T) {
	const pool = "zfsops"
	testPool(t, pool)
	ctx, n := context.Background(), openNative(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
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
	must(n.SetAll(ctx, a, Properties{"readonly": "off", "refquota": "none", "x:z": "1"}))
	must(n.Inherit(ctx, a, "x:y"))
	is("off 0 - 1", "get", "-Hpo", "value", "readonly,refquota,x:y,x:z", a)

	must(n.Create(ctx, pool+"/z", nil))
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

	must(n.Snapshot(ctx, b+"@3"))
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

	if names, err := n.Children(ctx, pool); err != nil || !slices.Equal(slices.Sorted(slices.Values(names)), []string{b, c, pool + "/copy", pool + "/z"}) {
		t.Errorf("children %v, %v", names, err)
	}
	if names, err := n.SnapshotsOf(ctx, b); err != nil || !slices.Equal(names, []string{b + "@2", b + "@3"}) {
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
		{"snapshot", 1, func() error { return n.Snapshot(ctx, pool+"/n@s") }},
		{"clone", 1, func() error { return n.Clone(ctx, pool+"/n@s", pool+"/m", nil) }},
		{"used", 1, func() error { _, err := n.Used(ctx, pool+"/m"); return err }},
		{"set", 1, func() error { return n.Set(ctx, pool+"/m", "a:b", "c") }},
		{"destroy", 1, func() error { return n.Destroy(ctx, pool+"/m") }},
	} {
		before := n.Calls()
		must(budget.f())
		if made := n.Calls() - before; made != budget.calls {
			t.Errorf("%s made %d ioctls, want %d", budget.what, made, budget.calls)
		}
	}
}
