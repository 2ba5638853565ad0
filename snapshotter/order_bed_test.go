//go:build bed

package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// BenchmarkLayer times what ZFS does for a layer of 3 and of 60 files (4 KiB
// each): as containerd's differ has it, unmount and then snapshot, and as a
// differ of our own could, the snapshot first, so that the unmount finds nothing
// to write.
func BenchmarkLayer(b *testing.B) {
	ctx := context.Background()
	dir, pool := b.TempDir(), makePool(b)
	z, err := zfs.New(ctx, zfs.NativeOnly)
	if err != nil {
		b.Fatal(err)
	}
	defer z.Close()
	base := pool + "/base"
	if err := z.Create(ctx, base, zfs.Properties{"mountpoint": "legacy"}); err != nil {
		b.Fatal(err)
	}
	if err := z.Snapshot(ctx, base+committed, nil); err != nil {
		b.Fatal(err)
	}
	n := 0
	for _, files := range []int{3, 60} {
		for _, first := range []string{"unmount", "snapshot"} {
			b.Run(fmt.Sprintf("files=%d/first=%s", files, first), func(b *testing.B) {
				for b.Loop() {
					n++
					dataset := fmt.Sprintf("%s/%d", pool, n)
					unmount := func() error { return unix.Unmount(dir, 0) }
					snapshot := func() error { return z.Snapshot(ctx, dataset+committed, nil) }
					steps := []func() error{
						func() error { return z.Clone(ctx, base+committed, dataset, zfs.Properties{"mountpoint": "legacy"}) },
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
					if first == "snapshot" {
						steps[3], steps[4] = snapshot, unmount
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
