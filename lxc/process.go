package lxc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Process is a container's init or one that was executed in it.
type Process struct {
	pid     int
	console *os.File
	done    chan struct{}

	mu    sync.Mutex
	pidfd *os.File // nil before it is known and after the end
	exit  ExitStatus
	ended bool
}

func newProcess() *Process { return &Process{done: make(chan struct{})} }

// attach sets what is known once the process exists.
func (p *Process) attach(pid int, pidfd, console *os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pid, p.pidfd, p.console = pid, pidfd, console
}

// Pid is the process's id on the host.
func (p *Process) Pid() int { return p.pid }

// Console is the pty's master with Terminal in the spec, else nil. The caller
// owns it and closes it.
func (p *Process) Console() *os.File { return p.console }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitStatus is how the process ended. It is valid once Done is closed.
func (p *Process) ExitStatus() ExitStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// finish records the end; only the first one counts.
func (p *Process) finish(exit ExitStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	p.ended, p.exit = true, exit
	if p.pidfd != nil {
		p.pidfd.Close()
		p.pidfd = nil
	}
	close(p.done)
}

// Kill sends the signal to the process alone. NotFound when it has ended.
func (p *Process) Kill(_ context.Context, sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended || p.pidfd == nil {
		return fmt.Errorf("process %d has ended: %w", p.pid, errdefs.ErrNotFound)
	}
	err := unix.PidfdSendSignal(int(p.pidfd.Fd()), sig, nil, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return fmt.Errorf("process %d has ended: %w", p.pid, errdefs.ErrNotFound)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("signal %d: %w", int(sig), errdefs.ErrInvalidArgument)
	case err != nil:
		return fmt.Errorf("signal %d to process %d: %w", int(sig), p.pid, err)
	}
	return nil
}

// openPidfd takes hold of a process. It does not block, so that awaitEnd needs
// no thread.
func openPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// awaitEnd comes back when the process has ended, or the descriptor is closed.
func awaitEnd(pidfd *os.File) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
}

// exitOf follows the shell's and containerd's convention.
func exitOf(ws syscall.WaitStatus) ExitStatus {
	code := uint32(ws.ExitStatus())
	if ws.Signaled() {
		code = 128 + uint32(ws.Signal())
	}
	return ExitStatus{Code: code, At: time.Now()}
}
