package lxc

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
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

// monitorLimit is how long lxc-start may take to tell of init's end.
const monitorLimit = 20 * time.Second

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
	user      *userNamespace
	enter     uintptr // see translation.enter
	hooked    bool    // hooks have run, so that those of the end are due
	oomKills  atomic.Uint64
}

// launch starts lxc-start and waits for pve-init's word.
func (c *Container) launch(ctx context.Context, start string, pveInit *initProgram, t *translation, trees *trees, o *CreateOptions) (retErr error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return err
	}
	defer ours.close()
	defer theirs.Close()
	hook, theirHook, err := socketpair()
	if err != nil {
		return err
	}
	defer hook.close()
	defer theirHook.Close()
	exe, err := pveInit.open()
	if err != nil {
		return err
	}
	defer exe.Close()
	inherited := []*os.File{theirs, exe, theirHook} // syncFD, programFD, hookFD
	if t.cgroupNS != "" {
		f, err := os.Open(t.cgroupNS) // cgroupFD
		if err != nil {
			return fmt.Errorf("linux.namespaces: cgroup: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		defer f.Close()
		inherited = append(inherited, f)
	}
	stdio := o.Stdio
	if c.spec.Process.Terminal {
		stdio = Stdio{}
	}
	if err := stdio.own(c.user, c.spec.Process.User.UID); err != nil {
		return err
	}
	c.monitor, err = startMonitor(start, &c.state, c.bundle, stdio, inherited, t)
	if err != nil {
		return err
	}
	theirs.Close()
	theirHook.Close()
	defer func() {
		if retErr == nil {
			return
		}
		if c.sync != nil {
			c.sync.close()
		}
		// What they cannot end the caller's erase finds, and says.
		_ = killCgroup(cgroupDir(c.state.Cgroup))
		_ = killCgroup(cgroupDir(c.state.monitorCgroup()))
		_ = c.monitor.cmd.Process.Kill()
		<-c.monitor.ended
		c.monitor.fifo.Close()
	}()

	// In the background: a message may be larger than the socket's buffer, and
	// nobody reads it if the start fails.
	sendCtx, cancel := context.WithCancel(ctx)
	sent := make(chan struct{})
	defer func() { <-sent }() // the trees are closed afterwards
	defer cancel()
	go func() {
		defer close(sent)
		_ = hook.send(sendCtx, t.mounts, trees.files...)
		_ = ours.send(sendCtx, t.process)
	}()

	m, err := c.next(ctx, hook, readyLimit)
	if err != nil {
		return err
	}
	pid, err := parentOf(m.pid)
	if err != nil {
		return err
	}
	if err := c.beforeHooks(pid, t); err != nil {
		return err
	}
	if h := c.spec.Hooks; h != nil {
		c.hooked = true
		st := ociState(o, specs.StateCreating)
		st.Pid = pid
		//nolint:staticcheck // prestart is deprecated and still used
		if err := runHooks(ctx, "prestart", h.Prestart, st); err != nil {
			return err
		}
		if err := runHooks(ctx, "createRuntime", h.CreateRuntime, st); err != nil {
			return err
		}
	}
	if err := hook.send(ctx, plan.Command{Start: true}); err != nil {
		return fmt.Errorf("container %s: the mount hook has gone: %w", c.state.ID, err)
	}
	// The container's hooks have time limits of their own, or none.
	if _, err := c.next(ctx, hook, 0); err != nil {
		return err
	}
	if m, err = c.next(ctx, ours, readyLimit); err != nil {
		return err
	}
	wanted := 1
	if t.process.Terminal {
		wanted++
	}
	if m.pid <= 0 || len(m.files) != wanted {
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
	go c.watchMonitor(pidfd)
	go c.reap()
	return nil
}

// next is the next event of pve-init, which must be ready. Without a limit it is
// the context's.
func (c *Container) next(ctx context.Context, from *channel, limit time.Duration) (*message, error) {
	// liblxc can wait for a child that is dead already.
	wait, cancel := ctx, context.CancelFunc(func() {})
	if limit > 0 {
		wait, cancel = context.WithTimeout(ctx, limit)
	}
	defer cancel()
	m, err := from.receive(wait)
	switch {
	case errors.Is(err, io.EOF):
		return nil, c.startFailure(ctx)
	case err != nil:
		return nil, err
	case m.Error != nil:
		m.close()
		return nil, typed(m.Error)
	case !m.Ready:
		m.close()
		return nil, fmt.Errorf("pve-init sent an event nobody asked for: %w", errdefs.ErrInternal)
	}
	return m, nil
}

// beforeHooks does to the container's first process what takes the host's rights.
func (c *Container) beforeHooks(pid int, t *translation) error {
	if t.time != nil {
		if err := t.time.check(pid); err != nil {
			return err
		}
	}
	if err := moveNetDevices(pid, c.spec.Linux.NetDevices); err != nil {
		return err
	}
	if c.user == nil {
		return nil
	}
	if adj := t.process.OOMScoreAdj; adj != nil {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(*adj)), 0); err != nil {
			return fmt.Errorf("process.oomScoreAdj %d: %w", *adj, err)
		}
	}
	return raiseLimits(pid, t.process.Rlimits)
}

