//go:build bed

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

var errInjected = errors.New("injected")

// watched has a function around each call that asks or changes something.
type watched struct {
	zfs.ZFS
	around func(change bool, do func() error) error
}

func (w watched) Create(ctx context.Context, name string, p zfs.Properties) error {
	return w.around(true, func() error { return w.ZFS.Create(ctx, name, p) })
}

func (w watched) Clone(ctx context.Context, snapshot, name string, p zfs.Properties) error {
	return w.around(true, func() error { return w.ZFS.Clone(ctx, snapshot, name, p) })
}

func (w watched) Snapshot(ctx context.Context, name string, p zfs.Properties) error {
	return w.around(true, func() error { return w.ZFS.Snapshot(ctx, name, p) })
}

func (w watched) SnapshotAndClone(ctx context.Context, snapshot string, props zfs.Properties, clone string, cloneProps zfs.Properties) error {
	return w.around(true, func() error { return w.ZFS.SnapshotAndClone(ctx, snapshot, props, clone, cloneProps) })
}

func (w watched) Destroy(ctx context.Context, name string) error {
	return w.around(true, func() error { return w.ZFS.Destroy(ctx, name) })
}

func (w watched) Rename(ctx context.Context, from, to string) error {
	return w.around(true, func() error { return w.ZFS.Rename(ctx, from, to) })
}

func (w watched) Promote(ctx context.Context, name string) error {
	return w.around(true, func() error { return w.ZFS.Promote(ctx, name) })
}

func (w watched) DestroyLater(ctx context.Context, snapshot string) error {
	return w.around(true, func() error { return w.ZFS.DestroyLater(ctx, snapshot) })
}

func (w watched) DestroyAll(ctx context.Context, names []string) (failed map[string]error, err error) {
	err = w.around(len(names) > 0, func() error { failed, err = w.ZFS.DestroyAll(ctx, names); return err })
	return failed, err
}

func (w watched) Set(ctx context.Context, name string, p zfs.Properties) error {
	return w.around(true, func() error { return w.ZFS.Set(ctx, name, p) })
}

func (w watched) Space(ctx context.Context, name string) (space zfs.Space, err error) {
	err = w.around(false, func() error { space, err = w.ZFS.Space(ctx, name); return err })
	return space, err
}

// faults fails the call number at: before it did anything, or after it did all.
type faults struct {
	mu        sync.Mutex
	at, calls int
	after     bool
}

// arm counts from now on.
func (f *faults) arm(at int, after bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at, f.calls, f.after = at, 0, after
}

func (f *faults) around(_ bool, do func() error) error {
	f.mu.Lock()
	f.calls++
	now, after := f.calls == f.at, f.after
	f.mu.Unlock()
	if !now {
		return do()
	}
	if after {
		if err := do(); err != nil {
			return err
		}
	}
	return errInjected
}

