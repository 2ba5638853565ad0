package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/lxc/pve/registry"
)

// runtimeName is what containers of this runtime have.
const runtimeName = "io.containerd.pve.v2"

// podLabel is the CRI plugin's, of a container in a pod.
const podLabel = "io.kubernetes.pod.name"

// container is one of the list. Its JSON is what other programs read: no field is
// renamed or removed.
type container struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	// VMID is 0 for a container that Proxmox does not know.
	VMID  int    `json:"vmid"`
	Image string `json:"image"`
	Pod   string `json:"pod"`
	// State is created, running, stopped, paused, or empty: there is no task.
	State string `json:"state"`
	PID   uint32 `json:"pid"`
	// Memory are the bytes in use; 0 if it does not run.
	Memory int64 `json:"memory"`
	// Disk are the bytes that the container has written. Null: it is not on our
	// snapshotter, or ZFS did not answer.
	Disk *int64 `json:"disk"`

	snapshotter, key string
}

func containerCommand() *cobra.Command {
	c := &cobra.Command{Use: "container", Aliases: []string{"containers", "ct"}, Short: "the containers of this runtime"}
	var path, address, format string
	var pods bool
	ls := &cobra.Command{
		Use:   "ls",
		Short: "list them with their VMIDs, states, memory and disks",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkFormat(format); err != nil {
				return err
			}
			conf, err := readConfig(path, c.Flags().Changed("config"))
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), containerdLimit)
			defer cancel()
			list, err := listContainers(ctx, address, isOurs)
			if err != nil {
				return err
			}
			if err := addVMIDs(list, recordsOf(conf)); err != nil {
				return err
			}
			addMemory(list, "/proc", "/sys/fs/cgroup")
			if err := addDisks(ctx, list, conf); err != nil {
				fmt.Fprintf(c.ErrOrStderr(), "containerd-pve: disks are not shown: %v\n", err)
			}
			sortContainers(list, pods)
			return printContainers(c.OutOrStdout(), format, list)
		},
	}
	ls.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration `file`")
	ls.Flags().StringVar(&address, "containerd-address", defaultContainerd, "containerd's `socket`")
	ls.Flags().StringVar(&format, "format", "table", "table or json")
	ls.Flags().BoolVar(&pods, "pods", false, "those of a pod together")
	c.AddCommand(append(stateCommands(), ls)...)
	return c
}

// isOurs are the containers with our runtime.
func isOurs(c *containersapi.Container) bool { return c.GetRuntime().GetName() == runtimeName }

// listContainers asks containerd for such containers of all namespaces.
func listContainers(ctx context.Context, address string, such func(*containersapi.Container) bool) ([]container, error) {
	conn, err := dialContainerd(address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	all, err := namespacesapi.NewNamespacesClient(conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, errgrpc.ToNative(err))
	}
	list := []container{}
	for _, n := range all.Namespaces {
		of, err := containersOf(namespaces.WithNamespace(ctx, n.Name), n.Name, conn, such)
		if err != nil {
			return nil, fmt.Errorf("containers of namespace %s: %w", n.Name, errgrpc.ToNative(err))
		}
		list = append(list, of...)
	}
	return list, nil
}

func containersOf(ctx context.Context, namespace string, conn *grpc.ClientConn, such func(*containersapi.Container) bool) ([]container, error) {
	running, err := tasksapi.NewTasksClient(conn).List(ctx, &tasksapi.ListTasksRequest{})
	if err != nil {
		return nil, err
	}
	stream, err := containersapi.NewContainersClient(conn).ListStream(ctx, &containersapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	var list []container
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			return nil, err
		}
		if !such(m.Container) {
			continue
		}
		c := container{
			Namespace: namespace, ID: m.Container.ID, Image: m.Container.Image, Pod: m.Container.Labels[podLabel],
			snapshotter: m.Container.Snapshotter, key: m.Container.SnapshotKey,
		}
		for _, t := range running.Tasks {
			if t.ID == c.ID {
				c.State, c.PID = strings.ToLower(t.Status.String()), t.Pid
			}
		}
		list = append(list, c)
	}
}

// addVMIDs takes the VMIDs from the registry's records, if this is a node of Proxmox.
func addVMIDs(list []container, records string) error {
	for i := range list {
		vmid, err := registry.Lookup(records, list[i].Namespace, list[i].ID)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		list[i].VMID = vmid
	}
	return nil
}

// payload is the part of a container's cgroup that LXC has its processes in; the
// container's own is the one above.
const payload = "payload"

// addMemory reads what the cgroup of each container's init uses. One that ends meanwhile uses nothing.
func addMemory(list []container, proc, cgroups string) {
	for i := range list {
		if list[i].PID == 0 || list[i].State == "stopped" {
			continue
		}
		text, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(int(list[i].PID)), "cgroup"))
		if err != nil {
			continue
		}
		_, path, _ := strings.Cut(strings.TrimSpace(string(text)), "::")
		if above, _, ok := strings.Cut(path, "/"+payload); ok {
			path = above
		}
		text, err = os.ReadFile(filepath.Join(cgroups, path, "memory.current"))
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil {
			list[i].Memory = n
		}
	}
}

// addDisks asks ZFS how much the containers have written.
func addDisks(ctx context.Context, list []container, conf config) error {
	if conf.Dataset == "" || !slices.ContainsFunc(list, func(c container) bool { return c.snapshotter == snapshotterName }) {
		return nil
	}
	if err := conf.complete(); err != nil {
		return err
	}
	snapshots, err := listSnapshots(ctx, conf)
	if err != nil {
		return err
	}
	used := map[snapshotName]int64{}
	for _, s := range snapshots {
		used[snapshotName{s.Namespace, s.Name}] = s.Used
	}
	for i, c := range list {
		if n, there := used[snapshotName{c.Namespace, c.key}]; there && c.snapshotter == snapshotterName {
			list[i].Disk = &n
		}
	}
	return nil
}

// snapshotterName is what our snapshotter is called in containerd's configuration.
const snapshotterName = "pve-zfs"

func sortContainers(list []container, pods bool) {
	slices.SortFunc(list, func(a, b container) int {
		if pods {
			if c := strings.Compare(a.Pod, b.Pod); c != 0 {
				return c
			}
		}
		if c := a.VMID - b.VMID; c != 0 {
			return c
		}
		return strings.Compare(a.Namespace+"/"+a.ID, b.Namespace+"/"+b.ID)
	})
}

func printContainers(w io.Writer, format string, list []container) error {
	if format == "json" {
		return printJSON(w, list)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "VMID\tNAMESPACE\tCONTAINER\tPOD\tSTATE\tMEMORY\tDISK\tIMAGE")
	for _, c := range list {
		vmid, memory, disk := "", "", ""
		if c.VMID != 0 {
			vmid = strconv.Itoa(c.VMID)
		}
		if c.Memory != 0 {
			memory = units.BytesSize(float64(c.Memory))
		}
		if c.Disk != nil {
			disk = units.BytesSize(float64(*c.Disk))
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", cell(vmid), cell(c.Namespace), cell(c.ID), cell(c.Pod), cell(c.State), cell(memory), cell(disk), cell(c.Image))
	}
	return t.Flush()
}
