package export

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

const (
	temporary  = ".containerd-pve-export-*"
	bufferSize = 1 << 20
)

// ToFile has f write a file that is there whole, or not at all: it gets its name
// when it is on the disk. It is readable for its owner only, as a root's files are for root.
// Errors: AlreadyExists, without force; InvalidArgument, what has the name is no file; the context's; f's.
func ToFile(ctx context.Context, name string, force bool, f func(w io.Writer) error) (err error) {
	fail := func(err error) error { return fmt.Errorf("writing %s: %w", name, err) }
	if err := vacant(name, force); err != nil {
		return fail(err)
	}
	file, err := os.CreateTemp(filepath.Dir(name), temporary)
	if err != nil {
		return fail(err)
	}
	defer func() {
		if err != nil {
			if rerr := os.Remove(file.Name()); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
		}
	}()
	buffered := bufio.NewWriterSize(file, bufferSize)
	w := &output{ctx: ctx, w: buffered}
	err = f(w)
	if err == nil {
		err = errors.Join(w.err, ctx.Err(), buffered.Flush(), file.Sync())
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return fail(err)
	}
	if err := rename(file.Name(), name, force); err != nil {
		return fail(err)
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return fail(err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil && !errors.Is(err, unix.EINVAL) { // there are filesystems without
		return fail(err)
	}
	return nil
}

// vacant wants a name that a file can have.
func vacant(name string, force bool) error {
	info, err := os.Lstat(name)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("there is something that is no file (%s), which is not replaced: give another name, or - for the standard output: %w", info.Mode(), errdefs.ErrInvalidArgument)
	case !force:
		return taken()
	}
	return nil
}

func taken() error {
	return fmt.Errorf("there is such a file: --force replaces it: %w", errdefs.ErrAlreadyExists)
}

// rename replaces nothing without force, whoever made it meanwhile.
func rename(from, to string, force bool) error {
	if force {
		return os.Rename(from, to)
	}
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, unix.EEXIST):
		return taken()
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENOTSUP): // NFS
		if err := vacant(to, false); err != nil {
			return err
		}
		return os.Rename(from, to)
	}
	return err
}

// ToStream has f write to out, which is left as it is. Errors: InvalidArgument, out is a terminal; the
// context's, even while nobody reads what was written; f's.
func ToStream(ctx context.Context, out *os.File, f func(w io.Writer) error) error {
	if term.IsTerminal(int(out.Fd())) {
		return fmt.Errorf("the standard output is a terminal, which an archive would confuse: name a file, or a pipe: %w", errdefs.ErrInvalidArgument)
	}
	buffered := bufio.NewWriterSize(&stream{ctx: ctx, w: out}, bufferSize)
	w := &output{ctx: ctx, w: buffered}
	if err := f(w); err != nil {
		return err
	}
	return errors.Join(w.err, ctx.Err(), buffered.Flush())
}

// output ends with its context, and keeps what went wrong: not everybody who writes an
// archive says it.
type output struct {
	ctx context.Context
	w   io.Writer
	err error
}

func (o *output) Write(b []byte) (int, error) {
	if o.err == nil {
		o.err = o.ctx.Err()
	}
	if o.err != nil {
		return 0, o.err
	}
	n, err := o.w.Write(b)
	o.err = err
	return n, err
}

// stream leaves a write that nobody takes when its context ends. The goroutine that
// hangs in it is gone with the process.
type stream struct {
	ctx context.Context
	w   io.Writer
}

func (s *stream) Write(b []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	done := make(chan result, 1)
	go func() {
		n, err := s.w.Write(b)
		done <- result{n, err}
	}()
	select {
	case r := <-done:
		return r.n, r.err
	case <-s.ctx.Done():
		return 0, s.ctx.Err()
	}
}
