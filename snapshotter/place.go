package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// A container that Proxmox knows has its dataset where Proxmox looks for it, by a
// name with the VMID (subvol-100-disk-0). Which those are stands beside the
// records: it is written before the dataset is renamed, and dropped after it is destroyed.
var placesBucket = []byte("places")

// Placer moves datasets of snapshots to names of others' choice.
type Placer interface {
	// Place renames the filesystem of an active snapshot, which is named as in its
	// mounts, and gives it the properties; with the name it has nothing is renamed.
	// Errors: NotFound, no snapshot of ours; FailedPrecondition, it is not active;
	// AlreadyExists, the name is taken; those of ZFS, which leave it where it was.
	Place(ctx context.Context, dataset, to string, props zfs.Properties) error
}

// places are the datasets that are not called by their ids, by their ids. The
// zero value is ready.
type places struct {
	mu sync.RWMutex
	of map[string]string
}

func (p *places) get(id string) string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.of[id]
}

func (p *places) set(id, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.of == nil {
		p.of = map[string]string{}
	}
	p.of[id] = name
}

func (p *places) forget(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.of, id)
}

func (p *places) all() map[string]string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	all := map[string]string{}
	maps.Copy(all, p.of)
	return all
}

// name is the filesystem of a snapshot.
func (s *snapshotter) name(id string) string {
	if name := s.places.get(id); name != "" {
		return name
	}
	return s.home(id)
}

// home is what it is called unless somebody gave it another place.
func (s *snapshotter) home(id string) string { return s.dataset + "/" + id }

// idOf is the snapshot that a filesystem is of.
func (s *snapshotter) idOf(dataset string) string {
	for id, name := range s.places.all() {
		if name == dataset {
			return id
		}
	}
	id, ok := strings.CutPrefix(dataset, s.dataset+"/")
	if !ok {
		return ""
	}
	return id
}

// Owner knows the datasets of its snapshots.
type Owner interface {
	// Owns says whether a dataset is called as one of a snapshot here is.
	Owns(dataset string) bool
}

// Owns implements Owner.
func (s *snapshotter) Owns(dataset string) bool {
	_, err := strconv.ParseUint(s.idOf(dataset), 10, 64)
	return err == nil
}

// Place implements Placer.
func (s *snapshotter) Place(ctx context.Context, dataset, to string, props zfs.Properties) error {
	fail := func(err error) error { return fmt.Errorf("moving %s to %s: %w", dataset, to, err) }
	s.placing.Lock()
	defer s.placing.Unlock()
	id := s.idOf(dataset)
	var key string
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		keys, err := keysByID(ctx)
		if err != nil {
			return err
		}
		if key = keys[id]; key == "" {
			return fmt.Errorf("it is no snapshot of ours: %w", errdefs.ErrNotFound)
		}
		_, info, _, err := storage.GetInfo(ctx, key)
		if err == nil && info.Kind != snapshots.KindActive {
			err = fmt.Errorf("snapshot %s is not active: %w", key, errdefs.ErrFailedPrecondition)
		}
		return err
	})
	if err != nil {
		return fail(err)
	}
	if dataset != to {
		// What is on its way to it goes to its old name.
		if err := s.creating.wait(ctx); err != nil {
			return fail(err)
		}
		if err := s.putPlace(ctx, id, to); err != nil {
			return fail(err)
		}
		if err := s.zfs.Rename(ctx, dataset, to); err != nil {
			back := s.places.get(id)
			return fail(errors.Join(s.lost(ctx, err, id, key), s.putPlace(context.WithoutCancel(ctx), id, back)))
		}
		s.places.set(id, to)
	}
	all := zfs.Properties{propPlace: to, propStore: s.store}
	maps.Copy(all, props)
	if err := s.zfs.Set(ctx, to, all); err != nil {
		return fail(err)
	}
	return nil
}

// putPlace writes a place down; an empty one is none.
func (s *snapshotter) putPlace(ctx context.Context, id, name string) error {
	return s.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		own, err := tx.CreateBucketIfNotExists(ownBucket)
		if err != nil {
			return err
		}
		b, err := own.CreateBucketIfNotExists(placesBucket)
		if err != nil {
			return err
		}
		if name == "" {
			return b.Delete([]byte(id))
		}
		return b.Put([]byte(id), []byte(name))
	})
}

// readPlaces finds out where the datasets are after a start: a crash may have come
// before the renaming.
func (s *snapshotter) readPlaces(ctx context.Context) error {
	stored := map[string]string{}
	_, t, err := s.ms.TransactionContext(ctx, false)
	if err != nil {
		return err
	}
	if tx, ok := t.(*bolt.Tx); ok {
		if own := tx.Bucket(ownBucket); own != nil {
			if b := own.Bucket(placesBucket); b != nil {
				err = b.ForEach(func(id, name []byte) error {
					stored[string(id)] = string(name)
					return nil
				})
			}
		}
	}
	if err = errors.Join(err, t.Rollback()); err != nil {
		return err
	}
	for id, name := range stored {
		mark, err := s.zfs.Property(ctx, name, propID)
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("whose is %s: %w", name, err)
		}
		if err == nil && mark == id {
			s.places.set(id, name)
			continue
		}
		switch _, err := s.zfs.Property(ctx, s.home(id), propID); {
		case err == nil:
			// It was not renamed: whoever asked for it asks again.
			if err := s.putPlace(ctx, id, ""); err != nil {
				return err
			}
		case errdefs.IsNotFound(err):
			// Somebody renamed or destroyed it, or it is gone with its record.
			s.places.set(id, name)
			log.G(ctx).WithField("dataset", name).Debug("the dataset of a snapshot is not where it was put")
		default:
			return fmt.Errorf("whose is %s: %w", s.home(id), err)
		}
	}
	return nil
}

// forgetPlaces drops those of datasets that are gone.
func (s *snapshotter) forgetPlaces(ctx context.Context, ids []string) error {
	for _, id := range ids {
		if s.places.get(id) == "" {
			continue
		}
		if err := s.putPlace(ctx, id, ""); err != nil {
			return err
		}
		s.places.forget(id)
	}
	return nil
}
