package snapshotter

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

const disk = "pool/data/subvol-100-disk-0"

// TestPlace: a snapshot lives on under the name it was given, over a restart, and
// its dataset goes with it.
func TestPlace(t *testing.T) {
	ctx, z, root := context.Background(), &fake{datasets: map[string]zfs.Properties{}}, filepath.Join(t.TempDir(), "root")
	s := start(t, z, root)
	m, err := s.Prepare(ctx, "container", "")
	if err != nil {
		t.Fatal(err)
	}
	place := s.Place
	if err := place(ctx, m[0].Source, disk, zfs.Properties{"refquota": "8G"}); err != nil {
		t.Fatal(err)
	}
	for _, again := range []string{disk, disk} {
		if err := place(ctx, again, disk, nil); err != nil {
			t.Error(err)
		}
	}
	at := func(s snapshots.Snapshotter, want string) {
		t.Helper()
		m, err := s.Mounts(ctx, "container")
		if err != nil || m[0].Source != want {
			t.Errorf("mounts %v, %v, not %s", m, err, want)
		}
	}
	at(s, disk)
	for dataset, want := range map[string]bool{disk: true, m[0].Source: true, "pool/other": false, parent: false, parent + "/x": false, disk + "@snapshot": false} {
		if got := s.Owns(dataset); got != want {
			t.Errorf("owns %s: %v", dataset, got)
		}
	}
	if v, _ := z.Property(ctx, disk, "refquota"); v != "8G" {
		t.Errorf("refquota %q", v)
	}
	if err := s.Commit(ctx, "layer", "container"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit: %v", err)
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = start(t, z, root)
	at(s, disk)
	if err := s.Remove(ctx, "container"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Cleanup(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := z.Property(ctx, disk, propID); !errdefs.IsNotFound(err) {
			t.Errorf("the dataset after Cleanup: %v", err)
		}
	}
	if left := s.(*snapshotter).places.all(); len(left) > 0 {
		t.Errorf("places left: %v", left)
	}
}

// TestPlaceRefused: nothing moves.
func TestPlaceRefused(t *testing.T) {
	ctx, z := context.Background(), &fake{datasets: map[string]zfs.Properties{disk: {}, "pool/foreign": {}}}
	s := start(t, z, filepath.Join(t.TempDir(), "root"))
	m, err := s.Prepare(ctx, "active", "")
	if err != nil {
		t.Fatal(err)
	}
	view, err := s.View(ctx, "view", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		from, to string
		is       func(error) bool
	}{
		{"pool/foreign", "pool/x", errdefs.IsNotFound},
		{parent + "/77", "pool/x", errdefs.IsNotFound},
		{view[0].Source, "pool/x", errdefs.IsFailedPrecondition},
		{m[0].Source, disk, errdefs.IsAlreadyExists},
	} {
		if err := s.Place(ctx, c.from, c.to, nil); !c.is(err) {
			t.Errorf("%s to %s: %v", c.from, c.to, err)
		}
	}
	if now, err := s.Mounts(ctx, "active"); err != nil || now[0].Source != m[0].Source {
		t.Errorf("%v, %v", now, err)
	}
}

// TestPlaceCrash: before the renaming and after it, the next start knows where
// the dataset is, and may be asked again.
func TestPlaceCrash(t *testing.T) {
	for _, after := range []bool{false, true} {
		ctx, z, root := context.Background(), &fake{datasets: map[string]zfs.Properties{}}, filepath.Join(t.TempDir(), "root")
		s := start(t, z, root)
		m, err := s.Prepare(ctx, "container", "")
		if err != nil {
			t.Fatal(err)
		}
		var crashed string
		z.renaming = func() error {
			crashed = copyOf(t, root)
			if after {
				return nil
			}
			return errors.New("the crash")
		}
		_ = s.Place(ctx, m[0].Source, disk, nil)
		z.renaming = nil
		next := start(t, z, crashed)
		now, err := next.Mounts(ctx, "container")
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]string{false: m[0].Source, true: disk}[after]; now[0].Source != want {
			t.Errorf("after %v: it is at %s, not %s", after, now[0].Source, want)
		}
		if err := next.Place(ctx, now[0].Source, disk, nil); err != nil {
			t.Errorf("after %v: asked again: %v", after, err)
		}
		if err := next.Cleanup(ctx); err != nil {
			t.Error(err)
		}
		if _, err := z.Property(ctx, disk, propID); err != nil {
			t.Errorf("after %v: the dataset: %v", after, err)
		}
	}
}
