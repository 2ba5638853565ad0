package pve

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
)

// create fails with os.ErrExist if the number is taken.
//
// A conf is put in place by a rename, as Proxmox's own tools do it, so it is there as a whole or not at
// all. The cluster's filesystem refuses the rename if another node, or a VM, has the number (pve-cluster, memdb.c:
// memdb_rename asks vmlist_different_vm_exists), in the order in which all nodes see the changes. A
// conf of this node's own containers it replaces: of that one the lock is the guard, which Proxmox's tools and
// ours hold when they make one.
func (n *Node) create(ctx context.Context, vmid int, of func(int) (*Conf, error)) error {
	conf, err := of(vmid)
	if err != nil {
		return err
	}
	return n.locked(ctx, vmid, func() error {
		if err := n.vacant(vmid); err != nil {
			return n.failure("registering", vmid, err)
		}
		// Looked at again, for whatever takes no lock: a guest that another node gives to this one, a copy
		// made by hand.
		if err := n.place(vmid, conf, func() error { return n.vacant(vmid) }); err != nil {
			return n.failure("registering", vmid, err)
		}
		return nil
	})
}

// vacant fails with os.ErrExist if a node has a guest of that number. The list of guests is
// not asked: it may be a second old. A guest moves from node to node by a rename, so this node's own is looked for
// last: one that moved here meanwhile is seen.
func (n *Node) vacant(vmid int) error {
	nodes, err := os.ReadDir(filepath.Join(n.Root, "nodes"))
	if err != nil {
		return err
	}
	file := strconv.Itoa(vmid) + ".conf"
	var places []string
	for _, node := range nodes {
		places = append(places, filepath.Join("nodes", node.Name(), "lxc", file), filepath.Join("nodes", node.Name(), "qemu-server", file))
	}
	for _, place := range append(places, filepath.Join("lxc", file)) {
		switch _, err := os.Lstat(filepath.Join(n.Root, place)); {
		case err == nil:
			return fmt.Errorf("%s is there: %w", place, os.ErrExist)
		case !errors.Is(err, os.ErrNotExist):
			return err
		}
	}
	return nil
}

// temporary is what a conf is called until it is in place. For Proxmox that is no guest's, as its
// own "<vmid>.conf.tmp.<pid>" is none. There is one of a number at most, as its writer has the lock.
const temporary = ".conf.tmp.containerd-pve"

var temporaryName = regexp.MustCompile(`^([1-9][0-9]*)` + regexp.QuoteMeta(temporary) + `$`)

func (n *Node) temporary(vmid int) string {
	return filepath.Join(n.Root, "lxc", strconv.Itoa(vmid)+temporary)
}

// place puts a conf in place, or in that of the one that is there; ready is called just before, and
// its error keeps it from that. The caller has the lock.
func (n *Node) place(vmid int, conf *Conf, ready func() error) error {
	name := n.temporary(vmid)
	err := os.WriteFile(name, conf.Bytes(), 0o640)
	if err == nil {
		err = ready()
	}
	if err == nil {
		err = os.Rename(name, n.conf(vmid))
	}
	if err != nil {
		if left := os.Remove(name); !errors.Is(left, os.ErrNotExist) {
			err = errors.Join(err, left)
		}
	}
	return err
}

// Tidy removes what is left of confs of this node that were not put in place, as after a crash. Errors: Unavailable;
// a deadline's, one is being written.
func (n *Node) Tidy(ctx context.Context) error {
	entries, err := os.ReadDir(filepath.Join(n.Root, "lxc"))
	if err != nil {
		return n.failed("looking for unfinished confs", err)
	}
	var failed error
	for _, e := range entries {
		m := temporaryName.FindStringSubmatch(e.Name())
		if m == nil || e.Type()&fs.ModeType != 0 {
			continue
		}
		vmid, err := strconv.Atoi(m[1])
		if err == nil {
			err = n.locked(ctx, vmid, func() error {
				if err := os.Remove(n.temporary(vmid)); !errors.Is(err, os.ErrNotExist) {
					return err
				}
				return nil
			})
		}
		if err != nil {
			failed = errors.Join(failed, n.failure("removing the unfinished conf of", vmid, err))
		}
	}
	return failed
}

// Empty says that nothing is in a conf: releases that made it before they wrote it left it so when they ended
// halfway.
func (c *Conf) Empty() bool { return len(c.Bytes()) == 0 }
