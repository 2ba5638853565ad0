package snapshotter

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// A crash between a snapshot's record and its dataset leaves a record of what
// was never made. That the dataset is missing does not tell: it may have been
// renamed by hand, and is somebody's data. So the ids of the snapshots that are
// being made stand beside the records. They are written with the transactions
// that change records, and cost none of their own.
var creatingKey = []byte("creating")

// creations are the snapshots that this process is making, by their ids.
type creations struct {
	mu  sync.Mutex
	ids map[string]*creation
	due chan struct{} // closed when what is still to be done is done; nil: nothing waits for it
}

// later is closed after a while, or when somebody waits for what is to be done then.
func (c *creations) later(d time.Duration) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.due == nil {
		c.due = make(chan struct{})
		time.AfterFunc(d, c.hurry)
	}
	return c.due
}

func (c *creations) hurry() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.due != nil {
		close(c.due)
		c.due = nil
	}
}

// creation is what is still to be done for one.
type creation struct {
	props  zfs.Properties // what its filesystem lacks; nil: the filesystem is being made
	origin string         // of what it is a clone
	ended  chan struct{}  // closed at the end of the call that is on its way to give it that; nil: there is none
}

func (c *creations) put(id string, of creation) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ids == nil {
		c.ids = map[string]*creation{}
	}
	c.ids[id] = &of
}

func (c *creations) begin(id string) { c.put(id, creation{}) }

// owe says what the filesystem lacks, or may lack if it is there.
func (c *creations) owe(id, origin string, props zfs.Properties) {
	c.put(id, creation{props: props, origin: origin})
}

// start is owe for a filesystem that is given it now.
func (c *creations) start(id, origin string, props zfs.Properties) {
	c.put(id, creation{props: props, origin: origin, ended: make(chan struct{})})
}

// fail is for one that was not given it.
func (c *creations) fail(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.ids[id].ended)
	c.ids[id].ended = nil
}

func (c *creations) end(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := c.ids[id]; i != nil && i.ended != nil {
		close(i.ended)
	}
	delete(c.ids, id)
}

func (c *creations) has(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ids[id] != nil
}

// retry starts all that lack something and for which nothing is on its way.
func (c *creations) retry() map[string]creation {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := map[string]creation{}
	for id, i := range c.ids {
		if i.props != nil && i.ended == nil {
			i.ended = make(chan struct{})
			all[id] = *i
		}
	}
	return all
}

// wait waits for the end of all that is on its way now.
func (c *creations) wait(ctx context.Context) error {
	c.hurry()
	c.mu.Lock()
	var all []chan struct{}
	for _, i := range c.ids {
		if i.ended != nil {
			all = append(all, i.ended)
		}
	}
	c.mu.Unlock()
	for _, ended := range all {
		select {
		case <-ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (c *creations) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(slices.Sorted(maps.Keys(c.ids)), " ")
}

// write is a transaction that changes records.
func (s *snapshotter) write(ctx context.Context, fn storage.TransactionCallback) error {
	return s.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if err := fn(ctx); err != nil {
			return err
		}
		return put(tx, creatingKey, s.creating.String())
	})
}

// storedCreations are the ids that the last transaction left.
func (s *snapshotter) storedCreations(ctx context.Context) (string, error) {
	return s.ownValue(ctx, creatingKey)
}

// settle takes those that were made out of the stored ids, if no transaction has
// done it since.
func (s *snapshotter) settle(ctx context.Context) error {
	ids, err := s.storedCreations(ctx)
	if err != nil || ids == s.creating.String() {
		return err
	}
	return s.write(ctx, func(context.Context) error { return nil })
}

// recordedOrigin is what the filesystem of a record was made of, within a transaction. It may
// have been committed before it was complete.
func (s *snapshotter) recordedOrigin(ctx context.Context, key string) (string, error) {
	_, info, _, err := storage.GetInfo(ctx, key)
	if err != nil || info.Labels[LabelCloneOf] != "" {
		return info.Labels[LabelCloneOf], err
	}
	if info.Parent == "" {
		return s.origin(nil), nil
	}
	parent, _, _, err := storage.GetInfo(ctx, info.Parent)
	return s.origin([]string{parent}), err
}

// dropUnfinished drops the records whose datasets a crash kept from being made,
// and finds out which of those that were made have to be completed.
func (s *snapshotter) dropUnfinished(ctx context.Context) error {
	ids, err := s.storedCreations(ctx)
	if err != nil || ids == "" {
		return err
	}
	var keys, origins map[string]string
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if keys, err = keysByID(ctx); err != nil {
			return err
		}
		origins = map[string]string{}
		for _, id := range strings.Fields(ids) {
			if key, ok := keys[id]; ok {
				if origins[id], err = s.recordedOrigin(ctx, key); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	var lost []string
	for _, id := range strings.Fields(ids) {
		key, recorded := keys[id]
		state, err := s.state(ctx, id, cmp.Or(origins[id], anyOrigin))
		switch {
		case err != nil:
			return err
		case state == missing && recorded:
			lost = append(lost, key)
			log.G(ctx).WithField("key", key).WithField("dataset", s.name(id)).Info("a crash kept this snapshot from being made: its record is dropped")
		case state == unmarked:
			s.creating.owe(id, cmp.Or(origins[id], anyOrigin), s.description(id, key))
		}
	}
	return s.write(ctx, func(ctx context.Context) error {
		for _, key := range lost {
			if _, _, err := storage.Remove(ctx, key); err != nil {
				return err
			}
		}
		return nil
	})
}
