package archive

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	imagearchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// refStore keeps what is being written apart from what other imports write: containerd's importer
// calls it by the file's name, and goes on with what is there.
type refStore struct {
	content.Store
	key digest.Digest
}

// Writer is content.Store's.
func (s refStore) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	return s.Store.Writer(ctx, append(opts, content.WithRef(refOf(s.key, o.Ref)))...)
}

// ingest brings in the blobs of an archive of images, by containerd's own importer, and is their index.
func (i *Importer) ingest(ctx context.Context, s *Source, key digest.Digest) (ocispec.Descriptor, error) {
	fail := func(err error) (ocispec.Descriptor, error) { return ocispec.Descriptor{}, err }
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		tw := tar.NewWriter(w)
		err := i.blobs(ctx, s, tw)
		if err == nil {
			err = tw.Close()
		}
		_ = w.CloseWithError(err)
		done <- err
	}()
	index, err := imagearchive.ImportIndex(ctx, refStore{i.Store, key}, r)
	if err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	_ = r.CloseWithError(errImporter)
	if werr := <-done; werr != nil && !errors.Is(werr, errImporter) {
		return fail(werr) // with the place, of which the importer knows nothing
	}
	if err != nil {
		return fail(damaged(err))
	}
	if err := i.hold(ctx, index); err != nil {
		return fail(err)
	}
	return index, i.label(ctx, index.Digest, map[string]string{labelSource: key.String()})
}

var errImporter = errors.New("containerd's importer has ended")

// blobs writes what the importer is to read: a directory's files, or the tar when it was checked.
func (i *Importer) blobs(ctx context.Context, s *Source, out *tar.Writer) error {
	b := &budget{Limits: i.Limits}
	if s.Kind == Layout {
		return i.layout(ctx, s, b, out)
	}
	file, err := s.open()
	if err != nil {
		return err
	}
	in := &meter{ctx: ctx, r: file, seen: i.progress(s.size)}
	st, err := newStream(ctx, in, func() int64 { return in.n }, b)
	if err != nil {
		return err
	}
	defer st.done()
	t := newTree(ofImages, b)
	return st.walk(true, func(h *tar.Header, data io.Reader) error {
		name, err := t.add(h)
		if err != nil {
			return err
		}
		// A name longer than the format takes needs PAX, as the importer's own reader knows.
		if err := out.WriteHeader(&tar.Header{Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode & 0o7777}); err != nil {
			return err
		}
		_, err = io.Copy(out, data)
		return err
	})
}

// layout reads a directory, and nothing outside of it.
func (i *Importer) layout(ctx context.Context, s *Source, b *budget, out *tar.Writer) error {
	root, err := os.OpenRoot(s.Path)
	if err != nil {
		return err
	}
	defer root.Close()
	names := []string{ocispec.ImageLayoutFile, ocispec.ImageIndexFile}
	err = fs.WalkDir(root.FS(), "blobs", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if !d.Type().IsRegular() {
			return refuse("%s is no file", name)
		}
		names = append(names, name)
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	for n, name := range names {
		if err := b.entry(); err != nil {
			return err
		}
		if err := i.layoutFile(ctx, root, name, b, out); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if i.Progress != nil {
			i.Progress("files", int64(n+1), int64(len(names)))
		}
	}
	return nil
}

func (i *Importer) layoutFile(ctx context.Context, root *os.Root, name string, b *budget, out *tar.Writer) error {
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := b.file(info.Size()); err != nil {
		return err
	}
	if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: info.Size(), Mode: 0o644}); err != nil {
		return err
	}
	_, err = io.Copy(out, &meter{ctx: ctx, r: f})
	return err
}

// candidate is an image of an archive that this host runs.
type candidate struct {
	desc     ocispec.Descriptor
	names    []string
	platform ocispec.Platform
}

func (c candidate) is(choice string) bool {
	return c.desc.Digest.String() == choice || len(choice) >= 12 && strings.HasPrefix(c.desc.Digest.Encoded(), strings.TrimPrefix(choice, "sha256:")) ||
		slices.ContainsFunc(c.names, func(name string) bool { return isName(name, choice) })
}

