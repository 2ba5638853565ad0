// Package archive brings images in from files: OCI layouts and archives, what `docker
// save` writes, Proxmox's vztmpl, images of LXC and Incus, tarballs and squashfs of a root. It
// owns how these are recognised (by content, never by name), what of them is refused, and
// the layer, config and manifest that a root becomes. It writes to the content store that it is
// given and nowhere else; it names no image, unpacks nothing, and mounts nothing.
package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Kind is a format.
type Kind string

// The formats. Any of them but Layout and Squashfs may be compressed.
const (
	Layout   Kind = "OCI layout"       // a directory
	Images   Kind = "image archive"    // an OCI layout or what docker saves, as a tar
	LXC      Kind = "LXC image"        // metadata.yaml, with rootfs/ beside it or without
	Rootfs   Kind = "rootfs tarball"   // vztmpl is this
	Squashfs Kind = "squashfs of root" // the other half of a split image, or alone
)

// known is what is said of a file that is none of these.
const known = "an OCI layout (directory or tar), what `docker save` writes, a vztmpl or another tarball of a root, an image of LXC or Incus (unified, split, squashfs); compressed with zstd, gzip, xz, bzip2 or not"

// Source is a file or directory that was recognised.
type Source struct {
	Kind Kind
	// Path is as it was given.
	Path string
	file *os.File
	size int64
	// digest is what Key found it to be.
	digest digest.Digest
}

// Open recognises a file or a directory. Errors: InvalidArgument, it is none of what is known.
func Open(name string) (*Source, error) {
	fail := func(err error) (*Source, error) { return nil, fmt.Errorf("%s: %w", name, err) }
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.IsDir() && !info.Mode().IsRegular() {
		err = fmt.Errorf("it is no file and no directory (%s): %w", info.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fail(errors.Join(err, f.Close()))
	}
	s := &Source{Path: name, file: f, size: info.Size()}
	if info.IsDir() {
		s.Kind = Layout
		for _, part := range []string{ocispec.ImageLayoutFile, ocispec.ImageIndexFile} {
			if _, err := os.Lstat(filepath.Join(name, part)); err != nil {
				return fail(errors.Join(fmt.Errorf("it is no OCI layout: it has no %s (a root's directory is imported as a tarball: `tar -C %s --numeric-owner --xattrs --xattrs-include='*' -cf FILE .`): %w", part, name, errdefs.ErrInvalidArgument), f.Close()))
			}
		}
		return s, nil
	}
	if s.Kind, err = Recognise(f); err != nil {
		return fail(errors.Join(err, f.Close()))
	}
	return s, nil
}

// Close gives the file back.
func (s *Source) Close() error { return s.file.Close() }

// Lock keeps others from importing it meanwhile. Errors: Unavailable, one does.
func (s *Source) Lock() error {
	if err := unix.Flock(int(s.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s: it is being imported already: %w", s.Path, errdefs.ErrUnavailable)
	}
	return nil // a file system without locks has none
}

// Digest is that of the whole file; of a layout that of its index, which names the rest by digest.
func (s *Source) Digest(ctx context.Context, read func(n int64)) (digest.Digest, error) {
	f := s.file
	if s.Kind == Layout {
		root, err := os.OpenRoot(s.Path)
		if err != nil {
			return "", err
		}
		defer root.Close()
		if f, err = root.Open(ocispec.ImageIndexFile); err != nil {
			return "", err
		}
		defer f.Close()
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", fmt.Errorf("%s: %w", s.Path, err)
	}
	return digest.FromReader(&meter{ctx: ctx, r: f, seen: read})
}

// open reads it from its beginning.
func (s *Source) open() (io.Reader, error) {
	_, err := s.file.Seek(0, io.SeekStart)
	return s.file, err
}

// Recognise says what a file is by its content. It reads no more than that takes:
// mostly the first entry. Errors: InvalidArgument, it is none of what is known.
func Recognise(r io.Reader) (Kind, error) {
	br := bufio.NewReaderSize(r, bufferSize)
	if magic, err := br.Peek(4); err == nil && string(magic) == "hsqs" {
		return Squashfs, nil
	}
	none := func(why string) (Kind, error) {
		return "", fmt.Errorf("it is none of the formats that are known (%s): %s: %w", why, known, errdefs.ErrInvalidArgument)
	}
	plain, done, err := decompress(br)
	if err != nil {
		return none(err.Error())
	}
	defer done()
	// A tar of nothing but what says nothing ends here.
	head := bufio.NewReaderSize(io.LimitReader(plain, 1<<20), bufferSize)
	if block, err := head.Peek(blockSize); errors.Is(err, io.EOF) {
		return none("it is too short for a tar")
	} else if err != nil {
		return none(damaged(err).Error())
	} else if bytes.Count(block, []byte{0}) == blockSize {
		return none("it is empty")
	}
	tr := tar.NewReader(head)
	for {
		h, err := tr.Next()
		if err != nil {
			return none("as a tar: " + err.Error())
		}
		if kind := kindBy(h); kind != "" {
			return kind, nil
		}
	}
}

// kindBy is what an entry of a tar shows the whole to be, if it does.
func kindBy(h *tar.Header) Kind {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return ""
	}
	name := path.Clean(h.Name)
	if name == "." {
		return ""
	}
	first, _, below := strings.Cut(name, "/")
	directory := below || h.Typeflag == tar.TypeDir
	switch {
	case first == metadataFile && !directory, (first == rootDir || first == templatesDir) && directory:
		return LXC
	case first == "blobs" && directory:
		return Images
	case !below && !directory && (name == ocispec.ImageLayoutFile || name == ocispec.ImageIndexFile || name == "manifest.json" || name == "repositories"):
		return Images
	}
	// Layers and configs by their digest, as docker, skopeo and crane write them.
	id, _, _ := strings.Cut(strings.TrimPrefix(first, "sha256:"), ".")
	if b, err := hex.DecodeString(id); err == nil && len(b) == 32 {
		return Images
	}
	return Rootfs
}
