package pve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The bounds of VMIDs (pve-common, pve_verify_vmid). A conf with another number
// makes `pct list` fail as a whole.
const (
	minVMID = 100
	maxVMID = 999_999_999
)

// Range is where VMIDs are taken from: Lower is in it, Upper is not.
type Range struct{ Lower, Upper int }

// defaultRange is Proxmox's (DataCenterConfig.pm, next-id).
var defaultRange = Range{100, 1_000_000}

// Node is a Proxmox VE node's part of the cluster's filesystem.
type Node struct {
	Root  string // /etc/pve
	Locks string // /run/lock/lxc
	// Range is the configured one; with the zero value it is next-id's of datacenter.cfg, or Proxmox's.
	Range Range
}

// Database is where the cluster's filesystem keeps its files on a node's disk.
const Database = "/var/lib/pve-cluster/config.db"

// Installed says whether a host is a node of Proxmox: it has the database, also
// while the cluster's filesystem is down. Nothing of that is asked, so nobody waits for it.
func Installed(database string) bool {
	_, err := os.Stat(database)
	return err == nil
}

// Name is this node's. Errors: Unavailable.
func (n *Node) Name() (string, error) {
	if err := n.ready(); err != nil {
		return "", err
	}
	target, err := os.Readlink(filepath.Join(n.Root, "local"))
	if err != nil {
		return "", n.failed("the name of this node", err)
	}
	return path.Base(target), nil
}

// ready: a directory that nothing is mounted on would have no guests.
func (n *Node) ready() error {
	_, err := os.Stat(filepath.Join(n.Root, ".vmlist"))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the cluster filesystem of Proxmox is not at %s (`systemctl status pve-cluster`): %w: %w", n.Root, err, errdefs.ErrUnavailable)
	}
	if err != nil {
		return n.failed("Proxmox's cluster filesystem", err)
	}
	return nil
}

func (n *Node) confAt(node string, vmid int) string {
	return filepath.Join(n.Root, "nodes", node, "lxc", strconv.Itoa(vmid)+".conf")
}

func (n *Node) conf(vmid int) string {
	return filepath.Join(n.Root, "lxc", strconv.Itoa(vmid)+".conf")
}

func checkVMID(vmid int) error {
	if vmid < minVMID || vmid > maxVMID {
		return fmt.Errorf("VMID %d is not from %d to %d: %w", vmid, minVMID, maxVMID, errdefs.ErrInvalidArgument)
	}
	return nil
}

func taken(vmid int, err error) error {
	return fmt.Errorf("VMID %d is taken (`pvesh get /cluster/resources --type vm` lists the guests): %w: %w", vmid, err, errdefs.ErrAlreadyExists)
}

// Free says whether a VMID can be had now. Errors: InvalidArgument, it is none;
// AlreadyExists; Unavailable.
func (n *Node) Free(vmid int) error {
	if err := checkVMID(vmid); err != nil {
		return err
	}
	at, err := n.Where(vmid)
	if err == nil && at != "" {
		err = taken(vmid, fmt.Errorf("node %s has it: %w", at, os.ErrExist))
	}
	return err
}

