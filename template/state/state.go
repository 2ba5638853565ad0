// Package state keeps what a container was: snapshots of its root file system
// with its configuration, containerd's and Proxmox's, and the way back to them. It owns the ZFS snapshots of containers'
// datasets that bear its mark and, under the lock that Proxmox's tools take as well, their sections in
// the containers' confs. It never touches a snapshot that another took, nor a dataset itself.
//
// With a conf a snapshot is in effect once its section is written, and no longer than
// that is there; a ZFS snapshot of ours without one was left by a crash. Without Proxmox the
// ZFS snapshot is all there is.
package state

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/compare"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// Container is one of containerd's with a dataset of its own.
type Container struct {
	ID      string
	Dataset string
	// VMID is 0 where Proxmox does not know it.
	VMID int
}

// Snapshot of a container.
type Snapshot struct {
	Name string `json:"name"`
	// Description is what was said of it when it was taken.
	Description string    `json:"description"`
	Created     time.Time `json:"created"`
	// Used are the bytes that it alone keeps, Referenced those that can be read in it.
	Used       int64 `json:"used"`
	Referenced int64 `json:"referenced"`
	// Foreign is one that another took, `pct snapshot` or `zfs snapshot`.
	Foreign bool `json:"foreign"`
	// Image is the container's then; empty if another took the snapshot.
	Image string `json:"image"`
	// Clones are the containers that were made of it; of what is no container's the dataset.
	Clones []string `json:"clones"`
	// own are its properties.
	own zfs.Properties
	// begun is one to which a rollback began and did not end.
	begun bool
}

// propBack is of a snapshot to which a rollback has begun, while that has the
// container's conf locked: a lock without it is one of Proxmox's own jobs.
const propBack = "containerd-pve:rollback"

// jobBack is that lock.
const jobBack = "rollback"

// ZFS is what is asked of it, see zfs.Way.
type ZFS interface {
	Taken(ctx context.Context, name string, properties []string) ([]zfs.Entry, error)
	Snapshot(ctx context.Context, name string, props zfs.Properties) error
	Property(ctx context.Context, name, property string) (string, error)
	Set(ctx context.Context, name string, props zfs.Properties) error
	Rollback(ctx context.Context, snapshot string) error
	DestroyAll(ctx context.Context, names []string) (failed map[string]error, err error)
}

// Confs changes the conf of a VMID while nobody else does, see pve.Node.Change.
type Confs interface {
	Change(ctx context.Context, vmid int, change func(*pve.Conf) error) error
}

// Tasks keeps containers' processes still, or ends them.
type Tasks interface {
	// Still pauses what runs, with what it wrote on its way to the disk, until resume.
	Still(ctx context.Context, id string) (resume func(context.Context) error, err error)
	// Stop ends the task, if there is one; start begins another if one ran.
	Stop(ctx context.Context, id string) (start func(context.Context) error, err error)
}

// Configs reads and sets what containerd knows of a container.
type Configs interface {
	Config(ctx context.Context, id string) (Config, error)
	// SetConfig gives it the configuration that a record has, all that a task is made from.
	SetConfig(ctx context.Context, id string, record []byte) error
	// Hold keeps tasks of it from beginning while it is on its way back to a snapshot, across crashes,
	// until SetConfig or, with an empty name, Hold. Held is that snapshot; empty: it is not.
	Hold(ctx context.Context, id, name string) error
	Held(ctx context.Context, id string) (name string, err error)
}

// Store is of one host.
type Store struct {
	ZFS     ZFS
	Tasks   Tasks
	Configs Configs
	// Confs is nil where there is no Proxmox.
	Confs Confs
	// Since compares a container's files with those in one of its snapshots, see compare.Since.
	Since func(ctx context.Context, snapshot string) ([]compare.Difference, error)
}

// reserved is what the snapshotter calls the snapshots of layers.
const reserved = "snapshot"

func checkName(name string) error {
	if name == reserved {
		return fmt.Errorf("%q is what the snapshots of layers are called: choose another name: %w", name, errdefs.ErrInvalidArgument)
	}
	return pve.CheckSnapshotName(name)
}

// change calls f with the container's conf, which is written if f succeeds; with
// nil for one that has none.
func (s *Store) change(ctx context.Context, c Container, f func(*pve.Conf) error) error {
	if c.VMID == 0 || s.Confs == nil {
		return f(nil)
	}
	return s.Confs.Change(ctx, c.VMID, f)
}

