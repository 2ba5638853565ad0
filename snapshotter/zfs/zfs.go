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
	"github.com/containerd/log"
)

// Properties are a dataset's, as `zfs set` takes them.
type Properties map[string]string

// Unset is the value of a user property that a dataset does not have.
const Unset = "-"

// Space is what a filesystem or snapshot takes, in bytes.
type Space struct {
	Used       int64 // by it and its snapshots alone, not shared with its origin
	Referenced int64 // by all that can be read in it
	// Objset is the pool's number of it, by which the module names the file of one that is mounted; 0: not known.
	Objset uint64
}

// ZFS is what the snapshotter needs. Errors are errdefs kinds: AlreadyExists,
// NotFound, FailedPrecondition (busy, read-only, or something depends on it),
// ResourceExhausted (no space, quota), Unavailable (no module, pool not
// imported or suspended).
type ZFS interface {
	// Create makes a filesystem; its parent exists. With properties, other than those
	// a filesystem has from its creation, it waits for the pool twice, and a crash
	// of the machine may come in between.
	Create(ctx context.Context, name string, props Properties) error
	// Clone makes a filesystem of a snapshot. With properties it is as Create.
	Clone(ctx context.Context, snapshot, name string, props Properties) error
	// Snapshot takes dataset@snapshot, with user properties.
	Snapshot(ctx context.Context, name string, props Properties) error
	// ClonesAtOnce says whether SnapshotAndClone is to be had.
	ClonesAtOnce() bool
	// SnapshotAndClone is Snapshot, and Clone of that, with one wait for the pool: both or neither. Properties are
	// user properties. NotImplemented: see ClonesAtOnce. AlreadyExists: one of the two.
	SnapshotAndClone(ctx context.Context, snapshot string, props Properties, clone string, cloneProps Properties) error
	// Rename gives a filesystem another name within its pool, whose parent exists, or
	// a snapshot another among those of its filesystem.
	Rename(ctx context.Context, from, to string) error
	// Promote makes a clone independent of its origin, which becomes a clone of it; the
	// snapshots that both have in their past are the clone's from then on. AlreadyExists: it has one
	// of the same name.
	Promote(ctx context.Context, name string) error
	// Destroy removes exactly one filesystem or snapshot, never what depends on it.
	Destroy(ctx context.Context, name string) error
	// DestroyAll removes filesystems and snapshots of one pool in their order, with
	// as few waits for the pool as there is a way for. What is in the way of one
	// does not stop the others: failed has an error for each that is still there,
	// and none for what was not there. err ends it: no more can be tried now.
	DestroyAll(ctx context.Context, names []string) (failed map[string]error, err error)
	// DestroyLater has a snapshot destroyed as soon as nothing needs it any more, which
	// may be now. One that is not there is no error.
	DestroyLater(ctx context.Context, snapshot string) error
	// Property is the value of a property in the words of `zfs get`, or Unset.
	Property(ctx context.Context, name, property string) (string, error)
	// Set sets properties.
	Set(ctx context.Context, name string, props Properties) error
	// Space is what a filesystem or snapshot takes.
	Space(ctx context.Context, name string) (Space, error)
	// Objects are the files and directories of a snapshot, or of a filesystem that
	// is mounted: one that is not could not be mounted meanwhile. NotImplemented:
	// there is no way to know.
	Objects(ctx context.Context, name string) (int64, error)
	// Children are the names of the filesystems directly below parent, in no order. Those of volumes may be among them.
	Children(ctx context.Context, parent string) ([]string, error)
	// Taken are the snapshots of a filesystem, oldest first, with those of the
	// properties that each has itself.
	Taken(ctx context.Context, name string, properties []string) ([]Entry, error)
	// Detached says that a call whose context ended may still take effect later.
	Detached() bool
	// Close gives back what the others use.
	Close() error
}

// The ways to ZFS.
const (
	Auto       = "auto"   // native, and go-zfs where the module is not known
	NativeOnly = "native" // nothing else
	GoZFS      = "go-zfs" // a zfs process for each call
)

// Way is a way to ZFS, with all that is asked of it.
type Way interface {
	ZFS
	Lister
	// Rollback takes a filesystem back to its latest snapshot, which has to be that
	// one. FailedPrecondition: it is not.
	Rollback(ctx context.Context, snapshot string) error
}

// New opens a way to ZFS. With Auto, go-zfs serves where the loaded module is not
// known, and that is logged. Errors: InvalidArgument for another word, and those
// of OpenNative.
func New(ctx context.Context, way string) (Way, error) {
	w, unknown, err := choose(way, OpenNative)
	if unknown != nil {
		log.G(ctx).WithError(unknown).Warn("ZFS is not used natively: a zfs process serves each call")
	}
	return w, err
}

// OpenLister opens a way to ZFS as New does, and logs nothing.
func OpenLister(way string) (Lister, error) {
	w, _, err := choose(way, OpenNative)
	if err != nil {
		return nil, err
	}
	return w, nil
}

// choose says with unknown why it is not the native one, if that is not the way asked for.
func choose(way string, native func() (*Native, error)) (w Way, unknown, err error) {
	switch way {
	case Auto, NativeOnly:
		n, err := native()
		if err == nil {
			return n, nil, nil
		}
		if way == Auto && errdefs.IsNotImplemented(err) {
			return goZFS{}, err, nil
		}
		return nil, nil, err
	case GoZFS:
		return goZFS{}, nil, nil
	}
	return nil, nil, fmt.Errorf("%q is no way to ZFS (known: %s, %s, %s): %w", way, Auto, NativeOnly, GoZFS, errdefs.ErrInvalidArgument)
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
