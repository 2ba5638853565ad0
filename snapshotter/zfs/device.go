package zfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

// request is the number of an ioctl of /dev/zfs (include/sys/fs/zfs.h, zfs_ioc_t).
type request uint

const (
	reqObjsetStats      request = 0x5a12
	reqDatasetListNext  request = 0x5a14
	reqSnapshotListNext request = 0x5a15
	reqSetProp          request = 0x5a16
	reqCreate           request = 0x5a17
	reqDestroy          request = 0x5a18
	reqRollback         request = 0x5a19
	reqRename           request = 0x5a1a
	reqPromote          request = 0x5a22
	reqSnapshot         request = 0x5a23
	reqInheritProp      request = 0x5a2b
	reqUserspaceMany    request = 0x5a2e
	reqHold             request = 0x5a30
	reqRelease          request = 0x5a31
	reqGetHolds         request = 0x5a32
	reqNextObject       request = 0x5a35
	reqDiff             request = 0x5a36
	reqTmpSnapshot      request = 0x5a37
	reqObjectStats      request = 0x5a38
	reqDestroySnaps     request = 0x5a3b
	reqSendNew          request = 0x5a40
	reqClone            request = 0x5a42
	reqBookmark         request = 0x5a43
	reqGetBookmarks     request = 0x5a44
	reqDestroyBookmarks request = 0x5a45
	reqReceive          request = 0x5a46
	reqChannelProgram   request = 0x5a48
)

// The layout of zfs_cmd_t (include/sys/zfs_ioctl.h) on a 64-bit machine, the same
// from OpenZFS 2.0 to 2.4.
const (
	commandSize = 13744

	offName      = 0 // char[4096]
	offSource    = 4096
	offSourceLen = 4104
	offResult    = 4112
	offResultLen = 4120
	offFilled    = 4128 // boolean_t
	offValue     = 4144 // char[8192]
	offString    = 12336
	offCookie    = 12616
	offObjsType  = 12624
	offObject    = 12656
	offStats     = 12704 // dmu_objset_stats_t
	offCleanup   = 13664 // int
	offSimple    = 13668
	offStat      = 13696 // zfs_stat_t: gen, mode, links, ctime[2], each of 64 bits

	nameSize   = 4096
	valueSize  = 8192
	stringSize = 256

	// In dmu_objset_stats_t.
	statsType       = 24
	statsIsSnapshot = 28
	statsOrigin     = 31
)

const (
	// firstResult is what libzfs_core begins with for an answer.
	firstResult = 128 << 10
	// programMemory is how much a channel program and its answer may take (the
	// default of `zfs program`).
	programMemory = 10 << 20
	// maxResult bounds how far a buffer that is too small is enlarged.
	maxResult = 256 << 20
)

// buffers are for answers, of which a list keeps nothing: the first use of so many new pages takes longer than what the module does.
var buffers = sync.Pool{New: func() any { return new([firstResult]byte) }}

// command is a zfs_cmd_t.
type command [commandSize]byte

func (c *command) setText(at, size int, text string) error {
	if len(text) >= size || strings.Contains(text, "\x00") {
		return fmt.Errorf("%.60q is longer than %d bytes or holds a NUL: %w", text, size-1, errdefs.ErrInvalidArgument)
	}
	copy(c[at:at+size], text)
	c[at+len(text)] = 0
	return nil
}

func (c *command) text(at, size int) string {
	b := c[at : at+size]
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

func (c *command) put64(at int, v uint64) { binary.NativeEndian.PutUint64(c[at:], v) }
func (c *command) put32(at int, v uint32) { binary.NativeEndian.PutUint32(c[at:], v) }
func (c *command) get64(at int) uint64    { return binary.NativeEndian.Uint64(c[at:]) }
func (c *command) get32(at int) uint32    { return binary.NativeEndian.Uint32(c[at:]) }

// device is /dev/zfs, open. It may be used by several goroutines at once.
type device struct {
	file *os.File
	// calls counts the ioctls made, which budgets are held against.
	calls atomic.Int64
}

func openDevice() (*device, error) {
	f, err := os.OpenFile("/dev/zfs", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return &device{file: f}, nil
}

// call makes one ioctl. A source goes with it as a packed list; the result is
// unpacked if the kernel gave one, also with an error, or what it has of the names, if some are given. ctx is looked at before:
// what the kernel has begun it ends.
func (d *device) call(ctx context.Context, r request, c *command, source nvlist.List, wantResult bool, names ...string) (nvlist.List, error) {
	var packed []byte
	if source != nil {
		var err error
		if packed, err = nvlist.Encode(source); err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	first := firstResult
	if r == reqChannelProgram {
		first = programMemory // its answer is never asked for twice
	}
	for size := first; ; size *= 2 {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var result []byte
		switch {
		case wantResult && size == firstResult:
			buffer := buffers.Get().(*[firstResult]byte)
			defer buffers.Put(buffer)
			result = buffer[:]
		case wantResult:
			result = make([]byte, size)
		}
		errno := d.ioctl(r, c, packed, result)
		if errno == unix.ENOMEM && wantResult && r != reqChannelProgram && size < maxResult {
			continue // the answer did not fit
		}
		if errno == unix.EINTR || errno == unix.ERESTART {
			size /= 2 // the same once more
			continue
		}
		var list nvlist.List
		if wantResult && c.get32(offFilled) != 0 {
			var err error
			if list, err = nvlist.Decode(result[:min(uint64(size), c.get64(offResultLen))], names...); err != nil {
				return nil, errors.Join(fmt.Errorf("the answer of ioctl %#x: %w: %w", uint(r), err, errdefs.ErrInternal), errnoOrNil(errno))
			}
		}
		return list, errnoOrNil(errno)
	}
}

func errnoOrNil(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

// ioctl hands over raw addresses, so the buffers are pinned for the call.
func (d *device) ioctl(r request, c *command, source, result []byte) unix.Errno {
	var pinner runtime.Pinner
	defer pinner.Unpin()
	c.put64(offSource, 0)
	c.put64(offSourceLen, uint64(len(source)))
	if len(source) > 0 {
		pinner.Pin(&source[0])
		c.put64(offSource, uint64(uintptr(unsafe.Pointer(&source[0]))))
	}
	c.put64(offResult, 0)
	c.put64(offResultLen, uint64(len(result)))
	binary.NativeEndian.PutUint32(c[offFilled:], 0)
	if len(result) > 0 {
		pinner.Pin(&result[0])
		c.put64(offResult, uint64(uintptr(unsafe.Pointer(&result[0]))))
	}
	d.calls.Add(1)
	ioctls.Add(1)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.file.Fd(), uintptr(r), uintptr(unsafe.Pointer(c)))
	runtime.KeepAlive(d)
	return errno
}
