package lxc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// PodOptions is what a pod's namespaces are made from.
type PodOptions struct {
	// Namespace and ID are containerd's.
	Namespace, ID string
	// Bundle is the absolute path of a directory; State is kept below Bundle/lxc.
	Bundle string
	// CgroupsPath is where its process is, as linux.cgroupsPath of a container.
	CgroupsPath string
	// SystemdCgroup has systemd make the cgroup.
	SystemdCgroup bool
	// Network is the path of its network namespace; the host's if empty.
	Network string
	// OfNetwork has the other namespaces belong to the user namespace that Network belongs to, and the pod's
	// processes be of that.
	OfNetwork bool
	// HostPID, HostIPC and HostUTS leave it the host's namespaces.
	HostPID, HostIPC, HostUTS bool
	// Hostname is set in its uts namespace, if that is its own; "" leaves it alone.
	Hostname string
	// Sysctl are kernel parameters of its namespaces.
	Sysctl map[string]string
	// OOMScoreAdj is that of its process, from -1000 to 1000.
	OOMScoreAdj int
}

// Pod holds the namespaces that the containers of a pod share, by a process that does nothing else, has no right to
// anything and sees no file: pve-init. It is no LXC container.
type Pod struct {
	*Process

	state  state
	bundle string
}

// CreatePod makes a pod's namespaces. Errors are those of Create. On error nothing is left behind but Bundle/lxc;
// what a crash leaves Cleanup takes away.
func (r *Runtime) CreatePod(ctx context.Context, o PodOptions) (_ *Pod, retErr error) {
	name, err := Name(o.Namespace, o.ID)
	if err != nil {
		return nil, err
	}
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("pod %s: %w", o.ID, err)
	}
	pveInit, err := r.openInit()
	if err != nil {
		return nil, err
	}
	var t translation
	if err := t.place(o.CgroupsPath, name, o.SystemdCgroup); err != nil {
		return nil, err
	}
	st := state{Namespace: o.Namespace, ID: o.ID, Name: name, LXCPath: r.config.Path, Cgroup: t.cgroup, Unit: t.unit}
	if populated(cgroupDir(st.Cgroup)) {
		return nil, fmt.Errorf("cgroup %s of pod %s has processes in it already: %w", st.Cgroup, o.ID, errdefs.ErrAlreadyExists)
	}
	defer func() {
		if retErr != nil {
			cleanCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			retErr = errors.Join(retErr, st.erase(cleanCtx, o.Bundle))
		}
	}()
	if err := st.write(o.Bundle); err != nil {
		return nil, err
	}
	cg, err := createCgroup(ctx, st.Cgroup, st.Unit, pveInit, nil, &cgroups.Resources{SkipDevices: true}, false)
	if err != nil {
		return nil, err
	}
	defer cg.holder.release()
	if err := os.Mkdir(cg.payloadDir(), 0o755); err != nil {
		return nil, err
	}
	p := &Pod{Process: newProcess(), state: st, bundle: o.Bundle}
	if err := p.start(ctx, &o, pveInit, cg); err != nil {
		return nil, fmt.Errorf("pod %s: %w", o.ID, err)
	}
	return p, nil
}

// check refuses what no namespace of the pod's own is there for.
func (o *PodOptions) check() error {
	if o.OfNetwork && o.Network == "" {
		return fmt.Errorf("a user namespace needs a network namespace, which the host's network is not: %w", errdefs.ErrNotImplemented)
	}
	if len(o.Hostname) > 64 {
		return invalid("hostname %q is longer than 64 bytes", o.Hostname)
	}
	return checkSysctl(o.Sysctl, map[specs.LinuxNamespaceType]bool{
		specs.NetworkNamespace: o.Network != "", specs.IPCNamespace: !o.HostIPC, specs.UTSNamespace: !o.HostUTS,
	})
}

// flags are the namespaces to be made.
func (o *PodOptions) flags() uintptr {
	flags := uintptr(unix.CLONE_NEWNS) // so that no file of the host's is to be seen through the process
	for flag, host := range map[uintptr]bool{unix.CLONE_NEWPID: o.HostPID, unix.CLONE_NEWIPC: o.HostIPC, unix.CLONE_NEWUTS: o.HostUTS} {
		if !host {
			flags |= flag
		}
	}
	return flags
}

