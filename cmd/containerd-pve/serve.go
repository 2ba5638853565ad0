package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	leasesproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/apply"
	"github.com/containerd-pve/containerd-pve/snapshotter/compare"
	"github.com/containerd-pve/containerd-pve/snapshotter/observe"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// stopLimit is how long running calls may take after SIGTERM.
const stopLimit = 10 * time.Second

func serveCommand() *cobra.Command {
	var path string
	var flags config
	c := &cobra.Command{
		Use:   "serve",
		Short: "serve the ZFS snapshotter to containerd",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			conf, err := readConfig(path, c.Flags().Changed("config"))
			if err != nil {
				return err
			}
			for _, f := range []struct{ to, from *string }{
				{&conf.Dataset, &flags.Dataset}, {&conf.Root, &flags.Root},
				{&conf.Address, &flags.Address}, {&conf.Containerd, &flags.Containerd}, {&conf.LogLevel, &flags.LogLevel}, {&conf.ZFS, &flags.ZFS},
				{&conf.LogFormat, &flags.LogFormat}, {&conf.MetricsAddress, &flags.MetricsAddress},
			} {
				if *f.from != "" {
					*f.to = *f.from
				}
			}
			if err := conf.complete(); err != nil {
				return err
			}
			if err := log.SetLevel(conf.LogLevel); err != nil {
				return fmt.Errorf("log_level %q: %w: %w", conf.LogLevel, err, errdefs.ErrInvalidArgument)
			}
			if err := log.SetFormat(log.OutputFormat(conf.LogFormat)); err != nil {
				return fmt.Errorf("log_format %q: %w: %w", conf.LogFormat, err, errdefs.ErrInvalidArgument)
			}
			return serve(c.Context(), conf)
		},
	}
	c.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration `file`")
	c.Flags().StringVar(&flags.Dataset, "dataset", "", "parent `dataset`, made if missing")
	c.Flags().StringVar(&flags.Root, "root", "", "`directory` of the metadata (default "+defaultRoot+")")
	c.Flags().StringVar(&flags.Address, "address", "", "unix `socket` (default "+defaultAddress+")")
	c.Flags().StringVar(&flags.Containerd, "containerd-address", "", "containerd's `socket`, for layers that are exported (default "+defaultContainerd+")")
	c.Flags().StringVar(&flags.ZFS, "zfs", "", "`way` to ZFS: auto, native or go-zfs (default auto)")
	c.Flags().StringVar(&flags.LogLevel, "log-level", "", "trace, debug, info, warn or error (default info)")
	c.Flags().StringVar(&flags.LogFormat, "log-format", "", "text or json (default text)")
	c.Flags().StringVar(&flags.MetricsAddress, "metrics-address", "", "where Prometheus finds /metrics: `HOST:PORT` or the path of a socket (default none)")
	return c
}

func serve(ctx context.Context, conf config) (err error) {
	if err := zfs.Ready(conf.Dataset); err != nil {
		return err
	}
	z, err := zfs.New(ctx, conf.ZFS)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, z.Close()) }()
	s, err := snapshotter.New(ctx, z, conf.Root, conf.Dataset, snapshotter.WithSpares(*conf.Spares))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	calls := observe.NewCalls()
	if conf.MetricsAddress != "" {
		end, err := serveMetrics(ctx, conf, s, z, calls)
		if err != nil {
			return err
		}
		defer end()
	}
	// It is met when a layer is unpacked or exported: containerd starts after us.
	containerd, err := grpc.NewClient("unix:"+conf.Containerd, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(apply.Window), grpc.WithInitialConnWindowSize(4*apply.Window))
	if err != nil {
		return fmt.Errorf("containerd at %s: %w", conf.Containerd, err)
	}
	defer containerd.Close()
	l, err := listen(conf.Address)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(calls.Unary), grpc.ChainStreamInterceptor(calls.Stream))
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	diffapi.RegisterDiffServer(server, diffservice.FromApplierAndComparer(apply.New(s.Owns, contentapi.NewContentClient(containerd)),
		compare.New(z, s.Owns, contentproxy.NewContentStore(containerd), leasesproxy.NewLeaseManager(leasesapi.NewLeasesClient(containerd)))))
	failed := make(chan error, 2)
	p, err := newProxmox(conf, z, s, containerd)
	if err != nil {
		return fmt.Errorf("this node of Proxmox: %w", err)
	}
	if p != nil {
		go func() { failed <- p.serve(ctx, conf.Registry) }()
		log.G(ctx).Infof("containers of this node are Proxmox's, by %s", conf.Registry)
	}
	go func() { failed <- server.Serve(l) }()
	log.G(ctx).WithField("dataset", conf.Dataset).Infof("serving snapshots on %s", conf.Address)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.G(ctx).WithError(err).Warn("tell systemd that we are ready")
	}
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", conf.Address, err)
	case <-ctx.Done():
	}
	log.G(ctx).Info("stopping")
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	stopped := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(stopped)
	}()
	select {
	case <-stopped:
	case <-time.After(stopLimit):
		server.Stop()
	}
	return nil
}

// serveMetrics answers Prometheus until end is called.
func serveMetrics(ctx context.Context, conf config, s snapshotter.Store, lister zfs.Lister, calls *observe.Calls) (end func(), err error) {
	server, err := observe.Server(calls, &observe.Store{
		Walk:    s.Walk,
		Cleaned: s.Cleaned,
		Calls:   zfs.Calls,
		Available: func(ctx context.Context) (int64, error) {
			return lister.Available(ctx, conf.Dataset)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	var l net.Listener
	if filepath.IsAbs(conf.MetricsAddress) {
		l, err = listen(conf.MetricsAddress)
	} else {
		l, err = net.Listen("tcp", conf.MetricsAddress)
	}
	if err != nil {
		return nil, fmt.Errorf("metrics_address: %w", err)
	}
	log.G(ctx).Infof("serving metrics on %s", conf.MetricsAddress)
	go func() {
		// Snapshots are served without them too.
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.G(ctx).WithError(err).Error("metrics are served no longer")
		}
	}()
	return func() { server.Close() }, nil
}

// listen takes the place of a socket nobody answers on.
func listen(address string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return nil, err
	}
	if c, err := net.Dial("unix", address); err == nil {
		c.Close()
		return nil, fmt.Errorf("another daemon answers on %s: stop it or use another address: %w", address, errdefs.ErrFailedPrecondition)
	}
	if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// Nobody but root may ever connect, not even before a chmod.
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", address)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return l, nil
}
