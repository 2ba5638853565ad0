// Package registry keeps which of containerd's containers is which of Proxmox's:
// a VMID for as long as the container is there, over tasks and restarts. It owns
// its directory of records and, through package pve, the confs of those containers; datasets it
// has moved by whoever owns them.
//
// A record is written before its conf is created and dropped after it was
// removed, so a conf of ours lacks one only if the records were lost. It holds the conf as well:
// one that somebody removed is written again.
package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/locker"
	"github.com/moby/sys/atomicwriter"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// Disk is where the root file system of a container is.
type Disk struct {
	// Dataset is the one that is mounted, whoever made it; empty if it is none.
	Dataset string
	// Directory is where it is mounted.
	Directory string
}

// Disks moves datasets of ours to where Proxmox looks for them.
type Disks interface {
	// Ours says whether a dataset is of a snapshot of ours. Another's stays where it is.
	Ours(dataset string) bool
	// Volume is the one that dataset is to be of a VMID. Errors: os.ErrExist, another
	// has its name, that of a removed container for example.
	Volume(ctx context.Context, vmid int, dataset string) (Volume, error)
	// Settle waits a while for the volume that a removed container of ours had under a VMID to be
	// destroyed, which containerd has its garbage collection do. Another's stays: Volume says so.
	Settle(ctx context.Context, vmid int) error
	// Move renames dataset to the volume's, and limits it. It is done if it was before.
	Move(ctx context.Context, dataset string, to Volume) error
	// Show mounts a volume where Proxmox's tools look for its files.
	Show(ctx context.Context, dataset string) error
	// Exists says whether there is a dataset of that name.
	Exists(ctx context.Context, dataset string) (bool, error)
	// Foreign says whether there is a dataset of that name that is none of ours, whatever was called so before.
	Foreign(ctx context.Context, dataset string) (bool, error)
	// DatasetOf is the dataset of a volume as a conf names it; empty if it is none on this node.
	DatasetOf(volume string) (string, error)
	// Drop destroys snapshots of a dataset of ours, if they are there.
	Drop(ctx context.Context, dataset string, snapshots []string) error
}

// Volume is one of Proxmox's on a storage of type zfspool.
type Volume struct {
	Conf    string // its name and options as a conf has them
	Dataset string
	Size    int64 // bytes
}

// Record is a container with its VMID.
type Record struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	VMID      int    `json:"vmid"`
	// Node is the one that has the conf; it may be called otherwise since.
	Node string `json:"node"`
	// Dataset is the volume's; empty if it has none.
	Dataset string `json:"dataset,omitempty"`
	// Conf is what was last seen of it.
	Conf string `json:"conf"`
	// Spec are the limits that the container asked for when they were last written into its conf.
	Spec pve.Limits `json:"spec"`
	// Host is what the host had then.
	Host pve.Host `json:"host"`
}

// Registered is what a task of a container is to know.
type Registered struct {
	VMID int `json:"vmid"`
	// Dataset is where the root file system is; empty if it is none of ours.
	Dataset string `json:"dataset"`
	// StopSignal is the number of the signal that `pct shutdown` is to send; 0 if the
	// conf does not say it as a number.
	StopSignal int `json:"stopSignal"`
	// Limits are the conf's. Of these Changed are other than what the container asks
	// for: an administrator changed them, and they are what it gets.
	Limits  pve.Limits `json:"limits"`
	Changed pve.Parts  `json:"changed"`
}

// Registry is of one node.
type Registry struct {
	// Describe adds what the caller did not know of a new container; nil: nothing.
	Describe func(context.Context, *pve.Container) error

	node  *pve.Node
	dir   string
	disks Disks
	host  pve.Host
	guard string // program

	locks *locker.Locker // by container
}

