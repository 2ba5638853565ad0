package lxc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups/fs2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// readyLimit is how long liblxc and the mount hook may take to make a container.
const readyLimit = time.Minute

// Container is a container that was created; it embeds its init.
type Container struct {
	*Process

	runtime   *Runtime
	state     state
	bundle    string
	spec      *specs.Spec
	cgroup    *cgroup
	monitor   *monitor
	sync      *channel // to pve-init until the entrypoint runs
	sharedPID bool     // init's end does not end the others by itself
	oomKills  atomic.Uint64
}

// launch starts lxc-start and waits for pve-init's word.
func (c *Container) launch(ctx context.Context, start string, program *initProgram, t *translation, stdio Stdio) (retErr error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return err
	}
	defer ours.close()
	exe, err := program.open()
	if err != nil {
		theirs.Close()
		return err
	}
	if c.spec.Process.Terminal {
		stdio = Stdio{}
	}
	c.monitor, err = startMonitor(start, &c.state, c.bundle, stdio, []*os.File{theirs, exe})
	theirs.Close()
	exe.Close()
	if err != nil {
		return err
	}
	defer func() {
		if retErr == nil {
			return
		}
		if c.sync != nil {
			c.sync.close()
		}
		killCgroup(cgroupDir(c.state.Cgroup))
		killCgroup(cgroupDir(c.state.monitorCgroup()))
		_ = c.monitor.cmd.Process.Kill()
		<-c.monitor.ended
		c.monitor.fifo.Close()
	}()

	// In the background: the message may be larger than the socket's buffer,
	// and nobody reads it if the start fails.
	sendCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { _ = ours.send(sendCtx, t.process) }()

	// liblxc can wait for a child that is dead already.
	waitCtx, cancelWait := context.WithTimeout(ctx, readyLimit)
	defer cancelWait()
	m, err := ours.receive(waitCtx)
	if errors.Is(err, io.EOF) {
		return c.startFailure(ctx)
	}
	if err != nil {
		return err
	}
	if m.Error != nil {
		m.close()
		return typed(m.Error)
	}
	wanted := 1
	if t.process.Terminal {
		wanted++
	}
	if !m.Ready || m.pid <= 0 || len(m.files) != wanted {
		m.close()
		return fmt.Errorf("pve-init reported ready from pid %d with %d files instead of %d: %w", m.pid, len(m.files), wanted, errdefs.ErrInternal)
	}
	// lxc-start holds the first socket for as long as it lives, so only a
	// second one can tell by its end that the entrypoint has been executed.
	if c.sync, err = newChannel(m.files[len(m.files)-1]); err != nil {
		m.close()
		return err
	}
	var console *os.File
	if t.process.Terminal {
		console = m.files[0]
	}
	pidfd, err := openPidfd(m.pid)
	if err != nil {
		if console != nil {
			console.Close()
		}
		return err
	}
	c.attach(m.pid, pidfd, console)
	if err := c.cgroup.settle(); err != nil {
		return err
	}
	if h := c.spec.Hooks; h != nil {
		st := c.ociState(specs.StateCreating)
		//nolint:staticcheck // prestart is deprecated and still used
		if err := runHooks(ctx, "prestart", h.Prestart, st); err != nil {
			return err
		}
		if err := runHooks(ctx, "createRuntime", h.CreateRuntime, st); err != nil {
			return err
		}
	}
	go c.reap()
	return nil
}

// startFailure finds out why lxc-start ended before pve-init was ready.
func (c *Container) startFailure(ctx context.Context) error {
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.monitor.wait(wait); err != nil {
		return err
	}
	dir := stateDir(c.bundle)
	if text, err := os.ReadFile(filepath.Join(dir, errorFile)); err == nil && len(text) > 0 {
		return fmt.Errorf("container %s: %s: %w", c.state.ID, strings.TrimSpace(string(text)), errdefs.ErrInvalidArgument)
	}
	log := filepath.Join(dir, logFile)
	text, _ := os.ReadFile(log)
	return fmt.Errorf("lxc-start of container %s failed (%v): %s (see %s): %w", c.state.ID, c.monitor.err, firstErrors(text), log, errdefs.ErrInternal)
}

// firstErrors are the messages of liblxc's log that say what went wrong; those
// after them only say who else noticed. A line is "lxc-start NAME TIME LEVEL
// CATEGORY - FILE:FUNCTION:LINE - MESSAGE".
func firstErrors(log []byte) string {
	var found []string
	for line := range bytes.Lines(log) {
		parts := bytes.SplitN(bytes.TrimSpace(line), []byte(" - "), 3)
		if len(parts) == 3 && bytes.Contains(parts[0], []byte(" ERROR ")) && len(found) < 3 {
			found = append(found, string(parts[2]))
		}
	}
	if found == nil {
		return "it gave no reason"
	}
	return strings.Join(found, "; ")
}

