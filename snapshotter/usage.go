package snapshotter

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/locker"
)

// objects remembers how many files committed snapshots hold, by id; that never
// changes. The zero value is ready.
type objects struct {
	counting locker.Locker // by id: one count of a snapshot excludes another
	mu       sync.Mutex    // of the map
	of       map[string]int64
}

func (o *objects) forget(id string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.of, id)
}

func (o *objects) known(id string) (int64, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n, ok := o.of[id]
	return n, ok
}

// get counts the files of a committed snapshot, if it was not done before.
func (o *objects) get(id string, count func() (int64, error)) (int64, error) {
	o.counting.Lock(id)
	defer func() { _ = o.counting.Unlock(id) }()
	if n, ok := o.known(id); ok {
		return n, nil
	}
	return o.count(id, count)
}

// anew counts the files of a snapshot that is being committed: what a Commit that
// failed has counted may be less.
func (o *objects) anew(id string, count func() (int64, error)) (int64, error) {
	o.counting.Lock(id)
	defer func() { _ = o.counting.Unlock(id) }()
	return o.count(id, count)
}

func (o *objects) count(id string, count func() (int64, error)) (int64, error) {
	n, err := count()
	if err != nil {
		return 0, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.of == nil {
		o.of = map[string]int64{}
	}
	o.of[id] = n
	return n, nil
}

// usage is what a snapshot has more than its parent. name is its filesystem, or
// what Commit made of it.
func (s *snapshotter) usage(ctx context.Context, name string, parents []string) (snapshots.Usage, error) {
	filesystem, _, final := strings.Cut(name, "@")
	space, err := s.zfs.Space(ctx, filesystem)
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of %s: %w", name, err)
	}
	usage := snapshots.Usage{Size: space.Used}
	if !final && !mountedAnywhere(filesystem, space.Objset) {
		return usage, nil
	}
	// What is missing to it is no reason to lose what is known, or a Commit: a pool
	// of old does not count, nor does go-zfs, and others may look at the same time.
	if usage.Inodes, err = s.inodes(ctx, name, parents); err != nil && !errdefs.IsNotImplemented(err) {
		log.G(ctx).WithError(err).WithField("dataset", filesystem).Warn("files are not counted")
	}
	return usage, nil
}

// inodes is how many files name has more than its parent, not less than none.
func (s *snapshotter) inodes(ctx context.Context, name string, parents []string) (int64, error) {
	var n int64
	var err error
	if filesystem, _, final := strings.Cut(name, "@"); final {
		id := strings.TrimPrefix(filesystem, s.dataset+"/")
		n, err = s.objects.anew(id, func() (int64, error) { return s.zfs.Objects(ctx, name) })
	} else {
		n, err = s.zfs.Objects(ctx, name)
	}
	if err != nil || len(parents) == 0 {
		return n, err
	}
	inherited, err := s.objects.get(parents[0], func() (int64, error) {
		return s.zfs.Objects(ctx, s.name(parents[0])+committed)
	})
	if err != nil {
		return 0, err
	}
	return max(n-inherited, 0), nil
}
