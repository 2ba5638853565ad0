// Package snapshotter is containerd's snapshots.Snapshotter on ZFS. It owns
// <root> (metadata.db, lock, store id) and the filesystems below its parent
// dataset that bear its mark, and touches no other dataset. It never mounts.
//
// A record is written before its dataset is made, and dropped before its
// dataset is destroyed; so what a crash leaves is a marked dataset without a
// record, which Cleanup destroys, or a record that is known to be of a dataset
// not made yet, which New drops. No bolt transaction is open while ZFS works.
package snapshotter

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/locker"
	"github.com/moby/sys/atomicwriter"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/mounts"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// The user properties of datasets.
const (
	propID    = "containerd-pve:id"    // of a snapshot's filesystem: its own last name
	PropKey   = "containerd-pve:key"   // of the same: the key of Prepare or View
	propName  = "containerd-pve:name"  // of its @snapshot: the name of Commit
	propStore = "containerd-pve:store" // of the parent dataset, and of one with a place of its own: whose it is
	propPlace = "containerd-pve:place" // of the latter: its own name
	// PropTaken is of a snapshot that template/state took of a container's filesystem;
	// it goes with that. Empty: that is gone, and only clones need it.
	PropTaken = "containerd-pve:state"
	// maxProperty is the longest value that ZFS takes (ZAP_MAXVALUELEN, with its NUL).
	maxProperty = 8191

	committed = "@snapshot"

	retryInterval = 5 * time.Minute
	// completeDelay is how long what a filesystem lacks of its description may wait: the pool is written for it, which
	// whoever mounts the filesystem just made, or commits it, would wait for.
	completeDelay = time.Second
	// listRest is how many times longer than it took all datasets are not listed again: with many of them it would
	// keep a processor busy for no good.
	listRest = 20
)

type snapshotter struct {
	zfs     zfs.ZFS
	dataset string
	store   string // its id
	ms      *storage.MetaStore
	lock    *os.File

	inherited zfs.Properties // what a filesystem has of its own accord, of what it has to have
	hasty     bool           // the rest can be set after the caller was answered
	creating  creations
	places    places
	placing   sync.Mutex // one Place at a time
	keeps     keeps
	spares    spares
	commits   *locker.Locker // by key: a leftover @snapshot of a crash is told from a racing Commit's
	objects   objects
	doomed    doomed
	cleaning  *semaphore.Weighted // one Cleanup at a time
	listed    atomic.Bool         // all datasets were looked at once
	cleaned   cleaned
	closeOnce sync.Once
	closeErr  error
	stop      context.CancelFunc
	done      chan struct{}
}

// Store is all that a snapshotter of this package does.
type Store interface {
	snapshots.Snapshotter
	snapshots.Cleaner
	Counter
	Placer
	Owner
}

var _ Store = (*snapshotter)(nil)

// DefaultSpares is how many spares there are at most where nobody says otherwise.
const DefaultSpares = 256

// Option changes what New opens.
type Option func(*snapshotter)

// WithSpares bounds how many filesystems are made before they are asked for, of the images that containers were made of last; 0: none.
func WithSpares(most int) Option { return func(s *snapshotter) { s.spares.most = most } }

// New opens the store at root on the parent dataset, which it makes if missing.
func New(ctx context.Context, z zfs.ZFS, root, dataset string, options ...Option) (_ Store, err error) {
	// Its parent is the runtime's as well, whose containers with a user namespace
	// have to get through.
	if err := os.MkdirAll(filepath.Dir(root), 0o711); err != nil {
		return nil, fmt.Errorf("making %s: %w", filepath.Dir(root), err)
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("making %s: %w", root, err)
	}
	lock, err := os.OpenFile(filepath.Join(root, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock: %w", err)
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another daemon serves %s: stop it or use another root: %w", root, errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("locking %s: %w", root, err)
	}
	store, err := storeID(filepath.Join(root, "store"))
	if err != nil {
		return nil, fmt.Errorf("reading the store's id: %w", err)
	}
	if err := claim(ctx, z, dataset, store); err != nil {
		return nil, fmt.Errorf("preparing dataset %s: %w", dataset, err)
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, fmt.Errorf("opening the metadata: %w", err)
	}
	bg, stop := context.WithCancel(context.WithoutCancel(ctx))
	s := &snapshotter{zfs: z, dataset: dataset, store: store, ms: ms, lock: lock, commits: locker.New(), cleaning: semaphore.NewWeighted(1), keeps: keeps{mount: mountDetached}, spares: spares{most: DefaultSpares}, stop: stop, done: make(chan struct{})}
	for _, o := range options {
		o(s)
	}
	if err = s.bind(ctx, store); err == nil {
		err = s.inherit(ctx)
	}
	if err == nil {
		err = s.readPlaces(ctx)
	}
	if err == nil {
		err = s.dropUnfinished(ctx)
	}
	if err == nil {
		err = syncDir(root) // metadata.db may be new
	}
	if err != nil {
		stop()
		return nil, errors.Join(fmt.Errorf("reading the metadata: %w", err), ms.Close())
	}
	go s.sweep(bg)
	return s, nil
}

// storeID is in a file that is whole and on the disk before the id is used: a
// dataset that was claimed for an id nobody knows any more would have to be
// given back by hand.
func storeID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		b = []byte(rand.Text())
		if err = atomicwriter.WriteFile(path, b, 0o600); err == nil {
			err = syncDir(filepath.Dir(path))
		}
	}
	return strings.TrimSpace(string(b)), err
}

