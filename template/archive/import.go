package archive

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// labelSource is on what was made of a source whole: its digest.
const labelSource = "io.containerd.pve.import.source"

// maxJSON is the largest manifest, index or config that is read.
const maxJSON = 8 << 20

// Importer brings images into a content store. What it writes is to be held by a lease
// in the context.
type Importer struct {
	Store    content.Store
	Limits   Limits
	Platform platforms.MatchComparer
	// Progress is told how much was read of how much; may be nil.
	Progress func(what string, n, total int64)
}

// Image is one that is whole in the content store, and labelled for its garbage collector.
type Image struct {
	// Target is its manifest, for this platform.
	Target ocispec.Descriptor
	// Name is the archive's own; may be empty, or no more than a tag.
	Name string
	// Found is one that an import before this one had made, and that needed no more work.
	Found bool
}

// Key is what stands for sources: the same have the same.
func Key(ctx context.Context, s, meta *Source, progress func(what string, n, total int64)) (digest.Digest, error) {
	var parts []string
	for _, one := range []*Source{s, meta} {
		if one == nil {
			continue
		}
		i := &Importer{Progress: progress}
		d, err := one.Digest(ctx, i.progressOf("hash", one.size))
		if err != nil {
			return "", fmt.Errorf("%s: %w", one.Path, err)
		}
		one.digest = d
		parts = append(parts, d.String())
	}
	// Raised with what a conversion makes of the same source.
	const version = "1"
	return digest.FromString(version + " " + strings.Join(parts, " ")), nil
}

// Import brings an image in. meta is the other half of a split image, else nil; key is
// that of both; choice names one of the images of an archive, by name or digest.
// Errors: InvalidArgument, what is refused, with the entry and its place; ResourceExhausted,
// a limit; FailedPrecondition, it is not for this host, or needs a program; those of the store.
func (i *Importer) Import(ctx context.Context, s, meta *Source, key digest.Digest, choice string) (_ Image, err error) {
	fail := func(err error) (Image, error) { return Image{}, fmt.Errorf("%s: %w", s.Path, err) }
	if meta != nil && (meta.Kind != LXC || s.Kind != Rootfs && s.Kind != Squashfs) {
		return fail(fmt.Errorf("it is a %s, and %s a %s: a split image is a root and a tarball with %s: %w", s.Kind, meta.Path, meta.Kind, metadataFile, errdefs.ErrInvalidArgument))
	}
	target, err := i.find(ctx, key, s.Kind)
	found := err == nil
	if err != nil && !errdefs.IsNotFound(err) {
		return fail(err)
	}
	if s.Kind != Layout && s.Kind != Images {
		if choice != "" {
			return fail(fmt.Errorf("it is a %s, which holds no more than one image: --select is for others: %w", s.Kind, errdefs.ErrInvalidArgument))
		}
		if !found {
			var said *metadata
			if meta != nil {
				if said, err = metadataOf(ctx, meta, &budget{Limits: i.Limits}); err != nil {
					return Image{}, err
				}
			}
			if target, err = i.root(ctx, s, key, said); err != nil {
				return fail(err)
			}
		}
		return Image{Target: target, Found: found}, nil
	}
	if found {
		image, err := i.pick(ctx, target, choice)
		if err == nil || !errdefs.IsNotFound(err) {
			image.Found = true
			return image, s.wrap(err)
		}
	}
	if target, err = i.ingest(ctx, s, key); err != nil {
		return fail(err)
	}
	image, err := i.pick(ctx, target, choice)
	return image, s.wrap(err)
}

func (s *Source) wrap(err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", s.Path, err)
	}
	return err
}

// pick chooses an image of an index, checks it, and has it hold its parts.
func (i *Importer) pick(ctx context.Context, index ocispec.Descriptor, choice string) (image Image, err error) {
	if image.Target, image.Name, err = i.choose(ctx, index, choice); err != nil {
		return Image{}, err
	}
	if err := i.checkLayers(ctx, image.Target); err != nil {
		return Image{}, err
	}
	return image, i.hold(ctx, image.Target)
}

// hold labels what is there for the garbage collector: each for what it refers to.
func (i *Importer) hold(ctx context.Context, d ocispec.Descriptor) error {
	children := images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if !images.IsIndexType(d.MediaType) && !images.IsManifestType(d.MediaType) {
			return nil, images.ErrSkipDesc
		}
		err := i.small(ctx, d)
		if errdefs.IsNotFound(err) {
			return nil, images.ErrSkipDesc // another platform's
		}
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", d.MediaType, d.Digest, err)
		}
		all, err := images.Children(ctx, i.Store, d)
		if err != nil {
			err = damaged(fmt.Errorf("%s %s: %w", d.MediaType, d.Digest, err))
		}
		return all, err
	})
	return images.Walk(ctx, images.SetChildrenLabels(i.Store, children), d)
}

