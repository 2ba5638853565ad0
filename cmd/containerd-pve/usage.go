package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/spf13/cobra"
)

// usage is what of ours is on this host.
type usage struct {
	containers, pods, snapshots int
	// others are the pods, or containers of none, of other runtimes that our snapshotter keeps.
	others []string
}

// runs says whether anything needs our programs.
func (u usage) runs() bool { return u.containers > 0 || u.pods > 0 }

func (u usage) String() string {
	var what []string
	for _, w := range []struct {
		n    int
		name string
	}{{u.containers, "containers"}, {u.pods, "pods"}, {u.snapshots, "snapshots of images and containers"}} {
		if w.n > 0 {
			what = append(what, fmt.Sprintf("%d %s", w.n, w.name))
		}
	}
	of := ""
	if len(u.others) > 0 {
		of = fmt.Sprintf(" (of other runtimes, which our snapshotter keeps: %s)", strings.Join(u.others, ", "))
	}
	return strings.Join(what, " and ") + of
}

// inUse asks containerd, if it is there, and the snapshotter's store.
func inUse(ctx context.Context, conf config) (usage, error) {
	u, err := running(ctx, defaultContainerd)
	if err != nil && !errdefs.IsUnavailable(err) {
		return u, err
	}
	if conf.Dataset != "" {
		if err := conf.complete(); err != nil {
			return u, err
		}
		snapshots, err := listSnapshots(ctx, conf)
		if err != nil && !errdefs.IsNotFound(err) {
			return u, err
		}
		u.snapshots = len(snapshots)
	}
	return u, nil
}

// running asks containerd for containers with our runtime or on our snapshotter, without which it could not remove
// them, and for pods with our runtime. A pod may have no container for a moment.
// Errors: Unavailable, containerd does not run.
func running(ctx context.Context, address string) (usage, error) {
	var others []string
	containers, err := listContainers(ctx, address, func(c *containersapi.Container) bool {
		if !isOurs(c) && c.Snapshotter == snapshotterName {
			others = append(others, cmp.Or(c.Labels[podLabel], c.ID))
		}
		return isOurs(c) || c.Snapshotter == snapshotterName
	})
	if err != nil {
		return usage{}, err
	}
	slices.Sort(others)
	pods, err := countPods(ctx, address)
	return usage{containers: len(containers), pods: pods, others: slices.Compact(others)}, err
}

// countPods counts the sandboxes of all namespaces.
func countPods(ctx context.Context, address string) (int, error) {
	conn, err := dialContainerd(address)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	all, err := namespacesapi.NewNamespacesClient(conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return 0, fmt.Errorf("containerd at %s: %w", address, errgrpc.ToNative(err))
	}
	n := 0
	for _, ns := range all.Namespaces {
		list, err := sandboxapi.NewStoreClient(conn).List(namespaces.WithNamespace(ctx, ns.Name), &sandboxapi.StoreListRequest{})
		if err = errgrpc.ToNative(err); err != nil {
			return 0, fmt.Errorf("sandboxes of namespace %s: %w", ns.Name, err)
		}
		for _, s := range list.List {
			if s.GetRuntime().GetName() == runtimeName {
				n++
			}
		}
	}
	return n, nil
}

// unused waits until nothing of ours is left, and says what it waits for; pause is between two looks. Errors: the context's.
func unused(c *cobra.Command, address string, pause time.Duration) error {
	said := ""
	for {
		u, err := running(c.Context(), address)
		say := fmt.Sprintf("There are %s: waiting until they are removed.", u)
		switch {
		case c.Context().Err() != nil:
			return fmt.Errorf("waiting until no containers of ours are left: %w", c.Context().Err())
		case err == nil && !u.runs():
			return nil
		case err != nil: // it may be restarted just now
			say = fmt.Sprintf("Waiting for containerd: %v", err)
		}
		if say != said {
			fmt.Fprintln(c.ErrOrStderr(), say)
		}
		said = say
		select {
		case <-c.Context().Done():
		case <-time.After(pause):
		}
	}
}
