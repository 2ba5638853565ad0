package main

import (
	"os"
	"strconv"
	"unsafe"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// cloneArgs is struct clone_args of the kernel, as far as it is used.
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls uint64
}

// enterFirst is the verb enter: the way into a container with a user or a time
// namespace, which only a process of a single thread may enter. Go never is one,
// so a copy of this process is made that has this thread alone. It makes no
// calls but bare system calls on what is prepared here: enters, becomes the
// container's root, and starts this program anew. As a child of this process's
// parent it is the shim's to wait for.
func enterFirst(fd, exe, pidfd int) int {
	s := &socket{fd: fd}
	var e plan.Enter
	if open, err := s.receive(&e); err != nil || !open {
		return report(s, fail(plan.ErrorInternal, "what to enter did not come"))
	}
	if err := beforeEntering(&e); err != nil {
		return report(s, err)
	}
	child, err := enterCopy(&e, fd, exe, pidfd)
	if child < 0 {
		return report(s, err)
	}
	event := plan.Event{Ready: true}
	if err != nil {
		event = plan.Event{Error: fail(plan.ErrorInternal, err.Error())}
	}
	if err := s.send(event, child); err != nil {
		stderr("handing over the process: " + err.Error())
		return exitFailure
	}
	return 0
}

// beforeEntering does what the container's root has no right to.
func beforeEntering(e *plan.Enter) error {
	if e.OOMScoreAdj != nil {
		// The host's /proc, which is what it says.
		fd, err := unix.Open("/proc/self/oom_score_adj", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			_, err = unix.Write(fd, []byte(strconv.Itoa(*e.OOMScoreAdj)))
			unix.Close(fd)
		}
		if err != nil {
			return failed(plan.ErrorInvalid, "process.oomScoreAdj "+strconv.Itoa(*e.OOMScoreAdj), err)
		}
	}
	return raiseLimits(e.Rlimits)
}

// raiseLimits lets hard limits be what they are to become, if that is more.
func raiseLimits(list []specs.POSIXRlimit) error {
	for _, l := range list {
		resource, ok := plan.Rlimits[l.Type]
		if !ok {
			return fail(plan.ErrorInvalid, "process.rlimits: unknown type "+l.Type)
		}
		var limit unix.Rlimit
		if err := prlimit(resource, nil, &limit); err != nil {
			return failed(plan.ErrorInvalid, "process.rlimits: "+l.Type, err)
		}
		if limit.Max >= l.Hard {
			continue
		}
		limit.Max = l.Hard
		if err := prlimit(resource, &limit, nil); err != nil {
			return failed(plan.ErrorInvalid, "process.rlimits: "+l.Type, err)
		}
	}
	return nil
}

// prlimit is not x/sys/unix's, which would have syscall keep its own books.
func prlimit(resource int, limit, old *unix.Rlimit) error {
	if _, _, errno := unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, uintptr(resource), uintptr(unsafe.Pointer(limit)), uintptr(unsafe.Pointer(old)), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// enterCopy makes the copy and returns its pidfd, also with an error if it did
// not get in.
func enterCopy(e *plan.Enter, socket, exe, pidfd int) (int, error) {
	// It is closed by the execve.
	var failure [2]int
	if err := unix.Pipe2(failure[:], unix.O_CLOEXEC); err != nil {
		return -1, failed(plan.ErrorInternal, "pipe", err)
	}
	defer unix.Close(failure[0])
	empty := [1]byte{}
	args, namespaces := []string{"pve-init", "exec", strconv.Itoa(socket)}, joined|e.Namespaces
	if e.Hold {
		args, namespaces = []string{"pve-init", "hold", strconv.Itoa(socket), strconv.Itoa(exe)}, unix.CLONE_NEWUSER
	}
	argv, envv := stringPointers(args), stringPointers(os.Environ())
	c := copyPlan{
		child:  -1,
		pidfd:  uintptr(pidfd),
		enter:  namespaces,
		user:   namespaces&unix.CLONE_NEWUSER != 0,
		exe:    uintptr(exe),
		empty:  &empty[0],
		argv:   &argv[0],
		envv:   &envv[0],
		report: uintptr(failure[1]),
	}
	// The runtime's signal handlers are not for the copy.
	all, old := ^uint64(0), uint64(0)
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), 8, 0, 0); errno != 0 {
		unix.Close(failure[1])
		return -1, failed(plan.ErrorInternal, "blocking signals", errno)
	}
	errno := c.run()
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	unix.Close(failure[1])
	if errno != 0 {
		return -1, failed(plan.ErrorInternal, "clone", errno)
	}
	var step [2]byte
	if n, err := unix.Read(failure[0], step[:]); err != nil || n < len(step) {
		return int(c.child), err
	}
	what := map[byte]string{
		stepEnter: "entering the container's namespaces", stepRoot: "becoming the container's root", stepExec: "starting pve-init anew",
	}[step[0]]
	return int(c.child), failed(plan.ErrorInternal, what, unix.Errno(step[1]))
}

// What the copy was doing when it failed.
const (
	stepEnter byte = iota + 1
	stepRoot
	stepExec
)

// copyPlan is all the copy needs, prepared.
type copyPlan struct {
	clone              cloneArgs
	child              int32 // its pidfd
	failure            [2]byte
	pidfd, exe, report uintptr
	enter              uintptr
	user               bool
	empty              *byte
	argv, envv         **byte
}

// run makes the copy. In it, it does not return: nothing of Go's runtime works
// there, so there is no call, no allocation and no growth of the stack in it.
//
//go:noinline
//go:norace
//go:nosplit
func (c *copyPlan) run() unix.Errno {
	c.clone = cloneArgs{flags: unix.CLONE_PARENT | unix.CLONE_PIDFD, pidfd: uint64(uintptr(unsafe.Pointer(&c.child)))}
	pid, _, errno := unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&c.clone)), unsafe.Sizeof(c.clone), 0)
	if errno != 0 || pid != 0 {
		return errno
	}
	step := stepEnter
	_, _, errno = unix.RawSyscall(unix.SYS_SETNS, c.pidfd, c.enter, 0)
	if errno == 0 && c.user {
		step = stepRoot
		_, _, errno = unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
		if errno == 0 {
			_, _, errno = unix.RawSyscall(unix.SYS_SETRESGID, 0, 0, 0)
		}
		if errno == 0 {
			_, _, errno = unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0)
		}
	}
	if errno == 0 {
		step = stepExec
		_, _, errno = unix.RawSyscall6(unix.SYS_EXECVEAT, c.exe, uintptr(unsafe.Pointer(c.empty)),
			uintptr(unsafe.Pointer(c.argv)), uintptr(unsafe.Pointer(c.envv)), unix.AT_EMPTY_PATH, 0)
	}
	c.failure[0], c.failure[1] = step, byte(errno)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, c.report, uintptr(unsafe.Pointer(&c.failure)), 2)
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, exitFailure, 0, 0)
	}
}
