package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
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
}

// disks are the snapshotter's, on the storages of this node.
type disks struct {
	conf  config
	node  *pve.Node
	self  string
	zfs   zfs.Way
	store snapshotter.Store
}

func (d *disks) Ours(dataset string) bool { return d.store.Owns(dataset) }

// Volume gives the disk the size of what is free: Proxmox takes one without a
// limit for one of 0 bytes, and none was asked for.
func (d *disks) Volume(ctx context.Context, vmid int, dataset string) (registry.Volume, error) {
	s, err := d.node.Storage(d.self, d.conf.Storage, d.conf.Dataset)
	if err != nil {
		return registry.Volume{}, err
	}
	name := fmt.Sprintf("subvol-%d-disk-0", vmid)
	target := path.Join(s.Pool, name)
	if target != dataset {
		if _, err := d.zfs.Space(ctx, target); err == nil {
			return registry.Volume{}, fmt.Errorf("volume %s: %w", target, os.ErrExist)
		} else if !errdefs.IsNotFound(err) {
			return registry.Volume{}, err
		}
	}
	free, err := d.zfs.Available(ctx, d.conf.Dataset)
	if err != nil {
		return registry.Volume{}, fmt.Errorf("the size of a disk: %w", err)
	}
	size := max(free>>30, 1)
	return registry.Volume{Conf: fmt.Sprintf("%s:%s,size=%dG", s.Name, name, size), Dataset: target, Size: size << 30}, nil
}

func (d *disks) Move(ctx context.Context, dataset string, to registry.Volume) error {
	return d.store.Place(ctx, dataset, to.Dataset, zfs.Properties{"refquota": strconv.FormatInt(to.Size, 10), "acltype": "posix", "xattr": "sa"})
}

// newProxmox is this node's registry; nil if this is no node of Proxmox.
func newProxmox(conf config, z zfs.Way, s snapshotter.Store, conn *grpc.ClientConn) (*proxmox, error) {
	node, self, err := thisNode(conf)
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
	d := &disks{conf: conf, node: node, self: self, zfs: z, store: s}
	r, err := registry.New(node, recordsOf(conf), program, host, d)
	if err != nil {
		return nil, err
	}
	p := &proxmox{registry: r, conn: conn}
	r.Describe = p.describe
	return p, nil
}

// thisNode is this node of Proxmox and its name; nil if it is none.
func thisNode(conf config) (*pve.Node, string, error) {
	if !pve.Found(conf.ProxmoxRoot) {
		return nil, "", nil
	}
	vmids, err := parseVMIDs(conf.VMIDRange)
	if err != nil {
		return nil, "", err
	}
	self, err := os.Readlink(filepath.Join(conf.ProxmoxRoot, "local"))
	if err != nil {
		return nil, "", fmt.Errorf("the name of this node: %w", err)
	}
	return &pve.Node{Root: conf.ProxmoxRoot, Locks: "/run/lock/lxc", Range: vmids}, path.Base(self), nil
}

// containerStorages are the datasets below which containers' disks may be.
func containerStorages(conf config) ([]string, error) {
	node, self, err := thisNode(conf)
	if node == nil || err != nil {
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

// describe adds what containerd knows of a container.
func (p *proxmox) describe(ctx context.Context, c *pve.Container) error {
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

// followPause is how long it takes to ask containerd again that did not answer.
const followPause = 5 * time.Second

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
	// containerd answers nothing before the first event: what is removed before it
	// listens is found by a look after it does, which a call that it answered proves.
	if err := p.sweep(ctx); err != nil {
		return err
	}
	for {
		e, err := stream.Recv()
		if err != nil {
			return err
		}
		var gone eventsapi.ContainerDelete
		if err := typeurl.UnmarshalTo(e.Event, &gone); err != nil {
			log.G(ctx).WithError(err).Warn("an event of containerd's")
			continue
		}
		p.remove(ctx, e.Namespace, gone.ID)
	}
}

// sweep removes what has no container any more.
func (p *proxmox) sweep(ctx context.Context) error {
	all, err := p.registry.List()
	if err != nil {
		return err
	}
	for _, rec := range all {
		_, err := containersapi.NewContainersClient(p.conn).Get(namespaces.WithNamespace(ctx, rec.Namespace), &containersapi.GetContainerRequest{ID: rec.ID})
		err = errgrpc.ToNative(err)
		if errdefs.IsNotFound(err) {
			p.remove(ctx, rec.Namespace, rec.ID)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// remove leaves what it could not do to the next sweep.
func (p *proxmox) remove(ctx context.Context, namespace, id string) {
	if err := p.registry.Remove(ctx, namespace, id); err != nil {
		log.G(ctx).WithError(err).WithField("namespace", namespace).WithField("container", id).Warn("its VMID is not given back yet; tried again later")
	}
}
