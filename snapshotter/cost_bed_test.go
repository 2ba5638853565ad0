//go:build bed

package snapshotter

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// fill mounts a snapshot for f.
func fill(t *testing.T, mounts []mount.Mount, f func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Fatal(err)
		}
	}()
	f(dir)
}

// write writes what cannot be compressed.
func write(t *testing.T, name string, size int) {
	t.Helper()
	data := make([]byte, size)
	_, _ = rand.Read(data)
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// syncs counts the syncs of files by this program, as the kernel traces them.
type syncs struct{ dir string }

func countSyncs(t *testing.T) *syncs {
	t.Helper()
	const root = "/sys/kernel/tracing"
	if _, err := os.Stat(root + "/instances"); err != nil {
		if err := (&mount.Mount{Type: "tracefs", Source: "tracefs"}).Mount(root); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = mount.Unmount(root, 0) })
	}
	s := &syncs{dir: fmt.Sprintf("%s/instances/syncs-%d", root, os.Getpid())}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(s.dir) })
	// By name: the kernel takes numbers of processes as its first namespace has them,
	// and on a host (TESTBED=host) this one is in another.
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	for _, call := range []string{"fsync", "fdatasync", "sync", "syncfs", "sync_file_range"} {
		s.write(t, "events/syscalls/sys_enter_"+call+"/filter", fmt.Sprintf("comm == %q", strings.TrimSpace(string(comm))))
		s.write(t, "events/syscalls/sys_enter_"+call+"/enable", "1")
	}
	return s
}

// write sets one of the instance's files.
func (s *syncs) write(t *testing.T, name, value string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// made is how many there were since it was asked last.
func (s *syncs) made(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.dir, "trace"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "trace"), nil, 0o600); err != nil { // opening it so empties it
		t.Fatal(err)
	}
	return strings.Count(string(data), ": sys_")
}

// TestCost is what each call may cost: processes, ioctls of ZFS and those of them
// that change something (and so wait for the pool), syncs of the records. What
// goes on after the caller was answered is counted with it.
func TestCost(t *testing.T) {
	pool, ctx := makePool(t), context.Background()
	native := open(t, zfs.NativeOnly).(*zfs.Native)
	var changes atomic.Int64
	counted := func(change bool, do func() error) error {
		if change {
			changes.Add(1)
		}
		return do()
	}
	opened, err := New(ctx, watched{native, counted}, t.TempDir(), pool+"/cost")
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	s := opened.(*snapshotter)
	// The first record makes the file grow, and Cleanup comes after the one that New began.
	_, err = s.Prepare(ctx, "first", "")
	if err := errors.Join(err, s.Remove(ctx, "first"), s.Cleanup(ctx)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir()) // no program can be found
	syncs := countSyncs(t)
	unpacked := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "ref"})
	later := 1 // of a layer's commit the spare comes later, unless it comes with it
	if native.ClonesAtOnce() {
		later = 0
	}
	// A transaction of the records is two syncs. waits are the changes that the caller waits for; the others,
	// marks and spares, come a second later.
	for _, step := range []struct {
		name                          string
		waits, changes, ioctls, syncs int
		do                            func() error
	}{
		{"Prepare of a layer", 1, 2, 2, 2, func() error { _, err := s.Prepare(ctx, "l1", ""); return err }},
		{"Mounts", 0, 0, 1, 0, func() error { _, err := s.Mounts(ctx, "l1"); return err }},
		// The space and the files are asked for; the spare is written down and made.
		{"Commit", 1, 2, 3 + 1, 2 + 2, func() error { return s.Commit(ctx, "c1", "l1") }},
		// It is looked at, marked, and replaced.
		{"Prepare with a spare", 0, 2, 3, 2 + 2, func() error { _, err := s.Prepare(ctx, "l2", "c1"); return err }},
		{"Commit on a parent", 1, 2, 3 + 1, 2 + 2, func() error { return s.Commit(ctx, "c2", "l2") }},
		{"View", 1, 1, 1, 2, func() error { _, err := s.View(ctx, "v", "c2"); return err }},
		{"Stat", 0, 0, 0, 0, func() error { _, err := s.Stat(ctx, "c2"); return err }},
		{"Walk", 0, 0, 0, 0, func() error { return s.Walk(ctx, func(context.Context, snapshots.Info) error { return nil }) }},
		{"Update", 0, 0, 0, 2, func() error {
			_, err := s.Update(ctx, snapshots.Info{Name: "c2", Labels: map[string]string{"a": "b"}}, "labels.a")
			return err
		}},
		{"Usage", 0, 0, 1, 0, func() error { _, err := s.Usage(ctx, "v"); return err }},
		{"Usage of a committed one", 0, 0, 0, 0, func() error { _, err := s.Usage(ctx, "c2"); return err }},
		{"Remove", 0, 0, 0, 2, func() error { return s.Remove(ctx, "v") }},
		{"Remove of another", 0, 0, 0, 2, func() error { return s.Remove(ctx, "c2") }},
		// However many there are: one for each mark, of which a spare has one too, and one that destroys all.
		{"Cleanup of two", 1, 1, 3 + 1, 0, func() error { return s.Cleanup(ctx) }},
		{"Prepare of a layer to be unpacked, with a spare", 0, 1, 2, 2, func() error { _, err := s.Prepare(ctx, "l3", "c1", unpacked); return err }},
		{"Commit of that", 1, 1 + later, 3 + later, 2 + 2*later, func() error { return s.Commit(ctx, "c3", "l3") }},
		{"Prepare of the next", 0, 1, 2, 2, func() error { _, err := s.Prepare(ctx, "l4", "c3", unpacked); return err }},
		{"Cleanup of none", 0, 0, 0, 0, func() error { return s.Cleanup(ctx) }},
	} {
		changes.Store(0)
		before := native.Calls()
		syncs.made(t)
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if n := int(changes.Load()); n != step.waits {
			t.Errorf("%s: the caller waits for %d changes, want %d", step.name, n, step.waits)
		}
		sparesMade(opened)
		if err := s.creating.wait(ctx); err != nil {
			t.Fatal(err)
		}
		if n := syncs.made(t); n != step.syncs {
			t.Errorf("%s: %d syncs, want %d", step.name, n, step.syncs)
		}
		if n := int(native.Calls() - before); n != step.ioctls {
			t.Errorf("%s: %d ioctls, want %d", step.name, n, step.ioctls)
		}
		if n := int(changes.Load()); n != step.changes {
			t.Errorf("%s: %d changes, want %d", step.name, n, step.changes)
		}
	}
}