// syncDir makes the names in a directory last.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// claim marks the parent dataset with this store's id, so that a daemon with
// other records never takes this one's datasets for orphans.
func claim(ctx context.Context, z zfs.ZFS, dataset, store string) error {
	owner, err := z.Property(ctx, dataset, propStore)
	if errdefs.IsNotFound(err) {
		props := zfs.Properties{"atime": "off", propStore: store}
		maps.Copy(props, needed)
		maps.Copy(props, common)
		return z.Create(ctx, dataset, props)
	}
	if err != nil {
		return err
	}
	switch owner {
	case store:
		return nil
	case zfs.Unset:
		return z.Set(ctx, dataset, zfs.Properties{propStore: store})
	}
	return foreign(owner, store)
}

// sweep destroys what a crash left, and comes back for what was busy.
func (s *snapshotter) sweep(ctx context.Context) {
	defer close(s.done)
	var again time.Time // when all may be listed
	for {
		begin := time.Now()
		all := !begin.Before(again)
		if err := s.clean(ctx, all); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("cleanup")
		}
		if all {
			again = time.Now().Add(listRest * time.Since(begin))
		}
		if err := s.settle(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("settling what was made")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryInterval):
			s.keeps.expire(keepLimit)
		}
	}
}

func (s *snapshotter) Close() error {
	s.closeOnce.Do(func() {
		s.stop()
		<-s.done
		s.keeps.expire(0)
		s.keeps.wait()
		s.spares.close()
		s.closeErr = s.creating.wait(context.Background())
		s.spares.runs.Wait()
		s.closeErr = errors.Join(s.closeErr, s.settle(context.Background()), s.ms.Close(), s.lock.Close())
	})
	return s.closeErr
}

func (s *snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

func (s *snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (out snapshots.Info, err error) {
	err = s.write(ctx, func(ctx context.Context) error {
		out, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return out, err
}

func (s *snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	called := false
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			called = true
			return fn(ctx, info)
		}, fs...)
	})
	if errdefs.IsNotFound(err) && !called {
		return nil // there never was a record
	}
	return err
}

func (s *snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	var id string
	var info snapshots.Info
	var usage snapshots.Usage
	var parents []string
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if id, info, usage, err = storage.GetInfo(ctx, key); err != nil || info.Kind == snapshots.KindCommitted {
			return err
		}
		sn, err := storage.GetSnapshot(ctx, key)
		parents = sn.ParentIDs
		return err
	})
	if err != nil || info.Kind == snapshots.KindCommitted {
		return usage, err
	}
	usage, err = s.usage(ctx, s.name(id), parents)
	return usage, s.lost(ctx, err, id, key)
}