// isName says whether a name is meant, which may be written shorter.
func isName(name, choice string) bool {
	full, err := Reference(choice, "", "")
	return name == choice || err == nil && choice != "" && name == full
}

func (c candidate) String() string {
	name := strings.Join(c.names, ", ")
	return fmt.Sprintf("%s (%s, %s)", cmp.Or(name, "without a name"), c.desc.Digest, platforms.Format(c.platform))
}

// choose finds the one image that is meant: for this platform, and the only one or the
// one that is asked for. Errors: InvalidArgument, which lists what there is.
func (i *Importer) choose(ctx context.Context, index ocispec.Descriptor, choice string) (ocispec.Descriptor, string, error) {
	fail := func(err error) (ocispec.Descriptor, string, error) { return ocispec.Descriptor{}, "", err }
	var all []candidate
	var others []string
	if err := i.collect(ctx, index, "", 0, &all, &others); err != nil {
		return fail(err)
	}
	if len(all) == 0 {
		if len(others) == 0 {
			return fail(refuse("it holds no image"))
		}
		return fail(fmt.Errorf("it holds no image for this host, but for %s: %w", strings.Join(others, ", "), errdefs.ErrFailedPrecondition))
	}
	listed := func(cs []candidate) string {
		var lines []string
		for _, c := range cs {
			lines = append(lines, c.String())
		}
		return strings.Join(lines, "; ")
	}
	chosen := all
	if choice != "" {
		chosen = slices.DeleteFunc(slices.Clone(all), func(c candidate) bool { return !c.is(choice) })
		if len(chosen) == 0 {
			return fail(fmt.Errorf("it holds no image %s, but %s: %w", choice, listed(all), errdefs.ErrNotFound))
		}
	}
	// Of those of one name, the one that suits this host best.
	slices.SortStableFunc(chosen, func(a, b candidate) int {
		switch {
		case i.Platform.Less(a.platform, b.platform):
			return -1
		case i.Platform.Less(b.platform, a.platform):
			return 1
		}
		return 0
	})
	best := chosen[0]
	for _, c := range chosen[1:] {
		if !slices.Equal(c.names, best.names) || !i.Platform.Less(best.platform, c.platform) {
			return fail(fmt.Errorf("it holds %d images, choose one with --select: %s: %w", len(chosen), listed(chosen), errdefs.ErrInvalidArgument))
		}
	}
	name := ""
	if len(best.names) > 0 {
		name = best.names[0]
	}
	for _, n := range best.names {
		if isName(n, choice) {
			name = n
		}
	}
	return best.desc, name, nil
}

// collect lists the images below an index, whose name is theirs unless they have one.
func (i *Importer) collect(ctx context.Context, index ocispec.Descriptor, name string, depth int, all *[]candidate, others *[]string) error {
	const deepest, most = 4, 1000
	var idx ocispec.Index
	if err := i.read(ctx, index, &idx); err != nil {
		return err
	}
	if depth > deepest || len(idx.Manifests) > most {
		return refuse("%s: %d images, %d indexes deep", index.Digest, len(idx.Manifests), depth)
	}
	for _, d := range idx.Manifests {
		own := cmp.Or(d.Annotations[images.AnnotationImageName], d.Annotations[ocispec.AnnotationRefName], name)
		if _, ok := d.Annotations[images.AnnotationManifestSubject]; ok || d.Annotations["vnd.docker.reference.type"] != "" {
			continue // what is said of another
		}
		err := i.small(ctx, d)
		if errdefs.IsNotFound(err) && d.Platform != nil && !i.Platform.Match(*d.Platform) {
			*others = append(*others, platforms.Format(*d.Platform))
			continue // archives of one platform have the whole index
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", d.MediaType, d.Digest, err)
		}
		switch {
		case images.IsIndexType(d.MediaType):
			if err := i.collect(ctx, d, own, depth+1, all, others); err != nil {
				return err
			}
		case images.IsManifestType(d.MediaType):
			if err := i.candidate(ctx, d, own, all, others); err != nil {
				return err
			}
		}
	}
	return nil
}

