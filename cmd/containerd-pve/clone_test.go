package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// cloneHost is the part of containerd, and of ZFS, that a clone is made with.
type cloneHost struct {
	log      []string
	fail     map[string]error // by the first word of a step
	denials  int              // of Prepare, before it succeeds
	made     *containersapi.Container
	snapshot *snapshotsapi.PrepareSnapshotRequest
}

func (h *cloneHost) did(step string, args ...any) error {
	step = fmt.Sprintf(step, args...)
	h.log = append(h.log, step)
	return errgrpc.ToGRPC(h.fail[strings.Fields(step)[0]])
}

func (h *cloneHost) Set(_ context.Context, name string, props zfs.Properties) error {
	if !maps.Equal(props, zfs.Properties{snapshotter.PropClone: "default/new"}) {
		return errors.New("it allows another")
	}
	return h.did("allow %s", name)
}

// The three services have calls of the same names.
type (
	cloneContainers struct {
		containersapi.UnimplementedContainersServer
		*cloneHost
	}
	cloneSnapshots struct {
		snapshotsapi.UnimplementedSnapshotsServer
		*cloneHost
	}
	cloneLeases struct {
		leasesapi.UnimplementedLeasesServer
		*cloneHost
	}
)

func (h cloneContainers) Get(_ context.Context, r *containersapi.GetContainerRequest) (*containersapi.GetContainerResponse, error) {
	if r.ID == "web" {
		return &containersapi.GetContainerResponse{Container: &containersapi.Container{ID: "web"}}, nil
	}
	return nil, errgrpc.ToGRPC(errdefs.ErrNotFound)
}

func (h cloneContainers) Create(_ context.Context, r *containersapi.CreateContainerRequest) (*containersapi.CreateContainerResponse, error) {
	h.made = r.Container
	return &containersapi.CreateContainerResponse{Container: r.Container}, h.did("create %s", r.Container.ID)
}

func (h cloneSnapshots) Stat(_ context.Context, r *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	return &snapshotsapi.StatSnapshotResponse{Info: &snapshotsapi.Info{Name: r.Key, Parent: "sha256:1", Labels: map[string]string{
		snapshots.LabelSnapshotMaxSize: "1000", snapshots.LabelSnapshotRef: "sha256:1", snapshotter.LabelCloneOf: "tank/c/1@before", "other": "x",
	}}}, nil
}

func (h cloneSnapshots) Prepare(ctx context.Context, r *snapshotsapi.PrepareSnapshotRequest) (*snapshotsapi.PrepareSnapshotResponse, error) {
	h.snapshot = r
	err := h.did("prepare %s", r.Key)
	if _, held := leases.FromContext(ctx); !held {
		err = errors.New("nothing holds it")
	}
	if n, _ := namespaces.Namespace(ctx); n != "default" {
		err = errors.New("namespace " + n)
	}
	if h.denials > 0 {
		h.denials--
		err = errgrpc.ToGRPC(errdefs.ErrPermissionDenied)
	}
	return &snapshotsapi.PrepareSnapshotResponse{}, err
}

func (h cloneSnapshots) Remove(_ context.Context, r *snapshotsapi.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, h.did("remove %s", r.Key)
}

func (h cloneLeases) Create(_ context.Context, r *leasesapi.CreateRequest) (*leasesapi.CreateResponse, error) {
	if r.Labels["containerd.io/gc.expire"] == "" {
		return nil, errors.New("it has no end")
	}
	return &leasesapi.CreateResponse{Lease: &leasesapi.Lease{ID: r.ID}}, h.did("lease")
}

func (h cloneLeases) Delete(_ context.Context, r *leasesapi.DeleteRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, h.did("end %v", r.Sync)
}

// TestCloner: the snapshot is held until its container is there, and nothing is left of one that
// could not be made.
func TestCloner(t *testing.T) {
	h := &cloneHost{}
	server := grpc.NewServer()
	containersapi.RegisterContainersServer(server, cloneContainers{cloneHost: h})
	snapshotsapi.RegisterSnapshotsServer(server, cloneSnapshots{cloneHost: h})
	leasesapi.RegisterLeasesServer(server, cloneLeases{cloneHost: h})
	address := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(l)
	t.Cleanup(server.Stop)
	conn, err := dialContainerd(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx := namespaces.WithNamespace(t.Context(), "default")
	c := &cloner{conn, h}

	for id, is := range map[string]func(error) bool{"web": errdefs.IsAlreadyExists, "a b": errdefs.IsInvalidArgument, "": errdefs.IsInvalidArgument} {
		if err := c.checkNew(ctx, id, 0, nil); !is(err) {
			t.Errorf("%q: %v", id, err)
		}
	}
	if err := c.checkNew(ctx, "new", 100, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "--vmid 100") {
		t.Errorf("a VMID without Proxmox: %v", err)
	}
	if err := c.checkNew(ctx, "new", 0, nil); err != nil {
		t.Error(err)
	}

	record, err := proto.Marshal(&containersapi.Container{ID: "web", SnapshotKey: "web", Snapshotter: snapshotterName, Spec: &anypb.Any{Value: []byte(`{}`)}})
	if err != nil {
		t.Fatal(err)
	}
	const ready = "lease; allow tank/c/7@one; prepare new; "
	for name, w := range map[string]struct {
		fail    map[string]error
		denials int
		steps   string
		is      func(error) bool
	}{
		"made":             {steps: ready + "create new; end false", is: func(err error) bool { return err == nil }},
		"in another's way": {denials: 2, steps: "lease; allow tank/c/7@one; prepare new; allow tank/c/7@one; prepare new; allow tank/c/7@one; prepare new; create new; end false", is: func(err error) bool { return err == nil }},
		"no lease":         {fail: map[string]error{"lease": errdefs.ErrUnavailable}, steps: "lease", is: errdefs.IsUnavailable},
		"no snapshot":      {fail: map[string]error{"prepare": errdefs.ErrNotFound}, steps: ready + "end true", is: errdefs.IsNotFound},
		"no container":     {fail: map[string]error{"create": errdefs.ErrAlreadyExists}, steps: ready + "create new; remove new; end true", is: errdefs.IsAlreadyExists},
		"no change in ZFS": {fail: map[string]error{"allow": errdefs.ErrUnavailable}, steps: "lease; allow tank/c/7@one; end true", is: func(err error) bool { return err != nil }},
	} {
		h.log, h.fail, h.denials = nil, w.fail, w.denials
		_, err := c.clone(ctx, "new", 0, "tank/c/7@one", record)
		if got := strings.Join(h.log, "; "); got != w.steps || !w.is(err) {
			t.Errorf("%s: %s, %v\nnot %s", name, got, err, w.steps)
		}
	}
	h.log, h.fail = nil, nil
	if _, err := c.clone(ctx, "new", 0, "tank/c/7@one", record); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{snapshots.LabelSnapshotMaxSize: "1000", snapshotter.LabelCloneOf: "tank/c/7@one"}
	if h.snapshot.Parent != "sha256:1" || !maps.Equal(h.snapshot.Labels, want) || h.made.ID != "new" || h.made.SnapshotKey != "new" {
		t.Errorf("%v, %v", h.snapshot, h.made)
	}
	h.log = nil
	if _, err := c.clone(ctx, "new", 0, "tank/c/7@one", []byte("rubbish")); !errdefs.IsDataLoss(err) || !slices.Equal(h.log, nil) {
		t.Errorf("rubbish: %v, %v", err, h.log)
	}
}