// Abandon drops what an import has not finished writing.
func Abandon(ctx context.Context, store content.Store, key digest.Digest) error {
	all, err := store.ListStatuses(ctx)
	if err != nil {
		return fmt.Errorf("content store: %w", err)
	}
	for _, st := range all {
		if strings.HasPrefix(st.Ref, refOf(key, "")) {
			if aerr := store.Abort(ctx, st.Ref); aerr != nil && !errdefs.IsNotFound(aerr) {
				err = errors.Join(err, aerr)
			}
		}
	}
	return err
}

// refOf is under what the content store keeps what is being written.
func refOf(key digest.Digest, what string) string {
	return "containerd-pve-import-" + key.Encoded()[:16] + "-" + what
}

func (i *Importer) progressOf(what string, total int64) func(int64) {
	if i.Progress == nil {
		return nil
	}
	var done int64
	return func(n int64) {
		done += n
		i.Progress(what, done, total)
	}
}

func (i *Importer) progress(total int64) func(int64) { return i.progressOf("read", total) }

// find is the manifest or index that was made of a source. Errors: NotFound.
func (i *Importer) find(ctx context.Context, key digest.Digest, kind Kind) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest}
	if kind == Layout || kind == Images {
		d.MediaType = ocispec.MediaTypeImageIndex
	}
	err := i.Store.Walk(ctx, func(info content.Info) error {
		d.Digest, d.Size = info.Digest, info.Size
		return nil
	}, fmt.Sprintf("labels.%q==%s", labelSource, key))
	if err != nil {
		return d, fmt.Errorf("content store: %w", err)
	}
	if d.Digest == "" {
		return d, fmt.Errorf("nothing is of %s: %w", key, errdefs.ErrNotFound)
	}
	// This lease holds it as well now: it is written again, as far as that is needed.
	if err := content.WriteBlob(ctx, i.Store, refOf(key, d.Digest.Encoded()), bytes.NewReader(nil), d); err != nil {
		return d, fmt.Errorf("%s: %w", d.Digest, errdefs.ErrNotFound)
	}
	// Its collector may have taken a part of what nothing holds.
	_, _, _, missing, err := images.Check(ctx, i.Store, d, i.Platform)
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("%s lacks %s: %w", d.Digest, missing[0].Digest, errdefs.ErrNotFound)
	}
	return d, err
}

// label adds labels to a blob that is there.
func (i *Importer) label(ctx context.Context, d digest.Digest, labels map[string]string) error {
	info := content.Info{Digest: d, Labels: labels}
	var fields []string
	for name := range labels {
		fields = append(fields, "labels."+name)
	}
	if len(fields) == 0 {
		return nil
	}
	if _, err := i.Store.Update(ctx, info, fields...); err != nil {
		return fmt.Errorf("content store: %w", err)
	}
	return nil
}

func (i *Importer) write(ctx context.Context, key digest.Digest, media string, v any, labels map[string]string) (ocispec.Descriptor, error) {
	blob, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: media, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	if err := content.WriteBlob(ctx, i.Store, refOf(key, d.Digest.Encoded()), bytes.NewReader(blob), d, content.WithLabels(labels)); err != nil {
		return d, fmt.Errorf("content store: %w", err)
	}
	return d, i.label(ctx, d.Digest, labels)
}

// read is a manifest, index or config. Errors: NotFound, InvalidArgument.
func (i *Importer) read(ctx context.Context, d ocispec.Descriptor, v any) error {
	fail := func(err error) error { return fmt.Errorf("%s %s: %w", d.MediaType, d.Digest, err) }
	if err := i.small(ctx, d); err != nil {
		return fail(err)
	}
	d.Data = nil // the blob is meant, whose digest was checked
	blob, err := content.ReadBlob(ctx, i.Store, d)
	if err != nil {
		return fail(err)
	}
	if err := json.Unmarshal(blob, v); err != nil {
		return fail(fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument))
	}
	return nil
}

// small wants one that can be read.
func (i *Importer) small(ctx context.Context, d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return refuse("digest %q: %v", d.Digest, err)
	}
	info, err := i.Store.Info(ctx, d.Digest)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("the archive lacks it, or has another content under its name: %w", err)
	}
	if err != nil {
		return err
	}
	if info.Size > maxJSON {
		return refuse("it has %d bytes", info.Size)
	}
	return nil
}

// unchanged reads a source and hashes it.
func (s *Source) unchanged(ctx context.Context, r io.Reader, seen func(int64)) *hashed {
	d := digest.Canonical.Digester()
	return &hashed{meter: &meter{ctx: ctx, r: io.TeeReader(r, d.Hash()), seen: seen}, digest: d}
}

type hashed struct {
	*meter
	digest digest.Digester
}
