//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// pve-init is what containerd-pve runs inside an LXC container to make the OCI
// runtime spec true there.
//
// It owns everything that happens between liblxc's clone and the execve of the
// image's entrypoint: mounts, devices, sysctls, the terminal, credentials,
// security attributes. It never touches the host: it writes one file there (the
// mount hook's error) and reads one (its plan). It imports next to nothing, as
// it is mapped once for each container and started for each exec.
//
// Verbs:
//
//	mount PLANFILE   as lxc.hook.mount
//	init FD          as the container's PID 1, until the execve
//	exec FD PIDFD    as one more process of the container whose init PIDFD is: it
//	                 is born in the cgroup and the pid namespace, and enters the
//	                 other namespaces here, where no thread of the shim is at stake
//
// The image and all processes of the container are hostile: a path is resolved
// inside the root by the kernel (openat2), and what is done is done on the
// descriptor, not on the path again.
package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

// Exit codes of a process that could not be executed, as a shell gives them.
const (
	exitFailure      = 1
	exitNotExecuted  = 126
	exitNotFound     = 127
	exitUsage        = 64
	firstInheritedFD = 3
)

func init() {
	// Credentials, capabilities, labels and seccomp filters belong to a thread:
	// everything happens on the one that executes the entrypoint.
	runtime.LockOSThread()
	// The process lives for milliseconds and allocates little.
	debug.SetGCPercent(-1)
}

func main() {
	// Nobody in the container may ptrace this process or look at its /proc entries.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		usage("PR_SET_DUMPABLE: " + err.Error())
	}
	if len(os.Args) < 3 {
		usage("usage: pve-init mount PLANFILE | init FD | exec FD PIDFD")
	}
	switch os.Args[1] {
	case "mount":
		os.Exit(mountHook(os.Args[2]))
	case "init", "exec":
		fd, err := strconv.Atoi(os.Args[2])
		if err != nil || fd < firstInheritedFD {
			usage("not a sync socket: " + os.Args[2])
		}
		if os.Args[1] == "exec" && len(os.Args) > 3 {
			if err := enter(os.Args[3]); err != nil {
				usage("entering the container: " + err.Error())
			}
		}
		os.Exit(runProcess(fd, os.Args[1] == "init"))
	default:
		usage("unknown verb " + os.Args[1])
	}
}

// enter joins the namespaces of the process behind the descriptor, all but its
// pid namespace, which only children can be born in.
func enter(pidfd string) error {
	fd, err := strconv.Atoi(pidfd)
	if err != nil {
		return err
	}
	// A thread that shares its root and cwd may not change its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(fd, unix.CLONE_NEWNS|unix.CLONE_NEWNET|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS|unix.CLONE_NEWCGROUP); err != nil {
		return err
	}
	return unix.Close(fd)
}

// usage ends the process after a mistake of the caller's.
func usage(message string) {
	stderr(message)
	os.Exit(exitUsage)
}

func stderr(message string) {
	// There is nobody left to tell when this fails.
	_, _ = unix.Write(2, []byte("pve-init: "+message+"\n"))
}

// fail makes a typed failure of a message that names the spec field.
func fail(kind plan.ErrorKind, message string) *plan.Error {
	return &plan.Error{Kind: kind, Message: message}
}

// failed is fail with the reason behind it. A reason that is a typed failure
// already keeps its kind.
func failed(kind plan.ErrorKind, what string, err error) *plan.Error {
	if typed, ok := err.(*plan.Error); ok {
		kind = typed.Kind
	}
	return fail(kind, what+": "+err.Error())
}
