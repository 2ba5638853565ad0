package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
)

// pulling says whether images are pulled first, and how.
type pulling struct {
	first, plainHTTP bool
	user, hosts      string
}

func (p *pulling) flags(c *cobra.Command) {
	f := c.Flags()
	f.BoolVar(&p.first, "pull", false, "pull the image from its registry first, if that has another")
	f.BoolVar(&p.plainHTTP, "plain-http", false, "with --pull: the registry speaks HTTP")
	f.StringVarP(&p.user, "user", "u", "", "with --pull: `NAME:PASSWORD` for the registry")
	f.StringVar(&p.hosts, "hosts-dir", "/etc/containerd/certs.d", "with --pull: `directory` of the registries' mirrors and certificates")
}

// pull brings an image into containerd's store, unpacked, and gives the name that it has there: of
// nginx docker.io/library/nginx:latest. Errors: InvalidArgument; those of the registry.
func (p *pulling) pull(ctx context.Context, conn *grpc.ClientConn, namespace, name string) (string, error) {
	ref, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", fmt.Errorf("image %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	c, err := client.NewWithConn(conn)
	if err != nil {
		return "", err
	}
	hosts := dockerconfig.HostOptions{HostDir: dockerconfig.HostDirFromRoot(p.hosts)}
	if p.plainHTTP {
		hosts.DefaultScheme = "http"
	}
	if p.user != "" {
		user, password, _ := strings.Cut(p.user, ":")
		hosts.Credentials = func(string) (string, string, error) { return user, password, nil }
	}
	said := newProgress(os.Stderr)
	defer said.end()
	said.show("pulling "+ref.String(), 0, 0)
	ctx = namespaces.WithNamespace(ctx, namespace)
	_, err = c.Pull(ctx, ref.String(), client.WithPullUnpack, client.WithPullSnapshotter(snapshotterName), client.WithPlatformMatcher(platforms.Default()),
		client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: dockerconfig.ConfigureHosts(ctx, hosts)})))
	if err != nil {
		return "", fmt.Errorf("pulling image %s: %w", ref, err)
	}
	return ref.String(), nil
}
