//go:build bed

package snapshotter

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	_ "github.com/containerd/containerd/v2/pkg/testutil"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

var pools atomic.Int64

// makePool makes a pool in a file, for one test.
func makePool(t testing.TB) string {
	t.Helper()
	pool, _ := makePoolOf(t, 4<<30)
	return pool
}

// makeSmallPool makes one that is soon full, and says where its file is.
func makeSmallPool(t *testing.T) (pool, dir string) {
	t.Helper()
	return makePoolOf(t, 64<<20)
}

func makePoolOf(t testing.TB, size int64, options ...string) (pool, dir string) {
	t.Helper()
	dir = t.TempDir()
	img := filepath.Join(dir, "pool")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, size); err != nil {
		t.Fatal(err)
	}
	pool = fmt.Sprintf("cpve%d-%d", os.Getpid(), pools.Add(1))
	if out, err := exec.Command("zpool", slices.Concat([]string{"create", "-m", "none"}, options, []string{pool, img})...).CombinedOutput(); err != nil {
		t.Fatalf("zpool create: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("zpool", "destroy", "-f", pool).CombinedOutput(); err != nil {
			t.Errorf("zpool destroy: %v: %s", err, out)
		}
	})
	return pool, dir
}

// open opens a way to ZFS for a test.
func open(t *testing.T, way string) zfs.ZFS {
	t.Helper()
	z, err := zfs.New(context.Background(), way)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { z.Close() })
	return z
}

// TestSuite is containerd's own suite for snapshotters, by both ways to ZFS.
func TestSuite(t *testing.T) {
	if err := flag.Set("test.root", "true"); err != nil { // defined by testutil: "yes, mount"
		t.Fatal(err)
	}
	for _, way := range []string{zfs.NativeOnly, zfs.GoZFS} {
		t.Run(way, func(t *testing.T) {
			pool, z := makePool(t), open(t, way)
			testsuite.SnapshotterSuite(t, "pve-zfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := New(ctx, z, root, pool+"/"+filepath.Base(filepath.Dir(root))+filepath.Base(root))
				if err != nil {
					return nil, nil, err
				}
				return s, s.Close, nil
			})
		})
	}
}
