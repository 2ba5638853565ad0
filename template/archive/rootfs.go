package archive

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxTime is the last that JSON can say.
	maxTime = 253402300799
	// paxAttribute is before the name of an extended attribute.
	paxAttribute = "SCHILY.xattr."
)

// converter makes a layer of a root.
type converter struct {
	tree, beside *tree // beside: of what an LXC image has next to its root
	out          *tar.Writer
	diff         digest.Digester
	meta         *metadata
	files        int64
	newest       time.Time
	machines     map[uint16]int // of programs, by their ELF header
}

// root converts a root, in one pass, and is the manifest of the image. meta may be nil.
func (i *Importer) root(ctx context.Context, s *Source, key digest.Digest, meta *metadata) (_ ocispec.Descriptor, err error) {
	r, err := s.open()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	verifier := s.unchanged(ctx, r, i.progress(s.size))
	in := func() int64 { return verifier.n }
	var source io.Reader = verifier
	if s.Kind == Squashfs {
		p, err := squashfsTar(ctx, s.file)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		defer p.Close()
		source, in = p, func() int64 { return s.size }
	}
	b := &budget{Limits: i.Limits}
	st, err := newStream(ctx, source, in, b)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer st.done()
	c := &converter{tree: newTree(ofRoot, b), diff: digest.Canonical.Digester(), meta: meta, machines: map[uint16]int{}}
	if s.Kind == LXC {
		c.beside = newTree(ofImages, b)
	}
	layer, err := i.layer(ctx, key, c, func() error {
		if err := st.walk(true, c.entry); err != nil {
			return err
		}
		if s.Kind != Squashfs {
			if _, err := io.Copy(io.Discard, verifier); err != nil {
				return err
			}
			if got := verifier.digest.Digest(); got != s.digest {
				return fmt.Errorf("it changed while it was read: %s, not %s: %w", got, s.digest, errdefs.ErrFailedPrecondition)
			}
		}
		return c.whole()
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return i.image(ctx, key, c, layer)
}

// layer writes a blob of what fill has the converter write.
func (i *Importer) layer(ctx context.Context, key digest.Digest, c *converter, fill func() error) (_ ocispec.Descriptor, err error) {
	fail := func(err error) (ocispec.Descriptor, error) { return ocispec.Descriptor{}, err }
	ref := refOf(key, "layer")
	w, err := content.OpenWriter(ctx, i.Store, content.WithRef(ref))
	// What was interrupted cannot be gone on with: a compressor has no memory of it.
	abort := func() {
		if aerr := i.Store.Abort(context.WithoutCancel(ctx), ref); aerr != nil && !errdefs.IsNotFound(aerr) {
			err = errors.Join(err, aerr)
		}
	}
	if err != nil {
		if err = fmt.Errorf("content store: %w", err); ctx.Err() != nil {
			abort() // it may have begun
		}
		return fail(err)
	}
	defer func() {
		_ = w.Close()
		if err != nil {
			abort()
		}
	}()
	if err := w.Truncate(0); err != nil {
		return fail(fmt.Errorf("content store: %w", err))
	}
	blocks := bufio.NewWriterSize(w, 1<<20)
	zw, err := zstd.NewWriter(blocks)
	if err != nil {
		return fail(err)
	}
	defer zw.Close() // again, after an error
	plain := bufio.NewWriterSize(io.MultiWriter(c.diff.Hash(), zw), 1<<18)
	c.out = tar.NewWriter(plain)
	if err := fill(); err != nil {
		return fail(err)
	}
	for _, end := range []func() error{c.out.Close, plain.Flush, zw.Close, blocks.Flush} {
		if err := end(); err != nil {
			return fail(fmt.Errorf("the layer: %w", err))
		}
	}
	st, err := w.Status()
	if err != nil {
		return fail(fmt.Errorf("content store: %w", err))
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: w.Digest(), Size: st.Offset}
	mark := map[string]string{labels.LabelUncompressed: c.diff.Digest().String()}
	if err := w.Commit(ctx, d.Size, d.Digest, content.WithLabels(mark)); err != nil && !errdefs.IsAlreadyExists(err) {
		return fail(fmt.Errorf("content store: %w", err))
	}
	return d, i.label(ctx, d.Digest, mark)
}

// entry checks one and writes it.
func (c *converter) entry(h *tar.Header, data io.Reader) error {
	if c.beside != nil {
		inside, err := below(h)
		if err != nil {
			return err
		}
		if !inside {
			name, err := c.beside.add(h)
			if err != nil || name != metadataFile {
				return err
			}
			m, err := readMetadata(h, data)
			c.meta = &m
			return err
		}
	}
	name, err := c.tree.add(h)
	if err != nil || name == "." {
		return err // no layer tells of its root
	}
	c.files++
	if h.ModTime.After(c.newest) {
		c.newest = h.ModTime
	}
	out := &tar.Header{
		Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Mode: h.Mode & 0o7777, Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime,
		Devmajor: h.Devmajor, Devminor: h.Devminor, Format: tar.FormatPAX,
	}
	switch h.Typeflag {
	case tar.TypeDir:
		out.Name += "/"
	case tar.TypeReg, tar.TypeGNUSparse:
		out.Typeflag, out.Size = tar.TypeReg, h.Size
	case tar.TypeLink:
		if out.Linkname, err = c.tree.clean(h.Linkname); err != nil {
			return err
		}
	}
	for key, value := range h.PAXRecords {
		if strings.HasPrefix(key, paxAttribute) {
			if out.PAXRecords == nil {
				out.PAXRecords = map[string]string{}
			}
			out.PAXRecords[key] = value
		}
	}
	if err := c.out.WriteHeader(out); err != nil {
		return err
	}
	if out.Size == 0 {
		return nil
	}
	if h.Mode&0o111 != 0 && out.Size > elfHeader {
		head := make([]byte, elfHeader)
		if _, err := io.ReadFull(data, head); err != nil {
			return err
		}
		c.machine(head)
		if _, err := c.out.Write(head); err != nil {
			return err
		}
	}
	_, err = io.Copy(c.out, data)
	return err
}

// whole says whether there was all that an image has.
func (c *converter) whole() error {
	if c.beside != nil && c.files == 0 {
		return fmt.Errorf("it has no %s: it is the half of a split image that tells of the other; give both: import ROOT METADATA: %w", rootDir, errdefs.ErrInvalidArgument)
	}
	if c.beside != nil && c.meta == nil {
		return fmt.Errorf("it has %s and no %s: it is no image of LXC's; a root is packed with nothing above it: `tar -C %[1]s -cf FILE .`: %[3]w", rootDir, metadataFile, errdefs.ErrInvalidArgument)
	}
	if c.files == 0 {
		return fmt.Errorf("it holds no file: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// elfHeader is as much of one as tells for which machine it is.
const elfHeader = 20

func (c *converter) machine(head []byte) {
	if string(head[:4]) != "\x7fELF" {
		return
	}
	var order binary.ByteOrder = binary.LittleEndian
	if head[5] == 2 {
		order = binary.BigEndian
	}
	n := order.Uint16(head[18:])
	if n == machinePower && head[5] == 2 {
		n = 0 // the old byte order, which no image is for
	}
	c.machines[n]++
}

const machinePower = 21

// machines are those of ELF that Linux runs on.
var machines = map[uint16]ocispec.Platform{
	3: {Architecture: "386"}, 62: {Architecture: "amd64"}, 40: {Architecture: "arm", Variant: "v7"}, 183: {Architecture: "arm64", Variant: "v8"},
	machinePower: {Architecture: "ppc64le"}, 22: {Architecture: "s390x"}, 243: {Architecture: "riscv64"}, 258: {Architecture: "loong64"},
}

// platform is what the metadata says, or what most programs are for, or this host's.
func (c *converter) platform() ocispec.Platform {
	p := ocispec.Platform{Architecture: runtime.GOARCH}
	if c.meta != nil {
		if said, err := c.meta.platform(); err == nil && said.Architecture != "" {
			return said
		}
	}
	most := 0
	for n, count := range c.machines {
		if is, ok := machines[n]; ok && (count > most || count == most && is.Architecture < p.Architecture) {
			most, p = count, is
		}
	}
	p.OS = "linux"
	return platforms.Normalize(p)
}

// image writes the config and the manifest.
func (i *Importer) image(ctx context.Context, key digest.Digest, c *converter, layer ocispec.Descriptor) (ocispec.Descriptor, error) {
	fail := func(err error) (ocispec.Descriptor, error) { return ocispec.Descriptor{}, err }
	config := ocispec.Image{Platform: c.platform(), RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{c.diff.Digest()}}}
	if !i.Platform.Match(config.Platform) {
		return fail(fmt.Errorf("its programs are for %s, which this host does not run: %w", platforms.Format(config.Platform), errdefs.ErrFailedPrecondition))
	}
	// The same source is the same image: of no time but its own.
	if c.meta != nil {
		config.Created, config.Config.Labels = c.meta.created(), c.meta.labels()
	}
	if u := c.newest.Unix(); config.Created == nil && u > 0 && u <= maxTime {
		t := time.Unix(u, 0).UTC()
		config.Created = &t
	}
	config.History = []ocispec.History{{Created: config.Created, CreatedBy: "containerd-pve template import"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{layer}}
	var err error
	if m.Config, err = i.write(ctx, key, ocispec.MediaTypeImageConfig, config, nil); err != nil {
		return fail(err)
	}
	return i.write(ctx, key, ocispec.MediaTypeImageManifest, m, map[string]string{
		labelSource:                           key.String(),
		"containerd.io/gc.ref.content.config": m.Config.Digest.String(),
		"containerd.io/gc.ref.content.l.0":    layer.Digest.String(),
	})
}