// New is a registry whose records are in dir, which it makes. guard is the
// program that confs run before a start, with the container's namespace and id.
func New(node *pve.Node, dir, guard string, host pve.Host, disks Disks) (*Registry, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making %s: %w", dir, err)
	}
	return &Registry{node: node, dir: dir, guard: guard, host: host, disks: disks, locks: locker.New()}, nil
}

// name is of a record and its lock: containerd's identifiers hold single hyphens
// only between other characters, and no slash.
// They stand in a shell's command as they are.
func name(namespace, id string) (string, error) {
	if namespace == "" || id == "" || notName.MatchString(namespace+id) || strings.HasPrefix(namespace, ".") {
		return "", fmt.Errorf("namespace %q and container %q: %w", namespace, id, errdefs.ErrInvalidArgument)
	}
	return namespace + "--" + id, nil
}

var notName = regexp.MustCompile(`[^A-Za-z0-9_.-]`)

func (r *Registry) read(file string) (rec Record, err error) {
	text, err := os.ReadFile(filepath.Join(r.dir, file))
	if err == nil {
		err = json.Unmarshal(text, &rec)
	}
	return rec, err
}

func (r *Registry) write(rec Record) error {
	file, err := name(rec.Namespace, rec.ID)
	if err != nil {
		return err
	}
	text, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return atomicwriter.WriteFile(filepath.Join(r.dir, file), text, 0o600)
}

// guardLine is the hook that says whose a conf is, and which refuses a start that
// is not containerd's. It lets one be that was restored where this program is not.
// liblxc gives it to a shell, after "exec ", with arguments of its own behind it.
func (r *Registry) guardLine(namespace, id string, vmid int) string {
	return fmt.Sprintf("/bin/sh -c 'test ! -x %[1]s || exec %[1]s guard %[2]s %[3]s %[4]d' sh", r.guard, namespace, id, vmid)
}

// guards is the end of that line, wherever the program was.
var guards = regexp.MustCompile(` guard ([A-Za-z0-9_.-]+) ([A-Za-z0-9_.-]+) ([0-9]+)' sh$`)

// ownerOf is whose a conf is, by its guard. A clone, or a backup restored under
// another number, has the guard of another VMID and so no owner.
func ownerOf(conf *pve.Conf, vmid int) (namespace, id string, ok bool) {
	for _, e := range conf.LXC() {
		if m := guards.FindStringSubmatch(e.Value); e.Key == "lxc.hook.pre-start" && m != nil && m[3] == strconv.Itoa(vmid) {
			return m[1], m[2], true
		}
	}
	return "", "", false
}

// mine says whether a conf is that record's.
func (rec Record) mine(conf *pve.Conf) bool {
	namespace, id, ok := ownerOf(conf, rec.VMID)
	return ok && namespace == rec.Namespace && id == rec.ID
}

// Lookup is the VMID of a container, by the records in dir. Errors: NotFound.
func Lookup(dir, namespace, id string) (int, error) {
	r := &Registry{dir: dir, locks: locker.New()}
	vmid := 0
	err := r.with(namespace, id, func(rec Record) error {
		vmid = rec.VMID
		return nil
	})
	return vmid, err
}

// Records are all in dir, as List has them.
func Records(dir string) ([]Record, error) { return (&Registry{dir: dir}).List() }

