package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
)

// usedHost is a containerd with containers and pods of ours and of others, in two namespaces. Its pods go at the third look.
type usedHost struct {
	mu    sync.Mutex
	looks int
}

type (
	usedNamespaces struct {
		namespacesapi.UnimplementedNamespacesServer
	}
	usedContainers struct {
		containersapi.UnimplementedContainersServer
		*usedHost
	}
	usedTasks struct {
		tasksapi.UnimplementedTasksServer
	}
	usedSandboxes struct {
		sandboxapi.UnimplementedStoreServer
		*usedHost
	}
)

func (usedNamespaces) List(context.Context, *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	return &namespacesapi.ListNamespacesResponse{Namespaces: []*namespacesapi.Namespace{{Name: "default"}, {Name: "k8s.io"}}}, nil
}

func (h usedContainers) ListStream(_ *containersapi.ListContainersRequest, s containersapi.Containers_ListStreamServer) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	names := []string{"io.containerd.runc.v2"}
	if ns, _ := namespaces.Namespace(s.Context()); ns == "k8s.io" && h.looks == 0 {
		names = append(names, runtimeName)
	}
	for _, n := range names {
		if err := s.Send(&containersapi.ListContainerMessage{Container: &containersapi.Container{ID: n, Runtime: &containersapi.Container_Runtime{Name: n}}}); err != nil {
			return err
		}
	}
	return nil
}

func (usedTasks) List(context.Context, *tasksapi.ListTasksRequest) (*tasksapi.ListTasksResponse, error) {
	return &tasksapi.ListTasksResponse{}, nil
}

func (h usedSandboxes) List(ctx context.Context, _ *sandboxapi.StoreListRequest) (*sandboxapi.StoreListResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := []*types.Sandbox{{SandboxID: "a", Runtime: &types.Sandbox_Runtime{Name: "io.containerd.runc.v2"}}}
	if ns, _ := namespaces.Namespace(ctx); ns != "k8s.io" {
		return &sandboxapi.StoreListResponse{List: list}, nil
	}
	if h.looks++; h.looks < 3 {
		list = append(list, &types.Sandbox{SandboxID: "b", Runtime: &types.Sandbox_Runtime{Name: runtimeName}})
	}
	return &sandboxapi.StoreListResponse{List: list}, nil
}

func usedServer(t *testing.T) string {
	t.Helper()
	h := &usedHost{}
	server := grpc.NewServer()
	namespacesapi.RegisterNamespacesServer(server, usedNamespaces{})
	containersapi.RegisterContainersServer(server, usedContainers{usedHost: h})
	tasksapi.RegisterTasksServer(server, usedTasks{})
	sandboxapi.RegisterStoreServer(server, usedSandboxes{usedHost: h})
	address := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(l)
	t.Cleanup(server.Stop)
	return address
}

// TestUnused: it waits for containers, and for pods that have none at the moment; each change is said once.
func TestUnused(t *testing.T) {
	address := usedServer(t)
	var said bytes.Buffer
	c := &cobra.Command{}
	c.SetErr(&said)
	c.SetContext(t.Context())
	if err := unused(c, address, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(said.String()), "\n")
	if !slices.Equal(lines, []string{"There are 1 containers and 1 pods: waiting until they are removed.", "There are 1 pods: waiting until they are removed."}) {
		t.Errorf("%q", lines)
	}
	// Without containerd it is not known.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	c.SetContext(ctx)
	if err := unused(c, filepath.Join(t.TempDir(), "none"), time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if _, err := running(t.Context(), filepath.Join(t.TempDir(), "none")); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		u    usage
		want string
		runs bool
	}{
		{usage{}, "", false}, {usage{snapshots: 2}, "2 snapshots of images and containers", false},
		{usage{containers: 1, pods: 2, snapshots: 3}, "1 containers and 2 pods and 3 snapshots of images and containers", true}, {usage{pods: 1}, "1 pods", true},
		{usage{containers: 2, others: []string{"coredns", "proxy"}}, "2 containers (of other runtimes, which our snapshotter keeps: coredns, proxy)", true},
	} {
		if got := c.u.String(); got != c.want || c.u.runs() != c.runs {
			t.Errorf("%q, %v, want %q", got, c.u.runs(), c.want)
		}
	}
}
