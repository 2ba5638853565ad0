package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
)

const (
	bufferSize = 1 << 16
	blockSize  = 512
	// maxWindow is what a decompressor may keep of what it has written: as much as
	// `zstd --ultra -22` and twice what `xz -9` asks for.
	maxWindow = 128 << 20
)

// decompress reads what is compressed, by its first bytes.
func decompress(br *bufio.Reader) (_ io.Reader, done func(), err error) {
	done = func() {}
	magic, err := br.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		r, err := gzip.NewReader(br)
		return r, done, err
	// The second is a frame that is skipped, which may come first.
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), len(magic) >= 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:4], []byte{0x2a, 0x4d, 0x18}):
		r, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(1)) // meters are not for two
		if err != nil {
			return nil, nil, err
		}
		return r, r.Close, nil
	case bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		r, err := xz.NewReader(br, maxWindow)
		return r, done, err
	case bytes.HasPrefix(magic, []byte("BZh")):
		return bzip2.NewReader(br), done, nil
	}
	return br, done, nil
}

// meter counts what is read, and ends with the context.
type meter struct {
	ctx   context.Context
	r     io.Reader
	n     int64
	ended bool              // more was asked for than there is
	seen  func(n int64)     // told of what was read; may be nil
	check func(int64) error // asked about the count; may be nil
}

func (m *meter) Read(p []byte) (int, error) {
	if err := m.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := m.r.Read(p)
	m.n += int64(n)
	m.ended = m.ended || n == 0 && errors.Is(err, io.EOF)
	if m.seen != nil {
		m.seen(int64(n))
	}
	if m.check != nil && (err == nil || errors.Is(err, io.EOF)) {
		if cerr := m.check(m.n); cerr != nil {
			return n, cerr
		}
	}
	return n, err
}

// Limits are what is too much.
type Limits struct {
	// Bytes may be in all files together, and in all that is decompressed.
	Bytes int64
	// Entries may there be, with the directories that only their names tell of.
	Entries int64
	// Ratio is how many times larger than the file its content may be, from ratioFrom bytes on.
	Ratio int64
}

// ratioFrom is how much may come of little: an image of a few files compresses well. Tests have less.
var ratioFrom int64 = 256 << 20

// budget is what is left of the limits for all of an image.
type budget struct {
	Limits
	entries, bytes int64
}

func (b *budget) entry() error {
	if b.entries++; b.entries > b.Entries {
		return fmt.Errorf("there are more than %d entries (--max-entries): %w", b.Entries, errdefs.ErrResourceExhausted)
	}
	return nil
}

func (b *budget) file(size int64) error {
	if size < 0 || size > b.Bytes-b.bytes {
		return fmt.Errorf("its %d bytes are more than are left of %s (--max-size, and what is free in the pool): %w", size, units.BytesSize(float64(b.Bytes)), errdefs.ErrResourceExhausted)
	}
	b.bytes += size
	return nil
}

// stream is one tar, decompressed.
type stream struct {
	*meter
	in     func() int64 // how much was read for it
	budget *budget
	data   int64 // of files, holes as well
	done   func()
}

// newStream decompresses r, of which in says how much was read.
func newStream(ctx context.Context, r io.Reader, in func() int64, b *budget) (*stream, error) {
	plain, done, err := decompress(bufio.NewReaderSize(r, bufferSize))
	if err != nil {
		return nil, damaged(err)
	}
	s := &stream{in: in, budget: b, done: done}
	s.meter = &meter{ctx: ctx, r: plain, check: s.room}
	return s, nil
}

// room says whether n bytes of this stream are not too many.
func (s *stream) room(n int64) error {
	if n > s.budget.Bytes {
		return fmt.Errorf("it is larger than %s (--max-size, and what is free in the pool): %w", units.BytesSize(float64(s.budget.Bytes)), errdefs.ErrResourceExhausted)
	}
	if n > ratioFrom && n/s.budget.Ratio > s.in() {
		return fmt.Errorf("it is %d bytes out of %d (--max-ratio %d): %w", n, s.in(), s.budget.Ratio, errdefs.ErrResourceExhausted)
	}
	return nil
}

// walk gives each entry to a function. What that leaves of a file's data is read. Its
// errors, and the tar's, say which entry it was, and where in the tar it begins. A tar must
// have its end mark, if there is nothing else to tell that it is whole.
func (s *stream) walk(mark bool, each func(h *tar.Header, data io.Reader) error) error {
	tr := tar.NewReader(s.meter)
	for n := 1; ; n++ {
		at := (s.n + blockSize - 1) &^ (blockSize - 1)
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if mark && s.ended {
				return fmt.Errorf("it ends without the mark of its end, after entry %d at byte %d: it is truncated: %w", n-1, at, errdefs.ErrInvalidArgument)
			}
			break
		}
		if err != nil {
			return fmt.Errorf("entry %d at byte %d: %w", n, at, damaged(err))
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		name := h.Name
		data := &meter{ctx: s.ctx, r: tr, check: func(n int64) error { return s.room(s.data + n) }}
		if err := each(h, data); err == nil {
			_, err = io.Copy(io.Discard, data)
			s.data += data.n
			if err != nil {
				return fmt.Errorf("entry %d %q at byte %d: %w", n, name, at, damaged(err))
			}
		} else {
			return fmt.Errorf("entry %d %q at byte %d: %w", n, name, at, damaged(err))
		}
	}
	// What is compressed is checked at its end only.
	if _, err := io.Copy(io.Discard, s.meter); err != nil {
		return fmt.Errorf("after the last entry, at byte %d: %w", s.n, damaged(err))
	}
	return nil
}

// damaged gives an error of a decompressor's or the tar reader's its kind; others have one.
func damaged(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), kinded(err):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("it is truncated (%w): %w", err, errdefs.ErrInvalidArgument)
	case errors.Is(err, xz.ErrMemlimit), errors.Is(err, zstd.ErrWindowSizeExceeded):
		return fmt.Errorf("it was compressed with a window of more than %s, compress it again with less (%w): %w", units.BytesSize(maxWindow), err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
}

// kinded says whether an error has a kind.
func kinded(err error) bool {
	for _, is := range []func(error) bool{errdefs.IsInvalidArgument, errdefs.IsResourceExhausted, errdefs.IsNotFound, errdefs.IsFailedPrecondition, errdefs.IsUnavailable, errdefs.IsAlreadyExists, errdefs.IsInternal, errdefs.IsUnknown, errdefs.IsDataLoss} {
		if is(err) {
			return true
		}
	}
	return false
}