func (s *snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

func (s *snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

func (s *snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	if err := checkMapping(info.Labels); err != nil {
		return nil, err
	}
	of, err := s.checkClone(ctx, kind, key, info.Labels)
	if err != nil {
		return nil, err
	}
	if of != "" {
		s.placing.Lock() // what it is made of keeps its name
		defer s.placing.Unlock()
	}
	own := zfs.Properties{}
	if kind == snapshots.KindView {
		own["readonly"] = "on"
	} else if v, ok := info.Labels[snapshots.LabelSnapshotMaxSize]; ok {
		if n, err := strconv.ParseUint(v, 10, 63); err != nil || n == 0 {
			return nil, fmt.Errorf("label %s: %q is not a number of bytes: %w", snapshots.LabelSnapshotMaxSize, v, errdefs.ErrInvalidArgument)
		}
		own["refquota"] = v
	}
	// What has to wait for a property anyway gets all of them at once.
	hasty := s.hasty && len(own) == 0 && of == ""
	var from, spare string
	if hasty && parent != "" {
		if from, spare, err = s.takeSpare(ctx, parent); err != nil {
			return nil, fmt.Errorf("making snapshot %s: %w", key, err)
		}
	}
	layer := kind == snapshots.KindActive && info.Labels[snapshots.LabelSnapshotRef] != "" // one will be unpacked into it
	if layer {
		s.spares.unwant(from) // before ZFS is waited for, which may take longer than a spare is put off
	}
	sn, err := s.record(ctx, kind, key, parent, of, spare, layer, opts)
	if spare != "" {
		s.settleSpare(from, spare, err != nil)
	}
	if err != nil {
		return nil, err
	}
	props, origin := s.description(sn.ID, key), cmp.Or(of, s.origin(sn.ParentIDs))
	if !hasty {
		maps.Copy(own, props)
	}
	switch {
	case spare != "":
	case of != "":
		err = s.zfs.Clone(ctx, of, s.name(sn.ID), own)
	case len(sn.ParentIDs) == 0:
		maps.Copy(own, anyName)
		err = s.lostRoot(s.zfs.Create(ctx, s.name(sn.ID), own))
	default:
		err = s.lost(ctx, s.zfs.Clone(ctx, origin, s.name(sn.ID), own), sn.ParentIDs[0], parent)
	}
	if err != nil {
		err = fmt.Errorf("making %s for snapshot %s: %w", s.name(sn.ID), key, s.tooSmall(ctx, err, origin, own["refquota"]))
		if of != "" {
			origin = anyOrigin // that may be renamed before it is asked for
		}
		if errdefs.IsAlreadyExists(err) {
			s.creating.end(sn.ID) // it is somebody's
		} else {
			s.creating.owe(sn.ID, origin, props) // it may be there all the same
		}
		return nil, errors.Join(err, s.undoCreate(ctx, key))
	}
	if layer {
		s.keeps.begin(ctx, sn.ID, s.name(sn.ID))
	} else if from != "" {
		s.wantSpare(ctx, from, parent)
	}
	if hasty {
		s.creating.start(sn.ID, origin, props)
		go func(due <-chan struct{}) {
			<-due
			s.complete(context.WithoutCancel(ctx), sn.ID, props)
		}(s.creating.later(completeDelay))
	} else {
		s.creating.end(sn.ID)
	}
	return s.mounts(kind, sn.ID, info.Labels), nil
}

// record writes the record of a snapshot that is to be made, or of a spare.
func (s *snapshotter) record(ctx context.Context, kind snapshots.Kind, key, parent, of, spare string, layer bool, opts []snapshots.Opt) (sn storage.Snapshot, err error) {
	err = s.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if err := s.checkSource(ctx, of, key, parent); err != nil {
			return err
		}
		create := func() (err error) {
			sn, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...)
			return err
		}
		if spare != "" {
			err = withID(tx, spare, create)
		} else {
			err = create()
		}
		if err != nil {
			return err
		}
		s.creating.begin(sn.ID)
		if layer {
			if err := s.planSpare(tx, sn.ID); err != nil {
				return err
			}
		}
		return put(tx, creatingKey, s.creating.String())
	})
	if err != nil {
		s.creating.end(sn.ID)
		s.spares.unplan(sn.ID)
		return sn, fmt.Errorf("recording snapshot %s: %w", key, err)
	}
	return sn, nil
}

// tooSmall says when it was the limit that failed, because the parent is beyond it:
// ZFS calls that "out of space".
func (s *snapshotter) tooSmall(ctx context.Context, err error, origin, limit string) error {
	if limit == "" || origin == zfs.Unset || ctx.Err() != nil {
		return err
	}
	space, serr := s.zfs.Space(ctx, origin)
	if n, perr := strconv.ParseInt(limit, 10, 64); serr != nil || perr != nil || space.Referenced <= n {
		return err
	}
	return fmt.Errorf("label %s: %s bytes are less than the %d that the parent holds: %w", snapshots.LabelSnapshotMaxSize, limit, space.Referenced, errdefs.ErrInvalidArgument)
}

