//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// pve-init is what containerd-pve runs inside an LXC container to make the OCI
// runtime spec true there.
//
// It owns everything that happens between liblxc's clone and the execve of the
// image's entrypoint: mounts, devices, sysctls, the terminal, credentials,
// security attributes. It never touches the host. It imports next to nothing, as
// it is mapped once for each container and started for each exec.
//
// Verbs, each with the descriptor of its socket to the shim (see package plan):
//
//	mount FD [CGROUP]     as lxc.hook.mount
//	init FD [CGROUP]      as the container's PID 1, until the execve
//	exec FD [PIDFD]       as one more process of the container whose init PIDFD is:
//	                      it is born in the cgroup and the pid namespace, and enters
//	                      the other namespaces here, where no thread of the shim is
//	                      at stake
//	enter FD EXE PIDFD    the same for a container with a user or a time namespace:
//	                      goes on as exec, from EXE, once it is in
//	hold FD EXE           as the first process of a pod's namespaces, until it goes on
//	                      as wait, from EXE
//	wait FD               holds a pod's namespaces until it is killed
//
// Without a descriptor:
//
//	boot                  as PID 1 of a container made of a template, which Proxmox or
//	                      LXC starts by themselves: what to become is in a file of the root
//
// CGROUP is a descriptor of the cgroup namespace to be in.
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
	if len(os.Args) == 2 && os.Args[1] == "boot" {
		os.Exit(boot())
	}
	if len(os.Args) < 3 {
		usage("usage: pve-init mount|init FD [CGROUP] | exec FD [PIDFD] | enter FD EXE PIDFD | hold FD EXE | wait FD | boot")
	}
	args := make([]int, len(os.Args)-2)
	for i, text := range os.Args[2:] {
		fd, err := strconv.Atoi(text)
		if err != nil || fd < firstInheritedFD {
			usage("not an inherited descriptor: " + text)
		}
		args[i] = fd
	}
	verb := os.Args[1]
	switch {
	case (verb == "mount" || verb == "init") && len(args) <= 2:
		var joined error
		if len(args) == 2 {
			joined = joinCgroup(args[1])
		}
		if verb == "mount" {
			os.Exit(mountHook(args[0], joined))
		}
		os.Exit(runProcess(args[0], true, joined))
	case verb == "exec" && len(args) <= 2:
		var entered error
		if len(args) == 2 {
			entered = enter(args[1])
		}
		os.Exit(runProcess(args[0], false, entered))
	case verb == "enter" && len(args) == 3:
		os.Exit(enterFirst(args[0], args[1], args[2]))
	case verb == "wait" && len(args) == 1:
		wait(args[0])
	case verb == "hold" && len(args) == 2:
		os.Exit(hold(args[0], args[1]))
	default:
		usage("unknown verb, or a wrong number of descriptors: " + verb)
	}
}

// joinCgroup enters a cgroup namespace: liblxc makes a new one whenever it joins
// any other namespace.
func joinCgroup(fd int) error {
	if err := unix.Setns(fd, unix.CLONE_NEWCGROUP); err != nil {
		return failed(plan.ErrorInvalid, "linux.namespaces: entering the cgroup namespace", err)
	}
	return unix.Close(fd)
}

// joined are the namespaces of a container's init that every exec enters. Its
// pid namespace is not among them, as only children can be born in there.
const joined = unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// enter joins the namespaces of the process behind the descriptor.
func enter(pidfd int) error {
	// A thread that shares its root and cwd may not change its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return failed(plan.ErrorInternal, "entering the container: unshare", err)
	}
	if err := unix.Setns(pidfd, joined); err != nil {
		return failed(plan.ErrorInternal, "entering the container", err)
	}
	return unix.Close(pidfd)
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

// The failures are reported as they are.
var fail, failed = plan.Fail, plan.Failed
