// Package stdio connects a process's stdin, stdout and stderr, or its terminal,
// to what containerd's client named: FIFOs, files or a logging program. It owns
// the pipes, the copying and the logging program; it never starts or signals
// the process itself.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc"
)

// Config says what a process's stdio is connected to. Empty means /dev/null.
type Config struct {
	// Namespace and ID are told to a logging program.
	Namespace, ID string
	// Stdin is the path of a FIFO. Stdout and Stderr are paths of FIFOs or files,
	// or file:///path, binary:///program?arg=value, binary-v2:///….
	Stdin, Stdout, Stderr string
	// Terminal says that the process has a pty: Stderr is not used.
	Terminal bool
	// UID and GID own the pipes.
	UID, GID int
}

// IO is the stdio of one process.
type IO struct {
	child  lxc.Stdio  // the process's ends
	out    []stream   // copied once the process runs
	stdin  *os.File   // what the client writes
	hold   *os.File   // keeps stdin from ending before CloseStdin
	toProc *os.File   // our end of the stdin pipe
	files  []*os.File // everything that Close closes
	logger *logger

	term struct {
		sink          *os.File
		master, slave *os.File
	}

	copies sync.WaitGroup
	moved  atomic.Int64

	mu     sync.Mutex
	users  map[*os.File]int // streams that still write into a sink
	closed bool
}

// stream is one output on its way from the process.
type stream struct{ from, to *os.File }

// Open opens all ends. NotFound or InvalidArgument name the one that cannot be.
func Open(ctx context.Context, c Config) (_ *IO, retErr error) {
	o := &IO{}
	defer func() {
		if retErr != nil {
			o.closeChild()
			o.Close()
		}
	}()
	if err := o.openStdin(c); err != nil {
		return nil, err
	}
	if c.Terminal {
		c.Stderr = ""
	}
	if scheme, u, err := parse(c.Stdout); err != nil {
		return nil, fmt.Errorf("stdout: %w", err)
	} else if scheme == "binary" || scheme == "binary-v2" {
		if o.logger, err = startLogger(ctx, c, u); err != nil {
			return nil, fmt.Errorf("stdout: %w", err)
		}
		if c.Terminal {
			o.term.sink = o.logger.stdout
		} else {
			o.child.Stdout, o.child.Stderr = o.logger.stdout, o.logger.stderr
		}
		return o, nil
	}
	stdout, err := o.sink("stdout", c.Stdout, nil)
	if err != nil {
		return nil, err
	}
	if c.Terminal {
		o.term.sink = stdout
		return o, nil
	}
	var same *os.File
	if c.Stderr == c.Stdout {
		same = stdout
	}
	stderr, err := o.sink("stderr", c.Stderr, same)
	if err != nil {
		return nil, err
	}
	if o.child.Stdout, err = o.output(c, stdout); err != nil {
		return nil, err
	}
	o.child.Stderr, err = o.output(c, stderr)
	return o, err
}

