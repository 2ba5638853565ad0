package compare

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive/tarheader"
	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."          // image-spec, layer.md
	attributes     = "SCHILY.xattr." // star(5)
)

// layer writes the tar stream of an image's layer (image-spec, layer.md).
// containerd's own (archive.ChangeWriter) leaves out fractions of seconds and all
// attributes but security.capability.
type layer struct {
	tw      *tar.Writer
	root    string     // where the files are
	latest  *time.Time // SOURCE_DATE_EPOCH: nothing is younger
	written map[string]bool
	first   map[uint64]string       // of a file with several names, the one that is written with its content
	edit    func(*tar.Header) error // sees each header of a file before it is written; may be nil
}

func newLayer(w io.Writer, root string, latest *time.Time) *layer {
	return &layer{tw: tar.NewWriter(w), root: root, latest: latest, written: map[string]bool{}, first: map[uint64]string{}}
}

// write writes changes, which are in the order of their paths.
func (l *layer) write(ctx context.Context, changes []change) error {
	for _, c := range changes {
		if err := l.parents(ctx, c.path); err != nil {
			return err
		}
		var err error
		if c.removed {
			err = l.whiteout(c.path)
		} else {
			err = l.file(ctx, c.path)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", c.path, err)
		}
	}
	return l.tw.Close()
}

// parents writes the directories above p: who unpacks onto nothing would make
// them as it likes.
func (l *layer) parents(ctx context.Context, p string) error {
	dir := path.Dir(p)
	if dir == "/" || l.written[dir] {
		return nil
	}
	if err := l.parents(ctx, dir); err != nil {
		return err
	}
	if err := l.file(ctx, dir); err != nil {
		return fmt.Errorf("%q: %w", dir, err)
	}
	return nil
}

// whiteout has no time, as containerd's from 2.0 on.
func (l *layer) whiteout(p string) error {
	dir, name := path.Split(p)
	return l.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: dir[1:] + whiteoutPrefix + name, ModTime: time.Unix(0, 0).UTC()})
}

func (l *layer) file(ctx context.Context, p string) error {
	source := l.root + p
	info, err := os.Lstat(source)
	if err != nil {
		return err
	}
	target := ""
	switch info.Mode().Type() {
	case os.ModeSocket:
		return nil // tar has none, and nobody could listen on it
	case os.ModeSymlink:
		if target, err = os.Readlink(source); err != nil {
			return err
		}
	}
	// The names of users are this host's, and no part of an image.
	h, err := tarheader.FileInfoHeaderNoLookups(info, target)
	if err != nil {
		return err
	}
	h.Format = tar.FormatPAX
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	if l.latest != nil && h.ModTime.After(*l.latest) {
		h.ModTime = *l.latest
	}
	h.Name = strings.TrimPrefix(p, "/")
	st := info.Sys().(*syscall.Stat_t)
	if info.IsDir() {
		h.Name += "/"
		l.written[p] = true
	} else if st.Nlink > 1 {
		if first, there := l.first[st.Ino]; there {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			l.first[st.Ino] = h.Name
		}
	}
	if h.PAXRecords, err = xattrs(source); err != nil {
		return err
	}
	if l.edit != nil {
		if err := l.edit(h); err != nil {
			return err
		}
	}
	if err := l.tw.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg || h.Size == 0 {
		return nil
	}
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	// As much as was said: it may grow meanwhile.
	n, err := io.Copy(l.tw, io.LimitReader(readerOf(ctx, f), h.Size))
	if err == nil && n < h.Size {
		err = fmt.Errorf("it became shorter while it was read: %w", io.ErrUnexpectedEOF)
	}
	return err
}

// readerOf ends with its context.
func readerOf(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(b []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return r.Read(b)
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// xattrs are the attributes of a file that go with an image. A label of this
// host's policy does not, nor does what overlayfs keeps for itself.
func xattrs(p string) (map[string]string, error) {
	names, err := sysx.LListxattr(p)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var records map[string]string
	for _, name := range names {
		if name == "security.selinux" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value, err := sysx.LGetxattr(p, name)
		if errors.Is(err, unix.ENODATA) {
			continue // it is gone
		}
		if err != nil {
			return nil, fmt.Errorf("attribute %s: %w", name, err)
		}
		if records == nil {
			records = map[string]string{}
		}
		records[attributes+name] = string(value)
	}
	return records, nil
}
