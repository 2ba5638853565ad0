// Package export writes a template as a file that other programs take: an OCI archive,
// or a tarball of its root as Proxmox's storage has them. It owns the file that it writes
// while it writes it. It reads the template's files and containerd's blobs, and changes neither.
package export

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/snapshotter/compare"
)

// Image is what a template keeps of the image that it was made of.
type Image struct {
	Name   string        // its reference
	Digest digest.Digest // of what the reference stood for: a manifest, or an index of some
	Config []byte        // its config as the registry had it
}

// Store is containerd's content.
type Store = content.InfoReaderProvider

// document is an index or a manifest.
type document struct {
	MediaType string               `json:"mediaType"`
	Manifests []ocispec.Descriptor `json:"manifests"`
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
}

// Find is the manifest by which the image was unpacked, if all that it names is
// still in the store. Errors: NotFound, something is not, which is named.
func Find(ctx context.Context, store Store, i Image) (ocispec.Descriptor, error) {
	info, err := store.Info(ctx, i.Digest)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("image %s: %w", i.Name, err)
	}
	found, err := find(ctx, store, ocispec.Descriptor{Digest: i.Digest, Size: info.Size}, digest.FromBytes(i.Config))
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("image %s: %w", i.Name, err)
	}
	return found, nil
}

// find looks for the manifest with this config. An index names those of other
// platforms as well, which need not be there.
func find(ctx context.Context, store Store, d ocispec.Descriptor, config digest.Digest) (ocispec.Descriptor, error) {
	var doc document
	blob, err := content.ReadBlob(ctx, store, d)
	if err != nil {
		return d, err
	}
	if err := json.Unmarshal(blob, &doc); err != nil {
		return d, fmt.Errorf("%s: %w: %w", d.Digest, err, errdefs.ErrDataLoss)
	}
	if doc.Config == nil {
		missing := fmt.Errorf("%s has no manifest with config %s: %w", d.Digest, config, errdefs.ErrNotFound)
		for _, m := range doc.Manifests {
			found, err := find(ctx, store, m, config)
			if !errdefs.IsNotFound(err) {
				return found, err
			}
			missing = errors.Join(missing, err)
		}
		return d, missing
	}
	if doc.Config.Digest != config {
		return d, fmt.Errorf("%s has config %s: %w", d.Digest, doc.Config.Digest, errdefs.ErrNotFound)
	}
	for _, part := range append([]ocispec.Descriptor{*doc.Config}, doc.Layers...) {
		if _, err := store.Info(ctx, part.Digest); err != nil {
			return d, fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
	}
	if d.MediaType == "" {
		d.MediaType = doc.MediaType
	}
	if d.MediaType == "" { // the image spec leaves it out of older ones
		d.MediaType = ocispec.MediaTypeImageManifest
	}
	return d, nil
}

// Archive writes the manifest and all that it names, byte by byte, as an OCI archive that
// gives it the name.
func Archive(ctx context.Context, w io.Writer, store Store, manifest ocispec.Descriptor, name string) error {
	watched := &watched{Store: store}
	opts := []archive.ExportOpt{archive.WithManifest(manifest, name)}
	if _, err := reference.ParseNormalizedNamed(name); err != nil {
		// Docker's own part of it has room for references only.
		opts = append(opts, archive.WithSkipDockerManifest())
	}
	return errors.Join(archive.Export(ctx, watched, w, opts...), watched.err)
}

// watched keeps what went wrong: containerd's exporter leaves out a manifest that
// it cannot ask for, and says nothing.
type watched struct {
	Store
	err error
}

func (s *watched) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	info, err := s.Store.Info(ctx, d)
	if err != nil {
		s.err = errors.Join(s.err, fmt.Errorf("%s: %w", d, err))
	}
	return info, err
}

