package snapshotter

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// ZFS waits for the pool with every clone: milliseconds on one that is idle, seconds on one that is written to. A container
// need not: of each image that containers are made of there is a spare, a clone that
// nobody asked for yet, and the next one is made when that is given away.
//
// A spare is a filesystem with the mark and without a key. Its id was taken from the records' own count, so that
// it has the name that it would have anyway, and no record is there until it is given away: what a daemon leaves of them
// the next one's sweep destroys as all that no record names.

// spareState is what becomes of a spare.
type spareState int

const (
	spareMaking spareState = iota // ZFS works
	spareReady
	spareTaken // a record of it is being written
)

type spare struct {
	id    string
	state spareState
	since time.Time
	// orphan says that the parent's record was dropped meanwhile. Both go when the state ends.
	orphan bool
}

// spares are the clones that are ready, by the ids of their parents. The zero value has none, ever.
type spares struct {
	most int // how many there are: those of the images that containers were made of last

	mu     sync.Mutex
	closed bool
	wanted map[string]string // names of the parents that shall have one, by their ids
	of     map[string]*spare
	next   map[string]string // ids for the spares of what is being unpacked, by its id
	making chan struct{}     // closed when those that are being made are there; nil: none is
	makers int               // runs that make some
	runs   sync.WaitGroup
}

// want notes that a committed snapshot shall have a spare, and runs make later if nobody does yet.
func (p *spares) want(id, name string, due func() <-chan struct{}, run func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.most == 0 || p.of[id] != nil && p.of[id].state != spareTaken {
		return
	}
	planned := len(p.wanted) > 0
	if p.wanted == nil {
		p.wanted = map[string]string{}
	}
	p.wanted[id] = name
	if planned {
		return
	}
	c := due()
	p.runs.Go(func() {
		<-c
		run()
	})
}

// plan notes the id that the spare of a snapshot will have when that is committed.
func (p *spares) plan(of, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.next == nil {
		p.next = map[string]string{}
	}
	p.next[of] = id
}

// planned answers that id; empty if there is none.
func (p *spares) planned(of string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.next[of]
}

// unplan is for one that was made, or will not be.
func (p *spares) unplan(of string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.next, of)
}

// unwant is for one that turned out to be no container's parent.
func (p *spares) unwant(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.wanted, id)
}

// begin answers the wanted that have none. If there are any, others wait until end.
func (p *spares) begin() map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.wanted
	p.wanted = nil
	maps.DeleteFunc(all, func(id, _ string) bool { return p.closed || p.of[id] != nil })
	if len(all) == 0 {
		return nil
	}
	if p.makers == 0 {
		p.making = make(chan struct{})
	}
	p.makers++
	return all
}

func (p *spares) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.makers--; p.makers == 0 {
		close(p.making)
		p.making = nil
	}
}

// reserve notes a spare that is to be made. It answers the id of the oldest, which has to go, if there are too many.
func (p *spares) reserve(parent, id string) (old string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.of == nil {
		p.of = map[string]*spare{}
	}
	if len(p.of) >= p.most {
		oldest, of := (*spare)(nil), ""
		for parent, i := range p.of {
			if i.state == spareReady && (oldest == nil || i.since.Before(oldest.since)) {
				oldest, of = i, parent
			}
		}
		if oldest != nil {
			old = oldest.id
			delete(p.of, of)
		}
	}
	p.of[parent] = &spare{id: id, since: time.Now()}
	return old
}

// take answers the id of the spare of a parent; empty if there is none. It is followed by settle.
func (p *spares) take(parent string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := p.of[parent]; i != nil && i.state == spareReady {
		i.state = spareTaken
		return i.id
	}
	return ""
}

// settle ends that a spare is being made or taken: it is ready, or is none. orphan: it has to go with its parent.
func (p *spares) settle(parent string, ready bool) (orphan bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.of[parent]
	i.state = spareReady
	if i.orphan || !ready {
		delete(p.of, parent)
	}
	return i.orphan
}

// drop is for a snapshot whose record was dropped. id is that of its spare; held: one is being made or taken,
// and what is to be done is done at the end of that.
func (p *spares) drop(parent string) (id string, held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.wanted, parent)
	i := p.of[parent]
	switch {
	case i == nil:
		return "", false
	case i.state == spareReady:
		delete(p.of, parent)
		return i.id, false
	}
	i.orphan = true
	return "", true
}

