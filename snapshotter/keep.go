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
	of      map[string]*keep
	closing sync.WaitGroup // those that are given up
}

type keep struct {
	since   time.Time
	mounted chan struct{} // closed when file is set
	file    io.Closer     // nil if it could not be mounted
}

func mountDetached(ctx context.Context, dataset string) (io.Closer, error) {
	return detached.Mount(ctx, dataset, false)
}

// begin mounts a filesystem while the caller goes on. That it cannot costs time only.
func (k *keeps) begin(ctx context.Context, id, dataset string) {
	i := &keep{since: time.Now(), mounted: make(chan struct{})}
	k.mu.Lock()
	if k.of == nil {
		k.of = map[string]*keep{}
	}
	k.of[id] = i
	k.mu.Unlock()
	go func() {
		defer close(i.mounted)
		file, err := k.mount(context.WithoutCancel(ctx), dataset)
		if err != nil {
			log.G(ctx).WithError(err).Debug("the filesystem of a layer is not kept mounted")
			return
		}
		i.file = file
	}()
}

// end gives a mount up, if there is one.
func (k *keeps) end(ids ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, id := range ids {
		i := k.of[id]
		if i == nil {
			continue
		}
		delete(k.of, id)
		k.closing.Go(func() {
			<-i.mounted
			if i.file != nil {
				_ = i.file.Close() // of a descriptor that only names
			}
		})
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
