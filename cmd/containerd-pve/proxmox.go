package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	eventsservice "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/sys/signal"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/lxc/pve/registry"
	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// stopSignalLabel is containerd's, of a container (pkg/oci and client).
const stopSignalLabel = "io.containerd.image.config.stop-signal"

// proxmox is this node's registry, which follows containerd's containers.
type proxmox struct {
	registry *registry.Registry
	conn     *grpc.ClientConn
	conf     config
	zfs      zfs.Way
}

// disks are the snapshotter's, on the storages of this node.
type disks struct {
	conf  config
	node  *pve.Node
	zfs   zfs.Way
	store snapshotter.Store
}

func (d *disks) Ours(dataset string) bool { return d.store.Owns(dataset) }

// Volume gives the disk the size of what is free: Proxmox takes one without a
// limit for one of 0 bytes, and none was asked for.
func (d *disks) Volume(ctx context.Context, vmid int, dataset string) (registry.Volume, error) {
	conf, target, err := d.place(vmid)
	if err != nil {
		return registry.Volume{}, err
	}
	if target != dataset {
		there, err := d.Exists(ctx, target)
		if err == nil && there {
			err = fmt.Errorf("volume %s: %w", target, os.ErrExist)
		}
		if err != nil {
			return registry.Volume{}, err
		}
	}
	free, err := d.zfs.Available(ctx, d.conf.Dataset)
	if err != nil {
		return registry.Volume{}, fmt.Errorf("the size of a disk: %w", err)
	}
	size := max(free>>30, 1)
	return registry.Volume{Conf: fmt.Sprintf("%s,size=%dG", conf, size), Dataset: target, Size: size << 30}, nil
}

// place is a VMID's volume, as a conf names it and as ZFS does.
func (d *disks) place(vmid int) (conf, dataset string, err error) {
	self, err := d.node.Name()
	if err != nil {
		return "", "", err
	}
	s, err := d.node.Storage(self, d.conf.Storage, d.conf.Dataset)
	name := fmt.Sprintf("subvol-%d-disk-0", vmid)
	return s.Name + ":" + name, path.Join(s.Pool, name), err
}

const (
	// settleLimit is less than a shim waits for a VMID.
	settleLimit = 10 * time.Second
	settlePause = 200 * time.Millisecond
)

func (d *disks) Settle(ctx context.Context, vmid int) error {
	_, target, err := d.place(vmid)
	if err != nil {
		return err
	}
	for limit := time.Now().Add(settleLimit); time.Now().Before(limit); {
		there, err := d.Exists(ctx, target)
		if err != nil || !there || !d.store.Owns(target) {
			return err
		}
		if err := d.store.Cleanup(ctx); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(settlePause):
		}
	}
	return nil
}

func (d *disks) Move(ctx context.Context, dataset string, to registry.Volume) error {
	return d.store.Place(ctx, dataset, to.Dataset, zfs.Properties{"refquota": strconv.FormatInt(to.Size, 10), "acltype": "posix", "xattr": "sa"})
}

func (d *disks) Show(ctx context.Context, dataset string) error { return d.store.Show(ctx, dataset) }

