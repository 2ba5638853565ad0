package pve

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
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/atomicwriter"
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

// Found says whether root is the cluster's filesystem.
func Found(root string) bool {
	// Its version is no file of any directory that somebody made by that name.
	_, err := os.Stat(filepath.Join(root, ".vmlist"))
	return err == nil
}

func (n *Node) conf(vmid int) string {
	return filepath.Join(n.Root, "lxc", strconv.Itoa(vmid)+".conf")
}

// Register reserves a VMID and writes its conf, which of makes for it: want, or the
// first that is free if want is 0. The reservation is the conf's own creation,
// which the cluster's filesystem refuses if any node has a guest of that number; so no two
// containers share one. Errors: AlreadyExists, want is taken; InvalidArgument, it is
// no VMID; ResourceExhausted, none of the range is free; Unavailable, the cluster has no quorum.
func (n *Node) Register(ctx context.Context, want int, of func(vmid int) (*Conf, error)) (int, error) {
	if want != 0 {
		if want < minVMID || want > maxVMID {
			return 0, fmt.Errorf("VMID %d is not from %d to %d: %w", want, minVMID, maxVMID, errdefs.ErrInvalidArgument)
		}
		err := n.create(want, of)
		if errors.Is(err, os.ErrExist) {
			err = fmt.Errorf("VMID %d is taken (`pvesh get /cluster/resources --type vm` lists the guests): %w: %w", want, err, errdefs.ErrAlreadyExists)
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
		err := n.create(vmid, of)
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

// create fails with os.ErrExist if the number is taken.
func (n *Node) create(vmid int, of func(int) (*Conf, error)) error {
	conf, err := of(vmid)
	if err != nil {
		return err
	}
	path := n.conf(vmid)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return n.failure("registering", vmid, err)
	}
	// One write is one change of the cluster's: nobody reads half of it.
	_, err = f.Write(conf.Bytes())
	if err = errors.Join(err, f.Close()); err != nil {
		return n.failure("registering", vmid, errors.Join(err, os.Remove(path)))
	}
	return nil
}

// failure says what the cluster's filesystem means by its errors.
func (n *Node) failure(doing string, vmid int, err error) error {
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%s VMID %d: %s cannot be written (has the cluster a quorum? `pvecm status`): %w: %w", doing, vmid, n.Root, err, errdefs.ErrUnavailable)
	}
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s VMID %d: %w: %w", doing, vmid, err, errdefs.ErrNotFound)
	}
	return fmt.Errorf("%s VMID %d: %w", doing, vmid, err)
}

// Read is the conf of a guest of this node. Errors: NotFound.
func (n *Node) Read(vmid int) (*Conf, error) {
	text, err := os.ReadFile(n.conf(vmid))
	if err != nil {
		return nil, n.failure("reading the conf of", vmid, err)
	}
	return Parse(text), nil
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
		if err := atomicwriter.WriteFile(n.conf(vmid), conf.Bytes(), 0o640); err != nil {
			return n.failure("changing the conf of", vmid, err)
		}
		return nil
	})
}

// Remove gives a VMID back if mine says that its conf is ours; without a conf
// there is nothing to do. Errors: FailedPrecondition, it is somebody else's.
func (n *Node) Remove(ctx context.Context, vmid int, mine func(*Conf) bool) error {
	return n.locked(ctx, vmid, func() error {
		conf, err := n.Read(vmid)
		if errdefs.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if !conf.tagged() || !mine(conf) {
			return fmt.Errorf("VMID %d is another guest's: its conf stays: %w", vmid, errdefs.ErrFailedPrecondition)
		}
		if err := os.Remove(n.conf(vmid)); err != nil {
			return n.failure("removing", vmid, err)
		}
		return nil
	})
}

// tagged says whether a conf bears our tag.
func (c *Conf) tagged() bool {
	tags, _ := c.Get("tags")
	return slices.Contains(strings.FieldsFunc(tags, func(r rune) bool { return strings.ContainsRune(";, ", r) }), Tag)
}

// Ours are the VMIDs of this node whose confs bear our tag.
func (n *Node) Ours() ([]int, error) {
	entries, err := os.ReadDir(filepath.Join(n.Root, "lxc"))
	if err != nil {
		return nil, fmt.Errorf("listing the guests of this node: %w", err)
	}
	var ours []int
	for _, e := range entries {
		vmid, err := strconv.Atoi(strings.TrimSuffix(e.Name(), ".conf"))
		if err != nil || !strings.HasSuffix(e.Name(), ".conf") {
			continue
		}
		conf, err := n.Read(vmid)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if conf.tagged() {
			ours = append(ours, vmid)
		}
	}
	slices.Sort(ours)
	return ours, nil
}

const (
	// lockLimit is how long Proxmox's tools wait for the lock of a conf (PVE::AbstractConfig).
	lockLimit = 10 * time.Second
	lockPause = 20 * time.Millisecond
)

func (n *Node) locked(ctx context.Context, vmid int, f func() error) error {
	if err := os.MkdirAll(n.Locks, 0o755); err != nil {
		return fmt.Errorf("locking VMID %d: %w", vmid, err)
	}
	lock, err := os.OpenFile(filepath.Join(n.Locks, fmt.Sprintf("pve-config-%d.lock", vmid)), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("locking VMID %d: %w", vmid, err)
	}
	defer lock.Close()
	ctx, cancel := context.WithTimeout(ctx, lockLimit)
	defer cancel()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("locking VMID %d: %w", vmid, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("VMID %d is locked by another program of Proxmox's: %w", vmid, ctx.Err())
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
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return Range{}, fmt.Errorf("reading the range of VMIDs: %w", err)
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

// taken are the VMIDs of all guests of the cluster, as its filesystem lists them.
// It is a hint: what it lacks is found when the conf is created. The list is made
// anew whenever anybody asks for its size, also while it is read (pve-cluster,
// cfs-plug-func.c), so it may be no JSON.
func (n *Node) taken() (map[int]bool, error) {
	const tries = 5
	for range tries {
		text, err := os.ReadFile(filepath.Join(n.Root, ".vmlist"))
		if err != nil {
			return nil, fmt.Errorf("reading the cluster's guests: %w", err)
		}
		var list struct {
			IDs map[string]struct{} `json:"ids"`
		}
		if json.Unmarshal(text, &list) != nil {
			continue
		}
		taken := map[int]bool{}
		for id := range list.IDs {
			if vmid, err := strconv.Atoi(id); err == nil {
				taken[vmid] = true
			}
		}
		return taken, nil
	}
	return nil, nil
}