// checkMapping looks at the labels for mapped ids (capability remap-ids), which
// are those of containerd's client: "container:host:size", with commas between.
func checkMapping(labels map[string]string) error {
	uid, gid := labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]
	if uid == "" && gid == "" {
		return nil
	}
	for label, value := range map[string]string{snapshots.LabelSnapshotUIDMapping: uid, snapshots.LabelSnapshotGIDMapping: gid} {
		for m := range strings.SplitSeq(value, ",") {
			fields := strings.Split(m, ":")
			bad := len(fields) != 3
			for _, f := range fields {
				_, err := strconv.ParseUint(f, 10, 32)
				bad = bad || err != nil
			}
			if bad {
				return fmt.Errorf("label %s: %q is not container:host:size: %w", label, value, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// undoCreate drops the record of a dataset that could not be made.
func (s *snapshotter) undoCreate(ctx context.Context, key string) error {
	var id string
	err := s.write(context.WithoutCancel(ctx), func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err == nil {
		s.spares.unplan(id)
		s.doomed.add(id) // it may be there all the same
	}
	return err
}

func (s *snapshotter) mounts(kind snapshots.Kind, id string, labels map[string]string) []mount.Mount {
	m := mounts.Of(s.name(id))
	if kind == snapshots.KindView {
		m.Options = append(m.Options, "ro")
	}
	if uid, gid := labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]; uid != "" && gid != "" {
		// Whoever mounts maps the ids of the mount: nothing is copied.
		m.Options = append(m.Options, "uidmap="+uid, "gidmap="+gid)
	}
	return []mount.Mount{m}
}

// Mounts is how to mount a snapshot: where it is mounted for writing, as a container's
// that runs is, by a bind mount.
func (s *snapshotter) Mounts(ctx context.Context, key string) (m []mount.Mount, err error) {
	active, fresh := false, false
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		sn, err := storage.GetSnapshot(ctx, key)
		if err != nil {
			return err
		}
		_, info, _, err := storage.GetInfo(ctx, key)
		m, active = s.mounts(sn.Kind, sn.ID, info.Labels), sn.Kind == snapshots.KindActive
		fresh = s.creating.has(sn.ID)
		return err
	})
	if err == nil && active {
		m[0] = s.shared(ctx, m[0], fresh)
	}
	return m, err
}

func (s *snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	s.commits.Lock(key)
	defer func() { _ = s.commits.Unlock(key) }()
	var id string
	var parents []string
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		if _, _, _, err := storage.GetInfo(ctx, name); err == nil {
			return fmt.Errorf("snapshot %s: %w", name, errdefs.ErrAlreadyExists)
		} else if !errdefs.IsNotFound(err) {
			return err
		}
		i, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if info.Kind != snapshots.KindActive {
			return fmt.Errorf("snapshot %s is not active: %w", key, errdefs.ErrFailedPrecondition)
		}
		sn, err := storage.GetSnapshot(ctx, key)
		id, parents = i, sn.ParentIDs
		return err
	})
	if err != nil {
		return fmt.Errorf("committing %s: %w", key, err)
	}
	if s.places.get(id) != "" {
		return fmt.Errorf("committing %s: %s is a Proxmox container's disk, of which an export makes a layer (nerdctl commit): %w", key, s.name(id), errdefs.ErrFailedPrecondition)
	}
	snap, props := s.name(id)+committed, zfs.Properties{}
	describe(props, propName, name)
	spare := s.commitWithSpare(ctx, id, snap, props)
	if spare == "" {
		err = s.snapshot(ctx, snap, props)
	}
	if err != nil {
		return fmt.Errorf("committing %s: %w", key, s.lost(ctx, err, id, key))
	}
	usage, err := s.usage(ctx, snap, parents)
	if err == nil {
		err = s.write(ctx, func(ctx context.Context) error {
			_, err := storage.CommitActive(ctx, key, name, usage, opts...)
			return err
		})
	}
	if err != nil {
		if spare != "" {
			s.dropPlanned(id, spare)
		}
		// The @snapshot stays: the next Commit takes it anew, Remove takes it along. A
		// record that is on the disk, though its last sync failed, would miss it.
		return fmt.Errorf("committing %s: %w", key, err)
	}
	s.keeps.end(id)
	if spare != "" {
		s.addSpare(id, spare)
	} else {
		s.wantSpare(ctx, id, name)
	}
	return nil
}

// snapshot takes the snapshot of one whose record is active: one that is there is of a crash
// or an error that came between snapshot and record.
func (s *snapshotter) snapshot(ctx context.Context, snap string, props zfs.Properties) error {
	err := s.zfs.Snapshot(ctx, snap, props)
	if !errdefs.IsAlreadyExists(err) {
		return err
	}
	if err = s.zfs.Destroy(ctx, snap); errdefs.IsFailedPrecondition(err) {
		// The spare that was made with it has no record.
		if err = s.clean(ctx, true); err == nil {
			err = s.zfs.Destroy(ctx, snap)
		}
	}
	if err == nil {
		err = s.zfs.Snapshot(ctx, snap, props)
	}
	return err
}

// Remove drops the record; the dataset goes with the next Cleanup.
func (s *snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.write(ctx, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err == nil {
		s.doom(id)
		s.keeps.end(id)
	}
	return err
}
