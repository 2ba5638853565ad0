package main

import (
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

// loadSeccomp puts this thread under the filter. A filter that notifies has a
// listener, which s takes to the shim before this comes back.
func loadSeccomp(f *plan.Seccomp, s *socket) error {
	if f == nil {
		return nil
	}
	const size = int(unsafe.Sizeof(unix.SockFilter{}))
	n := len(f.Filter) / size
	if n == 0 || n*size != len(f.Filter) || n > 0xffff {
		return fail(plan.ErrorInternal, "linux.seccomp: the filter is no list of instructions")
	}
	filter := make([]unix.SockFilter, n)
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&filter[0])), len(f.Filter)), f.Filter)
	prog := unix.SockFprog{Len: uint16(n), Filter: &filter[0]}
	if !f.Notify {
		if _, _, errno := setFilter(f.Flags, &prog); errno != 0 {
			return failed(plan.ErrorInvalid, "linux.seccomp", errno)
		}
		return nil
	}
	return newMessenger(s).deliver(f.Flags, &prog)
}

func setFilter(flags uint, prog *unix.SockFprog) (fd, _ uintptr, errno unix.Errno) {
	return unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags), uintptr(unsafe.Pointer(prog)))
}

// messenger is a second thread, which is not under the filter but has the same
// descriptors: the filter may notify any syscall, and until the listener is in
// the right hands nobody answers. So the thread under the filter makes none at
// all; it waits in memory for the messenger. (The shim starts this program with
// asyncpreemptoff=1 then: the runtime's signals would have it make some.)
type messenger struct {
	ready    atomic.Bool
	listener atomic.Int64 // the descriptor plus one, or noListener
	done     atomic.Bool
}

const noListener = -1

func newMessenger(s *socket) *messenger {
	m := &messenger{}
	// Both threads need a processor of the runtime's at the same time.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	go m.run(s)
	for !m.ready.Load() {
		pause()
	}
	return m
}

// pause is a short sleep that the runtime does not know of.
func pause() {
	t := unix.Timespec{Nsec: 50_000}
	_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&t)), 0, 0)
}

// deliver loads the filter and comes back when its listener is with the shim.
func (m *messenger) deliver(flags uint, prog *unix.SockFprog) error {
	fd, _, errno := setFilter(flags, prog)
	if errno != 0 {
		m.listener.Store(noListener)
		return failed(plan.ErrorInvalid, "linux.seccomp", errno)
	}
	m.listener.Store(int64(fd) + 1)
	for !m.done.Load() { //nolint:revive // empty: the filter may forbid every call that waits
	}
	return nil
}

func (m *messenger) run(s *socket) {
	runtime.LockOSThread()
	m.ready.Store(true)
	for m.listener.Load() == 0 {
		pause()
	}
	fd := m.listener.Load() - 1
	if fd < 0 {
		return
	}
	// What fails from here on ends the process, from this thread: the next
	// syscall of the other one might wait for ever.
	if err := s.send(plan.Event{Listener: true}, int(fd)); err != nil {
		os.Exit(report(s, failed(plan.ErrorInternal, "linux.seccomp: handing over the listener", err)))
	}
	var c plan.Command
	open, err := s.receive(&c)
	if err != nil {
		os.Exit(report(s, failed(plan.ErrorInternal, "linux.seccomp: handing over the listener", err)))
	}
	if !open || !c.Listening {
		os.Exit(exitFailure) // the shim could not pass it on, and knows why
	}
	m.done.Store(true)
}
