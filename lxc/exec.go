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
	"github.com/containerd-pve/containerd-pve/lxc/seccomp"
)

// execCPUs are where an exec begins and where it goes on. What it does not say
// itself the container's process says for it.
func execCPUs(spec, container *specs.Process) (initial *unix.CPUSet, final []int, err error) {
	affinity := spec.ExecCPUAffinity
	if affinity == nil {
		affinity = container.ExecCPUAffinity
	}
	if affinity == nil {
		return nil, nil, nil
	}
	if affinity.Initial != "" {
		cpus, err := parseList(affinity.Initial)
		if err != nil {
			return nil, nil, fmt.Errorf("process.execCPUAffinity.initial: %w", err)
		}
		initial = &unix.CPUSet{}
		for _, cpu := range cpus {
			initial.Set(cpu)
		}
	}
	if affinity.Final != "" {
		if final, err = parseList(affinity.Final); err != nil {
			return nil, nil, fmt.Errorf("process.execCPUAffinity.final: %w", err)
		}
	}
	return initial, final, nil
}

// Exec runs one more process in the container and returns when it has been
// executed. It is a child of this process, so its status is exact. NotFound:
// the program is not in the container; FailedPrecondition: the container has
// ended.
//
// The child is born in the container's cgroup and pid namespace and enters the
// other namespaces by itself: nothing of the container's file system is looked
// at before pve-init runs, and this process's threads stay on the host.
func (c *Container) Exec(ctx context.Context, spec *specs.Process, stdio Stdio) (_ *Process, retErr error) {
	process, err := processPlan(spec, c.spec)
	if err != nil {
		return nil, err
	}
	if err := checkHost(spec); err != nil {
		return nil, err
	}
	warn(ctx, spec)
	initial, final, err := execCPUs(spec, c.spec.Process)
	if err != nil {
		return nil, err
	}
	process.CPUs = final
	process.Seccomp, err = seccomp.Compile(c.spec.Linux.Seccomp)
	if err != nil {
		return nil, err
	}
	env := []string{}
	if process.Seccomp != nil && process.Seccomp.Notify {
		env = []string{quietInit}
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

	fdOfChild := -1
	if err := stdio.own(c.user, spec.User.UID); err != nil {
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
		Env:        env,
		Dir:        "/",
		ExtraFiles: inherited,
		SysProcAttr: &syscall.SysProcAttr{
			UseCgroupFD: true,
			CgroupFD:    int(cgroup.Fd()),
			Setsid:      true,
			// By its number it could be another process by now, or none could be
			// had any more.
			PidFD: &fdOfChild,
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
			if initial != nil {
				if err := unix.SchedSetaffinity(0, initial); err != nil {
					return fmt.Errorf("process.execCPUAffinity.initial: %w: %w", err, errdefs.ErrInvalidArgument)
				}
			}
			return cmd.Start()
		}()
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.state.ID, err)
	}
	theirs.Close()

	child, handle := cmd.Process, os.NewFile(uintptr(fdOfChild), "pidfd")
	wait := func() (*os.ProcessState, error) { err := cmd.Wait(); return cmd.ProcessState, err }
	if c.enter != 0 {
		handle.Close()
		if child, handle, err = entered(ctx, cmd, ours, plan.Enter{Namespaces: c.enter, OOMScoreAdj: process.OOMScoreAdj, Rlimits: process.Rlimits}); err != nil {
			return nil, fmt.Errorf("exec in container %s: %w", c.state.ID, err)
		}
		process.OOMScoreAdj = nil // set on the way in
		wait = child.Wait
	}
	p := newProcess()
	p.pidfd = handle
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
	if err := executed(ctx, ours, func(listener *os.File) error {
		return passListener(ctx, c.spec.Linux.Seccomp, listener, child.Pid, c.ociState(specs.StateRunning))
	}); err != nil {
		if console != nil {
			console.Close()
		}
		return nil, err
	}
	p.mu.Lock()
	p.pid, p.console = child.Pid, console
	p.mu.Unlock()
	return p, nil
}

// entered waits for pve-init's way in, which ends with another process, a child
// of ours as well, and returns that with its pidfd.
func entered(ctx context.Context, cmd *exec.Cmd, ours *channel, enter plan.Enter) (*os.Process, *os.File, error) {
	m, err := func() (*message, error) {
		if err := ours.send(ctx, enter); err != nil {
			return nil, err
		}
		return ours.receive(ctx)
	}()
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, nil, fmt.Errorf("pve-init gave up: %w", errors.Join(err, errdefs.ErrInternal))
	}
	defer m.close()
	_ = cmd.Wait()
	var child *os.Process
	if len(m.files) == 1 {
		pid, err := pidOf(m.files[0])
		if err != nil {
			return nil, nil, err
		}
		// Nobody but us waits for it, so the pid stays its own.
		if child, err = os.FindProcess(pid); err != nil {
			return nil, nil, err
		}
	}
	if m.Error != nil {
		if child != nil {
			_, _ = child.Wait()
		}
		return nil, nil, typed(m.Error)
	}
	if child == nil {
		return nil, nil, fmt.Errorf("pve-init handed over no process: %w", errdefs.ErrInternal)
	}
	handle := m.files[0]
	m.files = nil
	return child, handle, nil
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
