package registry

import (
	"context"
	"errors"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// Sweep brings records, confs and datasets together again: what has no container
// any more is removed, a conf that somebody removed is written again as long as its disk is
// there, and a conf of ours without a record, as after the loss of the records, gets one or is
// removed too, as is what a crash left of one that was being written. exists says whether containerd has a container. What could not be done is logged
// and left to the next sweep; the error is of what kept it from looking.
func (r *Registry) Sweep(ctx context.Context, exists func(ctx context.Context, namespace, id string) (bool, error)) error {
	all, err := r.List()
	if err != nil {
		return err
	}
	known := map[int]bool{}
	for _, rec := range all {
		known[rec.VMID] = true
		there, err := exists(ctx, rec.Namespace, rec.ID)
		if err != nil {
			return err
		}
		of := func(err error) {
			if err != nil {
				log.G(ctx).WithError(err).WithField("namespace", rec.Namespace).WithField("container", rec.ID).Warnf("VMID %d is looked at again later", rec.VMID)
			}
		}
		if there {
			of(r.with(rec.Namespace, rec.ID, func(rec Record) error { return r.repair(ctx, &rec) }))
		} else {
			of(r.Remove(ctx, rec.Namespace, rec.ID))
		}
	}
	ours, err := r.node.Ours()
	if err != nil {
		return err
	}
	for _, vmid := range ours {
		if known[vmid] {
			continue
		}
		if err := r.orphan(ctx, vmid, exists); err != nil {
			log.G(ctx).WithError(err).Warnf("VMID %d, which has no record, is looked at again later", vmid)
		}
	}
	if err := r.node.Tidy(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("confs that a crash left unfinished are looked for again later")
	}
	return nil
}

// repair looks after the conf of a container that containerd has.
func (r *Registry) repair(ctx context.Context, rec *Record) error {
	conf, err := r.conf(ctx, rec)
	if err == nil {
		if rec.mine(conf) {
			return r.seen(rec, string(conf.Bytes()))
		}
		return nil // another guest's: the container gets another VMID with its next task
	}
	if !errdefs.IsNotFound(err) {
		return err
	}
	if there, err := r.hasDisk(ctx, rec.Dataset); err != nil || !there {
		log.G(ctx).Debugf("container %s: its disk %s was destroyed, and its conf %d removed", rec.ID, rec.Dataset, rec.VMID)
		return err
	}
	if rec.Conf == "" {
		return nil
	}
	log.G(ctx).Warnf("container %s: somebody removed its conf %d, which is written again (remove the container in containerd instead)", rec.ID, rec.VMID)
	_, err = r.node.Register(ctx, rec.VMID, func(int) (*pve.Conf, error) { return pve.Parse([]byte(rec.Conf)), nil })
	if errdefs.IsAlreadyExists(err) {
		return nil // as above
	}
	return err
}

// orphan deals with a conf that bears our tag and has no record. One that is
// restored from a backup looks the same, but its disk is none of ours: it stays.
func (r *Registry) orphan(ctx context.Context, vmid int, exists func(ctx context.Context, namespace, id string) (bool, error)) error {
	conf, err := r.node.Read(vmid)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	namespace, id, ok := ownerOf(conf, vmid)
	if !ok {
		return nil
	}
	file, err := name(namespace, id)
	if err != nil {
		return err
	}
	rootfs, _ := conf.Get("rootfs")
	volume, _, _ := strings.Cut(rootfs, ",")
	dataset := ""
	if strings.HasPrefix(volume, "/") {
		if _, err := os.Stat(volume); !errors.Is(err, os.ErrNotExist) {
			return err
		}
	} else {
		if dataset, err = r.disks.DatasetOf(volume); err != nil || dataset == "" {
			return err
		}
		if !r.disks.Ours(dataset) {
			if there, err := r.disks.Exists(ctx, dataset); err != nil || there {
				return err
			}
		}
	}
	there, err := exists(ctx, namespace, id)
	if err != nil {
		return err
	}
	r.locks.Lock(file)
	defer func() { _ = r.locks.Unlock(file) }()
	// One that is being registered has its record by now.
	switch rec, err := r.read(file); {
	case err == nil && rec.VMID == vmid:
		return nil
	case err == nil:
		there = false // the container has another VMID
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	self, err := r.node.Name()
	if err != nil {
		return err
	}
	rec := Record{Namespace: namespace, ID: id, VMID: vmid, Node: self, Dataset: dataset, Conf: string(conf.Bytes())}
	if there {
		log.G(ctx).Infof("container %s has VMID %d, of which the record was lost", id, vmid)
		return r.write(rec)
	}
	log.G(ctx).Infof("the conf of VMID %d, of container %s that is no more, is removed", vmid, id)
	err = r.node.Remove(ctx, vmid, rec.mine, func(*pve.Conf) error { return nil })
	if errdefs.IsFailedPrecondition(err) {
		return nil
	}
	return err
}
