package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/lxc/pve/registry"
	"github.com/containerd-pve/containerd-pve/snapshotter/compare"
	"github.com/containerd-pve/containerd-pve/snapshotter/mounts"
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
	c, err := (&configs{t.conn}).get(ctx, id)
	if err != nil {
		return err
	}
	m, err := snapshotsapi.NewSnapshotsClient(t.conn).Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: c.Snapshotter, Key: c.SnapshotKey})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	client := tasksapi.NewTasksClient(t.conn)
	_, err = client.Create(ctx, &tasksapi.CreateTaskRequest{
		ContainerID: id, Rootfs: m.Mounts, Stdout: lasting(before.Stdout), Stderr: lasting(before.Stderr), Terminal: before.Terminal, Options: c.Runtime.Options,
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

// configs are what containerd knows of the containers of the namespace in the context.
type configs struct{ conn *grpc.ClientConn }

func (c *configs) get(ctx context.Context, id string) (*containersapi.Container, error) {
	a, err := containersapi.NewContainersClient(c.conn).Get(ctx, &containersapi.GetContainerRequest{ID: id})
	if err != nil {
		return nil, fmt.Errorf("asking containerd: %w", errgrpc.ToNative(err))
	}
	return a.Container, nil
}

func (c *configs) Config(ctx context.Context, id string) (state.Config, error) {
	found, err := c.get(ctx, id)
	if err != nil {
		return state.Config{}, err
	}
	config := state.Config{Image: found.Image}
	if config.Record, err = proto.Marshal(found); err != nil {
		return state.Config{}, fmt.Errorf("container %s: %w", id, err)
	}
	if found.Image == "" {
		return config, nil
	}
	i, err := imagesapi.NewImagesClient(c.conn).Get(ctx, &imagesapi.GetImageRequest{Name: found.Image})
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
		return config, nil // it was removed; its layers are there for as long as the container is
	}
	if err != nil {
		return state.Config{}, fmt.Errorf("image %s: %w", found.Image, err)
	}
	config.Image += "@" + i.Image.Target.Digest
	return config, nil
}

// SetConfig sets the spec: id, image and snapshot are the container's for its life,
// and labels are whoever's put them there.
func (c *configs) SetConfig(ctx context.Context, id string, record []byte) error {
	var kept containersapi.Container
	if err := proto.Unmarshal(record, &kept); err != nil {
		return fmt.Errorf("the configuration of container %s that was kept: %w: %w", id, err, errdefs.ErrDataLoss)
	}
	now, err := c.get(ctx, id)
	if err != nil {
		return err
	}
	if proto.Equal(now.Spec, kept.Spec) {
		return nil
	}
	return c.setSpec(ctx, id, kept.Spec)
}

// Held reads the spec's annotation, which the shim looks at.
func (c *configs) Held(ctx context.Context, id string) (string, error) {
	now, err := c.get(ctx, id)
	if err != nil {
		return "", err
	}
	_, annotations, err := annotationsOf(now.Spec.GetValue())
	if err != nil {
		return "", fmt.Errorf("container %s: %w", id, err)
	}
	return annotations[lxc.AnnotationRollback], nil
}

func (c *configs) Hold(ctx context.Context, id, name string) error {
	now, err := c.get(ctx, id)
	if err != nil {
		return err
	}
	spec, annotations, err := annotationsOf(now.Spec.GetValue())
	if err != nil {
		return fmt.Errorf("container %s: %w", id, err)
	}
	switch {
	case annotations[lxc.AnnotationRollback] == name:
		return nil
	case name == "":
		delete(annotations, lxc.AnnotationRollback)
	default:
		annotations[lxc.AnnotationRollback] = name
	}
	if spec["annotations"], err = json.Marshal(annotations); err != nil {
		return err
	}
	if now.Spec.Value, err = json.Marshal(spec); err != nil {
		return err
	}
	return c.setSpec(ctx, id, now.Spec)
}

// annotationsOf takes a spec apart, so that nothing of it is lost that we do not know.
func annotationsOf(spec []byte) (all map[string]json.RawMessage, annotations map[string]string, err error) {
	if err := json.Unmarshal(spec, &all); err != nil {
		return nil, nil, fmt.Errorf("its spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if text, there := all["annotations"]; there {
		if err := json.Unmarshal(text, &annotations); err != nil {
			return nil, nil, fmt.Errorf("the annotations of its spec: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	if annotations == nil {
		annotations = map[string]string{}
	}
	return all, annotations, nil
}

// setSpec is one change of containerd's database.
func (c *configs) setSpec(ctx context.Context, id string, spec *anypb.Any) error {
	_, err := containersapi.NewContainersClient(c.conn).Update(ctx, &containersapi.UpdateContainerRequest{
		Container: &containersapi.Container{ID: id, Spec: spec}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec"}},
	})
	if err != nil {
		return fmt.Errorf("the configuration of container %s: %w", id, errgrpc.ToNative(err))
	}
	return nil
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

// opened is what a command on a container works with.
type opened struct {
	*state.Store
	of     state.Container
	cloner *cloner
	node   *pve.Node // nil where there is no Proxmox
	end    func()
}

// open finds the container, and what its state is kept with. Errors: NotFound;
// FailedPrecondition, its root file system is not on our snapshotter.
func (s *stateTool) open(ctx context.Context, set bool, name string) (_ context.Context, _ *opened, err error) {
	fail := func(err error) (context.Context, *opened, error) { return nil, nil, err }
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
	found, err := (&configs{conn}).get(ctx, id)
	if err != nil {
		return fail(fmt.Errorf("%w (-n says in which namespace)", err))
	}
	m, err := snapshotsapi.NewSnapshotsClient(conn).Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: found.Snapshotter, Key: found.SnapshotKey})
	if err != nil {
		return fail(fmt.Errorf("the root file system of container %s: %w", id, errgrpc.ToNative(err)))
	}
	dataset, onZFS := "", false
	if len(m.Mounts) == 1 {
		dataset, onZFS = mounts.Dataset(mount.FromProto(m.Mounts)[0])
	}
	if found.Snapshotter != snapshotterName || !onZFS {
		return fail(fmt.Errorf("container %s has its root file system from snapshotter %q; only those of %s have a state on ZFS: %w", id, found.Snapshotter, snapshotterName, errdefs.ErrFailedPrecondition))
	}
	c := state.Container{ID: id, Dataset: dataset}
	if c.VMID, err = registry.Lookup(recordsOf(conf), namespace, id); err != nil && !errdefs.IsNotFound(err) {
		return fail(err)
	}
	z, err := zfs.New(ctx, conf.ZFS)
	if err != nil {
		return fail(err)
	}
	store := &state.Store{ZFS: z, Tasks: &tasks{conn}, Configs: &configs{conn}, Since: func(ctx context.Context, snapshot string) ([]compare.Difference, error) {
		return compare.Since(ctx, z, snapshot)
	}}
	node, err := thisNode(conf)
	if err != nil {
		return fail(errors.Join(err, z.Close()))
	}
	if node != nil {
		store.Confs = node
	}
	return ctx, &opened{store, c, &cloner{conn, z}, node, func() { _ = errors.Join(z.Close(), conn.Close()) }}, nil
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

// stateAction is what one of them does, with its arguments.
type stateAction func(ctx context.Context, store *state.Store, c state.Container, args []string, w io.Writer) error

// stateCommands are those on snapshots of containers.
func stateCommands() []*cobra.Command {
	s := &stateTool{}
	var description, format string
	var force bool
	const container = "CONTAINER is its id, or its VMID on a node of Proxmox."
	with := func(f stateAction) func(*cobra.Command, []string) error {
		return func(c *cobra.Command, args []string) error {
			ctx, o, err := s.open(c.Context(), c.Flags().Changed("config"), args[len(args)-1])
			if err != nil {
				return err
			}
			defer o.end()
			return f(ctx, o.Store, o.of, args, c.OutOrStdout())
		}
	}
	listing := func(f stateAction) func(*cobra.Command, []string) error {
		return func(c *cobra.Command, args []string) error {
			if err := checkFormat(format); err != nil {
				return err
			}
			return with(f)(c, args)
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
		RunE: listing(func(ctx context.Context, store *state.Store, c state.Container, _ []string, w io.Writer) error {
			all, err := store.List(ctx, c)
			if err != nil {
				return err
			}
			return printStates(w, format, all)
		}),
	}
	diff := &cobra.Command{
		Use: "diff NAME CONTAINER", Short: "list the files that changed since a state was kept",
		Long: "Lists the names of files that were added (A), changed (C) or deleted (D) since a state was kept; of a deleted directory its name only.\n" + container,
		Args: cobra.ExactArgs(2),
		RunE: listing(func(ctx context.Context, store *state.Store, c state.Container, args []string, w io.Writer) error {
			all, err := store.Diff(ctx, c, args[0])
			if err != nil {
				return err
			}
			return printDiff(w, format, all)
		}),
	}
	for _, c := range []*cobra.Command{list, diff} {
		c.Flags().StringVar(&format, "format", "table", "table or json")
	}
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
	all := []*cobra.Command{take, list, diff, rollback, s.cloneCommand(container), remove}
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
	fmt.Fprintln(t, "NAME\tCREATED\tUSED\tREFERENCED\tCLONES\tDESCRIPTION")
	for _, s := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", cell(s.Name), s.Created.Local().Format(time.DateTime), units.BytesSize(float64(s.Used)), units.BytesSize(float64(s.Referenced)), cell(strings.Join(s.Clones, ", ")), cell(s.Description))
	}
	return t.Flush()
}

func printDiff(w io.Writer, format string, all []compare.Difference) error {
	if format == "json" {
		return printJSON(w, all)
	}
	for _, d := range all {
		if _, err := fmt.Fprintln(w, d.Kind, cell(d.Path)); err != nil {
			return err
		}
	}
	return nil
}
