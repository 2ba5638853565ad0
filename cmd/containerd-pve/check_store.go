package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

const (
	// nearlyFull is how much of a pool may be in use (per cent) before ZFS gets slow.
	nearlyFull = 90
	// leastFree is how much a layer or a container may want at once.
	leastFree = 64 << 20
	// answerLimit is how long the pool and the daemon may take for what costs them next to nothing.
	answerLimit = 10 * time.Second
)

// storeHost is what a check of the snapshotter's store looks at.
type storeHost struct {
	ready   func(dataset string) error
	module  func() (version string, err error)
	pool    func(ctx context.Context, dataset string) (zfs.Pool, error)
	lister  func(way string) (zfs.Lister, error)
	belongs func(ctx context.Context, l zfs.Lister, root, dataset string) error
	serving func(ctx context.Context, address string) error
}

// thisHost looks at the real ones.
var thisHost = storeHost{
	ready:  zfs.Ready,
	module: zfs.Module,
	pool:   zfs.InspectPool,
	lister: zfs.OpenLister,
	belongs: func(ctx context.Context, l zfs.Lister, root, dataset string) error {
		return snapshotter.Belongs(ctx, l, root, dataset)
	},
	serving: serving,
}

// check says of the ZFS module, the pool, the dataset and the daemon how they
// are. What cannot be known because of an earlier finding is not listed.
func (h storeHost) check(ctx context.Context, conf config) []finding {
	list := h.checkZFS(ctx, conf)
	return append(list, h.checkDaemon(ctx, conf.Address))
}

func (h storeHost) checkZFS(ctx context.Context, conf config) []finding {
	err := h.ready(conf.Dataset)
	version, merr := h.module()
	if err != nil && errdefs.IsUnavailable(merr) {
		return []finding{result("zfs module", "", err)}
	}
	list := []finding{result("zfs module", version, merr)}
	switch {
	case conf.ZFS == zfs.GoZFS:
		list[0] = result("zfs module", version+`, by go-zfs, as the configuration says`, nil)
	case conf.ZFS == zfs.NativeOnly && errdefs.IsNotImplemented(merr):
		list[0] = result("zfs module", "", fmt.Errorf(`%w: set zfs = "auto" in the configuration, so that go-zfs serves`, merr))
	case conf.ZFS == zfs.Auto && errdefs.IsNotImplemented(merr):
		list[0] = warning("zfs module", version+" is of a release that was not tried: go-zfs serves, with a zfs process for each call")
	}
	if err != nil {
		return append(list, result("pool", "", err))
	}
	pctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	p, err := h.pool(pctx, conf.Dataset)
	f := result("pool", "", err)
	if err == nil {
		f = describePool(p)
	}
	list = append(list, f)
	if p.Health == zfs.HealthSuspended {
		return list // whoever asked for a dataset now would have to wait
	}
	l, err := h.lister(conf.ZFS)
	if err != nil {
		return append(list, result("dataset", "", err))
	}
	defer l.Close()
	return append(list, h.checkDataset(ctx, conf, l, p)...)
}

func describePool(p zfs.Pool) finding {
	see := fmt.Sprintf("see `zpool status %s`", p.Name)
	switch p.Health {
	case zfs.HealthSuspended:
		return result("pool", "", fmt.Errorf("%s is suspended, it has lost its devices: bring them back and run `zpool clear %s` (%s)", p.Name, p.Name, see))
	case "ONLINE", "DEGRADED":
	default:
		return result("pool", "", fmt.Errorf("%s is %s: %s", p.Name, p.Health, see))
	}
	if p.ReadOnly {
		return result("pool", "", fmt.Errorf("%s is imported read-only: run `zpool export %s`, then `zpool import %s`", p.Name, p.Name, p.Name))
	}
	state := fmt.Sprintf("%s, %s, %d %% used", p.Name, p.Health, p.Capacity)
	switch {
	case p.Health == "DEGRADED":
		return warning("pool", state+": "+see)
	case p.Capacity >= nearlyFull:
		return warning("pool", state+": ZFS gets slow; "+makeRoom(p.Name))
	}
	return result("pool", state, nil)
}

func makeRoom(pool string) string {
	return fmt.Sprintf("remove images or containers (`containerd-pve snapshots` shows their sizes), or add a disk to pool %s", pool)
}

func (h storeHost) checkDataset(ctx context.Context, conf config, l zfs.Lister, p zfs.Pool) []finding {
	name := conf.Dataset
	err := h.belongs(ctx, l, conf.Root, name)
	detail := name
	if errdefs.IsNotFound(err) {
		// What is above has to be there, and says how much space there is.
		name = path.Dir(name)
		detail = conf.Dataset + " does not exist yet: containerd-pve serve makes it"
		if _, err = l.Available(ctx, name); errdefs.IsNotFound(err) {
			err = fmt.Errorf("%s, above %s, does not exist: run `zfs create -p %s`, or set another dataset", name, conf.Dataset, name)
		}
	}
	list := []finding{result("dataset", detail, err)}
	free, err := l.Available(ctx, name)
	switch {
	case errdefs.IsNotFound(err):
		return list // the finding before says so
	case err != nil:
		return append(list, result("space", "", err))
	case free < leastFree:
		err = fmt.Errorf("%s is full, %s are left: %s, or raise a quota", name, units.BytesSize(float64(free)), makeRoom(p.Name))
	}
	return append(list, result("space", units.BytesSize(float64(free))+" available", err))
}

func (h storeHost) checkDaemon(ctx context.Context, address string) finding {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	err := h.serving(ctx, address)
	const look = "`journalctl -u containerd-pve`"
	switch {
	case errdefs.IsUnavailable(err):
		err = fmt.Errorf("nobody answers on %s: run `systemctl start containerd-pve`; if it ends again, see %s", address, look)
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("somebody listens on %s, but has not answered for %s: see %s", address, answerLimit, look)
	}
	return result("daemon", "answers on "+address, err)
}

// serving asks the daemon for a snapshot that nobody has. Unavailable: nobody
// listens; context.DeadlineExceeded: who listens does not answer.
func serving(ctx context.Context, address string) error {
	conn, err := grpc.NewClient("unix:"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = snapshotsapi.NewSnapshotsClient(conn).Stat(ctx, &snapshotsapi.StatSnapshotRequest{Key: "containerd-pve check"})
	switch status.Code(err) {
	case codes.OK, codes.NotFound:
		return nil
	case codes.Unavailable:
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	case codes.DeadlineExceeded:
		return fmt.Errorf("%w: %w", err, context.DeadlineExceeded)
	}
	return fmt.Errorf("%s answers, but not as a snapshotter: %w", address, err)
}
