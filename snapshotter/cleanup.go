package snapshotter

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// ZFS lists datasets one by one, so what containerd calls after each of its garbage
// collections does not list: the snapshots whose records were dropped are known. What a
// crash left, and what somebody else did, are found by the daemon's start and its sweep, which list.

// doomed are the ids of snapshots whose records are gone and whose datasets may not
// be. The zero value is ready.
type doomed struct {
	mu  sync.Mutex
	ids map[string]struct{}
}

func (d *doomed) add(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ids == nil {
		d.ids = map[string]struct{}{}
	}
	d.ids[id] = struct{}{}
}

func (d *doomed) forget(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.ids, id)
}

func (d *doomed) all() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.ids))
}

// Cleanup destroys the datasets of the snapshots that were removed. What is in use is
// logged and left to the next call. Errors: those of ZFS.
func (s *snapshotter) Cleanup(ctx context.Context) error { return s.clean(ctx, false) }

// clean is Cleanup; with all of them the marked datasets that no record names are destroyed,
// whoever dropped it.
func (s *snapshotter) clean(ctx context.Context, all bool) error {
	if err := s.completeAll(ctx); err != nil {
		return err
	}
	if err := s.spares.wait(ctx); err != nil { // its parent could not be destroyed
		return err
	}
	all = all || !s.listed.Load()
	find := s.findDoomed
	if all {
		find = s.findAll
	}
	ids, gone, err := find(ctx)
	if err != nil {
		return err
	}
	// The one before may wait for ZFS. A sweep that lists keeps nobody waiting: what it found
	// stays without a record, and may be gone when its turn comes.
	if err := s.cleaning.Acquire(ctx, 1); err != nil {
		return err
	}
	defer s.cleaning.Release(1)
	s.keeps.wait() // a mount would be in the way
	victims := make([]string, 0, 2*len(ids))
	for _, id := range ids {
		if name := s.places.get(id); name != "" {
			s.hide(ctx, name)
		}
		victims = append(victims, s.name(id)+committed, s.name(id))
		s.objects.forget(id)
		s.doomed.add(id) // until it is gone
	}
	failed, err := s.zfs.DestroyAll(ctx, victims)
	if err == nil && len(failed) > 0 {
		failed, err = s.destroyTaken(ctx, victims, failed)
	}
	left := 0
	for _, id := range ids {
		name := s.name(id)
		// Of the two the snapshot says more: the filesystem stays because of it.
		if err := cmp.Or(failed[name+committed], failed[name]); err != nil {
			log.G(ctx).WithError(err).WithField("dataset", name).Warn("not destroyed yet; tried again later")
			left++
			continue
		}
		gone = append(gone, id)
	}
	if err == nil {
		err = s.forget(ctx, gone)
	}
	s.cleaned.count(len(ids), left, err)
	if err != nil {
		return fmt.Errorf("destroying what no record names: %w", err)
	}
	if all {
		s.listed.Store(true)
	}
	return nil
}

// findAll lists the datasets: ids are those that are to be destroyed, gone those of
// places where nothing is any more.
func (s *snapshotter) findAll(ctx context.Context) (ids, gone []string, err error) {
	// Datasets before records: one made in between is in the records only.
	names, err := s.zfs.Children(ctx, s.dataset)
	if err != nil {
		return nil, nil, fmt.Errorf("listing %s: %w", s.dataset, s.lostRoot(err))
	}
	held := s.spares.held() // before the records: one that is given away has one first
	live, err := s.live(ctx)
	if err != nil {
		return nil, nil, err
	}
	of := s.places.all()
	for _, name := range names {
		if id := strings.TrimPrefix(name, s.dataset+"/"); of[id] == "" {
			of[id] = name
		}
	}
	// What was made since the listing began may be a clone of what is to be destroyed.
	for _, id := range s.doomed.all() {
		of[id] = s.name(id)
	}
	maps.DeleteFunc(of, func(id, _ string) bool { return live[id] != "" || held[id] })
	return s.marked(ctx, of)
}

// findDoomed is findAll for those whose records this process dropped.
func (s *snapshotter) findDoomed(ctx context.Context) (ids, gone []string, err error) {
	of := map[string]string{}
	for _, id := range s.doomed.all() {
		of[id] = s.name(id)
	}
	ids, gone, err = s.marked(ctx, of)
	if len(gone) > 0 {
		// Not if all of them are away.
		if _, err := s.zfs.Property(ctx, s.dataset, propStore); err != nil {
			return nil, nil, fmt.Errorf("looking for %s: %w", s.name(gone[0]), s.lostRoot(err))
		}
	}
	return ids, gone, err
}

// live are the keys of the records, by their ids.
func (s *snapshotter) live(ctx context.Context) (live map[string]string, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		live, err = keysByID(ctx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the records: %w", err)
	}
	return live, nil
}

// marked are those of the datasets, which are given by their ids, that bear our mark, in
// the order in which they have to be destroyed: a clone is younger than its origin. gone are not there.
func (s *snapshotter) marked(ctx context.Context, of map[string]string) (ids, gone []string, err error) {
	var numbers []uint64
	for id, name := range of {
		n, err := strconv.ParseUint(id, 10, 64)
		if err != nil {
			continue
		}
		mark, err := s.zfs.Property(ctx, name, propID)
		switch {
		case errdefs.IsNotFound(err):
			gone = append(gone, id)
		case err != nil:
			return nil, nil, fmt.Errorf("whose is %s: %w", name, err)
		case mark == id:
			numbers = append(numbers, n)
		case !s.creating.has(id):
			s.doomed.forget(id) // it is somebody's
		}
	}
	slices.Sort(numbers)
	for _, n := range slices.Backward(numbers) {
		ids = append(ids, strconv.FormatUint(n, 10))
	}
	return ids, gone, nil
}

// forget is for datasets that are gone.
func (s *snapshotter) forget(ctx context.Context, ids []string) error {
	if err := s.forgetPlaces(ctx, ids); err != nil {
		return err
	}
	for _, id := range ids {
		s.doomed.forget(id)
	}
	return nil
}