// TestUsage: what a snapshot has more than its parent, in bytes and files, while
// it is written and after.
func TestUsage(t *testing.T) {
	pool, ctx := makePool(t), context.Background()
	s, err := New(ctx, open(t, zfs.NativeOnly), t.TempDir(), pool+"/usage")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	usage := func(key string) snapshots.Usage {
		t.Helper()
		u, err := s.Usage(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	parent := ""
	for i, files := range []int{7, 20} {
		key, name := fmt.Sprint("l", i), fmt.Sprint("c", i)
		mounts, err := s.Prepare(ctx, key, parent)
		if err != nil {
			t.Fatal(err)
		}
		begin := int64(-1)
		fill(t, mounts, func(dir string) {
			begin = usage(key).Inodes
			for n := range files {
				write(t, fmt.Sprintf("%s/%d-%d", dir, i, n), 100<<10)
			}
			_ = exec.Command("sync", "-f", dir).Run()
			if u := usage(key); u.Inodes != begin+int64(files) || u.Size < int64(files)*50<<10 {
				t.Errorf("%s while it is mounted: %+v, at the beginning %d files", key, u, begin)
			}
		})
		if u := usage(key); u.Size < int64(files)*50<<10 {
			t.Errorf("%s not mounted: %+v", key, u)
		}
		if err := s.Commit(ctx, name, key); err != nil {
			t.Fatal(err)
		}
		if u := usage(name); u.Inodes != begin+int64(files) || u.Size < int64(files)*50<<10 || u.Size > int64(files)*150<<10 {
			t.Errorf("%s: %+v", name, u)
		}
		parent = name
	}
	if _, err := s.Prepare(ctx, "root", parent); err != nil {
		t.Fatal(err)
	}
	if u := usage("root"); u.Size > 100<<10 || u.Inodes != 0 {
		t.Errorf("nothing written: %+v", u)
	}
}

// TestMaxSize: the label is a limit, and one that makes no sense is refused.
func TestMaxSize(t *testing.T) {
	pool, ctx := makePool(t), context.Background()
	for _, way := range []string{zfs.NativeOnly, zfs.GoZFS} {
		t.Run(way, func(t *testing.T) {
			s, err := New(ctx, open(t, way), t.TempDir(), pool+"/"+way)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			size := func(n string) snapshots.Opt {
				return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: n})
			}
			mounts, err := s.Prepare(ctx, "l", "")
			if err != nil {
				t.Fatal(err)
			}
			fill(t, mounts, func(dir string) { write(t, dir+"/big", 4<<20) })
			if err := s.Commit(ctx, "c", "l"); err != nil {
				t.Fatal(err)
			}
			_, err = s.Prepare(ctx, "small", "c", size("1048576"))
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), snapshots.LabelSnapshotMaxSize+": 1048576 bytes are less than the ") {
				t.Errorf("a limit below what the parent holds: %v", err)
			}
			if _, err := s.Stat(ctx, "small"); !errdefs.IsNotFound(err) {
				t.Errorf("a record of it: %v", err)
			}
			for _, bad := range []string{"", "0", "-1", "1G"} {
				if _, err := s.Prepare(ctx, "bad", "c", size(bad)); !errdefs.IsInvalidArgument(err) {
					t.Errorf("%q: %v", bad, err)
				}
			}
			mounts, err = s.Prepare(ctx, "root", "c", size("8388608"))
			if err != nil {
				t.Fatal(err)
			}
			fill(t, mounts, func(dir string) {
				var err error
				for n := 0; n < 100 && err == nil; n++ {
					data := make([]byte, 256<<10)
					_, _ = rand.Read(data)
					err = os.WriteFile(fmt.Sprint(dir, "/", n), data, 0o600)
					if err == nil {
						err = exec.Command("sync", "-f", dir).Run()
					}
				}
				if !errors.Is(err, syscall.EDQUOT) {
					t.Errorf("beyond the limit: %v", err)
				}
			})
		})
	}
}