// Register gives a container its VMID and its conf, and its disk the name that
// goes with them: the one it has, or else want, or if that is 0 any that is free.
// The limits of a conf that it has stay as they are, unless the container asks for others than
// when they were written. Errors: those of Node.Register; FailedPrecondition, it has another VMID than want.
func (r *Registry) Register(ctx context.Context, want int, c pve.Container, disk Disk) (Registered, error) {
	file, err := name(c.Namespace, c.ID)
	if err != nil {
		return Registered{}, err
	}
	r.locks.Lock(file)
	defer func() { _ = r.locks.Unlock(file) }()
	fail := func(err error) (Registered, error) {
		return Registered{}, fmt.Errorf("registering container %s with Proxmox: %w", c.ID, err)
	}
	rec, err := r.read(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fail(err)
	}
	if rec.VMID != 0 && want != 0 && rec.VMID != want {
		return fail(fmt.Errorf("it has VMID %d for as long as it lives, not %d: %w", rec.VMID, want, errdefs.ErrFailedPrecondition))
	}
	if disk.Dataset != "" && !r.disks.Ours(disk.Dataset) {
		disk.Dataset = ""
	}
	if want != 0 && rec.VMID == 0 && disk.Dataset != "" {
		if _, err := r.node.Read(want); errdefs.IsNotFound(err) {
			if err := r.disks.Settle(ctx, want); err != nil {
				return fail(err)
			}
		}
	}
	has := rec.VMID
	described := r.Describe == nil
	var volume Volume
	of := func(vmid int) (_ *pve.Conf, err error) {
		if !described {
			if err := r.Describe(ctx, &c); err != nil {
				return nil, err
			}
			described = true
		}
		c.Rootfs = disk.Directory
		if disk.Dataset != "" {
			if volume, err = r.disks.Volume(ctx, vmid, disk.Dataset); err != nil {
				return nil, err
			}
			c.Rootfs = volume.Conf
		}
		c.Guard = r.guardLine(c.Namespace, c.ID, vmid)
		conf, err := c.Conf(r.host)
		if err != nil {
			return nil, err
		}
		self, err := r.node.Name()
		if err != nil {
			return nil, err
		}
		rec = Record{
			Namespace: c.Namespace, ID: c.ID, VMID: vmid, Node: self, Dataset: volume.Dataset, Conf: string(conf.Bytes()), Spec: c.Limits, Host: r.host,
		}
		return conf, r.write(rec)
	}
	made, err := r.vmid(ctx, &rec, want, &c, disk.Dataset, of)
	if err == nil && made {
		// Whoever asked may have gone on without it, with the disk where it is.
		err = ctx.Err()
	}
	if err != nil {
		if has == 0 {
			err = errors.Join(err, r.undo(context.WithoutCancel(ctx), rec))
		}
		return fail(err)
	}
	conf := pve.Parse([]byte(rec.Conf))
	a := Registered{VMID: rec.VMID, StopSignal: conf.StopSignal()}
	if a.Limits, a.Changed, err = conf.Limits(rec.Spec, rec.Host); err != nil {
		return fail(err)
	}
	if disk.Dataset == "" {
		return a, nil
	}
	if volume.Dataset == "" { // it had a conf
		if volume, err = r.disks.Volume(ctx, rec.VMID, disk.Dataset); err != nil {
			return fail(err)
		}
	}
	if disk.Dataset != volume.Dataset {
		if err := r.disks.Move(ctx, disk.Dataset, volume); err != nil {
			return fail(err)
		}
	}
	if err := r.disks.Show(ctx, volume.Dataset); err != nil {
		log.G(ctx).WithError(err).Warnf("container %s: Proxmox's tools do not see the files of VMID %d", c.ID, rec.VMID)
	}
	a.Dataset = volume.Dataset
	return a, nil
}

// undo takes back what was made for a container that could not be registered. What
// cannot be is found by its record, whose conf is not to be written again.
func (r *Registry) undo(ctx context.Context, rec Record) error {
	if rec.VMID == 0 {
		return nil
	}
	err := r.node.Remove(ctx, rec.VMID, rec.mine, func(*pve.Conf) error { return nil })
	if err != nil && !errdefs.IsFailedPrecondition(err) {
		rec.Conf = ""
		return errors.Join(err, r.write(rec))
	}
	return r.drop(rec)
}

