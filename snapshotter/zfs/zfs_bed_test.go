//go:build bed

package zfs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

// testPool makes a small pool in a file.
func testPool(t *testing.T, pool string) {
	t.Helper()
	img := filepath.Join(t.TempDir(), "pool")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 64<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("zpool", "create", "-m", "none", pool, img).CombinedOutput(); err != nil {
		t.Fatalf("zpool create: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("zpool", "destroy", "-f", pool).Run() })
}

// orFail ends the test for a step that it only builds on.
func orFail(t *testing.T) func(error) {
	return func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}

func openNative(t *testing.T) *Native {
	t.Helper()
	n, err := OpenNative()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// TestErrors: the kind of every failure, on real ZFS, by both ways to it.
func TestErrors(t *testing.T) {
	t.Run("go-zfs", func(t *testing.T) {
		const pool = "zfserrors"
		testPool(t, pool)
		z := goZFS{}
		testErrors(t, z, pool)
		t.Setenv("PATH", t.TempDir())
		if err := z.Create(context.Background(), pool+"/c", Properties{"mountpoint": "legacy"}); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "zfsutils-linux") {
			t.Errorf("without the zfs program: %v", err)
		}
	})
	t.Run("native", func(t *testing.T) {
		const pool = "zfsnative"
		testPool(t, pool)
		testErrors(t, openNative(t), pool)
	})
}

func testErrors(t *testing.T, z ZFS, pool string) {
	ctx := context.Background()
	legacy := Properties{"mountpoint": "legacy", "a:b": "some value"}
	must := orFail(t)
	must(z.Create(ctx, pool+"/a", legacy))
	must(z.Snapshot(ctx, pool+"/a@s", nil))
	must(z.Clone(ctx, pool+"/a@s", pool+"/b", legacy))

	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, usedErr := z.Space(ctx, pool+"/none")
	_, propErr := z.Property(ctx, pool+"/none", "a:b")
	_, childErr := z.Children(ctx, pool+"/none")
	for _, c := range []struct {
		name string
		err  error
		is   func(error) bool
	}{
		{"create, exists", z.Create(ctx, pool+"/a", legacy), errdefs.IsAlreadyExists},
		{"create, no parent", z.Create(ctx, pool+"/none/a", legacy), errdefs.IsNotFound},
		{"create, no pool", z.Create(ctx, "nopool/a", legacy), errdefs.IsUnavailable},
		{"clone, exists", z.Clone(ctx, pool+"/a@s", pool+"/b", legacy), errdefs.IsAlreadyExists},
		{"clone, no snapshot", z.Clone(ctx, pool+"/a@none", pool+"/c", legacy), errdefs.IsNotFound},
		{"snapshot, exists", z.Snapshot(ctx, pool+"/a@s", nil), errdefs.IsAlreadyExists},
		{"snapshot, no dataset", z.Snapshot(ctx, pool+"/none@s", nil), errdefs.IsNotFound},
		{"destroy, has a clone", z.Destroy(ctx, pool+"/a@s"), errdefs.IsFailedPrecondition},
		{"destroy, has a snapshot", z.Destroy(ctx, pool+"/a"), errdefs.IsFailedPrecondition},
		{"destroy, none", z.Destroy(ctx, pool+"/none"), errdefs.IsNotFound},
		{"set, none", z.Set(ctx, pool+"/none", Properties{"a:b": "c"}), errdefs.IsNotFound},
		{"space, none", usedErr, errdefs.IsNotFound},
		{"property, none", propErr, errdefs.IsNotFound},
		{"children, none", childErr, errdefs.IsNotFound},
		{"context ended", z.Create(ended, pool+"/late", legacy), errdefs.IsCanceled},
	} {
		if c.err == nil || !c.is(c.err) {
			t.Errorf("%s: %v", c.name, c.err)
		}
	}
	must(z.Set(ctx, pool+"/b", Properties{"a:b": "other"}))
	if v, err := z.Property(ctx, pool+"/b", "a:b"); err != nil || v != "other" {
		t.Errorf("property %q, %v", v, err)
	}
	if v, err := z.Property(ctx, pool+"/b", "a:unset"); err != nil || v != Unset {
		t.Errorf("unset property %q, %v", v, err)
	}
	if n, err := z.Space(ctx, pool+"/a"); err != nil || n.Used <= 0 || n.Referenced <= 0 {
		t.Errorf("space %v, %v", n, err)
	}
	names, err := z.Children(ctx, pool)
	slices.Sort(names)
	if got := strings.Join(names, " "); err != nil || got != pool+"/a "+pool+"/b" {
		t.Errorf("children %q, %v", got, err)
	}

	// No space: another takes nearly all of it, the rest is filled through a mount.
	available, err := strconv.Atoi(zfsSays(t, "get", "-Hpo", "value", "available", pool))
	must(err)
	zfsSays(t, "set", fmt.Sprintf("reservation=%d", available-1<<20), pool+"/a")
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "zfs", pool+"/b", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	// `zfs destroy` unmounts what is mounted and not in use: an open file keeps it.
	busy := z.Destroy(ctx, pool+"/b")
	if !errdefs.IsFailedPrecondition(busy) {
		t.Errorf("destroy of a dataset in use: %v", busy)
	}
	if _, err := io.CopyN(fill, rand.Reader, 256<<20); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("filling the pool: %v", err)
	}
	must(errors.Join(fill.Sync(), fill.Close()))
	full := z.Create(ctx, pool+"/full", legacy)
	if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
		t.Fatalf("umount: %v: %s", err, out)
	}
	if !errdefs.IsResourceExhausted(full) {
		t.Errorf("create in a full pool: %v", full)
	}
}