// Flat writes the files below root as the one layer of an image with this one's
// config, as an OCI archive. dir is where the layer is kept meanwhile, in a file without
// a name. What containerd-pve put into the template is left out. The result is the manifest's.
// Errors: DataLoss, the config is none; InvalidArgument, a file that a layer cannot have.
func Flat(ctx context.Context, w io.Writer, root *os.File, dir string, i Image) (_ ocispec.Descriptor, err error) {
	fail := func(err error) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, fmt.Errorf("one layer of the template's files: %w", err)
	}
	scratch, err := os.CreateTemp(dir, temporary)
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, scratch.Close()) }()
	if err := os.Remove(scratch.Name()); err != nil {
		return fail(err)
	}
	compressed, whole := digest.SHA256.Digester(), digest.SHA256.Digester()
	buffered := bufio.NewWriterSize(io.MultiWriter(scratch, compressed.Hash()), bufferSize)
	z, err := compression.CompressStream(buffered, compression.Gzip)
	if err != nil {
		return fail(err)
	}
	if err := compare.Files(ctx, io.MultiWriter(z, whole.Hash()), root, plan.BootDir, layerHeader); err != nil {
		return fail(err)
	}
	if err := errors.Join(z.Close(), buffered.Flush()); err != nil {
		return fail(err)
	}
	size, err := scratch.Seek(0, io.SeekEnd)
	if err != nil {
		return fail(err)
	}
	blobs := blobs{compressed.Digest(): io.NewSectionReader(scratch, 0, size)}
	config, err := i.flatConfig(whole.Digest())
	if err != nil {
		return fail(err)
	}
	text, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: blobs.add(ocispec.MediaTypeImageConfig, config),
		Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: compressed.Digest(), Size: size}},
	})
	if err != nil {
		return fail(err)
	}
	manifest := blobs.add(ocispec.MediaTypeImageManifest, text)
	if err := Archive(ctx, w, blobs, manifest, i.Name); err != nil {
		return fail(err)
	}
	return manifest, nil
}

// layerHeader: a layer's names have no dot before them, and one kind of names means something else there.
func layerHeader(h *tar.Header) error {
	if strings.HasPrefix(path.Base(h.Name), ".wh.") {
		return fmt.Errorf("in an image's layer this name removes another file; --as vztmpl can have it: %w", errdefs.ErrInvalidArgument)
	}
	if h.Name == "/" {
		h.Name = "./"
	}
	return nil
}

// flatConfig is the image's config, all of it, with one layer.
func (i Image) flatConfig(diffID digest.Digest) ([]byte, error) {
	fail := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("the config of image %s that the template keeps: %w", i.Name, err)
	}
	var all map[string]json.RawMessage // what is not in the spec stays
	var known struct {
		Created *time.Time `json:"created"`
	}
	if err := errors.Join(json.Unmarshal(i.Config, &all), json.Unmarshal(i.Config, &known)); err != nil || all == nil {
		return fail(errors.Join(err, errdefs.ErrDataLoss))
	}
	for name, v := range map[string]any{
		"rootfs":  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
		"history": []ocispec.History{{Created: known.Created, CreatedBy: "containerd-pve template export", Comment: fmt.Sprintf("the files of %s (%s)", i.Name, i.Digest)}},
	} {
		text, err := json.Marshal(v)
		if err != nil {
			return fail(err)
		}
		all[name] = text
	}
	return json.Marshal(all)
}

// blobs is content that no store has.
type blobs map[digest.Digest]*io.SectionReader

func (b blobs) add(media string, text []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: media, Digest: digest.FromBytes(text), Size: int64(len(text))}
	b[d.Digest] = io.NewSectionReader(bytes.NewReader(text), 0, d.Size)
	return d
}

func (b blobs) Info(_ context.Context, d digest.Digest) (content.Info, error) {
	r, ok := b[d]
	if !ok {
		return content.Info{}, fmt.Errorf("%s: %w", d, errdefs.ErrNotFound)
	}
	return content.Info{Digest: d, Size: r.Size()}, nil
}

func (b blobs) ReaderAt(_ context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	r, ok := b[d.Digest]
	if !ok {
		return nil, fmt.Errorf("%s: %w", d.Digest, errdefs.ErrNotFound)
	}
	return reader{r}, nil
}

type reader struct{ *io.SectionReader }

func (reader) Close() error { return nil }
