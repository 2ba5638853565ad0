// Package zfs is the one door to ZFS. It owns no dataset: what is made and
// destroyed is the caller's decision. Its errors have kinds of errdefs, found by
// looking at what is there, never in a message.
package zfs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// Properties are a dataset's, as `zfs set` takes them.
type Properties map[string]string

// Unset is the value of a user property that a dataset does not have.
const Unset = "-"

// ZFS is what the snapshotter needs. Errors are errdefs kinds: AlreadyExists,
// NotFound, FailedPrecondition (busy, or something depends on it),
// ResourceExhausted (no space), Unavailable (no module, pool not imported).
type ZFS interface {
	// Create makes a filesystem; its parent exists.
	Create(ctx context.Context, name string, props Properties) error
	// Clone makes a filesystem of a snapshot.
	Clone(ctx context.Context, snapshot, name string, props Properties) error
	// Snapshot takes dataset@snapshot.
	Snapshot(ctx context.Context, name string) error
	// Destroy removes exactly one filesystem or snapshot, never what depends on it.
	Destroy(ctx context.Context, name string) error
	// Property is the value of a user property, or Unset.
	Property(ctx context.Context, name, property string) (string, error)
	// Used are the bytes that the filesystem and its snapshots alone take.
	Used(ctx context.Context, name string) (int64, error)
	// Children are the names of the filesystems directly below parent.
	Children(ctx context.Context, parent string) ([]string, error)
	// Set sets a user property.
	Set(ctx context.Context, name, property, value string) error
}

// Ready says whether the kernel has ZFS and the pool of name is imported.
func Ready(name string) error {
	for _, p := range []string{"/sys/module/zfs", "/dev/zfs"} {
		if _, err := os.Stat(p); err != nil {
			return fmt.Errorf("the ZFS kernel module is not loaded (%s is missing): run `modprobe zfs`: %w", p, errdefs.ErrUnavailable)
		}
	}
	pool := pool(name)
	if _, err := os.Stat(filepath.Join("/proc/spl/kstat/zfs", pool)); err != nil {
		return fmt.Errorf("ZFS pool %q is not imported: run `zpool import %s`, or create it, or set another dataset: %w", pool, pool, errdefs.ErrUnavailable)
	}
	return nil
}

// New returns the implementation that serves.
func New() ZFS { return goZFS{} }