// held are the ids of all spares, and of the parents that wait for them.
func (p *spares) held() map[string]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := map[string]bool{}
	for _, id := range p.next {
		ids[id] = true // its parent is being committed
	}
	for parent, i := range p.of {
		ids[i.id] = true
		ids[parent] = ids[parent] || i.orphan
	}
	return ids
}

// wait waits for those that are being made.
func (p *spares) wait(ctx context.Context) error {
	p.mu.Lock()
	making := p.making
	p.mu.Unlock()
	if making == nil {
		return nil
	}
	select {
	case <-making:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// off says that no more are made.
func (p *spares) off() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed || p.most == 0
}

// close has no more of them made. Those that are there are left to the next daemon.
func (p *spares) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
}

// wantSpare has a spare made of a committed snapshot, when the filesystems made meanwhile get their marks: the pool is written for all at once.
func (s *snapshotter) wantSpare(ctx context.Context, id, name string) {
	if !s.hasty {
		return // one without its properties would not do, or an end cannot be waited for
	}
	s.spares.want(id, name, func() <-chan struct{} { return s.creating.later(completeDelay) }, func() {
		s.makeSpares(context.WithoutCancel(ctx))
	})
}

// sparesAtOnce is how many are made at once.
const sparesAtOnce = 16

// makeSpares makes those that are wanted.
func (s *snapshotter) makeSpares(ctx context.Context) {
	wanted := s.spares.begin()
	if len(wanted) == 0 {
		return
	}
	defer s.spares.end()
	made, err := s.reserveSpares(ctx, wanted)
	if err != nil {
		log.G(ctx).WithError(err).Warn("no spares are made: the next containers wait for the pool")
		return
	}
	var group errgroup.Group
	group.SetLimit(sparesAtOnce)
	for parent, id := range made {
		group.Go(func() error {
			s.makeSpare(ctx, parent, id)
			return nil
		})
	}
	_ = group.Wait() // none fails
}

// reserveSpares writes down the ids of the spares to be, and answers them by the parents' ids.
func (s *snapshotter) reserveSpares(ctx context.Context, wanted map[string]string) (map[string]string, error) {
	made := map[string]string{}
	err := s.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		for _, parent := range slices.Sorted(maps.Keys(wanted)) {
			id, info, _, err := storage.GetInfo(ctx, wanted[parent])
			if errdefs.IsNotFound(err) || err == nil && (id != parent || info.Kind != snapshots.KindCommitted) {
				continue // it is gone
			}
			if err != nil {
				return err
			}
			spare, err := nextID(tx)
			if err != nil {
				return err
			}
			made[parent] = spare
			s.creating.start(spare, s.origin([]string{parent}), s.spareProperties(spare))
			s.reserveSpare(parent, spare)
		}
		return put(tx, creatingKey, s.creating.String())
	})
	if err != nil {
		for parent, id := range made {
			s.creating.end(id)
			s.settleSpare(parent, id, false)
		}
	}
	return made, err
}

// reserveSpare notes a spare; the oldest goes if there are too many.
func (s *snapshotter) reserveSpare(parent, id string) {
	if old := s.spares.reserve(parent, id); old != "" {
		s.doomed.add(old)
	}
}

// spareProperties are those of a snapshot's filesystem without the key.
func (s *snapshotter) spareProperties(id string) zfs.Properties {
	props := s.description(id, "")
	delete(props, PropKey)
	return props
}

func (s *snapshotter) makeSpare(ctx context.Context, parent, id string) {
	origin, props := s.origin([]string{parent}), s.spareProperties(id)
	err := s.zfs.Clone(ctx, origin, s.home(id), props)
	switch {
	case err == nil, errdefs.IsAlreadyExists(err), errdefs.IsNotFound(err):
		s.creating.end(id) // first: whoever takes it begins again
	default:
		s.creating.fail(id) // it may be there all the same
		s.creating.owe(id, origin, props)
		s.doomed.add(id)
	}
	s.settleSpare(parent, id, err == nil)
	if err != nil {
		log.G(ctx).WithError(err).WithField("dataset", s.home(id)).Debug("no spare of this is made: the next container waits for the pool")
	}
}

