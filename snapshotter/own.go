package snapshotter

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// What this package keeps beside containerd's records is in a bucket of its own.
var (
	ownBucket = []byte("containerd-pve")
	storeKey  = []byte("store")
)

// update is a transaction in which fn may write to containerd's records and to
// the bucket of our own.
func (s *snapshotter) update(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
	ctx, t, err := s.ms.TransactionContext(ctx, true)
	if err != nil {
		return err
	}
	tx, ok := t.(*bolt.Tx)
	if !ok {
		err = fmt.Errorf("the records are in no bolt file but in %T: %w", t, errdefs.ErrInternal)
	} else {
		err = fn(ctx, tx)
	}
	if err != nil {
		return errors.Join(err, t.Rollback())
	}
	return t.Commit()
}

func get(tx *bolt.Tx, key []byte) string {
	b := tx.Bucket(ownBucket)
	if b == nil {
		return ""
	}
	return string(b.Get(key))
}

func put(tx *bolt.Tx, key []byte, value string) error {
	if get(tx, key) == value {
		return nil
	}
	b, err := tx.CreateBucketIfNotExists(ownBucket)
	if err != nil {
		return err
	}
	return b.Put(key, []byte(value))
}

func (s *snapshotter) ownValue(ctx context.Context, key []byte) (value string, err error) {
	_, t, err := s.ms.TransactionContext(ctx, false)
	if err != nil {
		return "", err
	}
	if tx, ok := t.(*bolt.Tx); ok {
		value = get(tx, key)
	}
	return value, t.Rollback()
}

// keysByID are the keys of all records, within a transaction; none if there never
// was a record.
func keysByID(ctx context.Context) (map[string]string, error) {
	keys, err := storage.IDMap(ctx)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	return keys, err
}

// bind ties the records to the store that the parent dataset was claimed for.
// With records that are lost or another store's, every dataset would look like
// an orphan to be destroyed.
func (s *snapshotter) bind(ctx context.Context, store string) error {
	of, err := s.ownValue(ctx, storeKey)
	if err != nil || of == store {
		return err
	}
	if of != "" {
		return fmt.Errorf("metadata.db is of the store %s, the file store says %s: put the one back that belongs here: %w", of, store, errdefs.ErrFailedPrecondition)
	}
	var keys map[string]string
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		keys, err = keysByID(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if len(keys) == 0 {
		names, err := s.zfs.Children(ctx, s.dataset)
		if err != nil {
			return err
		}
		for _, name := range names {
			if mark, err := s.zfs.Property(ctx, name, propID); err != nil {
				return err
			} else if mark != zfs.Unset {
				return fmt.Errorf("metadata.db is new, and %s is a dataset of ours whose record is lost: put the old file back, or begin anew with another dataset: %w", name, errdefs.ErrFailedPrecondition)
			}
		}
	}
	return s.update(ctx, func(_ context.Context, tx *bolt.Tx) error { return put(tx, storeKey, store) })
}