// locked is change of a conf that no job has, and of a container that no rollback holds.
func (s *Store) locked(ctx context.Context, c Container, f func(*pve.Conf) error) error {
	return s.change(ctx, c, func(conf *pve.Conf) error {
		if conf != nil {
			if err := conf.Free(c.VMID); err != nil {
				return err
			}
			return f(conf)
		}
		to, err := s.Configs.Held(ctx, c.ID)
		if err != nil {
			return err
		}
		if to != "" {
			return fmt.Errorf("a rollback of container %s to %s was interrupted: `containerd-pve container rollback %[2]s %[1]s` ends it: %[3]w", c.ID, to, errdefs.ErrFailedPrecondition)
		}
		return f(nil)
	})
}

// Take makes a snapshot; the container is paused for it if it runs. Errors:
// InvalidArgument, AlreadyExists, FailedPrecondition, those of ZFS; nothing is left then.
func (s *Store) Take(ctx context.Context, c Container, name, description string) error {
	if err := checkName(name); err != nil {
		return err
	}
	full := c.Dataset + "@" + name
	return s.locked(ctx, c, func(conf *pve.Conf) error {
		all, err := s.taken(ctx, c, conf)
		if err != nil {
			return err
		}
		if i := index(all, name); i >= 0 {
			return fmt.Errorf("container %s has a snapshot %s of %s: %w", c.ID, name, all[i].Created.Local().Format(time.DateTime), errdefs.ErrAlreadyExists)
		}
		config, err := s.Configs.Config(ctx, c.ID)
		if err != nil {
			return err
		}
		props, err := config.encode()
		if err != nil {
			return fmt.Errorf("container %s: %w", c.ID, err)
		}
		props[snapshotter.PropTaken] = description + " "
		resume, err := s.Tasks.Still(ctx, c.ID)
		if err != nil {
			return err
		}
		err = s.ZFS.Snapshot(ctx, full, props)
		// It goes on whatever became of the caller.
		err = errors.Join(err, resume(context.WithoutCancel(ctx)))
		if err != nil || conf == nil {
			return err
		}
		if err := conf.AddSnapshot(name, description, time.Now()); err != nil {
			_, undo := s.ZFS.DestroyAll(context.WithoutCancel(ctx), []string{full})
			return errors.Join(err, undo)
		}
		return nil
	})
}

// taken are the snapshots, oldest first. With a conf those are destroyed that a
// crash left before they were written into it.
func (s *Store) taken(ctx context.Context, c Container, conf *pve.Conf) ([]Snapshot, error) {
	entries, err := s.ZFS.Taken(ctx, c.Dataset, append(configProperties(), snapshotter.PropTaken, propBack))
	if err != nil {
		return nil, fmt.Errorf("the snapshots of container %s: %w", c.ID, err)
	}
	var all []Snapshot
	var left []string
	for _, e := range entries {
		_, name, _ := strings.Cut(e.Name, "@")
		text, ours := e.Own[snapshotter.PropTaken]
		if ours && text == "" {
			continue // of a container that is gone
		}
		// One that has clones is there until they are gone, `pct delsnapshot --force` or not.
		if ours && conf != nil && len(e.Clones) == 0 && !slices.Contains(conf.Snapshots(), name) {
			left = append(left, e.Name)
			continue
		}
		clones, err := s.containersOf(ctx, e.Clones)
		if err != nil {
			return nil, fmt.Errorf("the clones of %s: %w", e.Name, err)
		}
		all = append(all, Snapshot{Name: name, Description: strings.TrimSuffix(text, " "), Created: e.Created, Used: e.Used, Referenced: e.Referenced, Foreign: !ours, Image: e.Own[propImage], Clones: clones, own: e.Own, begun: e.Own[propBack] != ""})
	}
	if len(left) == 0 {
		return all, nil
	}
	failed, err := s.ZFS.DestroyAll(ctx, left)
	for _, e := range failed {
		err = errors.Join(err, e)
	}
	return all, err
}

// containersOf are the containers that clones are of.
func (s *Store) containersOf(ctx context.Context, clones []string) ([]string, error) {
	all := []string{}
	for _, c := range clones {
		key, err := s.ZFS.Property(ctx, c, snapshotter.PropKey)
		if errdefs.IsNotFound(err) {
			continue // destroyed meanwhile
		}
		if err != nil {
			return nil, err
		}
		if _, name := snapshotter.SplitKey(key); key != zfs.Unset && name != key {
			c = name
		}
		all = append(all, c)
	}
	return all, nil
}