// vmid finds the container's conf, or has one made and says so. rec is what is
// written down of it, before and after; dataset is where its disk is now.
func (r *Registry) vmid(ctx context.Context, rec *Record, want int, c *pve.Container, dataset string, of func(int) (*pve.Conf, error)) (made bool, err error) {
	if rec.VMID != 0 {
		conf, err := r.conf(ctx, rec)
		switch {
		case err == nil && rec.mine(conf):
			if err := conf.Free(rec.VMID); err != nil {
				return false, err
			}
			if c.Limits == rec.Spec {
				return false, r.seen(rec, string(conf.Bytes()))
			}
			rec.Spec, rec.Host = c.Limits, r.host
			return false, r.change(ctx, rec, c.Limits, pve.AllParts)
		case err != nil && !errdefs.IsNotFound(err):
			return false, err
		}
		// A crash came before its conf, or an administrator removed that; the number is
		// taken again if nobody else has it.
		again := of
		if rec.Conf != "" {
			there, err := r.hasDisk(ctx, dataset)
			if err == nil && !there {
				err = fmt.Errorf("somebody destroyed VMID %d with its disk %s: remove the container: %w", rec.VMID, dataset, errdefs.ErrFailedPrecondition)
			}
			if err != nil {
				return false, err
			}
			again = func(int) (*pve.Conf, error) {
				conf := pve.Parse([]byte(rec.Conf))
				if c.Limits == rec.Spec {
					return conf, nil
				}
				if err := c.Limits.Update(conf, r.host, pve.AllParts); err != nil {
					return nil, err
				}
				rec.Spec, rec.Host, rec.Conf = c.Limits, r.host, string(conf.Bytes())
				return conf, r.write(*rec)
			}
		}
		_, err = r.node.Register(ctx, rec.VMID, again)
		if !errdefs.IsAlreadyExists(err) {
			return true, err
		}
	}
	_, err = r.node.Register(ctx, want, of)
	return true, err
}

// hasDisk says whether a dataset is there; a container without one has a directory.
func (r *Registry) hasDisk(ctx context.Context, dataset string) (bool, error) {
	if dataset == "" {
		return true, nil
	}
	return r.disks.Exists(ctx, dataset)
}

// conf reads the conf of a record. After this node was renamed it is fetched from
// the directory of the old name. Errors: NotFound; FailedPrecondition, it went to another node.
func (r *Registry) conf(ctx context.Context, rec *Record) (*pve.Conf, error) {
	conf, err := r.node.Read(rec.VMID)
	if err == nil && conf.Empty() {
		// A daemon of an older release ended between making it and writing it; the record was first. One that
		// it is making now is locked, and not empty any more when Remove has the lock.
		if err := r.node.Remove(ctx, rec.VMID, (*pve.Conf).Empty, func(*pve.Conf) error { return nil }); err != nil && !errdefs.IsFailedPrecondition(err) {
			return nil, err
		}
		conf, err = r.node.Read(rec.VMID)
	}
	if !errdefs.IsNotFound(err) {
		return conf, err
	}
	at, whereErr := r.node.Where(rec.VMID)
	if whereErr != nil {
		return nil, whereErr
	}
	self, nameErr := r.node.Name()
	if nameErr != nil {
		return nil, nameErr
	}
	if at == "" || at == self {
		return nil, err
	}
	conf, otherErr := r.node.ReadAt(at, rec.VMID)
	if errdefs.IsNotFound(otherErr) || otherErr == nil && !rec.mine(conf) {
		return nil, err // a virtual machine, or another's container
	}
	if otherErr != nil {
		return nil, otherErr
	}
	member, err := r.node.IsMember(at)
	if err != nil {
		return nil, err
	}
	if at != rec.Node || member {
		return nil, fmt.Errorf("container %[1]d was moved to node %[2]s, where containerd does not know it: migrate it back or remove it here: %[3]w", rec.VMID, at, errdefs.ErrFailedPrecondition)
	}
	log.G(ctx).Infof("container %d is fetched from node %s, as this one was called", rec.VMID, at)
	if err := r.node.Fetch(ctx, rec.VMID, at); err != nil {
		return nil, err
	}
	rec.Node = self
	return conf, r.write(*rec)
}

