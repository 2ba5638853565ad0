//go:build bed

package zfs

import (
	"cmp"
	"context"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

// TestContents: both ways to ZFS list the same, and a property that is inherited is nobody's own.
func TestContents(t *testing.T) {
	const pool = "zfslist"
	testPool(t, pool)
	ctx, n := context.Background(), openNative(t)
	must := orFail(t)
	must(n.Create(ctx, pool+"/c", Properties{"mountpoint": "none", "x:inherited": "v"}))
	must(n.Create(ctx, pool+"/c/1", Properties{"mountpoint": "legacy", "x:key": "a b\tc\nd"}))
	must(n.Snapshots(ctx, []string{pool + "/c/1@s"}, Properties{"x:name": "sha256:1"}))
	must(n.Clone(ctx, pool+"/c/1@s", pool+"/c/2", Properties{"mountpoint": "legacy", "readonly": "on"}))
	must(n.Create(ctx, pool+"/c/2/deep", Properties{"x:key": "deep"}))
	asked := []string{"x:key", "x:name", "x:inherited", "readonly"}

	native, err := n.Contents(ctx, pool+"/c", asked)
	must(err)
	byProgram, err := goZFS{}.Contents(ctx, pool+"/c", asked)
	must(err)
	for _, list := range [][]Entry{native, byProgram} {
		slices.SortFunc(list, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
	}
	same(t, native, byProgram)
	if len(native) != 3 {
		t.Fatalf("%+v", native)
	}
	one, snapshot, clone := native[0], native[1], native[2]
	if one.Snapshot || one.Created.IsZero() || one.Used <= 0 || len(one.Own) != 1 || one.Own["x:key"] != "a b\tc\nd" {
		t.Errorf("%+v", one)
	}
	if !snapshot.Snapshot || len(snapshot.Own) != 1 || snapshot.Own["x:name"] != "sha256:1" || snapshot.Txg <= one.Txg {
		t.Errorf("%+v", snapshot)
	}
	if clone.Origin != pool+"/c/1@s" || len(clone.Own) != 1 || clone.Own["readonly"] != "on" {
		t.Errorf("%+v", clone)
	}
	for _, l := range []Lister{n, goZFS{}} {
		if _, err := l.Contents(ctx, pool+"/none", asked); !errdefs.IsNotFound(err) {
			t.Errorf("contents of what is not there: %v", err)
		}
		if free, err := l.Available(ctx, pool+"/c"); err != nil || free <= 0 || free > 64<<20 {
			t.Errorf("available %d, %v", free, err)
		}
	}
	if ioctl, process := Calls(); ioctl < n.Calls() || process < 2 {
		t.Errorf("%d ioctls and %d processes counted", ioctl, process)
	}
}
