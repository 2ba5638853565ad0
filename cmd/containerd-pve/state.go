package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"text/tabwriter"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/lxc/pve/registry"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
	"github.com/containerd-pve/containerd-pve/template/state"
)

// tasks are containerd's, of the namespace in the context.
type tasks struct{ conn *grpc.ClientConn }

// get is a container's task; nil if there is none.
func (t *tasks) get(ctx context.Context, id string) (*tasktypes.Process, error) {
	a, err := tasksapi.NewTasksClient(t.conn).Get(ctx, &tasksapi.GetRequest{ContainerID: id})
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the task of container %s: %w", id, err)
	}
	return a.Process, nil
}

func (t *tasks) Still(ctx context.Context, id string) (func(context.Context) error, error) {
	as := func(context.Context) error { return nil }
	p, err := t.get(ctx, id)
	if err != nil || p == nil || p.Status != tasktypes.Status_RUNNING {
		return as, err
	}
	client := tasksapi.NewTasksClient(t.conn)
	if _, err := client.Pause(ctx, &tasksapi.PauseTaskRequest{ContainerID: id}); err != nil {
		return nil, fmt.Errorf("pausing container %s: %w", id, errgrpc.ToNative(err))
	}
	resume := func(ctx context.Context) error {
		if _, err := client.Resume(ctx, &tasksapi.ResumeTaskRequest{ContainerID: id}); err != nil {
			return fmt.Errorf("resuming container %s, which stays paused: %w", id, errgrpc.ToNative(err))
		}
		return nil
	}
	// What was written into mapped files is in no file system yet.
	root, err := os.Open(fmt.Sprintf("/proc/%d/root", p.Pid))
	if err == nil {
		err = errors.Join(unix.Syncfs(int(root.Fd())), root.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("writing what container %s has in memory: %w", id, err), resume(context.WithoutCancel(ctx)))
	}
	return resume, nil
}

func (t *tasks) Stop(ctx context.Context, id string) (func(context.Context) error, error) {
	p, err := t.get(ctx, id)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return func(context.Context) error { return nil }, nil
	}
	client := tasksapi.NewTasksClient(t.conn)
	fail := func(err error) (func(context.Context) error, error) {
		return nil, fmt.Errorf("stopping container %s: %w", id, errgrpc.ToNative(err))
	}
	if p.Status != tasktypes.Status_STOPPED {
		if _, err := client.Kill(ctx, &tasksapi.KillRequest{ContainerID: id, Signal: uint32(unix.SIGKILL), All: true}); err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			return fail(err)
		}
		if _, err := client.Wait(ctx, &tasksapi.WaitRequest{ContainerID: id}); err != nil {
			return fail(err)
		}
	}
	// Whoever waits for it may delete it first.
	if _, err := client.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: id}); err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return fail(err)
	}
	if p.Status != tasktypes.Status_RUNNING && p.Status != tasktypes.Status_PAUSED {
		return func(context.Context) error { return nil }, nil
	}
	return func(ctx context.Context) error {
		if err := t.start(ctx, id, p); err != nil {
			return fmt.Errorf("starting container %s again: %w", id, err)
		}
		return nil
	}, nil
}

// start begins a task with the output of the one before, if that went to a file or
// a program: a FIFO's reader is gone.
func (t *tasks) start(ctx context.Context, id string, before *tasktypes.Process) error {
	c, err := containersapi.NewContainersClient(t.conn).Get(ctx, &containersapi.GetContainerRequest{ID: id})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	m, err := snapshotsapi.NewSnapshotsClient(t.conn).Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: c.Container.Snapshotter, Key: c.Container.SnapshotKey})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	client := tasksapi.NewTasksClient(t.conn)
	_, err = client.Create(ctx, &tasksapi.CreateTaskRequest{
		ContainerID: id, Rootfs: m.Mounts, Stdout: lasting(before.Stdout), Stderr: lasting(before.Stderr), Terminal: before.Terminal, Options: c.Container.Runtime.Options,
	})
	// The restart monitor, for one, may have been faster.
	if err = errgrpc.ToNative(err); err != nil {
		if errdefs.IsAlreadyExists(err) {
			return nil
		}
		return err
	}
	_, err = client.Start(ctx, &tasksapi.StartRequest{ContainerID: id})
	return errgrpc.ToNative(err)
}

// lasting is an output's address if it is a file or a program.
func lasting(address string) string {
	if u, err := url.Parse(address); err == nil && (u.Scheme == "file" || u.Scheme == "binary") {
		return address
	}
	return ""
}

// stateTool is what the commands on a container's state work with.
type stateTool struct {
	path, address, namespace string
}

