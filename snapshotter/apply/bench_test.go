package apply

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	containerds "github.com/containerd/containerd/v2/core/diff/apply"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// BenchmarkApply unpacks a layer as containerd does and as it has us do it: the call and the layer go through sockets.
func BenchmarkApply(b *testing.B) {
	ctx := namespaces.WithNamespace(b.Context(), "test")
	store, err := local.NewStore(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	served := func(register func(*grpc.Server)) *grpc.ClientConn {
		socket := filepath.Join(b.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			b.Fatal(err)
		}
		server := grpc.NewServer()
		register(server)
		go func() { _ = server.Serve(l) }()
		b.Cleanup(server.Stop)
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithInitialWindowSize(Window), grpc.WithInitialConnWindowSize(4*Window))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	containerd := served(func(s *grpc.Server) { contentapi.RegisterContentServer(s, contentserver.New(store)) })
	for _, size := range []int{4 << 10, 100 << 20} {
		plain := archived(b, size)
		data := gzipped(b, plain)
		layer := described(ocispec.MediaTypeImageLayerGzip, data)
		if err := content.WriteBlob(ctx, store, layer.Digest.String(), bytes.NewReader(data), layer); err != nil {
			b.Fatal(err)
		}
		for _, by := range []struct {
			name string
			of   func(dir string) (diff.Applier, []mount.Mount)
		}{
			{"containerd", func(dir string) (diff.Applier, []mount.Mount) {
				return containerds.NewFileSystemApplier(store), []mount.Mount{{Type: "bind", Source: dir, Options: []string{"bind"}}}
			}},
			{"ours", func(dir string) (diff.Applier, []mount.Mount) {
				a := New(func(string) bool { return true }, contentapi.NewContentClient(containerd))
				a.within = func(_ context.Context, _ string, f func(string) error) error { return f(dir) }
				conn := served(func(s *grpc.Server) { diffapi.RegisterDiffServer(s, diffservice.FromApplierAndComparer(a, nil)) })
				return diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(diff.Applier), ours
			}},
		} {
			b.Run(fmt.Sprintf("%d/%s", size, by.name), func(b *testing.B) {
				applier, mounts := by.of(b.TempDir())
				b.SetBytes(int64(len(plain)))
				for b.Loop() {
					if _, err := applier.Apply(ctx, layer, mounts); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
