//go:build bed

package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// TestMountsOfMounted: what is mounted for writing can be mounted read-only besides, as containerd's clients do it for
// a container that runs, and what was written is there.
func TestMountsOfMounted(t *testing.T) {
	for _, way := range []string{zfs.NativeOnly, zfs.GoZFS} {
		t.Run(way, func(t *testing.T) {
			pool, ctx := makePool(t), context.Background()
			s, err := New(ctx, open(t, way), t.TempDir(), pool+"/mounted")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			own, err := s.Prepare(ctx, "root", "")
			if err != nil {
				t.Fatal(err)
			}
			get := func(kind, source string) []mount.Mount {
				t.Helper()
				m, err := s.Mounts(ctx, "root")
				if err != nil || len(m) != 1 || m[0].Type != kind || m[0].Source != source {
					t.Fatalf("%+v, %v, want %s of %s", m, err, kind, source)
				}
				return m
			}
			get("zfs", own[0].Source)
			fill(t, own, func(dir string) {
				if err := os.WriteFile(filepath.Join(dir, "new"), []byte("new"), 0o600); err != nil {
					t.Fatal(err)
				}
				m := get("bind", dir)
				err := mount.WithReadonlyTempMount(ctx, m, func(root string) error {
					if err := os.WriteFile(filepath.Join(root, "no"), nil, 0o600); err == nil {
						t.Error("it is not read-only")
					}
					_, err := os.ReadFile(filepath.Join(root, "new"))
					return err
				})
				if err != nil {
					t.Error(err)
				}
				fill(t, m, func(root string) {
					if err := os.Remove(filepath.Join(root, "new")); err != nil {
						t.Error(err)
					}
				})
				if _, err := os.Stat(filepath.Join(dir, "new")); err == nil {
					t.Error("what is removed by one mount is there by the other")
				}
				// What nobody can reach is nothing to be bound.
				if err := (&mount.Mount{Type: "tmpfs", Source: "none"}).Mount(dir); err != nil {
					t.Fatal(err)
				}
				get("zfs", own[0].Source)
				if err := mount.Unmount(dir, 0); err != nil {
					t.Fatal(err)
				}
			})
			get("zfs", own[0].Source)
		})
	}
}