// settleSpare ends that a spare is being made or taken.
func (s *snapshotter) settleSpare(parent, id string, ready bool) {
	if s.spares.settle(parent, ready) {
		if ready {
			s.doomed.add(id)
		}
		s.doomed.add(parent)
	}
}

// planSpare takes an id for the spare of a snapshot that is recorded in this transaction, if that will be made with its commit.
func (s *snapshotter) planSpare(tx *bolt.Tx, of string) error {
	if !s.hasty || !s.zfs.ClonesAtOnce() || s.spares.off() {
		return nil
	}
	id, err := nextID(tx)
	if err == nil {
		s.spares.plan(of, id)
	}
	return err
}

// commitWithSpare takes the snapshot of one that is being unpacked together with the spare that the next layer, or a container, will have.
// Empty: there is none; the snapshot is not taken.
func (s *snapshotter) commitWithSpare(ctx context.Context, id, snap string, props zfs.Properties) string {
	spare := s.spares.planned(id)
	if spare == "" {
		return ""
	}
	err := s.zfs.SnapshotAndClone(ctx, snap, props, s.home(spare), s.spareProperties(spare))
	if err == nil {
		return spare
	}
	log.G(ctx).WithError(err).WithField("dataset", snap).Debug("no spare with the snapshot")
	s.dropPlanned(id, spare)
	return ""
}

// addSpare is for one that was made with its parent's commit.
func (s *snapshotter) addSpare(parent, id string) {
	s.reserveSpare(parent, id)
	s.spares.unplan(parent)
	s.settleSpare(parent, id, true)
}

// dropPlanned is for one whose parent was not committed with it. An error tells not whether it is there.
func (s *snapshotter) dropPlanned(parent, id string) {
	s.spares.unplan(parent)
	s.doomed.add(id)
}

// doom is for a snapshot whose record was dropped: its dataset and its spare go with the next Cleanup.
func (s *snapshotter) doom(id string) {
	s.spares.unplan(id)
	spare, held := s.spares.drop(id)
	if spare != "" {
		s.doomed.add(spare)
	}
	if !held {
		s.doomed.add(id)
	}
}

// takeSpare answers the spare of a snapshot with its parent's id; empty if there is none that is what it was when it was made. It is
// followed by settleSpare.
func (s *snapshotter) takeSpare(ctx context.Context, name string) (parent, id string, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		parent, _, _, err = storage.GetInfo(ctx, name)
		return err
	})
	if errdefs.IsNotFound(err) {
		return "", "", nil // that is said by whoever makes the record
	}
	if err != nil {
		return "", "", err
	}
	if id = s.spares.take(parent); id == "" {
		return parent, "", nil
	}
	// Anybody may have destroyed it, or made it independent of the image.
	origin, err := s.zfs.Property(ctx, s.home(id), "origin")
	if err == nil && origin == s.origin([]string{parent}) {
		return parent, id, nil
	}
	log.G(ctx).WithError(err).WithField("dataset", s.home(id)).Warn("somebody changed a spare: it is not used")
	s.settleSpare(parent, id, false)
	s.doomed.add(id) // if it is ours still
	return parent, "", ctx.Err()
}

// recordsOf is where containerd's package storage has the records, and counts their ids.
func recordsOf(tx *bolt.Tx) (*bolt.Bucket, error) {
	if version := tx.Bucket([]byte("v1")); version != nil {
		if b := version.Bucket([]byte("snapshots")); b != nil {
			return b, nil
		}
	}
	return nil, fmt.Errorf("the records have another form than is known here: %w", errdefs.ErrInternal)
}

// nextID takes an id from the count.
func nextID(tx *bolt.Tx) (string, error) {
	records, err := recordsOf(tx)
	if err != nil {
		return "", err
	}
	n, err := records.NextSequence()
	return strconv.FormatUint(n, 10), err
}

// withID has create give the record that it makes an id that was taken from the count before.
func withID(tx *bolt.Tx, id string, create func() error) error {
	n, err := strconv.ParseUint(id, 10, 64)
	if err != nil {
		return err
	}
	records, err := recordsOf(tx)
	if err != nil {
		return err
	}
	last := records.Sequence()
	if err := records.SetSequence(n - 1); err != nil {
		return err
	}
	if err := create(); err != nil {
		return err
	}
	return records.SetSequence(last)
}
