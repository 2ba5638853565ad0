//go:build bed

package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/detached"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// layerOf makes a pool with a snapshot to be cloned.
func layerOf(b *testing.B) (z zfs.ZFS, pool, origin string) {
	ctx := context.Background()
	pool = makePool(b)
	z, err := zfs.New(ctx, zfs.NativeOnly)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { z.Close() })
	origin = pool + "/base" + committed
	if err := z.Create(ctx, pool+"/base", zfs.Properties{"mountpoint": "legacy"}); err != nil {
		b.Fatal(err)
	}
	if err := z.Snapshot(ctx, origin, nil); err != nil {
		b.Fatal(err)
	}
	return z, pool, origin
}

// BenchmarkLayer times what ZFS does for a layer of 3 and of 60 files (4 KiB
// each): as containerd's differ has it, unmount and then snapshot, and as a
// differ of our own could, the snapshot first, so that the unmount finds nothing
// to write; and with a mount of ours, which the filesystem outlives the other by.
func BenchmarkLayer(b *testing.B) {
	ctx := context.Background()
	dir := b.TempDir()
	z, pool, origin := layerOf(b)
	n := 0
	for _, files := range []int{3, 60} {
		for _, first := range []string{"unmount", "snapshot", "hold"} {
			b.Run(fmt.Sprintf("files=%d/first=%s", files, first), func(b *testing.B) {
				for b.Loop() {
					n++
					dataset := fmt.Sprintf("%s/%d", pool, n)
					unmount := func() error { return unix.Unmount(dir, 0) }
					snapshot := func() error { return z.Snapshot(ctx, dataset+committed, nil) }
					steps := []func() error{
						func() error { return z.Clone(ctx, origin, dataset, zfs.Properties{"mountpoint": "legacy"}) },
						func() error { return unix.Mount(dataset, dir, "zfs", 0, "") },
						func() error {
							for f := range files {
								if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(f)), make([]byte, 4096), 0o600); err != nil {
									return err
								}
							}
							return nil
						},
						unmount, snapshot,
					}
					switch first {
					case "snapshot":
						steps[3], steps[4] = snapshot, unmount
					case "hold":
						var held *os.File
						hold := func() (err error) { held, err = detached.Mount(ctx, dataset, false); return err }
						steps = []func() error{steps[0], hold, steps[1], steps[2], unmount, snapshot, func() error { return held.Close() }}
					}
					for _, step := range steps {
						if err := step(); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}

// BenchmarkClone times a clone without properties and one with them, for which
// ZFS waits for the pool a second time.
func BenchmarkClone(b *testing.B) {
	ctx := context.Background()
	z, pool, origin := layerOf(b)
	n := 0
	for name, props := range map[string]zfs.Properties{
		"properties=0": nil,
		"properties=4": {"mountpoint": "legacy", "com.sun:auto-snapshot": "false", propID: "1", PropKey: "key"},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				n++
				if err := z.Clone(ctx, origin, fmt.Sprintf("%s/%d", pool, n), props); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
