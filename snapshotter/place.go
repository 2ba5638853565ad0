package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

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
	// Show mounts a filesystem that has a place where its property mountpoint says,
	// until it is destroyed; it is done if it was before.
	Show(ctx context.Context, dataset string) error
}

// Show mounts a filesystem that has a place where its property mountpoint says.
// Proxmox's tools take it for mounted there once it is mounted at all, and a container's
// is mounted in its bundle. Programs of it get no privileges from there.
func (s *snapshotter) Show(ctx context.Context, dataset string) error {
	dir, err := s.shownAt(ctx, dataset)
	if err != nil || dir == "" {
		return err
	}
	if mounted, err := mountinfo.Mounted(dir); err == nil && mounted {
		return nil
	}
	err = os.MkdirAll(dir, 0o755)
	if err == nil {
		err = unix.Mount(dataset, dir, "zfs", unix.MS_NOSUID|unix.MS_NODEV, "")
	}
	if err != nil {
		return fmt.Errorf("mounting %s at %s: %w", dataset, dir, err)
	}
	return nil
}

// shownAt is the directory that Show mounts at; empty if there is none.
func (s *snapshotter) shownAt(ctx context.Context, dataset string) (string, error) {
	dir, err := s.zfs.Property(ctx, dataset, "mountpoint")
	if !filepath.IsAbs(dir) {
		dir = "" // legacy, none
	}
	return dir, err
}

// hide undoes Show for a filesystem that is to be destroyed. If it cannot, that
// cannot be either.
func (s *snapshotter) hide(ctx context.Context, dataset string) {
	dir, err := s.shownAt(ctx, dataset)
	if err != nil || dir == "" {
		return
	}
	if mounted, err := mountinfo.Mounted(dir); err == nil && mounted {
		if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); err != nil {
			log.G(ctx).WithError(err).WithField("dataset", dataset).Debugf("it stays mounted at %s", dir)
			return
		}
	}
	_ = os.Remove(dir) // an empty directory only
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

// Placed says whether the dataset of that name is one that Place moved there, and no
// other that has its name since, such as a backup's. Errors: NotFound.
func Placed(ctx context.Context, z interface {
	Property(ctx context.Context, name, property string) (string, error)
}, dataset string,
) (bool, error) {
	place, err := z.Property(ctx, dataset, propPlace)
	return place == dataset, err
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
