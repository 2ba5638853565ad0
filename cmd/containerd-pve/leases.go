package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

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

// layerLease is a lease on a layer that templates are, or were, made of.
type layerLease struct{ namespace, chain string }

// layerLeases are all that containerd has.
func layerLeases(ctx context.Context, conn *grpc.ClientConn) ([]layerLease, error) {
	list, err := namespacesapi.NewNamespacesClient(conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("leases on layers: %w", errgrpc.ToNative(err))
	}
	var leased []layerLease
	for _, n := range list.Namespaces {
		all, err := leasesapi.NewLeasesClient(conn).List(namespaces.WithNamespace(ctx, n.Name), &leasesapi.ListRequest{})
		if err != nil {
			return nil, fmt.Errorf("leases of namespace %s: %w", n.Name, errgrpc.ToNative(err))
		}
		for _, l := range all.Leases {
			if chain, ours := strings.CutPrefix(l.ID, leasePrefix); ours {
				leased = append(leased, layerLease{n.Name, chain})
			}
		}
	}
	return leased, nil
}

// releaseLayers gives back the leases on layers of which no template is left,
// whoever removed it.
func releaseLayers(ctx context.Context, conn *grpc.ClientConn, left []template.Template) error {
	leased, err := layerLeases(ctx, conn)
	if err != nil {
		return err
	}
	for _, l := range leased {
		if slices.ContainsFunc(left, func(t template.Template) bool { return t.Layer == l.namespace+"/"+l.chain }) {
			continue
		}
		id := leasePrefix + l.chain
		_, err := leasesapi.NewLeasesClient(conn).Delete(namespaces.WithNamespace(ctx, l.namespace), &leasesapi.DeleteRequest{ID: id})
		if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("lease %s: %w", id, err)
		}
	}
	return nil
}

// releaseLimit is how long a look at leases may take: VMIDs are given back after it.
const releaseLimit = 5 * time.Second

// releaseDestroyed gives back what is leased for templates that `pct destroy`
// removed. Without any lease it asks Proxmox and ZFS nothing.
func (p *proxmox) releaseDestroyed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, releaseLimit)
	defer cancel()
	leased, err := layerLeases(ctx, p.conn)
	if err != nil || len(leased) == 0 {
		return err
	}
	s, err := storeOn(p.conf)
	if err != nil {
		return err
	}
	s.ZFS = p.zfs
	// One that is being made has its lease before it is in the list.
	return s.Node.Exclusive(ctx, "template", func() error {
		all, err := s.List(ctx)
		if err != nil {
			return err
		}
		return releaseLayers(ctx, p.conn, all)
	})
}
