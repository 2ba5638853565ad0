// Package apply is containerd's diff.Applier for snapshots of our snapshotter: it
// unpacks an image's layer from containerd's content store into one. It owns the mount it
// makes for that, which no other process sees and which ends with this one; it changes no dataset's properties and
// nothing in the content store.
//
// containerd's own reads, decompresses, digests and writes in turns. Here reading and decompressing
// are ahead of what is written, and nothing is mounted where it would stay after a crash.
package apply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/klauspost/readahead"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/containerd-pve/containerd-pve/snapshotter/detached"
	"github.com/containerd-pve/containerd-pve/snapshotter/mounts"
)

const (
	// pieces of a layer are received ahead of what is decompressed, and decompressed ahead of what is written; piece is how long one is.
	pieces, piece = 4, 256 << 10
	// little is the size of a layer that is written sooner than somebody helps with it.
	little = 64 << 10
)

// Window is how many bytes of a layer should be under way from the content store (gRPC's window): as many as it sends in one message.
const Window = 1 << 20

// Applier unpacks layers into the snapshots of a store.
type Applier struct {
	owns  func(dataset string) bool
	store contentapi.ContentClient
	// within calls f with the directory of the dataset's root, as long as it is mounted.
	within func(ctx context.Context, dataset string, f func(dir string) error) error
}

var _ diff.Applier = (*Applier)(nil)

// New is an applier for the snapshots whose datasets owns knows. Layers come from store, in one stream each.
func New(owns func(dataset string) bool, store contentapi.ContentClient) *Applier {
	return &Applier{owns: owns, store: store, within: mounted}
}

func mounted(ctx context.Context, dataset string, f func(dir string) error) (err error) {
	root, err := detached.Writable(ctx, dataset)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	return detached.In(root, func() error { return f("/") })
}

// Apply unpacks the layer desc into the snapshot that m mounts, and says what it is uncompressed. That is on
// the disk when the snapshot was committed; diff.WithSyncFs asks for nothing more.
//
// Errors: NotImplemented for what containerd's own differ is to do (another snapshotter's mounts, owners that are mapped, layers that
// want a stream processor, as encrypted ones, all of a caller without a namespace, as containerd 1.7's diff service), NotFound if the layer is not in the content store; those of the archive and the filesystem.
func (a *Applier) Apply(ctx context.Context, desc ocispec.Descriptor, m []mount.Mount, opts ...diff.ApplyOpt) (_ ocispec.Descriptor, err error) {
	var config diff.ApplyConfig
	for _, o := range opts {
		if err := o(ctx, desc, &config); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	dataset, err := mounts.Owned(m, a.owns)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	kind, err := images.DiffCompression(ctx, desc.MediaType)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	_, suffix, _ := strings.Cut(desc.MediaType, "+")
	if mounts.Mapped(m[0]) || suffix != "" && suffix != kind || len(config.ProcessorPayloads) > 0 {
		return ocispec.Descriptor{}, fmt.Errorf("unpacking %s (%s) with mapped owners or a stream processor: %w", desc.Digest, desc.MediaType, errdefs.ErrNotImplemented)
	}
	namespace, ok := namespaces.Namespace(ctx)
	if !ok {
		return ocispec.Descriptor{}, fmt.Errorf("unpacking %s for a caller that does not say its namespace: %w", desc.Digest, errdefs.ErrNotImplemented)
	}
	fail := func(err error) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, fmt.Errorf("unpacking layer %s into %s: %w", desc.Digest, dataset, err)
	}
	layer, err := a.open(namespaces.WithNamespace(ctx, namespace), desc, kind)
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, layer.Close()) }()
	digester := digest.Canonical.Digester()
	var size counter
	read := io.TeeReader(layer, io.MultiWriter(digester.Hash(), &size))
	err = a.within(ctx, dataset, func(dir string) error {
		_, err := archive.Apply(ctx, dir, read)
		return err
	})
	if err != nil {
		return fail(err)
	}
	// What follows an archive's end belongs to the layer's digest.
	if _, err := io.Copy(io.Discard, read); err != nil {
		return fail(err)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: int64(size), Digest: digester.Digest()}, nil
}

// counter counts what is written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// blob is what the content store sends of a layer.
type blob struct {
	stream contentapi.Content_ReadClient
	rest   []byte
	cancel context.CancelFunc
}

func (b *blob) Read(p []byte) (int, error) {
	for len(b.rest) == 0 {
		sent, err := b.stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				err = errgrpc.ToNative(err)
			}
			return 0, err
		}
		b.rest = sent.GetData()
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *blob) Close() error { b.cancel(); return nil }

// unpacked is a layer's archive, with all that is to be closed after it, the last first.
type unpacked struct {
	io.Reader
	closers []io.Closer
}

func (u *unpacked) push(r io.ReadCloser) { u.Reader, u.closers = r, append(u.closers, r) }

// ahead has another goroutine read before it is asked for.
func (u *unpacked) ahead() error {
	r, err := readahead.NewReaderSize(u.Reader, pieces, piece)
	if err == nil {
		u.push(r)
	}
	return err
}

func (u *unpacked) Close() error {
	var errs []error
	for i := len(u.closers) - 1; i >= 0; i-- {
		errs = append(errs, u.closers[i].Close())
	}
	return errors.Join(errs...)
}

// open is the layer's archive, decompressed.
func (a *Applier) open(ctx context.Context, desc ocispec.Descriptor, kind string) (_ io.ReadCloser, err error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := a.store.Read(ctx, &contentapi.ReadContentRequest{Digest: desc.Digest.String()})
	if err != nil {
		cancel()
		return nil, errgrpc.ToNative(err)
	}
	u := &unpacked{}
	u.push(&blob{stream: stream, cancel: cancel})
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Close())
		}
	}()
	if desc.Size > little {
		if err := u.ahead(); err != nil {
			return nil, err
		}
	}
	if kind == "" {
		return u, nil
	}
	plain, err := compression.DecompressStream(u.Reader)
	if err != nil {
		return nil, err
	}
	u.push(plain)
	if desc.Size > little {
		if err := u.ahead(); err != nil {
			return nil, err
		}
	}
	return u, nil
}