func (i *Importer) candidate(ctx context.Context, d ocispec.Descriptor, name string, all *[]candidate, others *[]string) error {
	p, err := i.platformOf(ctx, d)
	if err != nil {
		return err
	}
	if !i.Platform.Match(p) {
		*others = append(*others, platforms.Format(p))
		return nil
	}
	at := slices.IndexFunc(*all, func(c candidate) bool { return c.desc.Digest == d.Digest })
	if at < 0 {
		at = len(*all)
		*all = append(*all, candidate{desc: ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, platform: p})
	}
	if c := &(*all)[at]; name != "" && !slices.Contains(c.names, name) {
		c.names = append(c.names, name)
	}
	return nil
}

// platformOf is what a manifest's own config says; what names it may be wrong.
func (i *Importer) platformOf(ctx context.Context, d ocispec.Descriptor) (ocispec.Platform, error) {
	var m ocispec.Manifest
	if err := i.read(ctx, d, &m); err != nil {
		return ocispec.Platform{}, err
	}
	if err := i.small(ctx, m.Config); err != nil {
		// Of another platform's there may be no more than the manifest.
		if errdefs.IsNotFound(err) && d.Platform != nil && !i.Platform.Match(*d.Platform) {
			return *d.Platform, nil
		}
		return ocispec.Platform{}, fmt.Errorf("config %s: %w", m.Config.Digest, err)
	}
	p, err := images.ConfigPlatform(ctx, i.Store, m.Config)
	if err != nil {
		return p, damaged(fmt.Errorf("config %s: %w", m.Config.Digest, err))
	}
	if p.OS == "" && p.Architecture == "" && d.Platform != nil {
		p = *d.Platform
	}
	return p, nil
}

// checkLayers runs the rules over an image's layers, all of which are there, and
// compares what they unpack to with what the config says.
func (i *Importer) checkLayers(ctx context.Context, d ocispec.Descriptor) error {
	m, err := images.Manifest(ctx, i.Store, d, i.Platform)
	if err != nil {
		return damaged(fmt.Errorf("manifest %s: %w", d.Digest, err))
	}
	var config ocispec.Image
	if err := i.read(ctx, m.Config, &config); err != nil {
		return err
	}
	if len(m.Layers) != len(config.RootFS.DiffIDs) || len(m.Layers) == 0 {
		return refuse("manifest %s has %d layers, its config %d", d.Digest, len(m.Layers), len(config.RootFS.DiffIDs))
	}
	b := &budget{Limits: i.Limits}
	for n, l := range m.Layers {
		if err := i.checkLayer(ctx, l, config.RootFS.DiffIDs[n], b); err != nil {
			return fmt.Errorf("layer %d %s: %w", n+1, l.Digest, err)
		}
	}
	return nil
}

func (i *Importer) checkLayer(ctx context.Context, l ocispec.Descriptor, diff digest.Digest, b *budget) error {
	ra, err := i.Store.ReaderAt(ctx, l)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("the archive lacks it, or has another content under its name: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return err
	}
	defer ra.Close()
	if ra.Size() != l.Size {
		return refuse("it has %d bytes, and not %d", ra.Size(), l.Size)
	}
	in := &meter{ctx: ctx, r: content.NewReader(ra), seen: i.progressOf("check", l.Size)}
	st, err := newStream(ctx, in, func() int64 { return in.n }, b)
	if err != nil {
		return err
	}
	defer st.done()
	is := digest.Canonical.Digester()
	st.r = io.TeeReader(st.r, is.Hash())
	t := newTree(ofLayer, b)
	if err := st.walk(false, func(h *tar.Header, _ io.Reader) error {
		_, err := t.add(h)
		return err
	}); err != nil {
		return err
	}
	if got := is.Digest(); got != diff {
		return refuse("it unpacks to %s, and not to %s", got, diff)
	}
	return nil
}