// life is one image's and one container's life. It goes on after an error, as
// containerd does with the next request, and does again what failed.
func life(ctx context.Context, s snapshots.Snapshotter) (failed int, err error) {
	unpacked := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "ref"})
	steps := []struct {
		name string
		do   func() error
	}{
		{"prepare layer 1", func() error { _, err := s.Prepare(ctx, "l1", "", unpacked); return err }},
		{"commit layer 1", func() error { return s.Commit(ctx, "c1", "l1") }},
		{"prepare layer 2", func() error { _, err := s.Prepare(ctx, "l2", "c1", unpacked); return err }},
		{"commit layer 2", func() error { return s.Commit(ctx, "c2", "l2") }},
		{"view", func() error { _, err := s.View(ctx, "v", "c2"); return err }},
		{"prepare root", func() error { _, err := s.Prepare(ctx, "root", "c2"); return err }},
		{"usage", func() error { _, err := s.Usage(ctx, "root"); return err }},
		{"remove root", func() error { return s.Remove(ctx, "root") }},
		{"remove view", func() error { return s.Remove(ctx, "v") }},
		{"cleanup", func() error { return s.(snapshots.Cleaner).Cleanup(ctx) }},
	}
	for _, step := range steps {
		err := step.do()
		if errors.Is(err, errInjected) {
			failed++
			err = step.do()
		}
		if err != nil {
			return failed, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return failed, nil
}

// TestFaults fails every call to ZFS once, before and after its effect, on real
// ZFS: whoever tries again succeeds, and nothing is left that no record names.
func TestFaults(t *testing.T) {
	pool := makePool(t)
	ctx := context.Background()
	for _, after := range []bool{false, true} {
		for at, injected := 1, true; injected; at++ {
			name := fmt.Sprintf("call %d, after %v", at, after)
			dataset := fmt.Sprintf("%s/%d%v", pool, at, after)
			f := &faults{}
			s, err := New(ctx, watched{open(t, zfs.NativeOnly), f.around}, t.TempDir(), dataset)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.(*snapshotter).cleaning.Acquire(ctx, 1); err != nil { // the first sweep's calls are not to be counted
				t.Fatal(err)
			}
			f.arm(at, after)
			s.(*snapshotter).cleaning.Release(1)
			if _, err := life(ctx, s); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			injected = f.calls >= at
			f.arm(0, false)
			if err := s.(snapshots.Cleaner).Cleanup(ctx); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			agree(t, name, s, dataset)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// spareOf is of what a spare is a clone; empty: it is none.
func spareOf(t *testing.T, z zfs.ZFS, name string) string {
	t.Helper()
	var values []string
	for _, property := range []string{propID, PropKey, "origin"} {
		v, err := z.Property(context.Background(), name, property)
		if err != nil {
			t.Fatal(err)
		}
		values = append(values, v)
	}
	if values[0] != filepath.Base(name) || values[1] != zfs.Unset {
		return ""
	}
	return values[2]
}

// agree compares what the records name with what ZFS holds.
func agree(t *testing.T, name string, s snapshots.Snapshotter, dataset string) {
	t.Helper()
	z := open(t, zfs.Auto)
	names, err := z.Children(context.Background(), dataset)
	if err != nil {
		t.Fatal(err)
	}
	all := slices.Clone(names)
	names = slices.DeleteFunc(names, func(name string) bool {
		of, ok := strings.CutSuffix(spareOf(t, z, name), committed)
		return ok && slices.Contains(all, of)
	})
	var want []string
	err = s.Walk(context.Background(), func(_ context.Context, i snapshots.Info) error {
		want = append(want, i.Name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(want)
	if got := strings.Join(want, " "); got != "c1 c2" || len(names) != 2 {
		t.Errorf("%s: records %q, datasets %q", name, got, names)
	}
}

// TestRestart: the records and datasets of one daemon serve the next; what has
// no record is destroyed, what is not ours is left alone.
func TestRestart(t *testing.T) {
	pool := makePool(t)
	ctx, root, dataset := context.Background(), t.TempDir(), pool+"/restart"
	z := open(t, zfs.Auto)
	again := func() snapshots.Snapshotter {
		s, err := New(ctx, z, root, dataset)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := again()
	if _, err := life(ctx, s); err != nil {
		t.Fatal(err)
	}
	if _, err := New(ctx, z, root, dataset); err == nil {
		t.Error("a second daemon on the same root")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := New(ctx, z, filepath.Join(root, "other"), dataset); err == nil {
		t.Error("a second store on the same dataset")
	}
	// Without the records every dataset would be an orphan.
	records := filepath.Join(root, "metadata.db")
	if err := os.Rename(records, records+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := New(ctx, z, root, dataset); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a daemon whose records are lost: %v", err)
	}
	if err := os.Rename(records+".away", records); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]zfs.Properties{
		"/900":   {propID: "900", "mountpoint": "none"}, // an orphan
		"/901":   {"mountpoint": "none"},                // somebody's, with a number
		"/other": {"mountpoint": "none"},                // somebody's
	} {
		if err := z.Create(ctx, dataset+name, p); err != nil {
			t.Fatal(err)
		}
	}
	s = again()
	defer s.Close()
	if err := s.(snapshots.Cleaner).Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	names, err := z.Children(ctx, dataset)
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range names {
		names[i] = strings.TrimPrefix(n, dataset+"/")
	}
	slices.Sort(names)
	if got := strings.Join(names, " "); got != "1 2 901 other" {
		t.Errorf("datasets %s", got)
	}
}
