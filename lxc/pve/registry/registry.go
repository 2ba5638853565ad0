// Package registry keeps which of containerd's containers is which of Proxmox's:
// a VMID for as long as the container is there, over tasks and restarts. It owns
// its directory of records and, through package pve, the confs of those containers; datasets it
// has moved by whoever owns them.
//
// A record is written before its conf is created and dropped after it was
// removed, so a conf of ours never lacks one.
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
	"strings"

	"github.com/containerd/errdefs"
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
	// Move renames dataset to the volume's, and limits it. It is done if it was before.
	Move(ctx context.Context, dataset string, to Volume) error
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

func (r *Registry) write(file string, rec Record) error {
	text, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return atomicwriter.WriteFile(filepath.Join(r.dir, file), text, 0o600)
}

// guardLine is the hook that says whose a conf is, and which refuses a start that
// is not containerd's. It lets one be that was restored where this program is not.
// liblxc gives it to a shell, after "exec ", with arguments of its own behind it.
func (r *Registry) guardLine(namespace, id string) string {
	return fmt.Sprintf("/bin/sh -c 'test ! -x %[1]s || exec %[1]s guard %[2]s %[3]s' sh", r.guard, namespace, id)
}

// mine says whether a conf is that container's.
func (r *Registry) mine(namespace, id string) func(*pve.Conf) bool {
	return func(c *pve.Conf) bool {
		return slices.ContainsFunc(c.LXC(), func(e pve.Entry) bool {
			return e.Key == "lxc.hook.pre-start" && strings.HasSuffix(e.Value, fmt.Sprintf(" guard %s %s' sh", namespace, id))
		})
	}
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

// Register gives a container its VMID and its conf, and its disk the name that
// goes with them: the one it has, or else want, or if that is 0 any that is free.
// It answers the dataset, if the container has one of ours. Errors: those of
// Node.Register; FailedPrecondition, it has another than want.
func (r *Registry) Register(ctx context.Context, want int, c pve.Container, disk Disk) (vmid int, dataset string, err error) {
	file, err := name(c.Namespace, c.ID)
	if err != nil {
		return 0, "", err
	}
	r.locks.Lock(file)
	defer func() { _ = r.locks.Unlock(file) }()
	fail := func(err error) (int, string, error) {
		return 0, "", fmt.Errorf("registering container %s with Proxmox: %w", c.ID, err)
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
	c.Guard = r.guardLine(c.Namespace, c.ID)
	var volume Volume
	if rec.VMID == 0 && r.Describe != nil {
		if err := r.Describe(ctx, &c); err != nil {
			return fail(err)
		}
	}
	of := func(vmid int) (_ *pve.Conf, err error) {
		c.Rootfs = disk.Directory
		if disk.Dataset != "" {
			if volume, err = r.disks.Volume(ctx, vmid, disk.Dataset); err != nil {
				return nil, err
			}
			c.Rootfs = volume.Conf
		}
		conf, err := c.Conf(r.host)
		if err != nil {
			return nil, err
		}
		return conf, r.write(file, Record{c.Namespace, c.ID, vmid})
	}
	vmid, err = r.vmid(ctx, rec.VMID, want, &c, of)
	if err != nil {
		if rec.VMID == 0 {
			err = errors.Join(err, ignoreMissing(os.Remove(filepath.Join(r.dir, file))))
		}
		return fail(err)
	}
	if disk.Dataset == "" {
		return vmid, "", nil
	}
	if volume.Dataset == "" { // it had a conf
		if volume, err = r.disks.Volume(ctx, vmid, disk.Dataset); err != nil {
			return fail(err)
		}
	}
	if disk.Dataset != volume.Dataset {
		if err := r.disks.Move(ctx, disk.Dataset, volume); err != nil {
			return fail(err)
		}
	}
	return vmid, volume.Dataset, nil
}

// vmid finds the container's conf, or makes one.
func (r *Registry) vmid(ctx context.Context, has, want int, c *pve.Container, of func(int) (*pve.Conf, error)) (int, error) {
	if has != 0 {
		conf, err := r.node.Read(has)
		switch {
		case err == nil && r.mine(c.Namespace, c.ID)(conf):
			return has, r.node.Change(ctx, has, func(conf *pve.Conf) error { return c.Limits.Update(conf, r.host) })
		case err != nil && !errdefs.IsNotFound(err):
			return 0, err
		}
		// A crash came before its conf, or an administrator removed that; the number is
		// taken again if nobody else has it.
		vmid, err := r.node.Register(ctx, has, of)
		if !errdefs.IsAlreadyExists(err) {
			return vmid, err
		}
	}
	return r.node.Register(ctx, want, of)
}

// Update writes a container's limits into its conf. Errors: NotFound, it has none.
func (r *Registry) Update(ctx context.Context, namespace, id string, limits pve.Limits) error {
	return r.with(namespace, id, func(rec Record) error {
		return r.node.Change(ctx, rec.VMID, func(conf *pve.Conf) error {
			if !r.mine(namespace, id)(conf) {
				return fmt.Errorf("VMID %d is another guest's: %w", rec.VMID, errdefs.ErrNotFound)
			}
			return limits.Update(conf, r.host)
		})
	})
}

// Remove gives the VMID of a container back, with its conf. There is nothing to
// do for one that has none.
func (r *Registry) Remove(ctx context.Context, namespace, id string) error {
	err := r.with(namespace, id, func(rec Record) error {
		err := r.node.Remove(ctx, rec.VMID, r.mine(namespace, id))
		if err != nil && !errdefs.IsFailedPrecondition(err) {
			return err
		}
		// One that is another guest's meanwhile stays.
		file, err := name(namespace, id)
		if err != nil {
			return err
		}
		return ignoreMissing(os.Remove(filepath.Join(r.dir, file)))
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
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
