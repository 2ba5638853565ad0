package snapshotter

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// mountings counts what is mounted.
type mountings struct {
	now atomic.Int64
	err error
}

func (m *mountings) mount(context.Context, string) (io.Closer, error) {
	if m.err != nil {
		return nil, m.err
	}
	m.now.Add(1)
	return closer(func() { m.now.Add(-1) }), nil
}

type closer func()

func (c closer) Close() error { c(); return nil }

// TestKeeps: a layer's filesystem is kept mounted until Commit, Remove, the limit
// or the end.
func TestKeeps(t *testing.T) {
	ctx, z := context.Background(), &fake{datasets: map[string]zfs.Properties{}}
	store := start(t, z, filepath.Join(t.TempDir(), "root"))
	s, ok := store.(*snapshotter)
	if !ok {
		t.Fatal("another type")
	}
	m := &mountings{}
	s.keeps.mount = m.mount
	layer := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "sha256:1"})
	kept := func(want int64) {
		t.Helper()
		s.keeps.wait()
		if got := m.now.Load(); got != want {
			t.Errorf("%d are mounted, not %d", got, want)
		}
	}
	prepare := func(key string, opts ...snapshots.Opt) {
		t.Helper()
		if _, err := s.Prepare(ctx, key, "", opts...); err != nil {
			t.Fatal(err)
		}
	}
	prepare("container")
	kept(0)
	prepare("committed", layer)
	prepare("removed", layer)
	prepare("old", layer)
	prepare("last", layer)
	kept(4)
	if err := s.Commit(ctx, "name", "committed"); err != nil {
		t.Fatal(err)
	}
	kept(3)
	if err := s.Remove(ctx, "removed"); err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	kept(2)
	s.keeps.expire(time.Hour)
	kept(2)
	s.keeps.expire(0)
	kept(0)

	m.err = errors.New("no such filesystem type")
	prepare("not mounted", layer)
	kept(0)
	m.err = nil
	prepare("at the end", layer)
	kept(1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	kept(0)
}