// check makes sure that the process is in the namespace. Kernels before 6.3 keep
// a program that was started by vfork in the old one.
func (ns *timeNamespace) check(pid int) error {
	path := ns.path
	if path == "" {
		path = "/proc/self/ns/time"
	}
	other, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("linux.namespaces: time: %w", err)
	}
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/ns/time", pid))
	if err != nil {
		return fmt.Errorf("linux.namespaces: time: %w", err)
	}
	if os.SameFile(other, theirs) != (ns.path != "") {
		return fmt.Errorf("linux.namespaces: the container did not get into its time namespace, which takes Linux 6.3: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// parentOf is the parent of a process that waits for us. Of the mount hook it is
// the container's first process.
func parentOf(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// "pid (name) state ppid …", where the name may hold anything.
	_, rest, _ := strings.Cut(string(data[bytes.LastIndexByte(data, ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 2 {
		return 0, fmt.Errorf("/proc/%d/stat: %q: %w", pid, data, errdefs.ErrInternal)
	}
	return strconv.Atoi(fields[1])
}

// startFailure finds out why lxc-start ended before pve-init was ready.
func (c *Container) startFailure(ctx context.Context) error {
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.monitor.wait(wait); err != nil {
		return err
	}
	log := filepath.Join(stateDir(c.bundle), logFile)
	text, _ := os.ReadFile(log)
	ended := cmp.Or(c.monitor.err, errors.New("exit status 0"))
	return fmt.Errorf("lxc-start of container %s failed (%w): %s (see %s): %w", c.state.ID, ended, firstErrors(text), log, errdefs.ErrInternal)
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

// watchMonitor ends a monitor that says nothing although init has ended: it
// was stopped, or waits for something itself. The status is lost with it.
func (c *Container) watchMonitor(pidfd *os.File) {
	if awaitEnd(pidfd) != nil {
		return // closed: the end is known
	}
	select {
	case <-c.Done():
	case <-time.After(monitorLimit):
		_ = c.monitor.cmd.Process.Kill()
	}
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
		_ = killCgroup(cgroupDir(c.state.Cgroup)) // the pidfd below tells whether it helped
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
		_ = killCgroup(cgroupDir(c.state.Cgroup)) // Delete kills again, and says what does not end
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
		if err := runHooks(ctx, "poststart", h.Poststart, c.ociState(specs.StateRunning)); err != nil {
			// The spec has the container stopped; what is left of it is the caller's.
			return errors.Join(err, killCgroup(cgroupDir(c.state.Cgroup)))
		}
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
func (c *Container) Pause(_ context.Context) error { return c.cgroup.freeze(true) }

// Resume thaws what Pause froze.
func (c *Container) Resume(_ context.Context) error { return c.cgroup.freeze(false) }

// Frozen says whether the container is paused: by Pause, or by LXC's own tools
// (lxc-freeze(1), and so `pct suspend`), which do the same. Errors: NotFound, it has ended.
func (c *Container) Frozen() (bool, error) { return c.cgroup.frozen() }

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

// PayloadPath is the cgroup of its processes, below CgroupPath. It goes with the last of them.
func (c *Container) PayloadPath() string { return filepath.Join(c.state.Cgroup, payload) }

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
	poststop(ctx, &CreateOptions{ID: c.state.ID, Bundle: c.bundle, Spec: c.spec})
	return nil
}

func (c *Container) ociState(status specs.ContainerState) *specs.State {
	st := ociState(&CreateOptions{ID: c.state.ID, Bundle: c.bundle, Spec: c.spec}, status)
	if status != specs.StateStopped {
		st.Pid = c.pid
	}
	return st
}