// parse splits a URI; a path as it is has the scheme "".
func parse(s string) (scheme string, u *url.URL, err error) {
	if !strings.Contains(s, "://") {
		return "", &url.URL{Path: s}, nil
	}
	if u, err = url.Parse(s); err != nil {
		return "", nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return u.Scheme, u, nil
}

// sink opens where an output goes; nil for nowhere.
func (o *IO) sink(name, uri string, same *os.File) (*os.File, error) {
	if uri == "" || same != nil {
		return same, nil
	}
	scheme, u, err := parse(uri)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	flags := unix.O_WRONLY | unix.O_APPEND
	switch scheme {
	case "", "fifo":
		// Both ends, so that a client may come and go: without a reader the
		// container waits, it does not die of SIGPIPE.
		if st, err := os.Stat(u.Path); err == nil && st.Mode()&os.ModeNamedPipe != 0 {
			flags = unix.O_RDWR | unix.O_NONBLOCK
		}
	case "file":
		if !filepath.IsAbs(u.Path) {
			return nil, fmt.Errorf("%s: %q has no absolute path: %w", name, uri, errdefs.ErrInvalidArgument)
		}
		if err := os.MkdirAll(filepath.Dir(u.Path), 0o755); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		flags |= unix.O_CREAT
	default:
		return nil, fmt.Errorf("%s: scheme %q of %q is none of fifo, file, binary, binary-v2: %w", name, scheme, uri, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(u.Path, flags, 0o644)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrNotFound)
	}
	o.files = append(o.files, f)
	return f, nil
}

// output makes the pipe the process writes into. Files are not handed over as
// they are: liblxc changes the mode of its stdio.
func (o *IO) output(c Config, to *os.File) (*os.File, error) {
	if to == nil {
		return nil, nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	o.files = append(o.files, r)
	o.out = append(o.out, stream{r, to})
	if c.UID != 0 || c.GID != 0 {
		if err := w.Chown(c.UID, c.GID); err != nil {
			w.Close()
			return nil, err
		}
	}
	return w, nil
}

func (o *IO) openStdin(c Config) error {
	if c.Stdin == "" {
		return nil
	}
	f, err := os.OpenFile(c.Stdin, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("stdin: %w: %w", err, errdefs.ErrNotFound)
	}
	o.stdin = f
	o.files = append(o.files, f)
	if st, err := f.Stat(); err != nil {
		return err
	} else if st.Mode()&os.ModeNamedPipe != 0 {
		// There is a reader now, so this does not fail with ENXIO.
		if o.hold, err = os.OpenFile(c.Stdin, unix.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
			return fmt.Errorf("stdin: %w", err)
		}
	}
	if c.Terminal {
		return nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	o.child.Stdin, o.toProc = r, w
	if c.UID != 0 || c.GID != 0 {
		return r.Chown(c.UID, c.GID)
	}
	return nil
}

// Child is what the process gets. With a terminal it is empty.
func (o *IO) Child() lxc.Stdio { return o.child }

func (o *IO) closeChild() {
	for _, f := range []*os.File{o.child.Stdin, o.child.Stdout, o.child.Stderr} {
		if f != nil {
			f.Close()
		}
	}
	o.child = lxc.Stdio{}
}

// Started begins to copy, once the process has its ends. It takes console over.
func (o *IO) Started(console *os.File) error {
	o.closeChild()
	if console != nil {
		defer console.Close()
		// Non-blocking and known to the poller: a read must end when we close.
		fd, err := unix.FcntlInt(console.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
			return err
		}
		o.term.master = os.NewFile(uintptr(fd), "console")
		o.files = append(o.files, o.term.master)
		// Without a slave of our own the master would end whenever the process
		// happens to have none open (ioctl_tty(2), TIOCGPTPEER).
		peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
		if errno != 0 {
			return fmt.Errorf("slave of the console: %w", errno)
		}
		o.term.slave = os.NewFile(peer, "console slave")
		o.begin(stream{o.term.master, o.term.sink})
		if o.stdin != nil {
			go func() { _, _ = io.Copy(o.term.master, onlyReader{o.stdin}) }()
		}
		return nil
	}
	for _, s := range o.out {
		o.begin(s)
	}
	if o.stdin != nil {
		go func() {
			_, _ = io.Copy(o.toProc, onlyReader{o.stdin})
			o.toProc.Close()
		}()
	}
	return nil
}

// begin copies a stream and then closes its sink, if it was the last one to write
// there: clients wait for the end of the output before they call Delete.
func (o *IO) begin(s stream) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.users == nil {
		o.users = make(map[*os.File]int)
	}
	o.users[s.to]++
	o.copies.Go(func() {
		o.copy(s)
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.users[s.to]--; o.users[s.to] == 0 && s.to != nil {
			s.to.Close()
		}
	})
}

// onlyReader hides the methods that make io.Copy take a detour.
type onlyReader struct{ io.Reader }

var buffers = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

// copy goes on reading when the sink fails: the container must not stop because
// a log disk is full.
func (o *IO) copy(s stream) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	broken := s.to == nil
	for {
		n, err := s.from.Read(*buf)
		if n > 0 {
			if !broken {
				if _, werr := s.to.Write((*buf)[:n]); werr != nil {
					broken = true
					if !errors.Is(werr, os.ErrClosed) {
						log.L.WithError(werr).Warn("output of the container is lost from here on")
					}
				}
			}
			o.moved.Add(int64(n))
		}
		if err != nil {
			return
		}
	}
}

// Resize sets the terminal's size.
func (o *IO) Resize(width, height uint32) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.term.master == nil || o.closed {
		return fmt.Errorf("the process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	conn, err := o.term.master.SyscallConn()
	if err != nil {
		return err
	}
	var ioctlErr error
	err = conn.Control(func(fd uintptr) {
		ioctlErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(height), Col: uint16(width)})
	})
	return errors.Join(err, ioctlErr)
}

// CloseStdin lets the process see the end of its stdin once it has read what
// the client wrote.
func (o *IO) CloseStdin() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.hold != nil {
		o.hold.Close()
		o.hold = nil
	}
}

// Exited is called when the process has ended.
func (o *IO) Exited() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.term.slave != nil {
		o.term.slave.Close()
		o.term.slave = nil
	}
}

// Drain waits until all output of the process is where it belongs, but no
// longer than idle without a byte moving: something else may hold the pipe, or
// nobody read the FIFO. It returns whether everything was copied.
func (o *IO) Drain(ctx context.Context, idle time.Duration) bool {
	done := make(chan struct{})
	go func() {
		o.copies.Wait()
		close(done)
	}()
	last := o.moved.Load()
	for {
		select {
		case <-done:
			return true
		case <-ctx.Done():
			return false
		case <-time.After(idle):
			now := o.moved.Load()
			if now == last {
				return false
			}
			last = now
		}
	}
}

// Close ends all copying and waits for a logging program to finish. It can be
// called again.
func (o *IO) Close() {
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return
	}
	o.closed = true
	hold, slave := o.hold, o.term.slave
	o.hold, o.term.slave = nil, nil
	o.mu.Unlock()
	for _, f := range append(o.files, hold, slave, o.toProc) {
		if f != nil {
			f.Close()
		}
	}
	if o.logger != nil {
		o.logger.stop()
	}
}
