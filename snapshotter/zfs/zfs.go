// Package zfs is the one door of this project to ZFS. It owns the names and
// errors of dataset operations. It never mounts, never decides what may be
// destroyed, and imports nothing of containerd but errdefs.
package zfs

import "context"

// Properties are ZFS properties by name, with parsable ("-p") values.
type Properties map[string]string

// Dataset is one filesystem or snapshot and the properties asked for.
type Dataset struct {
	Name       string
	Properties Properties
}

// ZFS is what the snapshotter needs. Errors are errdefs kinds: AlreadyExists,
// NotFound, FailedPrecondition (busy, or something depends on it),
// ResourceExhausted (no space), Unavailable (no module, pool not imported).
type ZFS interface {
	Create(ctx context.Context, name string, props Properties) error
	Clone(ctx context.Context, snapshot, name string, props Properties) error
	Snapshot(ctx context.Context, name string) error
	// Destroy removes exactly one filesystem or snapshot, never what depends on it.
	Destroy(ctx context.Context, name string) error
	Get(ctx context.Context, name string, props ...string) (Dataset, error)
	// Children lists the filesystems directly below parent.
	Children(ctx context.Context, parent string, props ...string) ([]Dataset, error)
	Set(ctx context.Context, name, property, value string) error
}