// open finds the container, and what its state is kept with. Errors: NotFound;
// FailedPrecondition, its root file system is not on our snapshotter.
func (s *stateTool) open(ctx context.Context, set bool, name string) (_ context.Context, _ *state.Store, _ state.Container, end func(), err error) {
	fail := func(err error) (context.Context, *state.Store, state.Container, func(), error) {
		return nil, nil, state.Container{}, nil, err
	}
	conf, err := readConfig(s.path, set)
	if err != nil {
		return fail(err)
	}
	if err := conf.complete(); err != nil {
		return fail(err)
	}
	conn, err := dialContainerd(s.address)
	if err != nil {
		return fail(err)
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	namespace, id, err := s.find(ctx, conn, recordsOf(conf), name)
	if err != nil {
		return fail(err)
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	a, err := containersapi.NewContainersClient(conn).Get(ctx, &containersapi.GetContainerRequest{ID: id})
	if err != nil {
		return fail(fmt.Errorf("container %s in namespace %s (of another: -n): %w", id, namespace, errgrpc.ToNative(err)))
	}
	m, err := snapshotsapi.NewSnapshotsClient(conn).Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: a.Container.Snapshotter, Key: a.Container.SnapshotKey})
	if err != nil {
		return fail(fmt.Errorf("the root file system of container %s: %w", id, errgrpc.ToNative(err)))
	}
	if a.Container.Snapshotter != snapshotterName || len(m.Mounts) != 1 || m.Mounts[0].Type != "zfs" {
		return fail(fmt.Errorf("container %s has its root file system from snapshotter %q; only those of %s have a state on ZFS: %w", id, a.Container.Snapshotter, snapshotterName, errdefs.ErrFailedPrecondition))
	}
	c := state.Container{ID: id, Dataset: m.Mounts[0].Source}
	if c.VMID, err = registry.Lookup(recordsOf(conf), namespace, id); err != nil && !errdefs.IsNotFound(err) {
		return fail(err)
	}
	z, err := zfs.New(ctx, conf.ZFS)
	if err != nil {
		return fail(err)
	}
	store := &state.Store{ZFS: z, Tasks: &tasks{conn}}
	node, err := thisNode(conf)
	if err != nil {
		return fail(errors.Join(err, z.Close()))
	}
	if node != nil {
		store.Confs = node
	}
	return ctx, store, c, func() { _ = errors.Join(z.Close(), conn.Close()) }, nil
}

// find is a container by its id, or by its VMID.
func (s *stateTool) find(ctx context.Context, conn *grpc.ClientConn, records, name string) (namespace, id string, err error) {
	vmid, notNumber := strconv.Atoi(name)
	if notNumber != nil {
		return s.namespace, name, nil //nolint:nilerr // it is an id
	}
	_, err = containersapi.NewContainersClient(conn).Get(namespaces.WithNamespace(ctx, s.namespace), &containersapi.GetContainerRequest{ID: name})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) {
		return s.namespace, name, err
	}
	all, err := registry.Records(records)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", "", err
	}
	for _, r := range all {
		if r.VMID == vmid {
			return r.Namespace, r.ID, nil
		}
	}
	return s.namespace, name, nil
}

// stateCommands are those on snapshots of containers.
func stateCommands() []*cobra.Command {
	var s stateTool
	var description, format string
	var force bool
	const container = "CONTAINER is its id, or its VMID on a node of Proxmox."
	with := func(f func(ctx context.Context, store *state.Store, c state.Container, args []string, w io.Writer) error) func(*cobra.Command, []string) error {
		return func(c *cobra.Command, args []string) error {
			ctx, store, of, end, err := s.open(c.Context(), c.Flags().Changed("config"), args[len(args)-1])
			if err != nil {
				return err
			}
			defer end()
			return f(ctx, store, of, args, c.OutOrStdout())
		}
	}
	take := &cobra.Command{
		Use: "snapshot NAME CONTAINER", Short: "keep the state that it has now",
		Long: "Keeps root file system and configuration as they are now; a container that runs is paused for that moment.\n" + container,
		Args: cobra.ExactArgs(2),
		RunE: with(func(ctx context.Context, store *state.Store, c state.Container, args []string, _ io.Writer) error {
			return store.Take(ctx, c, args[0], description)
		}),
	}
	take.Flags().StringVarP(&description, "description", "d", "", "what is to be known of it")
	list := &cobra.Command{
		Use: "snapshots CONTAINER", Short: "list the states that are kept", Long: "Lists the states that are kept, oldest first.\n" + container,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("--format %q is neither table nor json: %w", format, errdefs.ErrInvalidArgument)
			}
			return with(func(ctx context.Context, store *state.Store, of state.Container, _ []string, w io.Writer) error {
				all, err := store.List(ctx, of)
				if err != nil {
					return err
				}
				return printStates(w, format, all)
			})(c, args)
		},
	}
	list.Flags().StringVar(&format, "format", "table", "table or json")
	rollback := &cobra.Command{
		Use: "rollback NAME CONTAINER", Short: "take it back to a state that was kept",
		Long: "Takes root file system and configuration back to a state that was kept. A container that runs is stopped, and started again\n" +
			"with the same id and VMID; its output goes on to where it went if that was a file or a program. What was written since is lost.\n" + container,
		Args: cobra.ExactArgs(2),
		RunE: with(func(ctx context.Context, store *state.Store, c state.Container, args []string, _ io.Writer) error {
			return store.Rollback(ctx, c, args[0], force)
		}),
	}
	rollback.Flags().BoolVar(&force, "force", false, "destroy newer snapshots, which are in the way")
	remove := &cobra.Command{
		Use: "rm-snapshot NAME CONTAINER", Short: "forget a state that was kept", Long: "Destroys a snapshot; the container is as it was.\n" + container,
		Args: cobra.ExactArgs(2),
		RunE: with(func(ctx context.Context, store *state.Store, c state.Container, args []string, _ io.Writer) error {
			return store.Remove(ctx, c, args[0])
		}),
	}
	all := []*cobra.Command{take, list, rollback, remove}
	for _, c := range all {
		f := c.Flags()
		f.StringVarP(&s.path, "config", "c", defaultConfig, "configuration `file`")
		f.StringVar(&s.address, "containerd-address", defaultContainerd, "containerd's `socket`")
		f.StringVarP(&s.namespace, "namespace", "n", namespaces.Default, "containerd's namespace")
	}
	return all
}

func printStates(w io.Writer, format string, all []state.Snapshot) error {
	if format == "json" {
		if all == nil {
			all = []state.Snapshot{}
		}
		return printJSON(w, all)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tCREATED\tUSED\tREFERENCED\tDESCRIPTION")
	for _, s := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", cell(s.Name), s.Created.Local().Format(time.DateTime), units.BytesSize(float64(s.Used)), units.BytesSize(float64(s.Referenced)), cell(s.Description))
	}
	return t.Flush()
}
