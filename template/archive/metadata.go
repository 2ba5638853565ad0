package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.yaml.in/yaml/v3"
)

const (
	metadataFile = "metadata.yaml"
	rootDir      = "rootfs"
	templatesDir = "templates"
	maxMetadata  = 1 << 20
	// labelProperty is what a property of an LXC image is kept under, in the image's config.
	labelProperty = "io.containerd.pve.lxc."
)

// metadata is what an LXC image says of itself.
type metadata struct {
	Architecture string            `yaml:"architecture"`
	Created      int64             `yaml:"creation_date"` // seconds since 1970
	Properties   map[string]string `yaml:"properties"`
}

// parseMetadata reads metadata.yaml. Errors: InvalidArgument.
func parseMetadata(text []byte) (m metadata, err error) {
	if err := yaml.Unmarshal(text, &m); err != nil {
		return m, refuse("%s: %v", metadataFile, err)
	}
	if _, err := m.platform(); err != nil {
		return m, fmt.Errorf("%s: %w", metadataFile, err)
	}
	return m, nil
}

func readMetadata(h *tar.Header, r io.Reader) (m metadata, err error) {
	if h.Typeflag != tar.TypeReg || h.Size > maxMetadata {
		return m, refuse("it is no file of at most %d bytes", maxMetadata)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		return m, err
	}
	return parseMetadata(text)
}

// platform is empty if it does not say.
func (m metadata) platform() (ocispec.Platform, error) {
	arch := strings.ToLower(m.Architecture)
	switch arch {
	case "":
		return ocispec.Platform{}, nil
	case "i686", "i586":
		arch = "386"
	case "armv7l", "armv7":
		arch = "arm/v7"
	case "ppc64le", "riscv64", "s390x":
	}
	p, err := platforms.Parse("linux/" + arch)
	if err != nil {
		return p, refuse("architecture %q is none", m.Architecture)
	}
	return p, nil
}

func (m metadata) created() *time.Time {
	if m.Created <= 0 || m.Created > maxTime {
		return nil
	}
	t := time.Unix(m.Created, 0).UTC()
	return &t
}

// labels are those of the image's config.
func (m metadata) labels() map[string]string {
	if len(m.Properties) == 0 {
		return nil
	}
	all := map[string]string{}
	for name, value := range m.Properties {
		all[labelProperty+name] = value
	}
	for label, name := range map[string]string{ocispec.AnnotationDescription: "description", ocispec.AnnotationVersion: "release", ocispec.AnnotationTitle: "name"} {
		if v := m.Properties[name]; v != "" {
			all[label] = v
		}
	}
	return all
}

// metadataOf reads the half of a split image that is no root.
func metadataOf(ctx context.Context, s *Source, b *budget) (_ *metadata, err error) {
	fail := func(err error) (*metadata, error) { return nil, fmt.Errorf("%s: %w", s.Path, err) }
	r, err := s.open()
	if err != nil {
		return fail(err)
	}
	in := &meter{ctx: ctx, r: r}
	st, err := newStream(ctx, in, func() int64 { return in.n }, b)
	if err != nil {
		return fail(err)
	}
	defer st.done()
	var found *metadata
	beside := newTree(ofImages, b)
	err = st.walk(true, func(h *tar.Header, data io.Reader) error {
		name, err := beside.add(h)
		if err != nil {
			return err
		}
		if first, _, _ := strings.Cut(name, "/"); first == rootDir {
			return errWhole
		}
		if name != metadataFile {
			return nil
		}
		m, err := readMetadata(h, data)
		found = &m
		return err
	})
	if err == nil && found == nil {
		err = fmt.Errorf("it has no %s: %w", metadataFile, errdefs.ErrInvalidArgument)
	}
	if errors.Is(err, errWhole) {
		err = fmt.Errorf("it is a whole image, with its %s: give it alone: %w", rootDir, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fail(err)
	}
	return found, nil
}

var errWhole = fmt.Errorf("a root: %w", errdefs.ErrInvalidArgument)

// below takes the root's directory off the names of an entry of an LXC image. Of what
// lies beside it, inside is false.
func below(h *tar.Header) (inside bool, err error) {
	name := path.Clean(h.Name)
	after, ok := strings.CutPrefix(name, rootDir)
	if !ok || (after != "" && after[0] != '/') {
		return false, nil
	}
	if name == rootDir && h.Typeflag != tar.TypeDir {
		return false, refuse("%s is no directory", rootDir)
	}
	// The rules are for the name as it stands, beyond what Clean made of it.
	for part := range strings.SplitSeq(h.Name, "/") {
		if part == ".." {
			return false, refuse("its name leaves the root")
		}
	}
	h.Name = "." + after
	if h.Typeflag == tar.TypeLink {
		target, ok := strings.CutPrefix(path.Clean(h.Linkname), rootDir+"/")
		if !ok {
			return false, refuse("its target %q is not in %s", h.Linkname, rootDir)
		}
		h.Linkname = target
	}
	return true, nil
}