// Register reserves a VMID and writes its conf, which of makes for it: want, or the
// first that is free if want is 0. The reservation is that the conf is put in place, whole,
// which the cluster's filesystem refuses if another node has a guest of that number, and the lock on this one;
// so no two containers share one. Errors: AlreadyExists, want is taken; InvalidArgument, it is
// no VMID; ResourceExhausted, none of the range is free; Unavailable, the cluster has no quorum.
func (n *Node) Register(ctx context.Context, want int, of func(vmid int) (*Conf, error)) (int, error) {
	if want != 0 {
		if err := checkVMID(want); err != nil {
			return 0, err
		}
		err := n.create(ctx, want, of)
		if errors.Is(err, os.ErrExist) {
			err = taken(want, err)
		}
		return want, err
	}
	r, err := n.vmids()
	if err != nil {
		return 0, err
	}
	taken, err := n.taken()
	if err != nil {
		return 0, err
	}
	for vmid := r.Lower; vmid < r.Upper; vmid++ {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if taken[vmid] {
			continue
		}
		err := n.create(ctx, vmid, of)
		if !errors.Is(err, os.ErrExist) {
			return vmid, err
		}
		// Somebody was first, and may be taking a row of them.
		if taken, err = n.taken(); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("no VMID from %d to %d is free (the range is vmid_range, or next-id in datacenter.cfg): %w", r.Lower, r.Upper-1, errdefs.ErrResourceExhausted)
}

// failure is of something done to a VMID. Errors: NotFound, Unavailable.
func (n *Node) failure(doing string, vmid int, err error) error {
	return n.failed(fmt.Sprintf("%s VMID %d", doing, vmid), err)
}

// failed says what the cluster's filesystem means by its errors.
func (n *Node) failed(doing string, err error) error {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EROFS):
		return fmt.Errorf("%s: %s cannot be written (has the cluster a quorum? `pvecm status`): %w: %w", doing, n.Root, err, errdefs.ErrUnavailable)
	case errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.EIO):
		return fmt.Errorf("%s: %s does not answer (`systemctl status pve-cluster`): %w: %w", doing, n.Root, err, errdefs.ErrUnavailable)
	case errors.Is(err, os.ErrNotExist):
		// Without the filesystem nothing is there, which says nothing.
		if down := n.ready(); down != nil {
			return fmt.Errorf("%s: %w", doing, down)
		}
		return fmt.Errorf("%s: %w: %w", doing, err, errdefs.ErrNotFound)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// Read is the conf of a guest of this node. Errors: NotFound, Unavailable.
func (n *Node) Read(vmid int) (*Conf, error) { return n.read(vmid, n.conf(vmid)) }

// ReadAt is the conf of a container of the node of that name. Errors: NotFound, Unavailable.
func (n *Node) ReadAt(node string, vmid int) (*Conf, error) {
	return n.read(vmid, n.confAt(node, vmid))
}

func (n *Node) read(vmid int, name string) (*Conf, error) {
	// That nothing is there is believed if the filesystem was there before and after:
	// it may come just now.
	if err := n.ready(); err != nil {
		return nil, fmt.Errorf("reading the conf of VMID %d: %w", vmid, err)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, n.failure("reading the conf of", vmid, err)
	}
	return Parse(text), nil
}

// Where is the node that has a guest of that VMID; empty if none has.
func (n *Node) Where(vmid int) (string, error) {
	all, err := n.guests()
	return all[vmid], err
}

// Fetch moves a container's conf here from another node's directory, as is done
// when a node is renamed. Errors: NotFound, Unavailable.
func (n *Node) Fetch(ctx context.Context, vmid int, from string) error {
	return n.locked(ctx, vmid, func() error {
		if err := os.Rename(n.confAt(from, vmid), n.conf(vmid)); err != nil {
			return n.failure("moving the conf of", vmid, err)
		}
		return nil
	})
}

// IsMember says whether the cluster has a node of that name. One without a
// cluster has itself only.
func (n *Node) IsMember(name string) (bool, error) {
	text, err := n.made(".members")
	if err != nil {
		return false, err
	}
	var list struct {
		Self  string              `json:"nodename"`
		Nodes map[string]struct{} `json:"nodelist"`
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return false, fmt.Errorf("the cluster's members: %w", err)
	}
	_, there := list.Nodes[name]
	return there || list.Self == name, nil
}

// Change changes a conf under the lock that Proxmox's tools take as well. Errors:
// NotFound; those of change, which leave it as it was.
func (n *Node) Change(ctx context.Context, vmid int, change func(*Conf) error) error {
	return n.locked(ctx, vmid, func() error {
		conf, err := n.Read(vmid)
		if err != nil {
			return err
		}
		before := conf.Bytes()
		if err := change(conf); err != nil {
			return err
		}
		if slices.Equal(before, conf.Bytes()) {
			return nil // each write is a commit on every node
		}
		if err := n.place(vmid, conf, func() error { return nil }); err != nil {
			return n.failure("changing the conf of", vmid, err)
		}
		return nil
	})
}