// start starts the process and returns when it waits.
func (p *Pod) start(ctx context.Context, o *PodOptions, pveInit *initProgram, cg *cgroup) (retErr error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return err
	}
	defer ours.close()
	defer theirs.Close()
	exe, err := pveInit.open()
	if err != nil {
		return err
	}
	defer exe.Close()
	cgroup, err := os.Open(cg.payloadDir())
	if err != nil {
		return err
	}
	defer cgroup.Close()
	pidfd := -1
	cmd := &exec.Cmd{
		Path: "/proc/self/fd/4", Args: []string{"pve-init", "hold", "3", "4"}, Env: []string{}, Dir: "/", ExtraFiles: []*os.File{theirs, exe},
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: o.flags(), UseCgroupFD: true, CgroupFD: int(cgroup.Fd()), Setsid: true, PidFD: &pidfd},
	}
	var network *os.File
	if o.Network != "" {
		if network, err = os.Open(o.Network); err != nil {
			return fmt.Errorf("network namespace: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		defer network.Close()
	}
	if o.OfNetwork {
		fd, err := unix.IoctlRetInt(int(network.Fd()), unix.NS_GET_USERNS)
		if err != nil {
			return fmt.Errorf("user namespace of %s: %w", o.Network, err)
		}
		user := os.NewFile(uintptr(fd), "user namespace")
		defer user.Close()
		again, err := pveInit.unreadable()
		if err != nil {
			return err
		}
		cmd.Args = []string{"pve-init", "enter", "3", "6", "5"}
		cmd.ExtraFiles = append(cmd.ExtraFiles, user, again)
		cmd.SysProcAttr.Cloneflags = 0
	}
	if err := startIn(network, cmd); err != nil {
		return err
	}
	theirs.Close()
	child, handle := cmd.Process, os.NewFile(uintptr(pidfd), "pidfd")
	wait := func() (*os.ProcessState, error) { err := cmd.Wait(); return cmd.ProcessState, err }
	if o.OfNetwork {
		handle.Close()
		if child, handle, err = enterAndSplit(ctx, cmd, ours, o.flags()); err != nil {
			return err
		}
		wait = child.Wait
	}
	p.attach(child.Pid, handle, nil)
	go func() {
		exit := ExitStatus{Code: 255, At: time.Now()}
		if state, _ := wait(); state != nil {
			exit = exitOf(state.Sys().(syscall.WaitStatus))
		}
		_ = writeJSON(filepath.Join(stateDir(p.bundle), exitFile), exit) // as with a container's
		p.finish(exit)
	}()
	defer func() {
		if retErr != nil {
			_ = p.Kill(ctx, unix.SIGKILL)
			<-p.Done()
		}
	}()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", child.Pid), []byte(strconv.Itoa(o.OOMScoreAdj)), 0); err != nil {
		return fmt.Errorf("oom_score_adj %d: %w", o.OOMScoreAdj, err)
	}
	hold := plan.Hold{Hostname: o.Hostname, Sysctl: o.Sysctl}
	if o.HostUTS {
		hold.Hostname = ""
	}
	if err := ours.send(ctx, hold); err != nil {
		return fmt.Errorf("pve-init gave up: %w", err)
	}
	return executed(ctx, ours, func(*os.File) error { return errdefs.ErrInternal })
}

// startIn starts a process in a network namespace; nil is the host's.
func startIn(network *os.File, cmd *exec.Cmd) error {
	started := make(chan error, 1)
	go func() {
		if network != nil {
			runtime.LockOSThread() // never unlocked: it stays in there
			if err := unix.Setns(int(network.Fd()), unix.CLONE_NEWNET); err != nil {
				started <- fmt.Errorf("network namespace %s: %w: %w", network.Name(), err, errdefs.ErrInvalidArgument)
				return
			}
		}
		started <- cmd.Start()
	}()
	return <-started
}

// enterAndSplit takes pve-init, as whom cmd was started, into the user namespace and from there into new namespaces, and
// returns the process that goes on. All are children of this one.
func enterAndSplit(ctx context.Context, cmd *exec.Cmd, ours *channel, flags uintptr) (*os.Process, *os.File, error) {
	first, handle, err := entered(ctx, cmd, ours, plan.Enter{Hold: true})
	if err != nil {
		return nil, nil, err
	}
	handle.Close()
	defer func() { _, _ = first.Wait() }()
	m, err := func() (*message, error) {
		if err := ours.send(ctx, plan.Hold{Split: flags}); err != nil {
			return nil, err
		}
		return ours.receive(ctx)
	}()
	if err != nil {
		_ = first.Kill()
		return nil, nil, fmt.Errorf("pve-init gave up: %w", errors.Join(err, errdefs.ErrInternal))
	}
	defer m.close()
	if m.Error != nil {
		return nil, nil, typed(m.Error)
	}
	if len(m.files) != 1 {
		_ = first.Kill()
		return nil, nil, fmt.Errorf("pve-init handed over no process: %w", errdefs.ErrInternal)
	}
	pid, err := pidOf(m.files[0])
	if err != nil {
		return nil, nil, err
	}
	child, err := os.FindProcess(pid)
	if err != nil {
		return nil, nil, err
	}
	handle, m.files = m.files[0], nil
	return child, handle, nil
}

// CgroupPath is the process's cgroup below /sys/fs/cgroup.
func (p *Pod) CgroupPath() string { return p.state.Cgroup }

// Delete ends the process, if it has not ended, and removes its cgroup. It can be repeated.
func (p *Pod) Delete(ctx context.Context) error {
	if err := p.state.erase(ctx, p.bundle); err != nil {
		return fmt.Errorf("pod %s: %w", p.state.ID, err)
	}
	select {
	case <-p.Done():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("pod %s: its process does not end: %w", p.state.ID, ctx.Err())
	}
}
