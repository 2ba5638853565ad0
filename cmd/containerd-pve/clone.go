package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
	"github.com/containerd-pve/containerd-pve/template/clone"
)

const (
	// cloneLimit is how long containerd keeps what a clone that was killed has left.
	cloneLimit = 10 * time.Minute
	// cloneTries is how often another clone of the same state is waited for.
	cloneTries = 5
	clonePause = 10 * time.Millisecond
)

// cloner makes containers of containerd's, of states of others, in the namespace of the context.
type cloner struct {
	conn *grpc.ClientConn
	zfs  interface {
		Set(ctx context.Context, name string, props zfs.Properties) error
	}
}

// checkNew refuses what cannot be another container's, before anything is made.
// node is nil where there is no Proxmox. Errors: InvalidArgument, AlreadyExists.
func (c *cloner) checkNew(ctx context.Context, id string, vmid int, node *pve.Node) error {
	if err := identifiers.Validate(id); err != nil {
		return fmt.Errorf("the new container's id: %w", err)
	}
	_, err := (&configs{c.conn}).get(ctx, id)
	if err == nil {
		return fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	}
	if !errdefs.IsNotFound(err) {
		return err
	}
	if vmid != 0 && node == nil {
		return fmt.Errorf("--vmid %d: this is no node of Proxmox VE: %w", vmid, errdefs.ErrInvalidArgument)
	}
	if vmid != 0 {
		return node.Free(vmid)
	}
	return nil
}

// clone makes container id of a state, dataset@name, and of the record that was kept
// with it. It is not started. If it fails nothing is left. notes are clone.Of's.
func (c *cloner) clone(ctx context.Context, id string, vmid int, state string, record []byte) (notes []string, err error) {
	var kept containersapi.Container
	if err := proto.Unmarshal(record, &kept); err != nil {
		return nil, fmt.Errorf("the configuration that was kept: %w: %w", err, errdefs.ErrDataLoss)
	}
	container, notes, err := clone.Of(&kept, id, vmid)
	if err != nil {
		return nil, err
	}
	// Until the container is there containerd would drop its snapshot.
	ctx, end, err := c.lease(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, end(err != nil)) }()
	if err := c.prepare(ctx, &kept, id, state); err != nil {
		return nil, err
	}
	// An answer that nobody waits for would leave it open whether the snapshot is in use.
	whole := context.WithoutCancel(ctx)
	if err = ctx.Err(); err == nil {
		_, err = containersapi.NewContainersClient(c.conn).Create(whole, &containersapi.CreateContainerRequest{Container: container})
		err = errgrpc.ToNative(err)
	}
	if err != nil {
		_, undo := snapshotsapi.NewSnapshotsClient(c.conn).Remove(whole, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: kept.Snapshotter, Key: id})
		return nil, errors.Join(fmt.Errorf("making container %s: %w", id, err), errgrpc.ToNative(undo))
	}
	return notes, nil
}

// lease holds what is made with the context, until end, or for cloneLimit. What failed is
// gone, with its dataset, before end returns; else nobody has to wait.
func (c *cloner) lease(ctx context.Context) (_ context.Context, end func(failed bool) error, err error) {
	client := leasesapi.NewLeasesClient(c.conn)
	lease, err := client.Create(ctx, &leasesapi.CreateRequest{
		ID: "containerd-pve-clone-" + rand.Text(), Labels: map[string]string{"containerd.io/gc.expire": time.Now().Add(cloneLimit).UTC().Format(time.RFC3339)},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("a lease: %w", errgrpc.ToNative(err))
	}
	whole := context.WithoutCancel(ctx)
	return leases.WithLease(ctx, lease.Lease.ID), func(failed bool) error {
		_, err := client.Delete(whole, &leasesapi.DeleteRequest{ID: lease.Lease.ID, Sync: failed})
		if err = errgrpc.ToNative(err); err == nil || !failed {
			return nil // it ends by itself
		}
		return fmt.Errorf("the lease %s: %w", lease.Lease.ID, err)
	}, nil
}

// prepare makes the snapshot. Its labels are those by which the first container's
// is mounted and limited.
func (c *cloner) prepare(ctx context.Context, kept *containersapi.Container, id, state string) error {
	client := snapshotsapi.NewSnapshotsClient(c.conn)
	fail := func(err error) error { return fmt.Errorf("the root file system of container %s: %w", id, err) }
	of, err := client.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: kept.Snapshotter, Key: kept.SnapshotKey})
	if err != nil {
		return fail(errgrpc.ToNative(err))
	}
	labels := maps.Clone(snapshots.FilterInheritedLabels(of.Info.Labels))
	if labels == nil {
		labels = map[string]string{}
	}
	delete(labels, snapshots.LabelSnapshotRef)
	labels[snapshotter.LabelCloneOf] = state
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		if err := c.zfs.Set(ctx, state, zfs.Properties{snapshotter.PropClone: namespace + "/" + id}); err != nil {
			return fail(err)
		}
		_, err = client.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: kept.Snapshotter, Key: id, Parent: of.Info.Parent, Labels: labels})
		// Another that clones the same state has set it in between.
		if err = errgrpc.ToNative(err); !errdefs.IsPermissionDenied(err) || try == cloneTries {
			break
		}
		select {
		case <-ctx.Done():
			return fail(ctx.Err())
		case <-time.After(time.Duration(try) * clonePause):
		}
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

func (s *stateTool) cloneCommand(container string) *cobra.Command {
	var vmid int
	c := &cobra.Command{
		Use: "clone NAME CONTAINER NEWID", Short: "make another container of a state that was kept",
		Long: "Makes a container with the id NEWID, of the root file system and the configuration that were kept, and copies nothing; it is not started.\n" +
			"What is said on standard error is not its own, or what both containers have to share: directories of the host that are mounted, for example.\n" + container,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) error {
			name, id := args[0], args[2]
			ctx, o, err := s.open(c.Context(), c.Flags().Changed("config"), args[1])
			if err != nil {
				return err
			}
			defer o.end()
			if err := o.cloner.checkNew(ctx, id, vmid, o.node); err != nil {
				return err
			}
			var notes []string
			err = o.Clone(ctx, o.of, name, func(snapshot string, record []byte) (err error) {
				notes, err = o.cloner.clone(ctx, id, vmid, snapshot, record)
				return err
			})
			if err != nil {
				return err
			}
			for _, n := range notes {
				fmt.Fprintf(c.ErrOrStderr(), "containerd-pve: container %s: %s\n", id, n)
			}
			namespace, err := namespaces.NamespaceRequired(ctx)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "container %s is made; it is started by `ctr -n %s task start -d %s`\n", id, namespace, id)
			return err
		},
	}
	c.Flags().IntVar(&vmid, "vmid", 0, "its `VMID` on a node of Proxmox; any that is free if not said")
	return c
}
