package main

import (
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

// hold is the verb hold: the first process of a pod's namespaces on its way to
// the verb wait. It returns only if it did not get there, or if another process goes on.
func hold(fd, exe int) int {
	s := &socket{fd: fd}
	// The program is executed once more, the rest is for nobody.
	if err := unix.CloseRange(firstInheritedFD, ^uint(0)>>32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return report(s, failed(plan.ErrorInternal, "closing inherited descriptors", err))
	}
	var h plan.Hold
	open, err := s.receive(&h)
	switch {
	case err != nil:
		return report(s, failed(plan.ErrorInternal, "reading what to hold", err))
	case !open:
		return exitFailure // the shim is gone
	case h.Split != 0:
		if err := split(h.Split, s, exe); err != nil {
			return report(s, err)
		}
		return 0
	}
	return report(s, becomeHolder(&h, s, exe))
}

// split has another process, a child of this one's parent, go on in new
// namespaces. Where a user namespace had to be entered first, they are its own.
func split(flags uintptr, s *socket, exe int) error {
	pidfd := -1
	_, err := syscall.ForkExec("/proc/self/fd/"+strconv.Itoa(exe), []string{"pve-init", "hold", "3", "4"}, &syscall.ProcAttr{
		Files: []uintptr{0, 1, 2, uintptr(s.fd), uintptr(exe)},
		Sys:   &syscall.SysProcAttr{Cloneflags: flags | unix.CLONE_PARENT, Setsid: true, PidFD: &pidfd},
	})
	if err != nil {
		return failed(plan.ErrorInternal, "making the pod's namespaces", err)
	}
	if err := s.send(plan.Event{Ready: true}, pidfd); err != nil {
		return failed(plan.ErrorInternal, "handing over the process", err)
	}
	return nil
}

// becomeHolder sets what the namespaces are to have and gives up everything: the
// containers of the pod may share its process namespace, and then what this
// process may do, or can see of the host, is theirs.
func becomeHolder(h *plan.Hold, s *socket, exe int) error {
	if h.Hostname != "" {
		if err := unix.Sethostname([]byte(h.Hostname)); err != nil {
			return failed(plan.ErrorInvalid, "hostname", err)
		}
	}
	r, err := openRoot("/")
	if err != nil {
		return failed(plan.ErrorInternal, "opening the root", err)
	}
	if err := r.sysctl(h.Sysctl); err != nil {
		return err
	}
	unix.Close(r.fd)
	if err := leaveRoot(); err != nil {
		return failed(plan.ErrorInternal, "leaving the host's files", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return failed(plan.ErrorInternal, "no_new_privs", err)
	}
	if err := (&process{}).setCredentials(); err != nil {
		return err
	}
	// It is closed when signals are ignored: until then the new program's runtime would end at some of them.
	if _, err := unix.FcntlInt(uintptr(s.fd), unix.F_SETFD, 0); err != nil {
		return failed(plan.ErrorInternal, "handing over the socket", err)
	}
	// Anew: the runtime's other threads have their rights still.
	argv, envv, empty := stringPointers([]string{"pve-init", "wait", strconv.Itoa(s.fd)}), stringPointers(nil), [1]byte{}
	_, _, errno := unix.RawSyscall6(unix.SYS_EXECVEAT, uintptr(exe), uintptr(unsafe.Pointer(&empty[0])),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])), unix.AT_EMPTY_PATH, 0)
	return failed(plan.ErrorInternal, "starting pve-init anew", errno)
}

// leaveRoot makes an empty, read-only directory this process's root, in a mount namespace of its own.
func leaveRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return err
	}
	const empty = "/proc" // it is there on every host
	if err := unix.Mount("tmpfs", empty, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=555,size=4k,nr_inodes=2"); err != nil {
		return err
	}
	if err := unix.Chdir(empty); err != nil {
		return err
	}
	// The old root comes to lie on the new one, and is taken away from there.
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	return os.Chdir("/")
}

// wait is the verb wait: it holds the namespaces until it is killed, and leaves
// no zombies as the first process of one. That it does is said by the end of fd.
func wait(fd int) {
	const numSignals = 64
	ignore := [8]uint64{1} // SIG_IGN, for SIGCHLD too: the kernel reaps then
	for sig := 1; sig <= numSignals; sig++ {
		// SIGKILL and SIGSTOP cannot be ignored.
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&ignore)), 0, 8, 0, 0)
	}
	unix.Close(fd)
	for {
		_, _ = unix.Ppoll(nil, nil, nil)
	}
}
