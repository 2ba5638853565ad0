package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
)

// fakeContainerd has images and containers by namespace, and their content.
type fakeContainerd struct {
	blobs      map[string][]byte
	images     map[string][]*imagesapi.Image
	containers map[string][]*containersapi.Container
}

func (f *fakeContainerd) blob(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(b)
	f.blobs[d.String()] = b
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}

// image adds one of the platform, with these layers.
func (f *fakeContainerd) image(t *testing.T, namespace, name string, platform ocispec.Platform, layers ...digest.Digest) {
	t.Helper()
	config := f.blob(t, ocispec.MediaTypeImageConfig, ocispec.Image{Platform: platform, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: layers}})
	manifest := f.blob(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config})
	manifest.Platform = &platform
	index := f.blob(t, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{manifest},
	})
	f.images[namespace] = append(f.images[namespace], &imagesapi.Image{
		Name: name, Target: &types.Descriptor{MediaType: index.MediaType, Digest: index.Digest.String(), Size: index.Size},
	})
}

type fakeNamespaces struct {
	namespacesapi.UnimplementedNamespacesServer
	*fakeContainerd
}

func (f fakeNamespaces) List(context.Context, *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	r := &namespacesapi.ListNamespacesResponse{}
	for n := range f.images {
		r.Namespaces = append(r.Namespaces, &namespacesapi.Namespace{Name: n})
	}
	return r, nil
}

type fakeImages struct {
	imagesapi.UnimplementedImagesServer
	*fakeContainerd
}

func (f fakeImages) List(ctx context.Context, _ *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	n, err := namespaces.NamespaceRequired(ctx)
	return &imagesapi.ListImagesResponse{Images: f.images[n]}, err
}

type fakeContainers struct {
	containersapi.UnimplementedContainersServer
	*fakeContainerd
}

func (f fakeContainers) ListStream(_ *containersapi.ListContainersRequest, s containersapi.Containers_ListStreamServer) error {
	n, err := namespaces.NamespaceRequired(s.Context())
	if err != nil {
		return err
	}
	for _, c := range f.containers[n] {
		if err := s.Send(&containersapi.ListContainerMessage{Container: c}); err != nil {
			return err
		}
	}
	return nil
}

type fakeContent struct {
	contentapi.UnimplementedContentServer
	*fakeContainerd
}

func (f fakeContent) Info(_ context.Context, r *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	b, ok := f.blobs[r.Digest]
	if !ok {
		return nil, errgrpc.ToGRPC(errdefs.ErrNotFound)
	}
	return &contentapi.InfoResponse{Info: &contentapi.Info{Digest: r.Digest, Size: int64(len(b))}}, nil
}

func (f fakeContent) Read(r *contentapi.ReadContentRequest, s contentapi.Content_ReadServer) error {
	b, ok := f.blobs[r.Digest]
	if !ok {
		return errgrpc.ToGRPC(errdefs.ErrNotFound)
	}
	return s.Send(&contentapi.ReadContentResponse{Offset: r.Offset, Data: b[r.Offset:]})
}

func (f *fakeContainerd) serve(t *testing.T) (address string) {
	t.Helper()
	address = filepath.Join(t.TempDir(), "containerd.sock")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	namespacesapi.RegisterNamespacesServer(server, fakeNamespaces{fakeContainerd: f})
	imagesapi.RegisterImagesServer(server, fakeImages{fakeContainerd: f})
	containersapi.RegisterContainersServer(server, fakeContainers{fakeContainerd: f})
	contentapi.RegisterContentServer(server, fakeContent{fakeContainerd: f})
	go server.Serve(l)
	t.Cleanup(server.Stop)
	return address
}

func TestUsedBy(t *testing.T) {
	f := &fakeContainerd{
		blobs: map[string][]byte{}, images: map[string][]*imagesapi.Image{}, containers: map[string][]*containersapi.Container{},
	}
	here := platforms.DefaultSpec()
	elsewhere := ocispec.Platform{OS: "plan9", Architecture: "mips"}
	one, two := digest.FromString("1"), digest.FromString("2")
	f.image(t, "default", "base", here, one)
	f.image(t, "default", "app", here, one, two)
	f.image(t, "k8s.io", "base", here, one)
	f.image(t, "k8s.io", "other", elsewhere, two)
	f.images["k8s.io"] = append(f.images["k8s.io"], &imagesapi.Image{Name: "gone", Target: &types.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("gone").String(), Size: 3,
	}})
	f.containers["k8s.io"] = []*containersapi.Container{{ID: "pod", Image: "base", SnapshotKey: "pod-root"}, {ID: "bare"}}

	u, err := usedBy(t.Context(), f.serve(t))
	if err != nil {
		t.Fatal(err)
	}
	chain := identity.ChainIDs([]digest.Digest{one, two})
	at := func(namespace string, n int) snapshotName { return snapshotName{namespace, chain[n].String()} }
	want := &users{
		layers: map[snapshotName][]string{at("default", 0): {"base", "app"}, at("default", 1): {"app"}, at("k8s.io", 0): {"base"}},
		tops:   map[snapshotName][]string{at("default", 0): {"base"}, at("default", 1): {"app"}, at("k8s.io", 0): {"base"}},
		roots:  map[snapshotName]string{{"k8s.io", "pod-root"}: "base"},
	}
	if !reflect.DeepEqual(u, want) {
		t.Errorf("%+v\nwant %+v", u, want)
	}
}

func TestUsedByNobody(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	address := filepath.Join(t.TempDir(), "none.sock")
	if _, err := usedBy(ctx, address); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), address) {
		t.Errorf("%v", err)
	}
}

func TestSnapshotsCommandRefuses(t *testing.T) {
	for _, args := range [][]string{{"snapshots", "--format", "xml", "--dataset", "a/b"}, {"snapshot", "ls", "--dataset", "a@b"}} {
		c := root()
		c.SetArgs(args)
		c.SetOut(&bytes.Buffer{})
		if err := c.Execute(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", args, err)
		}
	}
}
