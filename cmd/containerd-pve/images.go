package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// snapshotName is a snapshot as containerd knows it.
type snapshotName struct{ namespace, name string }

// users says which images use which snapshot.
type users struct {
	// layers are the committed snapshots of images, tops the last of each image.
	layers, tops map[snapshotName][]string
	// roots are the containers' own, with the one image of each.
	roots map[snapshotName]string
}

// dialContainerd takes answers as large as containerd's own client does; containerd
// is met with the first call.
func dialContainerd(address string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix:"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize)))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, err)
	}
	return conn, nil
}

// usedBy asks containerd for all images and containers of all namespaces.
func usedBy(ctx context.Context, address string) (*users, error) {
	conn, err := dialContainerd(address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	list, err := namespacesapi.NewNamespacesClient(conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, errgrpc.ToNative(err))
	}
	u := &users{layers: map[snapshotName][]string{}, tops: map[snapshotName][]string{}, roots: map[snapshotName]string{}}
	store := proxy.NewContentStore(contentapi.NewContentClient(conn))
	for _, n := range list.Namespaces {
		ctx := namespaces.WithNamespace(ctx, n.Name)
		all, err := imagesapi.NewImagesClient(conn).List(ctx, &imagesapi.ListImagesRequest{})
		if err != nil {
			return nil, fmt.Errorf("images of namespace %s: %w", n.Name, errgrpc.ToNative(err))
		}
		for _, i := range all.Images {
			if err := u.addImage(ctx, n.Name, imageFrom(i), store); err != nil {
				return nil, err
			}
		}
		if err := u.addContainers(ctx, n.Name, containersapi.NewContainersClient(conn)); err != nil {
			return nil, fmt.Errorf("containers of namespace %s: %w", n.Name, errgrpc.ToNative(err))
		}
	}
	return u, nil
}

// imageFrom is an image as containerd's API has it.
func imageFrom(i *imagesapi.Image) images.Image {
	return images.Image{Name: i.Name, Target: ocispec.Descriptor{
		MediaType: i.Target.GetMediaType(), Digest: digest.Digest(i.Target.GetDigest()), Size: i.Target.GetSize(),
	}}
}

// addContainers asks for one at a time: all of them, with their specs, may be more
// than one message takes.
func (u *users) addContainers(ctx context.Context, namespace string, client containersapi.ContainersClient) error {
	stream, err := client.ListStream(ctx, &containersapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if c := m.Container; c.GetImage() != "" && c.GetSnapshotKey() != "" {
			u.roots[snapshotName{namespace, c.SnapshotKey}] = c.Image
		}
	}
}

// addImage notes the layers that the image has on this platform. One that is not
// here whole, or not for this platform, has none.
func (u *users) addImage(ctx context.Context, namespace string, image images.Image, store content.Provider) error {
	layers, err := image.RootFS(ctx, store, platforms.Default())
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("layers of image %s in namespace %s: %w", image.Name, namespace, err)
	}
	chain := identity.ChainIDs(layers)
	for i, id := range chain {
		name := snapshotName{namespace, id.String()}
		u.layers[name] = append(u.layers[name], image.Name)
		if i == len(chain)-1 {
			u.tops[name] = append(u.tops[name], image.Name)
		}
	}
	return nil
}

// name fills in the images: of a layer all that have it, of a container's root
// the container's, of another snapshot those whose last layer it was made of.
func (u *users) name(list []snapshot) {
	byDataset := map[string]snapshotName{}
	for _, s := range list {
		byDataset[s.Dataset] = snapshotName{s.Namespace, s.Name}
	}
	for i := range list {
		s := &list[i]
		name := byDataset[s.Dataset]
		image, root := u.roots[name]
		switch {
		case s.Kind == "committed":
			s.Images = slices.Clone(u.layers[name])
		case root:
			s.Images = []string{image}
		default:
			s.Images = slices.Clone(u.tops[byDataset[s.Parent]])
		}
		slices.Sort(s.Images)
		if s.Images == nil {
			s.Images = []string{}
		}
	}
}
