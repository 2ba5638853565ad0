//go:build bed

package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// txg is the number of the pool's transaction group that is open.
func txg(t *testing.T, pool string) int {
	t.Helper()
	text, err := os.ReadFile("/proc/spl/kstat/zfs/" + pool + "/txgs")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	n, err := strconv.Atoi(strings.Fields(lines[len(lines)-1])[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestKeptMounted: containerd's unmount of a layer does not wait for the pool, its
// Commit does, once; and the layer is whole.
func TestKeptMounted(t *testing.T) {
	ctx := context.Background()
	pool := makePool(t)
	s := openStore(t, zfs.NativeOnly, pool+"/ours")
	layer := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "sha256:1"})
	// unmounting says how many transaction groups went by.
	unmounting := func(key string, opts ...snapshots.Opt) int {
		t.Helper()
		m, err := s.Prepare(ctx, key, "", opts...)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		mounted(t, m[0].Source, 0, func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, "file"), []byte(key), 0o600); err != nil {
				t.Fatal(err)
			}
			n = txg(t, pool)
		})
		n = txg(t, pool) - n
		if err := s.Commit(ctx, "layer of "+key, key); err != nil {
			t.Fatal(err)
		}
		view, err := s.View(ctx, "look at "+key, "layer of "+key)
		if err != nil {
			t.Fatal(err)
		}
		mounted(t, view[0].Source, unix.MS_RDONLY, func(dir string) {
			if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(got) != key {
				t.Errorf("%s: the layer has %q, %v", key, got, err)
			}
		})
		return n
	}
	if n := unmounting("container"); n == 0 {
		t.Error("an unmount does not wait for the pool: then no layer has to be kept mounted")
	}
	// The pool begins a group every five seconds anyway.
	least := 1
	for _, key := range []string{"a", "b", "c"} {
		least = min(least, unmounting(key, layer))
	}
	if least > 0 {
		t.Error("each unmount of a layer waited for the pool")
	}
	for _, key := range []string{"layer of a", "look at a"} {
		if _, err := s.Stat(ctx, key); err != nil {
			t.Error(err)
		}
	}
	for _, key := range []string{"look at a", "layer of a"} {
		if err := s.Remove(ctx, key); err != nil {
			t.Error(err)
		}
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if _, left := s.Cleaned(); left != 0 {
		t.Errorf("%d datasets could not be destroyed", left)
	}
}