func (d *disks) Exists(ctx context.Context, dataset string) (bool, error) {
	_, err := d.zfs.Space(ctx, dataset)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

func (d *disks) Foreign(ctx context.Context, dataset string) (bool, error) {
	placed, err := snapshotter.Placed(ctx, d.zfs, dataset)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil && !placed, err
}

func (d *disks) DatasetOf(volume string) (string, error) {
	storage, name, ok := strings.Cut(volume, ":")
	self, err := d.node.Name()
	if err != nil || !ok {
		return "", err
	}
	all, err := d.node.Storages(self)
	for _, s := range all {
		if s.Name == storage {
			return path.Join(s.Pool, name), nil
		}
	}
	return "", err
}

func (d *disks) Drop(ctx context.Context, dataset string, snapshots []string) error {
	if len(snapshots) == 0 {
		return nil
	}
	var names []string
	for _, s := range snapshots {
		names = append(names, dataset+"@"+s)
	}
	failed, err := d.zfs.DestroyAll(ctx, names)
	for name, f := range failed {
		if errdefs.IsNotFound(f) {
			continue
		}
		if taken, perr := d.zfs.Property(ctx, name, snapshotter.PropTaken); perr == nil && taken != zfs.Unset {
			continue // a clone needs it: it goes with the dataset, which the snapshotter sees to
		}
		err = errors.Join(err, fmt.Errorf("destroying %s: %w", name, f))
	}
	return err
}

// newProxmox is this node's registry; nil if this is no node of Proxmox.
func newProxmox(conf config, z zfs.Way, s snapshotter.Store, conn *grpc.ClientConn) (*proxmox, error) {
	node, err := thisNode(conf)
	if node == nil || err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	host, err := pve.ReadHost()
	if err != nil {
		return nil, err
	}
	host.Env, host.Idmap = thisProxmox.knowsEnv(), pve.KnowsIdmap(thisProxmox.version("pve-container"))
	d := &disks{conf: conf, node: node, zfs: z, store: s}
	r, err := registry.New(node, recordsOf(conf), program, host, d)
	if err != nil {
		return nil, err
	}
	p := &proxmox{registry: r, conn: conn, conf: conf, zfs: z}
	r.Describe = p.describe
	return p, nil
}

// lockDir is where Proxmox's tools lock a container's conf.
const lockDir = "/run/lock/lxc"

// thisNode is this node of Proxmox; nil if it is none. Its cluster filesystem may be down.
func thisNode(conf config) (*pve.Node, error) {
	if !pve.Installed(conf.ProxmoxDatabase) {
		return nil, nil
	}
	vmids, err := parseVMIDs(conf.VMIDRange)
	if err != nil {
		return nil, err
	}
	return &pve.Node{Root: conf.ProxmoxRoot, Locks: lockDir, Range: vmids}, nil
}

// containerStorages are the datasets below which containers' disks may be.
func containerStorages(conf config) ([]string, error) {
	node, err := thisNode(conf)
	if node == nil || err != nil {
		return nil, err
	}
	self, err := node.Name()
	if err != nil {
		return nil, err
	}
	storages, err := node.Storages(self)
	if err != nil {
		return nil, err
	}
	var datasets []string
	for _, s := range storages {
		if pve.PoolOf(s.Pool) == pve.PoolOf(conf.Dataset) {
			datasets = append(datasets, s.Pool)
		}
	}
	return datasets, nil
}

// parseVMIDs reads a range as "1000-1999"; an empty one is none.
func parseVMIDs(text string) (pve.Range, error) {
	if text == "" {
		return pve.Range{}, nil
	}
	lower, upper, ok := strings.Cut(text, "-")
	first, err := strconv.Atoi(lower)
	last, err2 := strconv.Atoi(upper)
	if !ok || err != nil || err2 != nil {
		return pve.Range{}, fmt.Errorf("vmid_range %q is not FIRST-LAST: %w", text, errdefs.ErrInvalidArgument)
	}
	return pve.Range{Lower: first, Upper: last + 1}, nil
}

// describe adds what containerd knows of a container, of which the conf is about
// to be made: Proxmox reads its memory from its cgroup, and lists no container at all where that
// says nothing.
func (p *proxmox) describe(ctx context.Context, c *pve.Container) error {
	if f := thisProxmox.memory(); !f.OK {
		return fmt.Errorf("%s: %w", f.Detail, errdefs.ErrFailedPrecondition)
	}
	ctx = namespaces.WithNamespace(ctx, c.Namespace)
	a, err := containersapi.NewContainersClient(p.conn).Get(ctx, &containersapi.GetContainerRequest{ID: c.ID})
	if err != nil {
		return fmt.Errorf("asking containerd for container %s: %w", c.ID, errgrpc.ToNative(err))
	}
	if c.Image == "" {
		c.Image = a.Container.Image
	}
	if s := a.Container.Labels[stopSignalLabel]; s != "" {
		if n, err := signal.ParseSignal(s); err == nil {
			c.StopSignal = int(n)
		}
	}
	i, err := imagesapi.NewImagesClient(p.conn).Get(ctx, &imagesapi.GetImageRequest{Name: a.Container.Image})
	if err != nil {
		log.G(ctx).WithError(err).Debugf("the digest of container %s's image", c.ID)
		return nil // it may have been removed
	}
	c.Digest = i.Image.GetTarget().GetDigest()
	return nil
}

// serve answers the shims and follows containerd until ctx ends.
func (p *proxmox) serve(ctx context.Context, address string) error {
	l, err := listen(address)
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return errors.Join(err, l.Close())
	}
	registry.Serve(server, p.registry)
	go p.follow(ctx)
	go func() {
		<-ctx.Done()
		server.Close()
	}()
	if err := server.Serve(context.WithoutCancel(ctx), l); !errors.Is(err, ttrpc.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", address, err)
	}
	return nil
}

const (
	// followPause is how long it takes to ask containerd again that did not answer.
	followPause = 5 * time.Second
	// sweepPause is how long it takes to try again what could not be done, and to see
	// what somebody did behind our back.
	sweepPause = time.Minute
)

// follow gives the VMIDs of removed containers back.
func (p *proxmox) follow(ctx context.Context) {
	for ctx.Err() == nil {
		if err := p.followOnce(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Debug("containerd's events are asked for again")
		}
		select {
		case <-ctx.Done():
		case <-time.After(followPause):
		}
	}
}

// followOnce listens first and looks then, so that nothing is missed.
func (p *proxmox) followOnce(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := eventsservice.NewEventsClient(p.conn).Subscribe(ctx, &eventsservice.SubscribeRequest{Filters: []string{`topic=="/containers/delete"`}})
	if err != nil {
		return err
	}
	removed := make(chan [2]string)
	failed := make(chan error, 1)
	go func() {
		for {
			e, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			var gone eventsapi.ContainerDelete
			if err := typeurl.UnmarshalTo(e.Event, &gone); err != nil {
				log.G(ctx).WithError(err).Warn("an event of containerd's")
				continue
			}
			select {
			case removed <- [2]string{e.Namespace, gone.ID}:
			case <-ctx.Done():
				return
			}
		}
	}()
	// containerd answers nothing before the first event: what is removed before it
	// listens is found by a look after it does, which a call that it answered proves.
	look := time.NewTimer(0)
	defer look.Stop()
	for {
		select {
		case err := <-failed:
			return err
		case <-look.C:
			if err := p.registry.Sweep(ctx, p.exists); err != nil {
				log.G(ctx).WithError(err).Warn("the containers of this node of Proxmox are looked at again later")
			}
			if err := p.releaseDestroyed(ctx); err != nil {
				log.G(ctx).WithError(err).Debug("what is leased for templates is looked at again later") // one may be in the making
			}
			look.Reset(sweepPause)
		case c := <-removed:
			if err := p.registry.Remove(ctx, c[0], c[1]); err != nil {
				log.G(ctx).WithError(err).WithField("namespace", c[0]).WithField("container", c[1]).Warn("its VMID is not given back yet; tried again later")
			}
		}
	}
}

// exists asks containerd for a container.
func (p *proxmox) exists(ctx context.Context, namespace, id string) (bool, error) {
	_, err := containersapi.NewContainersClient(p.conn).Get(namespaces.WithNamespace(ctx, namespace), &containersapi.GetContainerRequest{ID: id})
	err = errgrpc.ToNative(err)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}
