package lxc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// Exec runs one more process in the container and returns when it has been
// executed. It is a child of this process, so its status is exact. NotFound:
// the program is not in the container; FailedPrecondition: the container has
// ended.
//
// The child is born in the container's cgroup and pid namespace and enters the
// other namespaces by itself: nothing of the container's file system is looked
// at before pve-init runs, and this process's threads stay on the host.
func (c *Container) Exec(ctx context.Context, spec *specs.Process, stdio Stdio) (_ *Process, retErr error) {
	full := *spec
	process, err := processPlan(&full, c.spec)
	if err != nil {
		return nil, err
	}
	process.Seccomp, err = compileSeccomp(c.spec)
	if err != nil {
		return nil, err
	}
	program, err := c.runtime.openInit()
	if err != nil {
		return nil, err
	}
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer ours.close()
	defer theirs.Close()
	exe, err := program.open()
	if err != nil {
		return nil, err
	}
	defer exe.Close()
	c.mu.Lock()
	if c.ended || c.pidfd == nil {
		c.mu.Unlock()
		return nil, fmt.Errorf("container %s has ended: %w", c.state.ID, errdefs.ErrFailedPrecondition)
	}
	fd, err := unix.FcntlInt(c.pidfd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	defer pidfd.Close()
	cgroup, err := os.Open(c.cgroup.payloadDir())
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.state.ID, err)
	}
	defer cgroup.Close()

	if err := stdio.own(c.user, full.User.UID); err != nil {
		return nil, err
	}
	args := []string{"pve-init", "exec", "3", "5"}
	inherited := []*os.File{theirs, exe, pidfd}
	if c.enter != 0 {
		again, err := program.unreadable()
		if err != nil {
			return nil, fmt.Errorf("exec in container %s: %w", c.state.ID, err)
		}
		args = []string{"pve-init", "enter", "3", "6", "5"}
		inherited = append(inherited, again)
	}
	cmd := &exec.Cmd{
		Path:       "/proc/self/fd/4",
		Args:       args,
		Env:        []string{},
		Dir:        "/",
		ExtraFiles: inherited,
		SysProcAttr: &syscall.SysProcAttr{
			UseCgroupFD: true,
			CgroupFD:    int(cgroup.Fd()),
			Setsid:      true,
		},
	}
	if !process.Terminal {
		stdio.apply(cmd)
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: its children are the container's
		started <- func() error {
			if err := unix.Setns(fd, unix.CLONE_NEWPID); err != nil {
				return fmt.Errorf("enter the pid namespace: %w", err)
			}
			return cmd.Start()
		}()
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.state.ID, err)
	}
	theirs.Close()

	child := cmd.Process
	wait := func() (*os.ProcessState, error) { err := cmd.Wait(); return cmd.ProcessState, err }
	if c.enter != 0 {
		if child, err = c.entered(ctx, cmd, ours, process); err != nil {
			return nil, fmt.Errorf("exec in container %s: %w", c.state.ID, err)
		}
		process.OOMScoreAdj = nil // set on the way in
		wait = child.Wait
	}
	p := newProcess()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		exit := ExitStatus{Code: 255, At: time.Now()}
		if state, _ := wait(); state != nil {
			exit = exitOf(state.Sys().(syscall.WaitStatus))
		}
		p.finish(exit)
	}()
	defer func() {
		if retErr != nil {
			_ = child.Kill()
			<-ended
		}
	}()
	if err := ours.send(ctx, process); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.state.ID, err)
	}
	m, err := ours.receive(ctx)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: pve-init gave up: %w", c.state.ID, errors.Join(err, errdefs.ErrInternal))
	}
	if m.Error != nil {
		m.close()
		return nil, typed(m.Error)
	}
	var console *os.File
	if process.Terminal {
		if len(m.files) == 0 {
			return nil, fmt.Errorf("pve-init sent no terminal: %w", errdefs.ErrInternal)
		}
		console = m.files[0]
	}
	if err := executed(ctx, ours); err != nil {
		if console != nil {
			console.Close()
		}
		return nil, err
	}
	// The process may have ended already; then Kill answers NotFound.
	pid := child.Pid
	handle, err := openPidfd(pid)
	p.mu.Lock()
	p.pid, p.console = pid, console
	if err == nil && !p.ended {
		p.pidfd = handle
	} else if err == nil {
		handle.Close()
	}
	p.mu.Unlock()
	return p, nil
}

// entered waits for pve-init's way in, which ends with another process, a child
// of ours as well.
func (c *Container) entered(ctx context.Context, cmd *exec.Cmd, ours *channel, process *plan.Process) (*os.Process, error) {
	m, err := func() (*message, error) {
		if err := ours.send(ctx, plan.Enter{Namespaces: c.enter, OOMScoreAdj: process.OOMScoreAdj, Rlimits: process.Rlimits}); err != nil {
			return nil, err
		}
		return ours.receive(ctx)
	}()
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("pve-init gave up: %w", errors.Join(err, errdefs.ErrInternal))
	}
	defer m.close()
	_ = cmd.Wait()
	var child *os.Process
	if len(m.files) == 1 {
		pid, err := pidOf(m.files[0])
		if err != nil {
			return nil, err
		}
		// Nobody but us waits for it, so the pid stays its own.
		if child, err = os.FindProcess(pid); err != nil {
			return nil, err
		}
	}
	if m.Error != nil {
		if child != nil {
			_, _ = child.Wait()
		}
		return nil, typed(m.Error)
	}
	if child == nil {
		return nil, fmt.Errorf("pve-init handed over no process: %w", errdefs.ErrInternal)
	}
	return child, nil
}

// pidOf is the pid behind a pidfd.
func pidOf(pidfd *os.File) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd.Fd()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if text, ok := strings.CutPrefix(line, "Pid:"); ok {
			return strconv.Atoi(strings.TrimSpace(text))
		}
	}
	return 0, fmt.Errorf("fdinfo of a pidfd without a pid: %w", errdefs.ErrInternal)
}