// change writes parts of limits into the conf of a record, and keeps both.
func (r *Registry) change(ctx context.Context, rec *Record, limits pve.Limits, parts pve.Parts) error {
	err := r.node.Change(ctx, rec.VMID, func(conf *pve.Conf) error {
		if !rec.mine(conf) {
			return fmt.Errorf("VMID %d is another guest's: %w", rec.VMID, errdefs.ErrNotFound)
		}
		err := limits.Update(conf, r.host, parts)
		rec.Conf = string(conf.Bytes())
		return err
	})
	if err != nil {
		return err
	}
	return r.write(*rec)
}

// seen keeps what the conf is now.
func (r *Registry) seen(rec *Record, text string) error {
	if rec.Conf == text {
		return nil
	}
	rec.Conf = text
	return r.write(*rec)
}

// Update writes parts of a container's limits into its conf. Errors: NotFound, it has none.
func (r *Registry) Update(ctx context.Context, namespace, id string, limits pve.Limits, parts pve.Parts) error {
	return r.with(namespace, id, func(rec Record) error { return r.change(ctx, &rec, limits, parts) })
}

// Remove gives the VMID of a container back, with its conf and the snapshots that
// Proxmox made of it. There is nothing to do for one that has none. Errors: Unavailable, to be tried again.
func (r *Registry) Remove(ctx context.Context, namespace, id string) error {
	err := r.with(namespace, id, func(rec Record) error {
		if _, err := r.conf(ctx, &rec); errdefs.IsUnavailable(err) {
			return err
		}
		err := r.node.Remove(ctx, rec.VMID, rec.mine, func(conf *pve.Conf) error {
			if rec.Dataset == "" {
				return nil
			}
			over, err := r.restoredOver(ctx, conf)
			if err == nil && over {
				err = fmt.Errorf("VMID %d is a backup that was restored: its conf stays: %w", rec.VMID, errdefs.ErrFailedPrecondition)
			}
			if err != nil {
				return err
			}
			return r.disks.Drop(ctx, rec.Dataset, conf.Snapshots())
		})
		if err != nil && !errdefs.IsFailedPrecondition(err) {
			return err
		}
		// One that is another guest's meanwhile, or a backup's, stays.
		return r.drop(rec)
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// restoredOver says whether a record's conf has a disk that is none of ours: `pct restore`
// made both of a backup of the container, whose own disk it or `pct destroy` destroyed.
func (r *Registry) restoredOver(ctx context.Context, conf *pve.Conf) (bool, error) {
	rootfs, _ := conf.Get("rootfs")
	volume, _, _ := strings.Cut(rootfs, ",")
	dataset, err := r.disks.DatasetOf(volume)
	if err != nil || dataset == "" {
		return false, err
	}
	return r.disks.Foreign(ctx, dataset)
}

// drop removes a record, if it is there.
func (r *Registry) drop(rec Record) error {
	file, err := name(rec.Namespace, rec.ID)
	if err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(r.dir, file)); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// with calls f with a container's record.
func (r *Registry) with(namespace, id string, f func(Record) error) error {
	file, err := name(namespace, id)
	if err != nil {
		return err
	}
	r.locks.Lock(file)
	defer func() { _ = r.locks.Unlock(file) }()
	rec, err := r.read(file)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("container %s has no VMID: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("reading the VMID of container %s: %w", id, err)
	}
	return f(rec)
}

// List are all containers with a VMID, in the order of these.
func (r *Registry) List() ([]Record, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, fmt.Errorf("listing the containers with a VMID: %w", err)
	}
	var all []Record
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue // being written
		}
		rec, err := r.read(e.Name())
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", filepath.Join(r.dir, e.Name()), err)
		}
		all = append(all, rec)
	}
	slices.SortFunc(all, func(a, b Record) int { return a.VMID - b.VMID })
	return all, nil
}
