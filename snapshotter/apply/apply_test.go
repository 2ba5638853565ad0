package apply

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/snapshotter/mounts"
)

// blobs is a content store that counts what is read and not ended.
type blobs struct {
	contentapi.ContentClient
	of   map[digest.Digest][]byte
	open atomic.Int32
	fail error // of each read
}

func (b *blobs) Read(ctx context.Context, r *contentapi.ReadContentRequest, _ ...grpc.CallOption) (contentapi.Content_ReadClient, error) {
	if _, err := namespaces.NamespaceRequired(ctx); err != nil {
		return nil, err
	}
	b.open.Add(1)
	context.AfterFunc(ctx, func() { b.open.Add(-1) })
	data, ok := b.of[digest.Digest(r.Digest)]
	return &sending{left: data, there: ok, of: b}, nil
}

type sending struct {
	contentapi.Content_ReadClient
	left  []byte
	there bool
	of    *blobs
}

func (s *sending) Recv() (*contentapi.ReadContentResponse, error) {
	switch {
	case !s.there:
		return nil, errgrpc.ToGRPC(errdefs.ErrNotFound)
	case s.of.fail != nil:
		return nil, s.of.fail
	case len(s.left) == 0:
		return nil, io.EOF
	}
	n := min(len(s.left), 1000)
	r := &contentapi.ReadContentResponse{Data: s.left[:n]}
	s.left = s.left[n:]
	return r, nil
}