// reap waits for the container's end and makes its status known.
func (c *Container) reap() {
	ws, ok := <-c.monitor.status
	// At once: systemd takes an empty scope away, with its counters.
	c.OOMKills()
	var exit ExitStatus
	if ok {
		exit = exitOf(ws)
	} else {
		// The monitor died first and takes init with it (lxc.monitor.signal.pdeath).
		killCgroup(cgroupDir(c.state.Cgroup))
		c.mu.Lock()
		pidfd := c.pidfd
		c.mu.Unlock()
		fds := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds, 10_000); !errors.Is(err, unix.EINTR) {
				break
			}
		}
		exit = ExitStatus{Code: 128 + uint32(unix.SIGKILL), At: time.Now()}
	}
	if c.sharedPID {
		killCgroup(cgroupDir(c.state.Cgroup))
	}
	// A lost file costs the exact status after a crash of the shim only.
	_ = writeJSON(filepath.Join(stateDir(c.bundle), exitFile), exit)
	c.finish(exit)
}

// Start lets pve-init become the entrypoint and returns when it has.
func (c *Container) Start(ctx context.Context) error {
	if c.sync == nil {
		return fmt.Errorf("container %s was started already: %w", c.state.ID, errdefs.ErrFailedPrecondition)
	}
	sync := c.sync
	c.sync = nil
	defer sync.close()
	select {
	case <-c.Done():
		return fmt.Errorf("container %s ended before it was started: %w", c.state.ID, errdefs.ErrFailedPrecondition)
	default:
	}
	if err := sync.send(ctx, plan.Command{Start: true}); err != nil {
		return fmt.Errorf("start of container %s: %w", c.state.ID, err)
	}
	if err := executed(ctx, sync, func(listener *os.File) error {
		return passListener(ctx, c.spec.Linux.Seccomp, listener, c.pid, c.ociState(specs.StateCreated))
	}); err != nil {
		return err
	}
	if h := c.spec.Hooks; h != nil {
		return runHooks(ctx, "poststart", h.Poststart, c.ociState(specs.StateRunning))
	}
	return nil
}

// KillAll sends the signal to every process of the container.
func (c *Container) KillAll(ctx context.Context, sig unix.Signal) error {
	if sig == unix.SIGKILL {
		if err := killCgroup(cgroupDir(c.state.Cgroup)); err != nil {
			return fmt.Errorf("kill all of container %s: %w", c.state.ID, err)
		}
		return nil
	}
	pids, err := c.Pids(ctx)
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		return fmt.Errorf("container %s has no process: %w", c.state.ID, errdefs.ErrNotFound)
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal %d to process %d: %w", int(sig), pid, err)
		}
	}
	return nil
}

// Pause freezes every process of the container.
func (c *Container) Pause(ctx context.Context) error { return c.cgroup.freeze(true) }

// Resume thaws what Pause froze.
func (c *Container) Resume(ctx context.Context) error { return c.cgroup.freeze(false) }

// Update changes the limits; fields that are nil stay as they are.
func (c *Container) Update(_ context.Context, r *specs.LinuxResources) error {
	return c.cgroup.update(r)
}

// Pids are the host's process ids of all that runs in the container.
func (c *Container) Pids(context.Context) ([]int, error) { return c.cgroup.pids() }

// OOMKills is how many processes of the container the OOM killer has taken, as
// far as it is known: the cgroup may be gone.
func (c *Container) OOMKills() uint64 {
	if n, err := fs2.OOMKillCount(cgroupDir(c.state.Cgroup)); err == nil {
		c.oomKills.Store(n)
	}
	return c.oomKills.Load()
}

// CgroupPath is the container's cgroup below /sys/fs/cgroup, as "/default/id".
func (c *Container) CgroupPath() string { return c.state.Cgroup }

// Delete removes what is left of a container that has ended.
func (c *Container) Delete(ctx context.Context) error {
	select {
	case <-c.Done():
	default:
		return fmt.Errorf("container %s still runs: %w", c.state.ID, errdefs.ErrFailedPrecondition)
	}
	if c.sync != nil {
		c.sync.close()
		c.sync = nil
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := c.monitor.wait(wait); err != nil {
		// It has nothing left to do but to clean up, which erase does as well.
		if err := c.monitor.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		<-c.monitor.ended
	}
	c.monitor.fifo.Close()
	if err := c.state.erase(ctx, c.bundle); err != nil {
		return err
	}
	if h := c.spec.Hooks; h != nil {
		return runHooks(ctx, "poststop", h.Poststop, c.ociState(specs.StateStopped))
	}
	return nil
}

func (c *Container) ociState(status specs.ContainerState) *specs.State {
	st := &specs.State{
		Version: specs.Version, ID: c.state.ID, Status: status,
		Bundle: c.bundle, Annotations: c.spec.Annotations,
	}
	if status != specs.StateStopped {
		st.Pid = c.pid
	}
	return st
}