// TestRemapIDs: the labels of a mapping are options of the mount, and with them
// the same files belong to others, with none of them changed.
func TestRemapIDs(t *testing.T) {
	pool, ctx := makePool(t), context.Background()
	s, err := New(ctx, open(t, zfs.NativeOnly), t.TempDir(), pool+"/remap")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	mounts, err := s.Prepare(ctx, "l", "")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, mounts, func(dir string) {
		write(t, dir+"/a", 1<<20)
		if err := errors.Join(os.Link(dir+"/a", dir+"/b"), os.Chown(dir+"/a", 5, 6)); err != nil {
			t.Fatal(err)
		}
	})
	if err := s.Commit(ctx, "c", "l"); err != nil {
		t.Fatal(err)
	}
	labels := func(uid, gid string) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: uid, snapshots.LabelSnapshotGIDMapping: gid})
	}
	for _, bad := range []snapshots.Opt{labels("0:1", "0:1:2"), labels("", "0:1:2"), labels("0:1:2", "0:1:x")} {
		if _, err := s.Prepare(ctx, "bad", "c", bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("no mapping: %v", err)
		}
	}
	if _, err := s.Prepare(ctx, "root", "c", labels("0:100000:65536", "0:200000:65536")); err != nil {
		t.Fatal(err)
	}
	if mounts, err = s.Mounts(ctx, "root"); err != nil {
		t.Fatal(err)
	}
	owner := func(name string) string {
		var st syscall.Stat_t
		if err := syscall.Stat(name, &st); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(st.Uid, ":", st.Gid)
	}
	fill(t, mounts, func(dir string) {
		if got := owner(dir) + " " + owner(dir+"/b"); got != "100000:200000 100005:200006" {
			t.Errorf("owners %s", got)
		}
		if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("touch", dir+"/new")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 100000, Gid: 200000}}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatal(err, string(out))
		}
	})
	plain := mount.Mount{Type: mounts[0].Type, Source: mounts[0].Source}
	fill(t, []mount.Mount{plain}, func(dir string) {
		if got := owner(dir+"/b") + " " + owner(dir+"/new"); got != "5:6 0:0" {
			t.Errorf("owners on the disk %s", got)
		}
	})
	if u, err := s.Usage(ctx, "root"); err != nil || u.Size > 100<<10 {
		t.Errorf("%+v, %v: something was copied", u, err)
	}
}
