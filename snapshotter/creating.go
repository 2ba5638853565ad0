package snapshotter

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
)

// A crash between a snapshot's record and its dataset leaves a record of what
// was never made. That the dataset is missing does not tell: it may have been
// renamed by hand, and is somebody's data. So the ids of the snapshots that are
// being made stand beside the records. They are written with the transactions
// that change records, and cost none of their own.
var creatingKey = []byte("creating")

// creations are the ids of the snapshots that this process is making.
type creations struct {
	mu  sync.Mutex
	ids map[string]struct{}
}

func (c *creations) begin(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ids == nil {
		c.ids = map[string]struct{}{}
	}
	c.ids[id] = struct{}{}
}

func (c *creations) end(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ids, id)
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

// dropUnfinished drops the records whose datasets a crash kept from being made.
func (s *snapshotter) dropUnfinished(ctx context.Context) error {
	ids, err := s.storedCreations(ctx)
	if err != nil || ids == "" {
		return err
	}
	var missing []string
	for _, id := range strings.Fields(ids) {
		_, err := s.zfs.Property(ctx, s.name(id), propID)
		if errdefs.IsNotFound(err) {
			missing = append(missing, id)
		} else if err != nil {
			return fmt.Errorf("was %s made: %w", s.name(id), err)
		}
	}
	return s.write(ctx, func(ctx context.Context) error {
		keys, err := keysByID(ctx)
		if err != nil {
			return err
		}
		for _, id := range missing {
			key, ok := keys[id]
			if !ok {
				continue
			}
			if _, _, err := storage.Remove(ctx, key); err != nil {
				return err
			}
			log.G(ctx).WithField("key", key).WithField("dataset", s.name(id)).Info("a crash kept this snapshot from being made: its record is dropped")
		}
		return nil
	})
}
