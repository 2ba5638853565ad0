//go:build bed

package integration

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestExportRunning: what a running container changed becomes a layer (what `nerdctl commit` does) while it runs; with
// another snapshotter as before.
func TestExportRunning(t *testing.T) {
	for _, snapshotter := range []string{zfs, "overlayfs"} {
		t.Run(snapshotter, func(t *testing.T) {
			b := start(t, options{snapshotter: snapshotter, args: []string{"sleep", "1000"}})
			const script = "echo changed >/etc/issue && rm /etc/debian_version && mkdir -m 700 /srv/new && touch -d @1000000000.25 /srv/new/file"
			if out, code, err := b.execIn(sh(script), nil); err != nil || code != 0 {
				t.Fatalf("%v, code %d: %s", err, code, out)
			}
			d, err := rootfs.CreateDiff(b.ctx, b.container.ID(), b.client.SnapshotService(snapshotter), b.client.DiffService(), diff.WithMediaType(ocispec.MediaTypeImageLayer))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { must(t, b.client.ContentStore().Delete(background(t), d.Digest)) })
			blob, err := content.ReadBlob(b.ctx, b.client.ContentStore(), d)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]*tar.Header{}
			for r := tar.NewReader(bytes.NewReader(blob)); ; {
				h, err := r.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				got[h.Name] = h
			}
			for _, name := range []string{"etc/", "etc/issue", "etc/.wh.debian_version", "srv/", "srv/new/", "srv/new/file"} {
				if got[name] == nil {
					t.Fatalf("%s is not in the layer", name)
				}
			}
			if len(got) > 20 {
				t.Errorf("%d names for a handful of changes: %v", len(got), got)
			}
			if snapshotter != zfs {
				return
			}
			if h := got["srv/new/file"]; h.ModTime.Nanosecond() != 250_000_000 {
				t.Errorf("the time is %v", h.ModTime)
			}
			held, err := b.client.LeasesService().List(b.ctx)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(held, func(l leases.Lease) bool {
				r, err := b.client.LeasesService().ListResources(b.ctx, l)
				must(t, err)
				mine := slices.Contains(r, leases.Resource{ID: d.Digest.String(), Type: "content"})
				if mine {
					must(t, b.client.LeasesService().Delete(b.ctx, l))
				}
				return mine
			}) {
				t.Errorf("no lease holds the layer: %v", held)
			}
		})
	}
}
