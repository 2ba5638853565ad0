package snapshotter

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/containerd-pve/containerd-pve/snapshotter/detached"
)

// When the last mount of a filesystem goes that was written to, ZFS waits until
// the pool has all of it (zfs_vfsops.c, zfsvfs_teardown). containerd mounts and unmounts one for
// each layer that it unpacks, and the snapshot that Commit takes right after
// that waits for the pool as well. With a mount of ours that lasts until then there is one wait
// for both.

// keepLimit is how long a mount is kept for an unpacking that does not come to
// its end, as of a containerd that was killed: a pool with a mount is not exported.
const keepLimit = 5 * time.Minute

// keeps are the filesystems that are kept mounted, by their snapshots' ids.
type keeps struct {
	mount func(ctx context.Context, dataset string) (io.Closer, error)

	mu      sync.Mutex
	of      map[string]keep
	closing sync.WaitGroup // those that are given up
}

type keep struct {
	since time.Time
	file  io.Closer
}

func mountDetached(ctx context.Context, dataset string) (io.Closer, error) {
	return detached.Mount(ctx, dataset, false)
}

// begin mounts a filesystem. That it cannot costs time only. It is done before
// anybody else does: of two who mount one at the same moment ZFS refuses one.
func (k *keeps) begin(ctx context.Context, id, dataset string) {
	file, err := k.mount(ctx, dataset)
	if err != nil {
		log.G(ctx).WithError(err).Debug("the filesystem of a layer is not kept mounted")
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of == nil {
		k.of = map[string]keep{}
	}
	k.of[id] = keep{time.Now(), file}
}

// end gives a mount up, if there is one.
func (k *keeps) end(ids ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, id := range ids {
		i, there := k.of[id]
		if !there {
			continue
		}
		delete(k.of, id)
		k.closing.Go(func() { _ = i.file.Close() }) // of a descriptor that only names
	}
}

// expire gives those up that are older than the limit.
func (k *keeps) expire(limit time.Duration) {
	k.mu.Lock()
	var old []string
	for id, i := range k.of {
		if time.Since(i.since) >= limit {
			old = append(old, id)
		}
	}
	k.mu.Unlock()
	k.end(old...)
}

// wait waits until what was given up is unmounted.
func (k *keeps) wait() { k.closing.Wait() }
