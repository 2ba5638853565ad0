package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/template"
)

// leasePrefix is what the leases of templates begin with; the rest is the chain id
// of the layer that one holds.
const leasePrefix = "containerd-pve-template-"

// holdLayer keeps containerd from dropping a layer that templates are made of,
// whatever becomes of the image.
func holdLayer(ctx context.Context, conn *grpc.ClientConn, namespace, chain string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	client := leasesapi.NewLeasesClient(conn)
	id := leasePrefix + chain
	_, err := client.Create(ctx, &leasesapi.CreateRequest{ID: id})
	if err = errgrpc.ToNative(err); err == nil || errdefs.IsAlreadyExists(err) {
		_, err = client.AddResource(ctx, &leasesapi.AddResourceRequest{ID: id, Resource: &leasesapi.Resource{ID: chain, Type: "snapshots/" + snapshotterName}})
		err = errgrpc.ToNative(err)
	}
	if err != nil {
		return fmt.Errorf("a lease on layer %s: %w", chain, err)
	}
	return nil
}

// releaseLayers gives back the leases on layers of which no template is left,
// whoever removed it.
func releaseLayers(ctx context.Context, conn *grpc.ClientConn, left []template.Template) error {
	list, err := namespacesapi.NewNamespacesClient(conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return fmt.Errorf("leases on layers: %w", errgrpc.ToNative(err))
	}
	client := leasesapi.NewLeasesClient(conn)
	for _, n := range list.Namespaces {
		ctx := namespaces.WithNamespace(ctx, n.Name)
		all, err := client.List(ctx, &leasesapi.ListRequest{})
		if err != nil {
			return fmt.Errorf("leases of namespace %s: %w", n.Name, errgrpc.ToNative(err))
		}
		for _, l := range all.Leases {
			chain, ours := strings.CutPrefix(l.ID, leasePrefix)
			if !ours || slices.ContainsFunc(left, func(t template.Template) bool { return t.Layer == n.Name+"/"+chain }) {
				continue
			}
			_, err := client.Delete(ctx, &leasesapi.DeleteRequest{ID: l.ID})
			if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("lease %s: %w", l.ID, err)
			}
		}
	}
	return nil
}