func index(all []Snapshot, name string) int {
	return slices.IndexFunc(all, func(s Snapshot) bool { return s.Name == name })
}

// List are a container's snapshots, oldest first.
func (s *Store) List(ctx context.Context, c Container) ([]Snapshot, error) {
	return s.taken(ctx, c, nil)
}

// Diff is what changed in a container's files since a snapshot, whoever took that. Errors: NotFound.
func (s *Store) Diff(ctx context.Context, c Container, name string) ([]compare.Difference, error) {
	if _, _, err := s.find(ctx, c, nil, name); err != nil {
		return nil, err
	}
	return s.Since(ctx, c.Dataset+"@"+name)
}

// find are a container's snapshots, and the place of one among them. Errors:
// NotFound, which names those that there are.
func (s *Store) find(ctx context.Context, c Container, conf *pve.Conf, name string) ([]Snapshot, int, error) {
	all, err := s.taken(ctx, c, conf)
	if err != nil {
		return nil, 0, err
	}
	i := index(all, name)
	if i < 0 {
		return nil, 0, fmt.Errorf("container %s has no snapshot %s (it has %s): %w", c.ID, name, names(all), errdefs.ErrNotFound)
	}
	return all, i, nil
}

func names(all []Snapshot) string {
	var list []string
	for _, s := range all {
		list = append(list, s.Name)
	}
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}

// uncloned refuses a snapshot that clones need.
func (n Snapshot) uncloned(c Container) error {
	if len(n.Clones) == 0 {
		return nil
	}
	return fmt.Errorf("snapshot %s of container %s is what others were cloned from (%s): remove these first, or the container: %w", n.Name, c.ID, strings.Join(n.Clones, ", "), errdefs.ErrFailedPrecondition)
}

// Clone calls make for a snapshot that one of containerd-pve's is, and with what containerd
// knew of the container then; nothing changes in its snapshots meanwhile on a node of Proxmox.
// Errors: NotFound; FailedPrecondition, another took it; those of make.
func (s *Store) Clone(ctx context.Context, c Container, name string, clone func(snapshot string, record []byte) error) error {
	return s.locked(ctx, c, func(conf *pve.Conf) error {
		all, i, err := s.find(ctx, c, conf, name)
		if err != nil {
			return err
		}
		config, err := decode(all[i].own)
		if err != nil {
			return fmt.Errorf("snapshot %s of container %s: %w", name, c.ID, err)
		}
		if all[i].Foreign || config == nil {
			return fmt.Errorf("snapshot %s of container %s is none of containerd-pve's, and says nothing of its configuration (`containerd-pve container snapshot` takes one that does): %w", name, c.ID, errdefs.ErrFailedPrecondition)
		}
		return clone(c.Dataset+"@"+name, config.Record)
	})
}

// Rollback takes a container back to a snapshot, root file system and
// configuration: its task is stopped, and another started if it ran. Newer snapshots are lost by
// it, and so it is refused where there are some unless force is set; those that another took are
// never destroyed. A crash leaves the conf locked, or without one the container held, by which no task
// starts, until the same is asked for again. Errors: NotFound, FailedPrecondition.
func (s *Store) Rollback(ctx context.Context, c Container, name string, force bool) error {
	full := c.Dataset + "@" + name
	var start func(context.Context) error
	var newer []Snapshot
	var before []byte
	var config *Config
	err := s.change(ctx, c, func(conf *pve.Conf) (err error) {
		all, i, err := s.find(ctx, c, conf, name)
		if err != nil {
			return err
		}
		if conf != nil && (conf.Lock() != jobBack || !all[i].begun) {
			if err := conf.Free(c.VMID); err != nil {
				return err
			}
		}
		if conf != nil && !slices.Contains(conf.Snapshots(), name) {
			return fmt.Errorf("the conf of VMID %d does not list snapshot %s, which only ZFS has: %w", c.VMID, name, errdefs.ErrFailedPrecondition)
		}
		if config, err = decode(all[i].own); err != nil {
			return fmt.Errorf("snapshot %s of container %s: %w", name, c.ID, err)
		}
		newer = all[i+1:]
		if len(newer) > 0 && !force {
			return fmt.Errorf("container %s has newer snapshots than %s, which a rollback destroys (%s): --force if it may: %w", c.ID, name, names(newer), errdefs.ErrFailedPrecondition)
		}
		for _, n := range newer {
			if err := n.uncloned(c); err != nil {
				return err
			}
			if n.Foreign {
				return fmt.Errorf("snapshot %s of container %s is newer than %s and none of containerd-pve's: destroy it with what took it (`pct delsnapshot`, `zfs destroy`): %w", n.Name, c.ID, name, errdefs.ErrFailedPrecondition)
			}
		}
		if start, err = s.Tasks.Stop(ctx, c.ID); err != nil {
			return err
		}
		if conf == nil {
			return s.Configs.Hold(ctx, c.ID, name)
		}
		if err := conf.SetLock(""); err != nil {
			return err
		}
		before = conf.Bytes()
		for _, n := range newer {
			conf.RemoveSnapshot(n.Name)
		}
		if err := s.ZFS.Set(ctx, full, zfs.Properties{propBack: "begun"}); err != nil {
			return err
		}
		return conf.SetLock(jobBack)
	})
	if err == nil {
		// From here on the caller's end would leave neither the old nor the new state.
		err = s.back(context.WithoutCancel(ctx), c, name, newer, config, before)
	}
	if start == nil {
		return err
	}
	// The new task reads the conf, under the same lock.
	return errors.Join(err, start(context.WithoutCancel(ctx)))
}

