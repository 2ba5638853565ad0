package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	containerdzfs "github.com/containerd/zfs/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// subject is a snapshotter that is measured.
type subject struct {
	name        string
	root        string
	mounted     string // where the standing snapshot is; empty: not yet
	snapshotter snapshots.Snapshotter
	open        func(ctx context.Context) (snapshots.Snapshotter, error)
	// offline opens what fills it with snapshots while it is stopped.
	offline func(ctx context.Context) (snapshots.Snapshotter, error)
	daemon  *exec.Cmd
	conn    *grpc.ClientConn
	content string // the socket where our daemon's differ meets what is containerd otherwise
	filled  int
	layers  int
}

// makeSubjects makes the datasets; remove takes all away again.
func makeSubjects(ctx context.Context, o snapshotOptions) (_ []*subject, _ func() error, err error) {
	z, err := zfs.New(ctx, zfs.NativeOnly)
	if err != nil {
		return nil, nil, err
	}
	dir, err := os.MkdirTemp("", "snapshots-bench-")
	if err != nil {
		return nil, nil, errors.Join(err, z.Close())
	}
	var subjects []*subject
	remove := func() error {
		var errs []error
		for _, s := range subjects {
			if s.mounted != "" {
				errs = append(errs, mount.UnmountAll(s.mounted, 0))
			}
			errs = append(errs, s.stop(), mount.UnmountAll(s.root, 0))
		}
		// By the program, which takes a tree.
		if out, err := exec.Command("zfs", "destroy", "-r", o.dataset).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("zfs destroy -r %s: %w: %s", o.dataset, err, out))
		}
		return errors.Join(append(errs, os.RemoveAll(dir), z.Close())...)
	}
	if err := z.Create(ctx, o.dataset, zfs.Properties{"mountpoint": "none", "acltype": "posixacl", "xattr": "sa", "atime": "off"}); err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir), z.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, remove())
		}
	}()
	// mounted is a dataset with its mount, which the other two keep their files in.
	mounted := func(name string) (root string, err error) {
		root = filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(root, 0o700), z.Create(ctx, o.dataset+"/"+name, zfs.Properties{"mountpoint": "legacy"})); err != nil {
			return "", err
		}
		return root, (&mount.Mount{Type: "zfs", Source: o.dataset + "/" + name}).Mount(root)
	}
	ours := &subject{name: "pve-zfs", root: filepath.Join(dir, "ours"), content: filepath.Join(dir, "content.sock")}
	ours.offline = func(ctx context.Context) (snapshots.Snapshotter, error) {
		return snapshotter.New(ctx, z, ours.root, o.dataset+"/ours")
	}
	ours.open = func(ctx context.Context) (snapshots.Snapshotter, error) { return ours.serve(ctx, o, dir) }
	subjects = append(subjects, ours)

	root, err := mounted("zfs")
	if err != nil {
		return nil, nil, err
	}
	theirs := &subject{name: "zfs", root: root}
	// Records and datasets have the same form, so that ours, which is quick, makes them.
	theirs.offline = func(ctx context.Context) (snapshots.Snapshotter, error) {
		return snapshotter.New(ctx, z, theirs.root, o.dataset+"/zfs")
	}
	theirs.open = func(context.Context) (snapshots.Snapshotter, error) { return containerdzfs.NewSnapshotter(theirs.root) }
	subjects = append(subjects, theirs)

	if root, err = mounted("overlayfs"); err != nil {
		return nil, nil, err
	}
	over := &subject{name: "overlayfs", root: root}
	over.open = func(context.Context) (snapshots.Snapshotter, error) { return overlay.NewSnapshotter(over.root) }
	over.offline = over.open
	subjects = append(subjects, over)
	return subjects, remove, nil
}

// stand makes the standing snapshot, if it is not there, and mounts it as a container's that runs.
func (s *subject) stand(ctx context.Context) error {
	if s.mounted != "" {
		return nil
	}
	mounts, err := s.snapshotter.Prepare(ctx, standing, s.top())
	if err != nil {
		return fmt.Errorf("preparing %s of %s: %w", standing, s.name, err)
	}
	dir := filepath.Join(filepath.Dir(s.root), standing+"-"+s.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	s.mounted = dir
	return mount.All(mounts, dir)
}

// serve starts our daemon and connects to it.
func (s *subject) serve(ctx context.Context, o snapshotOptions, dir string) (snapshots.Snapshotter, error) {
	address := filepath.Join(dir, "ours.sock")
	s.daemon = exec.Command(o.daemon, "serve", "--config", os.DevNull, "--zfs", zfs.NativeOnly, "--dataset", o.dataset+"/ours", "--root", s.root, "--address", address,
		"--containerd-address", s.content, "--log-level", "warn")
	s.daemon.Stderr = os.Stderr
	if err := s.daemon.Start(); err != nil {
		s.daemon = nil
		return nil, err
	}
	conn, err := grpc.NewClient("unix:"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	s.conn = conn
	p := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), s.name)
	for {
		_, err := p.Stat(ctx, "none")
		if errdefs.IsNotFound(err) {
			return p, nil
		}
		if !errdefs.IsUnavailable(err) {
			return nil, err
		}
		conn.ResetConnectBackoff()
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (s *subject) start(ctx context.Context) (err error) {
	s.snapshotter, err = s.open(ctx)
	return err
}

func (s *subject) stop() error {
	var errs []error
	if s.snapshotter != nil {
		errs = append(errs, s.snapshotter.Close())
		s.snapshotter = nil
	}
	if s.conn != nil {
		errs = append(errs, s.conn.Close())
		s.conn = nil
	}
	if s.daemon != nil {
		errs = append(errs, s.daemon.Process.Signal(syscall.SIGTERM), s.daemon.Wait())
		s.daemon = nil
	}
	return errors.Join(errs...)
}

// memory is what our daemon has in RAM, in KiB; 0 of the others.
func (s *subject) memory() int {
	if s.daemon == nil {
		return 0
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.daemon.Process.Pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(data), "VmRSS:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return 0
	}
	kb, _ := strconv.Atoi(fields[0])
	return kb
}

// top is the last layer of the first image.
func (s *subject) top() string { return layer(0, min(s.filled, s.layers)-1) }

func layer(image, n int) string { return fmt.Sprintf("image-%d-%d", image, n) }

// fill brings the snapshots to count, as images of so many layers, several at once.
func (s *subject) fill(ctx context.Context, count, layers int) (err error) {
	s.layers = layers
	filler, err := s.offline(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, filler.Close()) }()
	group, ctx := errgroup.WithContext(namespaces.WithNamespace(ctx, "bench"))
	group.SetLimit(16)
	for image := s.filled / layers; image*layers < count; image++ {
		from := max(s.filled-image*layers, 0)
		to := min(count-image*layers, layers)
		group.Go(func() error {
			for n := from; n < to; n++ {
				parent := ""
				if n > 0 {
					parent = layer(image, n-1)
				}
				label := map[string]string{snapshots.LabelSnapshotRef: layer(image, n)} // as of one that is unpacked
				if _, err := filler.Prepare(ctx, layer(image, n)+"-key", parent, snapshots.WithLabels(label)); err != nil {
					return err
				}
				if err := filler.Commit(ctx, layer(image, n), layer(image, n)+"-key"); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	s.filled = count
	return nil
}