// ended waits until all reads are over, which is said in another goroutine.
func (b *blobs) ended(t *testing.T) {
	t.Helper()
	for range 1000 {
		if b.open.Load() == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("%d layers are still read", b.open.Load())
}

func (b *blobs) add(kind string, data []byte) ocispec.Descriptor {
	d := described(kind, data)
	b.of[d.Digest] = data
	return d
}

func described(kind string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: kind, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// archived is a layer with one large file, and what follows its end.
func archived(t testing.TB, size int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h := &tar.Header{Name: "dir/file", Mode: 0o600, Size: int64(size), Uid: os.Getuid(), Gid: os.Getgid(), ModTime: time.Unix(1e9, 0)}
	data := make([]byte, size) // half of which can be compressed away
	for random, at := rand.NewChaCha8([32]byte{}), 0; at < size; at += 4096 {
		_, _ = random.Read(data[at:min(at+2048, size)])
	}
	err := w.WriteHeader(h)
	if err == nil {
		_, err = w.Write(data)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	b.Write(make([]byte, 10240))
	return b.Bytes()
}

func packed(t testing.TB, data []byte, to func(io.Writer) (io.WriteCloser, error)) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := to(&b)
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	return packed(t, data, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
}

var ours = []mount.Mount{mounts.Of("tank/ct/7")}

// standing is an applier whose snapshots are a directory.
func standing(b *blobs, dir string) *Applier {
	a := New(func(dataset string) bool { return strings.HasPrefix(dataset, "tank/ct/") }, b)
	a.within = func(_ context.Context, _ string, f func(string) error) error { return f(dir) }
	return a
}

func TestApply(t *testing.T) {
	const size = 3 << 20
	plain := archived(t, size)
	for name, c := range map[string]struct {
		kind string
		data []byte
	}{
		"plain":                {ocispec.MediaTypeImageLayer, plain},
		"gzip":                 {ocispec.MediaTypeImageLayerGzip, gzipped(t, plain)},
		"Docker's, not called": {"application/vnd.docker.image.rootfs.diff.tar", gzipped(t, plain)},
		"zstd": {ocispec.MediaTypeImageLayerZstd, packed(t, plain, func(w io.Writer) (io.WriteCloser, error) {
			return zstd.NewWriter(w)
		})},
	} {
		t.Run(name, func(t *testing.T) {
			dir, b := t.TempDir(), &blobs{of: map[digest.Digest][]byte{}}
			got, err := standing(b, dir).Apply(namespaces.WithNamespace(t.Context(), "test"), b.add(c.kind, c.data), ours)
			if err != nil {
				t.Fatal(err)
			}
			if got.MediaType != ocispec.MediaTypeImageLayer || got.Size != int64(len(plain)) || got.Digest != digest.FromBytes(plain) {
				t.Errorf("%+v was unpacked, not %d bytes", got, len(plain))
			}
			if i, err := os.Stat(filepath.Join(dir, "dir/file")); err != nil || i.Size() != size {
				t.Errorf("its file: %v, %v", i, err)
			}
			b.ended(t)
		})
	}
}

// TestLeft is what containerd's next differ is to do.
func TestLeft(t *testing.T) {
	b := &blobs{of: map[digest.Digest][]byte{}}
	layer := b.add(ocispec.MediaTypeImageLayer, archived(t, 1))
	secret := layer
	secret.MediaType = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
	wrapped := layer
	wrapped.MediaType = "application/vnd.docker.image.rootfs.diff.tar.gzip+encrypted"
	foreign := layer
	foreign.MediaType = "application/vnd.erofs.layer.v1"
	for name, c := range map[string]struct {
		layer  ocispec.Descriptor
		mounts []mount.Mount
		opts   []diff.ApplyOpt
	}{
		"another snapshotter's": {layer, []mount.Mount{{Type: "overlay", Source: "overlay"}}, nil},
		"no namespace":          {layer, ours, nil},
		"another dataset":       {layer, []mount.Mount{mounts.Of("tank/other/7")}, nil},
		"mapped owners":         {layer, []mount.Mount{mounts.Of("tank/ct/7", "uidmap=0:100000:65536", "gidmap=0:100000:65536")}, nil},
		"a processor's":         {layer, ours, []diff.ApplyOpt{diff.WithPayloads(map[string]typeurl.Any{"key": nil})}},
		"encrypted":             {secret, ours, nil},
		"encrypted, Docker's":   {wrapped, ours, nil},
		"no archive":            {foreign, ours, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ctx := namespaces.WithNamespace(t.Context(), "test")
			if name == "no namespace" {
				ctx = t.Context()
			}
			_, err := standing(b, dir).Apply(ctx, c.layer, c.mounts, c.opts...)
			if !errdefs.IsNotImplemented(err) {
				t.Errorf("%v, want NotImplemented", err)
			}
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("%v was written", left)
			}
			b.ended(t)
		})
	}
}

func TestApplyFails(t *testing.T) {
	whole := gzipped(t, archived(t, 3<<20))
	gone := errgrpc.ToGRPC(errdefs.ErrUnavailable)
	for name, c := range map[string]struct {
		data []byte
		fail error
		is   func(error) bool
	}{
		"cut short":   {whole[:len(whole)/2], nil, func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		"cannot read": {whole, gone, errdefs.IsUnavailable},
		"not gzip":    {[]byte("\x1f\x8b\x08 is no archive"), nil, func(err error) bool { return err != nil }},
		"no archive":  {gzipped(t, bytes.Repeat([]byte("x"), 1024)), nil, func(err error) bool { return errors.Is(err, tar.ErrHeader) }},
		"not there":   {nil, nil, errdefs.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			b := &blobs{of: map[digest.Digest][]byte{}, fail: c.fail}
			d := b.add(ocispec.MediaTypeImageLayerGzip, c.data)
			if c.data == nil {
				delete(b.of, d.Digest)
			}
			ctx := namespaces.WithNamespace(t.Context(), "test")
			_, err := standing(b, t.TempDir()).Apply(ctx, d, ours)
			if !c.is(err) {
				t.Errorf("%v", err)
			}
			if err != nil && !strings.Contains(err.Error(), d.Digest.String()) {
				t.Errorf("%q does not name the layer", err)
			}
			b.ended(t)
		})
	}
}
