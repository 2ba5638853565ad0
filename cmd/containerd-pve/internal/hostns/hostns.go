// Package hostns starts programs in the host's namespaces, out of a container that
// shares the host's process ids. It owns the thread that enters them, and ends it;
// it never changes those of the calling process.
package hostns

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// grace is how long a program that was asked to end may take: it may have to undo
// what it did.
const grace = 150 * time.Second

// namespaces are entered in this order: where the others are named is found by the
// last.
var namespaces = []string{"cgroup", "ipc", "uts", "net", "mnt"}

// environment of the programs: the container's own says nothing of the host.
var environment = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}

// Path is where the host finds a file of this process's.
func Path(path string) string { return filepath.Join("/proc", strconv.Itoa(os.Getpid()), "root", path) }

// Run runs a program, whose path is absolute and the host's, with this process's
// output streams, in the namespaces of process 1. If the context ends, it gets
// SIGTERM and time to end in order. Errors: FailedPrecondition, process 1 is not
// the host's; PermissionDenied; exec.ExitError.
func Run(ctx context.Context, program string, args ...string) error {
	if err := distinct("/proc/self/ns/mnt", "/proc/1/ns/mnt"); err != nil {
		return err
	}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, n := range namespaces {
		f, err := os.Open("/proc/1/ns/" + n)
		if err != nil {
			return fmt.Errorf("namespaces of the host: %w", err)
		}
		files = append(files, f)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = environment, "/", os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = grace
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this
		started <- start(cmd, files)
	}()
	if err := <-started; err != nil {
		return err
	}
	return cmd.Wait()
}

// distinct says whether process 1 has another mount namespace than this one.
func distinct(self, first string) error {
	a, err := os.Readlink(self)
	if err != nil {
		return err
	}
	b, err := os.Readlink(first)
	if err != nil {
		return fmt.Errorf("namespaces of the host (is the container privileged?): %w: %w", err, errdefs.ErrPermissionDenied)
	}
	if a == b {
		return fmt.Errorf("process 1 is not the host's: this has to run in a container with the host's process ids (hostPID: true), on the host itself use `containerd-pve install`: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// start starts a command from this thread, which is in the namespaces then.
func start(cmd *exec.Cmd, namespaces []*os.File) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // a mount namespace is not for a part of those that share a root
		return os.NewSyscallError("unshare", err)
	}
	for _, f := range namespaces {
		if err := unix.Setns(int(f.Fd()), 0); err != nil {
			return fmt.Errorf("entering %s (is the container privileged?): %w", f.Name(), err)
		}
	}
	return cmd.Start()
}
