package snapshotter

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// TestCleanupDoesNotList: however many datasets there are, Cleanup looks at those that were
// removed, and at those that may be left of a Prepare that failed. What was in use is tried again.
func TestCleanupDoesNotList(t *testing.T) {
	ctx, f := context.Background(), &fake{datasets: map[string]zfs.Properties{}}
	s := start(t, f, filepath.Join(t.TempDir(), "root"))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	listed := func() int {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.listed
	}
	for listed() < 2 { // by the start, as there are no records, and by the first sweep
		time.Sleep(time.Millisecond)
	}
	there := func(name string) bool {
		_, err := f.Property(ctx, name, propID)
		return !errdefs.IsNotFound(err)
	}
	prepare := func(key string) string {
		t.Helper()
		m, err := s.Prepare(ctx, key, "")
		must(err)
		return m[0].Source
	}
	kept, gone, used := prepare("kept"), prepare("gone"), prepare("used")
	must(f.Create(ctx, used+"@backup", zfs.Properties{}))
	must(errors.Join(s.Remove(ctx, "gone"), s.Remove(ctx, "used"), s.Cleanup(ctx)))
	if !there(kept) || there(gone) || !there(used) {
		t.Errorf("kept %v, gone %v, in use %v", there(kept), there(gone), there(used))
	}
	if destroyed, left := s.Cleaned(); destroyed != 1 || left != 1 {
		t.Errorf("%d destroyed, %d left", destroyed, left)
	}
	must(errors.Join(f.Destroy(ctx, used+"@backup"), s.Cleanup(ctx)))
	if there(used) {
		t.Error("what was in use is there still")
	}
	// It is made, and its maker learns otherwise.
	failing := ""
	s.(*snapshotter).zfs = madeAndFailed{f, &failing}
	if _, err := s.Prepare(ctx, "failed", ""); !errdefs.IsUnavailable(err) || !there(failing) {
		t.Fatalf("%s: %v", failing, err)
	}
	must(s.Cleanup(ctx))
	if there(failing) {
		t.Error("what a Prepare left that failed is there still")
	}
	if n := len(s.(*snapshotter).doomed.all()); n > 0 || listed() > 2 {
		t.Errorf("%d are not forgotten, all datasets were listed %d times", n, listed())
	}
}

// madeAndFailed makes filesystems, and says that it could not.
type madeAndFailed struct {
	*fake
	name *string
}

func (m madeAndFailed) Create(ctx context.Context, name string, p zfs.Properties) error {
	*m.name = name
	return errors.Join(m.fake.Create(ctx, name, p), errdefs.ErrUnavailable)
}

// listing is a ZFS that takes its time to list.
type listing struct {
	*fake
	begun, goOn chan struct{}
}

func (l listing) Children(ctx context.Context, parent string) ([]string, error) {
	close(l.begun)
	<-l.goOn
	return l.fake.Children(ctx, parent)
}

// TestCleanupDuringSweep: while a sweep lists ten thousand datasets, Cleanup destroys what was removed.
func TestCleanupDuringSweep(t *testing.T) {
	ctx, f := context.Background(), &fake{datasets: map[string]zfs.Properties{}}
	s := start(t, f, filepath.Join(t.TempDir(), "root")).(*snapshotter)
	for !s.listed.Load() {
		time.Sleep(time.Millisecond)
	}
	m, err := s.Prepare(ctx, "gone", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Create(ctx, parent+"/77", zfs.Properties{propID: "77"}); err != nil {
		t.Fatal(err)
	}
	slow := listing{f, make(chan struct{}), make(chan struct{})}
	s.zfs = slow
	swept := make(chan error)
	go func() { swept <- s.clean(ctx, true) }()
	<-slow.begun
	if err := errors.Join(s.Remove(ctx, "gone"), s.Cleanup(ctx)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Property(ctx, m[0].Source, propID); !errdefs.IsNotFound(err) {
		t.Errorf("what was removed is there still: %v", err)
	}
	close(slow.goOn)
	if err := <-swept; err != nil {
		t.Fatal(err)
	}
	if _, err := f.Property(ctx, parent+"/77", propID); !errdefs.IsNotFound(err) {
		t.Errorf("what no record names is there still: %v", err)
	}
}

// TestCleanupLists: a daemon that has not listed yet, since ZFS refused, does it with the
// first Cleanup that can.
func TestCleanupLists(t *testing.T) {
	ctx, f, root := context.Background(), &fake{datasets: map[string]zfs.Properties{}}, filepath.Join(t.TempDir(), "root")
	s := start(t, f, root)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	orphan := parent + "/77"
	if err := f.Create(ctx, orphan, zfs.Properties{propID: "77"}); err != nil {
		t.Fatal(err)
	}
	f.destroying = errdefs.ErrUnavailable
	s = start(t, f, root)
	if err := s.Cleanup(ctx); !errdefs.IsUnavailable(err) {
		t.Fatalf("while ZFS refuses: %v", err)
	}
	f.mu.Lock()
	f.destroying = nil
	f.mu.Unlock()
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Property(ctx, orphan, propID); !errdefs.IsNotFound(err) {
		t.Errorf("what no record names is there still: %v", err)
	}
}