// Remove gives a VMID back if mine says that its conf is ours; without a conf
// there is nothing to do. before is called first. Errors: FailedPrecondition, it is somebody else's;
// Unavailable, a job of Proxmox's has it or the cluster has no quorum; those of before.
func (n *Node) Remove(ctx context.Context, vmid int, mine func(*Conf) bool, before func(*Conf) error) error {
	return n.locked(ctx, vmid, func() error {
		conf, err := n.Read(vmid)
		if errdefs.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if !mine(conf) {
			return fmt.Errorf("VMID %d is another guest's: its conf stays: %w", vmid, errdefs.ErrFailedPrecondition)
		}
		if job := conf.Lock(); job != "" {
			return fmt.Errorf("VMID %d is locked by a job of Proxmox's (%s; if there is none: `pct unlock %d`): %w", vmid, job, vmid, errdefs.ErrUnavailable)
		}
		if err := before(conf); err != nil {
			return err
		}
		if err := os.Remove(n.conf(vmid)); err != nil {
			return n.failure("removing", vmid, err)
		}
		return nil
	})
}

// Lock is the job of Proxmox's that has a container (backup, snapshot, migrate…); empty: none.
func (c *Conf) Lock() string {
	job, _ := c.Get(lockKey)
	return job
}

// Free refuses the conf of a VMID that such a job has. Errors: FailedPrecondition.
func (c *Conf) Free(vmid int) error {
	job := c.Lock()
	if job == "" {
		return nil
	}
	return fmt.Errorf("VMID %[1]d is locked by a job of Proxmox's (%[2]s): wait for its end, or `pct unlock %[1]d` if there is none: %[3]w", vmid, job, errdefs.ErrFailedPrecondition)
}

// SetLock notes such a job, or with an empty one that there is none. Errors: InvalidArgument.
func (c *Conf) SetLock(job string) error {
	if job == "" {
		c.Delete(lockKey)
		return nil
	}
	return c.Set(lockKey, job)
}

// Tagged says whether a conf bears a tag.
func (c *Conf) Tagged(tag string) bool {
	tags, _ := c.Get("tags")
	return slices.Contains(strings.FieldsFunc(tags, func(r rune) bool { return strings.ContainsRune(";, ", r) }), tag)
}

// Guests are the VMIDs of this node's containers, in order.
func (n *Node) Guests() ([]int, error) {
	entries, err := os.ReadDir(filepath.Join(n.Root, "lxc"))
	if err != nil {
		return nil, n.failed("listing the guests of this node", err)
	}
	var all []int
	for _, e := range entries {
		vmid, err := strconv.Atoi(strings.TrimSuffix(e.Name(), ".conf"))
		if err == nil && strings.HasSuffix(e.Name(), ".conf") {
			all = append(all, vmid)
		}
	}
	slices.Sort(all)
	return all, nil
}

// Ours are the VMIDs of this node whose confs bear our tag.
func (n *Node) Ours() ([]int, error) {
	all, err := n.Guests()
	if err != nil {
		return nil, err
	}
	var ours []int
	for _, vmid := range all {
		conf, err := n.Read(vmid)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if conf.Tagged(Tag) {
			ours = append(ours, vmid)
		}
	}
	return ours, nil
}

const (
	// lockLimit is how long Proxmox's tools wait for the lock of a conf (PVE::AbstractConfig).
	lockLimit = 10 * time.Second
	lockPause = 20 * time.Millisecond
)

// locked calls f while no other program of Proxmox's changes the conf.
func (n *Node) locked(ctx context.Context, vmid int, f func() error) error {
	limited, cancel := context.WithTimeout(ctx, lockLimit)
	defer cancel()
	return n.exclusive(limited, fmt.Sprintf("VMID %d", vmid), fmt.Sprintf("pve-config-%d.lock", vmid), f)
}

// Exclusive calls f while no other process on this host is in one of the same name.
func (n *Node) Exclusive(ctx context.Context, name string, f func() error) error {
	return n.exclusive(ctx, name, "containerd-pve-"+name+".lock", f)
}

