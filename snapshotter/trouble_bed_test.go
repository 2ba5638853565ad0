//go:build bed

package snapshotter

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// logged are the lines that were logged while the test runs.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

// take gives the lines so far, and forgets them.
func (l *logged) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.buf.Reset()
	return strings.Split(strings.TrimSpace(l.buf.String()), "\n")
}

func captureLog(t *testing.T) *logged {
	l := &logged{}
	log.L.Logger.SetOutput(io.MultiWriter(os.Stderr, l))
	t.Cleanup(func() { log.L.Logger.SetOutput(os.Stderr) })
	return l
}

func command(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// openStore makes a snapshotter that is closed with the test. It makes no spares: the
// datasets that are counted are those of its snapshots.
func openStore(t *testing.T, way, dataset string) Store {
	t.Helper()
	s, err := New(context.Background(), open(t, way), filepath.Join(t.TempDir(), "root"), dataset)
	if err != nil {
		t.Fatal(err)
	}
	s.(*snapshotter).spares.close()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// prepare gives the dataset of a new active snapshot.
func prepare(t *testing.T, s snapshots.Snapshotter, key, parent string) string {
	t.Helper()
	m, err := s.Prepare(context.Background(), key, parent)
	if err != nil {
		t.Fatalf("prepare %s: %v", key, err)
	}
	return m[0].Source
}

// layer gives the dataset of a new committed snapshot.
func layer(t *testing.T, s snapshots.Snapshotter, name, parent string) string {
	t.Helper()
	dataset := prepare(t, s, "to-be-"+name, parent)
	if err := s.Commit(context.Background(), name, "to-be-"+name); err != nil {
		t.Fatalf("commit %s: %v", name, err)
	}
	return dataset
}

func remove(t *testing.T, s snapshots.Snapshotter, keys ...string) {
	t.Helper()
	for _, key := range keys {
		if err := s.Remove(context.Background(), key); err != nil {
			t.Fatalf("remove %s: %v", key, err)
		}
	}
}

func cleanup(t *testing.T, s snapshots.Snapshotter) {
	t.Helper()
	if err := s.(snapshots.Cleaner).Cleanup(context.Background()); err != nil {
		t.Fatalf("cleanup: %v", err)
	}
}

// TestForeign: what somebody else did to datasets of ours is in the way of their
// destruction only, is told, and they go once it is gone.
func TestForeign(t *testing.T) {
	pool := makePool(t)
	for _, way := range []string{zfs.NativeOnly, zfs.GoZFS} {
		t.Run(way, func(t *testing.T) {
			s := openStore(t, way, pool+"/foreign-"+way)
			cleanup(t, s) // after it the first sweep destroys nothing
			snap, hold, clone := layer(t, s, "snap", ""), layer(t, s, "hold", ""), layer(t, s, "clone", "")
			mount, child, free := prepare(t, s, "mount", ""), prepare(t, s, "child", ""), layer(t, s, "free", "")
			other := pool + "/somebody-" + way
			command(t, "zfs", "snapshot", snap+"@backup")
			command(t, "zfs", "hold", "keep", hold+committed)
			command(t, "zfs", "clone", "-o", "mountpoint=none", clone+committed, other)
			command(t, "zfs", "create", "-o", "mountpoint=none", child+"/theirs")
			dir := t.TempDir()
			command(t, "mount", "-t", "zfs", mount, dir)
			file, err := os.Create(filepath.Join(dir, "file")) // `zfs destroy` takes a mount away that nobody uses
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			remove(t, s, "snap", "hold", "clone", "mount", "child", "free")

			lines := captureLog(t)
			cleanup(t, s)
			left := strings.Fields(command(t, "zfs", "list", "-Hro", "name", pool))
			said := lines.take()
			for _, c := range []struct {
				dataset string
				reasons []string // native, go-zfs
			}{
				{snap, []string{"depend on it", "has children"}},
				{hold, []string{"held", "busy"}},
				{clone, []string{"depend on it", "has dependent clones"}},
				{mount, []string{"mounted", "busy"}},
				{child, []string{"depend on it", "has children"}},
			} {
				if !slices.Contains(left, c.dataset) {
					t.Errorf("%s is destroyed", c.dataset)
				}
				if !slices.ContainsFunc(said, func(line string) bool {
					return strings.Contains(line, c.dataset) && slices.ContainsFunc(c.reasons, func(r string) bool { return strings.Contains(line, r) })
				}) {
					t.Errorf("no line names %s and why (%q): %q", c.dataset, c.reasons, said)
				}
			}
			if slices.Contains(left, free) {
				t.Errorf("%s, with which nobody did anything, is there still", free)
			}

			command(t, "zfs", "destroy", snap+"@backup")
			command(t, "zfs", "release", "keep", hold+committed)
			command(t, "zfs", "destroy", other)
			command(t, "zfs", "destroy", child+"/theirs")
			file.Close()
			command(t, "umount", dir)
			cleanup(t, s)
			if left := command(t, "zfs", "list", "-Hro", "name", pool+"/foreign-"+way); left != pool+"/foreign-"+way {
				t.Errorf("what is left when nothing is in the way: %s", left)
			}
			if said := strings.Join(lines.take(), "\n"); said != "" {
				t.Errorf("logged then: %s", said)
			}
		})
	}
}

// TestTrouble: a pool that is full, read-only or away, and datasets that were
// renamed or destroyed, make calls fail with an error that says what to do; when
// that was done the same daemon goes on.
func TestTrouble(t *testing.T) {
	for _, way := range []string{zfs.NativeOnly, zfs.GoZFS} {
		t.Run(way, func(t *testing.T) { trouble(t, way) })
	}
}

// reserve takes the pool's space until less is left than a new filesystem needs
// (48 KiB). What was freed before comes back little by little.
func reserve(t *testing.T, pool string) {
	t.Helper()
	greedy, reserved := pool+"/greedy", int64(0)
	command(t, "zfs", "create", "-o", "mountpoint=none", greedy)
	for range 20 {
		command(t, "zpool", "sync", pool)
		free, err := strconv.ParseInt(command(t, "zfs", "get", "-Hpo", "value", "available", pool), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if free < 32<<10 {
			return
		}
		more := reserved + free - 8<<10
		if exec.Command("zfs", "set", fmt.Sprint("reservation=", more), greedy).Run() == nil {
			reserved = more
		}
	}
	t.Fatal("the pool does not get full")
}

func trouble(t *testing.T, way string) {
	pool, dir := makeSmallPool(t)
	s := openStore(t, way, pool+"/trouble")
	ctx := context.Background()
	base, active := layer(t, s, "base", ""), prepare(t, s, "active", "")
	type result struct {
		call string
		err  error
	}
	try := func(parent string) []result {
		_, perr := s.Prepare(ctx, "new", parent)
		return []result{{"prepare", perr}}
	}
	onActive := func() []result {
		_, uerr := s.Usage(ctx, "active")
		return []result{{"commit", s.Commit(ctx, "committed", "active")}, {"usage", uerr}}
	}
	failed := func(state string, is func(error) bool, word string, results []result) {
		t.Helper()
		for _, r := range results {
			if r.err == nil || !is(r.err) || !strings.Contains(r.err.Error(), word) {
				t.Errorf("%s, %s: %v; want %q", state, r.call, r.err, word)
			}
		}
		if _, err := s.Stat(ctx, "new"); !errdefs.IsNotFound(err) {
			t.Errorf("%s: a record of what was not prepared: %v", state, err)
		}
	}
	works := func(state string) {
		t.Helper()
		prepare(t, s, "new", "base")
		if _, err := s.Usage(ctx, "active"); err != nil {
			t.Errorf("after %s: usage: %v", state, err)
		}
		remove(t, s, "new")
		cleanup(t, s)
		if left := strings.Fields(command(t, "zfs", "list", "-Hro", "name", pool+"/trouble")); len(left) != 3 {
			t.Errorf("after %s: left is %s", state, left)
		}
	}

	prepare(t, s, "spare", "base")
	if err := s.(*snapshotter).creating.wait(ctx); err != nil { // without its mark nothing would try to destroy it
		t.Fatal(err)
	}
	command(t, "zpool", "export", pool)
	failed("exported", errdefs.IsUnavailable, "zpool import", append(try("base"), onActive()...))
	failed("exported", errdefs.IsUnavailable, "zpool import", []result{{"cleanup", s.(snapshots.Cleaner).Cleanup(ctx)}})
	remove(t, s, "spare")
	command(t, "zpool", "import", "-d", dir, "-o", "readonly=on", pool)
	failed("read-only", errdefs.IsFailedPrecondition, "zpool export", append(try("base"), onActive()[0]))
	failed("read-only", errdefs.IsFailedPrecondition, "zpool export", []result{{"cleanup", s.(snapshots.Cleaner).Cleanup(ctx)}})
	command(t, "zpool", "export", pool)
	command(t, "zpool", "import", "-d", dir, pool)
	works("read-only")

	command(t, "zfs", "rename", base, pool+"/trouble/away")
	failed("layer renamed", errdefs.IsFailedPrecondition, "rename it back", try("base"))
	cleanup(t, s)
	command(t, "zfs", "rename", pool+"/trouble/away", base)
	command(t, "zfs", "rename", active, pool+"/away")
	failed("active renamed", errdefs.IsFailedPrecondition, "rename it back", onActive())
	command(t, "zfs", "rename", pool+"/away", active)
	command(t, "zfs", "rename", pool+"/trouble", pool+"/elsewhere")
	failed("all renamed", errdefs.IsFailedPrecondition, "rename it back", append(append(try(""), try("base")...), onActive()...))
	failed("all renamed", errdefs.IsFailedPrecondition, "rename it back", []result{{"cleanup", s.(snapshots.Cleaner).Cleanup(ctx)}})
	command(t, "zfs", "rename", pool+"/elsewhere", pool+"/trouble")
	works("renamed")

	command(t, "zfs", "destroy", "-r", base)
	failed("layer destroyed", errdefs.IsFailedPrecondition, "make it again", try("base"))
	remove(t, s, "base")
	command(t, "zfs", "destroy", active)
	failed("active destroyed", errdefs.IsFailedPrecondition, "make it again", onActive())
	remove(t, s, "active")
	cleanup(t, s)
	layer(t, s, "base", "")
	prepare(t, s, "active", "")
	works("destroyed")

	spare := prepare(t, s, "spare", "")
	// What is promised to another is as full as what is written, and quicker
	// done: TestErrors of package zfs fills a pool.
	reserve(t, pool)
	failed("full", errdefs.IsResourceExhausted, "remove images", append(try("base"), onActive()[0]))
	remove(t, s, "spare")
	cleanup(t, s)
	if out, err := exec.Command("zfs", "list", spare).CombinedOutput(); err == nil {
		t.Errorf("full: what was removed is there still: %s", out)
	}
	command(t, "zfs", "destroy", pool+"/greedy")
	works("full")
	if err := s.Commit(ctx, "committed", "active"); err != nil {
		t.Errorf("after all: %v", err)
	}
}