// back is the rollback itself; before is the conf that it fails to.
func (s *Store) back(ctx context.Context, c Container, name string, newer []Snapshot, config *Config, before []byte) error {
	full := c.Dataset + "@" + name
	var failed error
	err := s.change(ctx, c, func(conf *pve.Conf) error {
		for _, n := range slices.Backward(newer) {
			if failed = s.destroy(ctx, c, n.Name); failed != nil {
				break
			}
		}
		if failed == nil {
			failed = s.ZFS.Rollback(ctx, full)
		}
		if failed != nil {
			if conf == nil {
				return s.Configs.Hold(ctx, c.ID, "")
			}
			*conf = *pve.Parse(before)
			return s.gone(ctx, c, conf, newer)
		}
		if config != nil {
			if err := s.Configs.SetConfig(ctx, c.ID, config.Record); err != nil {
				return err
			}
		}
		if conf == nil {
			return s.Configs.Hold(ctx, c.ID, "")
		}
		return conf.Rollback(name)
	})
	if before != nil && err == nil {
		err = s.ZFS.Set(ctx, full, zfs.Properties{propBack: ""})
	}
	return errors.Join(failed, err)
}

// gone takes the sections away of those that were destroyed.
func (s *Store) gone(ctx context.Context, c Container, conf *pve.Conf, of []Snapshot) error {
	all, err := s.taken(ctx, c, conf)
	if err != nil {
		return err
	}
	for _, n := range of {
		if index(all, n.Name) < 0 {
			conf.RemoveSnapshot(n.Name)
		}
	}
	return nil
}

// destroy destroys a snapshot of ours.
func (s *Store) destroy(ctx context.Context, c Container, name string) error {
	full := c.Dataset + "@" + name
	failed, err := s.ZFS.DestroyAll(ctx, []string{full})
	if err := errors.Join(err, failed[full]); err != nil {
		return fmt.Errorf("destroying snapshot %s of container %s: %w", name, c.ID, err)
	}
	return nil
}

// Remove destroys a snapshot, and takes its section away. One that is a section only,
// which a crash of a removal leaves, is that. Errors: NotFound; FailedPrecondition, another took it,
// or a clone needs it.
func (s *Store) Remove(ctx context.Context, c Container, name string) error {
	return s.locked(ctx, c, func(conf *pve.Conf) error {
		all, i, err := s.find(ctx, c, conf, name)
		if errdefs.IsNotFound(err) && conf != nil && slices.Contains(conf.Snapshots(), name) {
			conf.RemoveSnapshot(name)
			return nil
		}
		if err != nil {
			return err
		}
		if all[i].Foreign {
			return fmt.Errorf("snapshot %s of container %s is none of containerd-pve's: destroy it with what took it (`pct delsnapshot`, `zfs destroy`): %w", name, c.ID, errdefs.ErrFailedPrecondition)
		}
		if err := all[i].uncloned(c); err != nil {
			return err
		}
		if err := s.destroy(ctx, c, name); err != nil || conf == nil {
			return err
		}
		conf.RemoveSnapshot(name)
		return nil
	})
}