func (n *Node) exclusive(ctx context.Context, what, file string, f func() error) error {
	if err := os.MkdirAll(n.Locks, 0o755); err != nil {
		return fmt.Errorf("locking %s: %w", what, err)
	}
	lock, err := os.OpenFile(filepath.Join(n.Locks, file), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("locking %s: %w", what, err)
	}
	defer lock.Close()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("locking %s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is locked by another program: %w", what, ctx.Err())
		case <-time.After(lockPause):
		}
	}
}

// nextID is the property of datacenter.cfg: "next-id: lower=1000,upper=2000".
var nextID = regexp.MustCompile(`(?m)^next-id:\s*(.*?)\s*$`)

// vmids is the range that is in force.
func (n *Node) vmids() (Range, error) {
	if n.Range != (Range{}) {
		return n.Range, n.Range.check("vmid_range")
	}
	text, err := os.ReadFile(filepath.Join(n.Root, "datacenter.cfg"))
	if err != nil {
		if err = n.failed("reading the range of VMIDs", err); !errdefs.IsNotFound(err) {
			return Range{}, err
		}
	}
	return parseRange(text)
}

func parseRange(datacenter []byte) (Range, error) {
	r := defaultRange
	m := nextID.FindSubmatch(datacenter)
	if m == nil {
		return r, nil
	}
	for part := range strings.SplitSeq(string(m[1]), ",") {
		name, value, _ := strings.Cut(part, "=")
		v, err := strconv.Atoi(value)
		to := map[string]*int{"lower": &r.Lower, "upper": &r.Upper}[strings.TrimSpace(name)]
		if err != nil || to == nil {
			return Range{}, fmt.Errorf("datacenter.cfg: next-id: %q: %w", m[1], errdefs.ErrInvalidArgument)
		}
		*to = v
	}
	return r, r.check("datacenter.cfg: next-id")
}

func (r Range) check(where string) error {
	if r.Lower < minVMID || r.Upper > maxVMID+1 || r.Lower >= r.Upper {
		return fmt.Errorf("%s: from %d to %d, exclusive, is no range within %d and %d: %w", where, r.Lower, r.Upper, minVMID, maxVMID, errdefs.ErrInvalidArgument)
	}
	return nil
}

// VMIDs are the range that new ones are taken from, and how many of it guests have.
func (n *Node) VMIDs() (r Range, taken int, err error) {
	if r, err = n.vmids(); err != nil {
		return r, 0, err
	}
	all, err := n.taken()
	for vmid := range all {
		if vmid >= r.Lower && vmid < r.Upper {
			taken++
		}
	}
	return r, taken, err
}

// taken are the VMIDs of all guests of the cluster.
func (n *Node) taken() (map[int]bool, error) {
	all, err := n.guests()
	taken := map[int]bool{}
	for vmid := range all {
		taken[vmid] = true
	}
	return taken, err
}

// guests are the nodes of all guests of the cluster by their VMIDs, as its
// filesystem lists them. It is a hint: what it lacks is found when the conf is created.
func (n *Node) guests() (map[int]string, error) {
	text, err := n.made(".vmlist")
	if err != nil {
		return nil, err
	}
	var list struct {
		IDs map[string]struct {
			Node string `json:"node"`
		} `json:"ids"`
	}
	all := map[int]string{}
	if text == nil {
		return all, nil
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("the cluster's guests: %w", err)
	}
	for id, g := range list.IDs {
		if vmid, err := strconv.Atoi(id); err == nil {
			all[vmid] = g.Node
		}
	}
	return all, nil
}

// made is a file that the cluster's filesystem makes up. It is made anew whenever
// anybody asks for its size, also while it is read (pve-cluster, cfs-plug-func.c), so it may be
// no JSON; nil if it never was.
func (n *Node) made(name string) ([]byte, error) {
	const tries = 5
	for range tries {
		text, err := os.ReadFile(filepath.Join(n.Root, name))
		if err != nil {
			return nil, n.failed("reading the cluster's "+name, err)
		}
		if json.Valid(text) {
			return text, nil
		}
	}
	return nil, nil
}
