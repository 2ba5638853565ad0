// Package task is containerd's Task service, version 2 and 3, on package lxc.
// It owns the tasks and processes of one shim, their events and the mount of
// their root file systems. It never looks into a container itself: it asks the
// Engine.
package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2"
	eventsapi "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/shim/dhcp"
	"github.com/containerd-pve/containerd-pve/shim/options"
	"github.com/containerd-pve/containerd-pve/shim/rpc"
	"github.com/containerd-pve/containerd-pve/shim/stdio"
	"github.com/containerd-pve/containerd-pve/snapshotter/mounts"
)

const (
	// drainInit and drainExec bound how long Delete waits for output that does
	// not move: whoever holds an exec's pipe may live as long as the container.
	drainInit = 10 * time.Second
	drainExec = 2 * time.Second
	// endLimit bounds the wait for processes that were killed.
	endLimit = 10 * time.Second
)

// failedExec is the status of an exec that could not be started.
const failedExec = 255

// Service is the task service of one shim.
type Service struct {
	namespace string
	engine    Engine
	events    *queue
	pod       Pod
	shutdown  func()

	mu    sync.Mutex
	tasks map[string]*taskState
}

// taskState is one task. The fields from container on are set before ready is closed.
type taskState struct {
	service *Service
	id      string
	bundle  string
	rootfs  string
	mounted bool
	proxmox proxmox
	leases  []*dhcp.Client

	ready     chan struct{} // closed when Create is through
	failed    chan struct{} // closed when it failed
	stdio     stdio.Config  // init's
	container Container
	init      *process
	oomKills  atomic.Uint64

	mu    sync.Mutex
	execs map[string]*process
}

// New returns a service. shutdown is called when the last task is gone and
// containerd has asked for it.
func New(ctx context.Context, namespace string, engine Engine, publisher shim.Publisher, pod Pod, shutdown func()) *Service {
	return &Service{
		namespace: namespace,
		engine:    engine,
		events:    newQueue(context.WithoutCancel(ctx), publisher),
		pod:       pod,
		shutdown:  shutdown,
		tasks:     make(map[string]*taskState),
	}
}

// Close publishes the last events.
func (s *Service) Close() error { return s.events.close() }

// RegisterTTRPC offers the service in both versions: their messages are the
// same on the wire, only the service's name differs.
func (s *Service) RegisterTTRPC(server *ttrpc.Server) error {
	methods := map[string]ttrpc.Method{
		"State":      rpc.Method(s.State),
		"Create":     rpc.Method(s.Create),
		"Start":      rpc.Method(s.Start),
		"Delete":     rpc.Method(s.Delete),
		"Pids":       rpc.Method(s.Pids),
		"Pause":      rpc.Method(s.Pause),
		"Resume":     rpc.Method(s.Resume),
		"Checkpoint": rpc.Method(s.Checkpoint),
		"Kill":       rpc.Method(s.Kill),
		"Exec":       rpc.Method(s.Exec),
		"ResizePty":  rpc.Method(s.ResizePty),
		"CloseIO":    rpc.Method(s.CloseIO),
		"Update":     rpc.Method(s.Update),
		"Wait":       rpc.Method(s.Wait),
		"Stats":      rpc.Method(s.Stats),
		"Connect":    rpc.Method(s.Connect),
		"Shutdown":   rpc.Method(s.Shutdown),
	}
	for _, name := range []string{"containerd.task.v2.Task", "containerd.task.v3.Task"} {
		server.RegisterService(name, &ttrpc.ServiceDesc{Methods: methods})
	}
	return nil
}

var empty = &emptypb.Empty{}

// find returns a task whose Create is through.
func (s *Service) find(id string) (*taskState, error) {
	s.mu.Lock()
	t := s.tasks[id]
	s.mu.Unlock()
	if t != nil {
		select {
		case <-t.ready:
			return t, nil
		default:
		}
	}
	return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
}

// await waits for the end of a task's Create, and returns a task that is still being made when
// ctx or the time for it ends; nil: there is none, or it is made. runc's shim has everybody wait: a client whose
// stdin has ended looks for its task and closes the input once (nerdctl's StdinCloser), which may be before
// the task is made.
func (s *Service) await(ctx context.Context, id string) *taskState {
	s.mu.Lock()
	t := s.tasks[id]
	s.mu.Unlock()
	if t == nil {
		return nil
	}
	select {
	case <-t.ready:
	case <-t.failed:
	case <-ctx.Done():
		return t
	}
	return nil
}

func (s *Service) findProcess(id, execID string) (*process, error) {
	t, err := s.find(id)
	if err != nil {
		return nil, err
	}
	if execID == "" {
		return t.init, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.execs[execID]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("exec %s of task %s: %w", execID, id, errdefs.ErrNotFound)
}

// Create makes the container up to the moment before its entrypoint.
func (s *Service) Create(ctx context.Context, r *api.CreateTaskRequest) (_ *api.CreateTaskResponse, retErr error) {
	if r.Checkpoint != "" || r.ParentCheckpoint != "" {
		return nil, fmt.Errorf("task %s: restore from a checkpoint: %w", r.ID, errdefs.ErrNotImplemented)
	}
	o, err := options.Parse(r.Options, options.File)
	if err != nil {
		return nil, err
	}
	t := &taskState{service: s, id: r.ID, bundle: r.Bundle, ready: make(chan struct{}), failed: make(chan struct{}), execs: make(map[string]*process), stdio: stdio.Config{
		Namespace: s.namespace, ID: r.ID,
		Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal,
		UID: o.IOUID, GID: o.IOGID,
	}}
	s.mu.Lock()
	if s.tasks[r.ID] != nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("task %s: %w", r.ID, errdefs.ErrAlreadyExists)
	}
	s.tasks[r.ID] = t
	s.mu.Unlock()
	defer func() {
		if retErr != nil {
			s.forget(t)
			close(t.failed)
		}
	}()

	// A mount that a task before has left is not this one's.
	rootfs := mount.FromProto(r.Rootfs)
	for i, m := range rootfs {
		rootfs[i] = mounts.Anew(m)
	}
	r.Rootfs = mount.ToProto(rootfs)
	spec, err := readSpec(r.Bundle)
	if err != nil {
		return nil, err
	}
	if spec.Process != nil {
		spec.Process.Terminal = r.Terminal
	}
	s.pod.Join(spec)
	if to, held := spec.Annotations[lxc.AnnotationRollback]; held {
		return nil, fmt.Errorf("task %s: a rollback to %s was interrupted, and its files may not be those of its configuration: `containerd-pve container rollback %[2]s %[1]s` ends it: %[3]w", r.ID, to, errdefs.ErrFailedPrecondition)
	}
	nets, err := netsOf(spec, s.namespace, r.ID, interfaces)
	if err == nil && len(nets) > 0 {
		err = resolv(spec, r.Bundle, resolvConf)
	}
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	if err := unprivilegedToo(spec, r.Rootfs, &o, thisHost); err != nil {
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	name, config, err := t.onProxmox(ctx, spec, nets, r, &o)
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	if err := t.mount(spec, r); err != nil {
		return nil, err
	}
	defer func() {
		if retErr == nil {
			return
		}
		if err := t.unmount(); err != nil {
			retErr = errors.Join(retErr, err)
		}
	}()
	p := newProcess(t, "", t.stdio)
	if p.io, err = stdio.Open(ctx, p.config); err != nil {
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	c, err := s.engine.Create(ctx, config, lxc.CreateOptions{
		Namespace: s.namespace, ID: r.ID, Name: name, Interfaces: veths(nets, name), InnerLimits: name != "", Bundle: r.Bundle, Rootfs: t.rootfs, Spec: spec, StopSignal: t.proxmox.stopSignal, SystemdCgroup: o.SystemdCgroup, Stdio: p.io.Child(),
	})
	if err != nil {
		_ = p.io.Started(nil) // its ends of the pipes are nobody's now
		p.io.Close()
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	p.proc, t.container, t.init = c, c, p
	err = p.io.Started(c.Console())
	if err == nil {
		err = t.dhcp(ctx, nets, c.Pid())
	}
	if err == nil {
		err = shim.WritePidFile(filepath.Join(r.Bundle, "init.pid"), c.Pid())
	}
	if err != nil {
		t.abort(ctx)
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	s.events.put(&eventsapi.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Pid: uint32(c.Pid()),
		IO: &eventsapi.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	background := context.WithoutCancel(ctx)
	go t.watchOOM(background)
	go p.watch(t.beforeEnd)
	close(t.ready)
	return &api.CreateTaskResponse{Pid: uint32(c.Pid())}, nil
}

// abort removes a container whose Create failed at the very end.
func (t *taskState) abort(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	defer cancel()
	t.endLeases()
	if err := t.container.KillAll(ctx, unix.SIGKILL); err != nil {
		log.G(ctx).WithError(err).Error("kill a half-made container")
	}
	select {
	case <-t.container.Done():
	case <-ctx.Done():
	}
	if err := t.container.Delete(ctx); err != nil {
		log.G(ctx).WithError(err).Error("delete a half-made container")
	}
	t.init.io.Close()
}

func (s *Service) forget(t *taskState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tasks, t.id)
}

func readSpec(bundle string) (*specs.Spec, error) {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("bundle: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, fmt.Errorf("bundle %s: config.json: %w: %w", bundle, err, errdefs.ErrInvalidArgument)
	}
	return &spec, nil
}

// mount puts the snapshot's mounts on bundle/rootfs. Without any the spec's
// root is taken as it is.
func (t *taskState) mount(spec *specs.Spec, r *api.CreateTaskRequest) error {
	t.rootfs = filepath.Join(t.bundle, "rootfs")
	if len(r.Rootfs) == 0 {
		if spec.Root == nil || spec.Root.Path == "" {
			return fmt.Errorf("task %s has no root file system: %w", t.id, errdefs.ErrInvalidArgument)
		}
		t.rootfs = spec.Root.Path
		if !filepath.IsAbs(t.rootfs) {
			t.rootfs = filepath.Join(t.bundle, t.rootfs)
		}
		if st, err := os.Stat(t.rootfs); err != nil || !st.IsDir() {
			return fmt.Errorf("task %s: root %s is not a directory: %w", t.id, t.rootfs, errdefs.ErrInvalidArgument)
		}
		return nil
	}
	if err := os.Mkdir(t.rootfs, 0o711); err != nil && !os.IsExist(err) {
		return err
	}
	mounts := mount.FromProto(r.Rootfs)
	if err := mount.All(mounts, t.rootfs); err != nil {
		return errors.Join(fmt.Errorf("task %s: mount of the root file system: %w", t.id, err), mount.UnmountRecursive(t.rootfs, 0))
	}
	t.mounted = true
	return nil
}

func (t *taskState) unmount() error {
	if !t.mounted {
		return nil
	}
	if err := mount.UnmountRecursive(t.rootfs, 0); err != nil {
		// A process of the host's is in it. Detached it is out of the way at once
		// and gone with its last user: the task must not wait for that one.
		if err := mount.UnmountRecursive(t.rootfs, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("task %s: unmount of the root file system: %w", t.id, err)
		}
		log.L.WithError(err).Warnf("task %s: the root file system was busy and is detached", t.id)
	}
	t.mounted = false
	return nil
}

// beforeEnd puts init's end after all that came before it: an OOM kill, and the
// ends of the execs, which died with their pid namespace.
func (t *taskState) beforeEnd() {
	t.endLeases()
	t.lastOOM()
	t.mu.Lock()
	var others []*process
	for _, p := range t.execs {
		if p.begun() {
			others = append(others, p)
		}
	}
	t.mu.Unlock()
	limit := time.After(endLimit)
	for _, p := range others {
		select {
		case <-p.exited:
		case <-limit:
			return
		}
	}
}

// Start runs the entrypoint or an exec.
func (s *Service) Start(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	t := p.task
	if r.ExecID == "" {
		err = p.start(func() any {
			return &eventsapi.TaskStart{ContainerID: r.ID, Pid: uint32(p.pid())}
		}, func() error { return t.container.Start(ctx) })
	} else {
		err = t.startExec(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	_, pid, _, _ := p.current()
	return &api.StartResponse{Pid: uint32(pid)}, nil
}

func (t *taskState) startExec(ctx context.Context, p *process) error {
	if st, _, _, _ := t.init.current(); st != running {
		return p.errorf(errdefs.ErrFailedPrecondition, "cannot start: the task is %s", st)
	}
	attempted := false
	err := p.start(func() any {
		return &eventsapi.TaskExecStarted{ContainerID: t.id, ExecID: p.execID, Pid: uint32(p.pid())}
	}, func() error {
		attempted = true
		stdio, err := stdio.Open(ctx, p.config)
		if err != nil {
			return err
		}
		proc, err := t.container.Exec(ctx, p.spec, stdio.Child())
		if err != nil {
			_ = stdio.Started(nil)
			stdio.Close()
			return err
		}
		p.mu.Lock()
		p.proc, p.io = proc, stdio
		if p.noStdin {
			stdio.CloseStdin()
		}
		p.mu.Unlock()
		if err := stdio.Started(proc.Console()); err != nil {
			_ = proc.Kill(ctx, unix.SIGKILL)
			<-proc.Done()
			stdio.Close()
			return err
		}
		return nil
	})
	if err != nil {
		if attempted {
			p.fail(lxc.ExitStatus{Code: failedExec, At: time.Now()})
		}
		return fmt.Errorf("%s: %w", p.name(), err)
	}
	go p.watch(nil)
	return nil
}

// Exec adds a process, which Start runs.
func (s *Service) Exec(_ context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	if st, _, _, _ := t.init.current(); st == stopped || st == deleting {
		return nil, fmt.Errorf("task %s has ended: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	var spec specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("spec of exec %s: %w: %w", r.ExecID, err, errdefs.ErrInvalidArgument)
	}
	if r.ExecID == "" {
		return nil, fmt.Errorf("exec without an id: %w", errdefs.ErrInvalidArgument)
	}
	spec.Terminal = r.Terminal
	p := newProcess(t, r.ExecID, stdio.Config{
		Namespace: s.namespace, ID: r.ID,
		Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal,
		UID: t.init.config.UID, GID: t.init.config.GID,
	})
	p.spec = &spec
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.execs[r.ExecID] != nil {
		return nil, fmt.Errorf("exec %s of task %s: %w", r.ExecID, r.ID, errdefs.ErrAlreadyExists)
	}
	t.execs[r.ExecID] = p
	s.events.put(&eventsapi.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return empty, nil
}

// Delete removes a process that has ended; with init goes the container.
func (s *Service) Delete(ctx context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	t := p.task
	if r.ExecID != "" {
		if err := p.claim(); err != nil {
			return nil, err
		}
		drain(ctx, p, drainExec)
		t.mu.Lock()
		delete(t.execs, r.ExecID)
		t.mu.Unlock()
	} else if err := t.delete(ctx); err != nil {
		return nil, err
	}
	_, pid, exit, _ := p.current()
	response := &api.DeleteResponse{Pid: uint32(pid), ExitStatus: exit.Code, ExitedAt: timestamppb.New(exit.At)}
	if r.ExecID == "" {
		s.forget(t)
		s.events.put(&eventsapi.TaskDelete{
			ContainerID: r.ID, Pid: response.Pid, ExitStatus: response.ExitStatus, ExitedAt: response.ExitedAt,
		})
	}
	return response, nil
}

func drain(ctx context.Context, p *process, idle time.Duration) {
	_, _, _, stdio := p.current()
	if stdio == nil {
		return
	}
	if !stdio.Drain(ctx, idle) {
		log.G(ctx).Warnf("%s: output that nobody takes is given up", p.name())
	}
	stdio.Close()
}

func (t *taskState) delete(ctx context.Context) error {
	if st, _, _, _ := t.init.current(); st == created {
		// Created and never started: there is nothing that could be lost.
		if err := t.container.KillAll(ctx, unix.SIGKILL); err != nil {
			return err
		}
		select {
		case <-t.init.exited:
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(endLimit):
			return t.init.errorf(context.DeadlineExceeded, "was killed and does not end")
		}
	}
	if err := t.init.claim(); err != nil {
		return err
	}
	err := t.container.Delete(ctx)
	if err == nil {
		t.mu.Lock()
		for _, p := range t.execs {
			// Their end was published before init's.
			drain(ctx, p, drainExec)
		}
		t.mu.Unlock()
		drain(ctx, t.init, drainInit)
		err = t.unmount()
	}
	if err != nil {
		t.init.release()
	}
	return err
}

// stateTime is less than what containerd waits for a state (2 s): a task that takes longer to make is there, without a process.
const stateTime = time.Second

// State tells what is known, without asking the container.
func (s *Service) State(ctx context.Context, r *api.StateRequest) (*api.StateResponse, error) {
	short, cancel := context.WithTimeout(ctx, stateTime)
	defer cancel()
	if t := s.await(short, r.ID); t != nil && r.ExecID == "" {
		return &api.StateResponse{
			ID: t.id, Bundle: t.bundle, Status: task.Status_CREATED,
			Stdin: t.stdio.Stdin, Stdout: t.stdio.Stdout, Stderr: t.stdio.Stderr, Terminal: t.stdio.Terminal,
		}, nil
	}
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.ExecID == "" {
		if err := s.look(p.task); err != nil {
			return nil, err
		}
	}
	st, pid, exit, _ := p.current()
	response := &api.StateResponse{
		ID: p.id(), Bundle: p.task.bundle, Pid: uint32(pid), Status: st.apiStatus(), ExecID: r.ExecID,
		Stdin: p.config.Stdin, Stdout: p.config.Stdout, Stderr: p.config.Stderr, Terminal: p.config.Terminal,
	}
	if st.apiStatus() == task.Status_STOPPED {
		response.ExitStatus, response.ExitedAt = exit.Code, timestamppb.New(exit.At)
	}
	return response, nil
}

// Wait comes back with the status when the process has ended, for ever after.
func (s *Service) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	s.await(ctx, r.ID)
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	_, _, exit, _ := p.current()
	return &api.WaitResponse{ExitStatus: exit.Code, ExitedAt: timestamppb.New(exit.At)}, nil
}

// Kill signals one process, or all of the container.
func (s *Service) Kill(ctx context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	s.await(ctx, r.ID)
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	sig := unix.Signal(r.Signal)
	if r.Signal == 0 || r.Signal > 64 {
		return nil, p.errorf(errdefs.ErrInvalidArgument, "cannot be sent signal %d", r.Signal)
	}
	if r.All && r.ExecID == "" {
		if st, _, _, _ := p.current(); st == stopped || st == deleting {
			return nil, p.errorf(errdefs.ErrNotFound, "has ended")
		}
		err = p.task.container.KillAll(ctx, sig)
	} else {
		err = p.kill(ctx, sig)
	}
	if err != nil {
		return nil, err
	}
	return empty, nil
}

// Pause freezes the container.
func (s *Service) Pause(ctx context.Context, r *api.PauseRequest) (*emptypb.Empty, error) {
	return s.freeze(r.ID, running, paused, &eventsapi.TaskPaused{ContainerID: r.ID},
		func(c Container) error { return c.Pause(ctx) })
}

// Resume thaws it.
func (s *Service) Resume(ctx context.Context, r *api.ResumeRequest) (*emptypb.Empty, error) {
	return s.freeze(r.ID, paused, running, &eventsapi.TaskResumed{ContainerID: r.ID},
		func(c Container) error { return c.Resume(ctx) })
}

func (s *Service) freeze(id string, from, to status, event any, f func(Container) error) (*emptypb.Empty, error) {
	t, err := s.find(id)
	if err != nil {
		return nil, err
	}
	p := t.init
	if err := s.look(t); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status != from {
		return nil, p.errorf(errdefs.ErrFailedPrecondition, "is %s and not %s", p.status, from)
	}
	if err := f(t.container); err != nil {
		return nil, err
	}
	p.status = to
	s.events.put(event)
	return empty, nil
}

// look takes over what somebody else did: LXC's own tools pause and resume a
// container as well.
func (s *Service) look(t *taskState) error {
	p := t.init
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status != running && p.status != paused {
		return nil
	}
	frozen, err := t.container.Frozen()
	switch {
	case errdefs.IsNotFound(err): // its end is on the way
	case err != nil:
		return fmt.Errorf("task %s: %w", t.id, err)
	case frozen && p.status == running:
		p.status = paused
		s.events.put(&eventsapi.TaskPaused{ContainerID: t.id})
	case !frozen && p.status == paused:
		p.status = running
		s.events.put(&eventsapi.TaskResumed{ContainerID: t.id})
	}
	return nil
}

// Pids are all processes of the container, the execs with their ids.
func (s *Service) Pids(ctx context.Context, r *api.PidsRequest) (*api.PidsResponse, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	pids, err := t.container.Pids(ctx)
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	execs := make(map[int]string)
	t.mu.Lock()
	for id, p := range t.execs {
		if st, pid, _, _ := p.current(); st == running {
			execs[pid] = id
		}
	}
	t.mu.Unlock()
	if len(pids) == 0 {
		// At its start containerd takes a shim without any process for one whose
		// task was never made, and reaps it: a task that has ended and is still to
		// be deleted would be lost. Its init stands for it.
		pids = []int{t.container.Pid()}
	}
	response := &api.PidsResponse{}
	for _, pid := range pids {
		info := &task.ProcessInfo{Pid: uint32(pid)}
		if id, ok := execs[pid]; ok {
			if info.Info, err = anyOf(&runcoptions.ProcessDetails{ExecID: id}); err != nil {
				return nil, err
			}
		}
		response.Processes = append(response.Processes, info)
	}
	return response, nil
}

func anyOf(v any) (*anypb.Any, error) {
	a, err := typeurl.MarshalAny(v)
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()}, nil
}

// CloseIO ends a process's stdin.
func (s *Service) CloseIO(ctx context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	s.await(ctx, r.ID)
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Stdin {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.noStdin = true
		if p.io != nil {
			p.io.CloseStdin()
		}
	}
	return empty, nil
}

// ResizePty sets the size of a process's terminal.
func (s *Service) ResizePty(_ context.Context, r *api.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	st, _, _, stdio := p.current()
	if stdio == nil {
		// An exec that is not started yet: its terminal will have this size.
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.spec != nil && p.spec.Terminal && p.status == created {
			p.spec.ConsoleSize = &specs.Box{Width: uint(r.Width), Height: uint(r.Height)}
			return empty, nil
		}
		return nil, p.errorf(errdefs.ErrFailedPrecondition, "is %s and has no terminal", st)
	}
	if err := stdio.Resize(r.Width, r.Height); err != nil {
		return nil, fmt.Errorf("%s: %w", p.name(), err)
	}
	return empty, nil
}

// Update changes the container's limits.
func (s *Service) Update(ctx context.Context, r *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	var resources specs.LinuxResources
	if err := json.Unmarshal(r.Resources.GetValue(), &resources); err != nil {
		return nil, fmt.Errorf("resources of task %s: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
	}
	if err := t.container.Update(ctx, &resources); err != nil {
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	t.proxmox.update(ctx, &resources)
	return empty, nil
}

// Stats are the cgroup's counters.
func (s *Service) Stats(_ context.Context, r *api.StatsRequest) (*api.StatsResponse, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	m, err := cgroup2.Load(t.container.CgroupPath())
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	metrics, err := m.Stat()
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", r.ID, err)
	}
	limitsToo(metrics.GetMemory(), filepath.Join(cgroupRoot, t.container.PayloadPath()))
	a, err := anyOf(metrics)
	if err != nil {
		return nil, err
	}
	return &api.StatsResponse{Stats: a}, nil
}

// Connect tells the shim's pid, for any id.
func (s *Service) Connect(_ context.Context, r *api.ConnectRequest) (*api.ConnectResponse, error) {
	response := &api.ConnectResponse{ShimPid: uint32(os.Getpid())}
	if t, err := s.find(r.ID); err == nil {
		response.TaskPid = uint32(t.container.Pid())
	}
	return response, nil
}

// Shutdown ends the shim if no task is left, and no pod.
func (s *Service) Shutdown(_ context.Context, _ *api.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.tasks) == 0 && !s.pod.Serving() {
		s.shutdown()
	}
	return empty, nil
}

// Checkpoint is not supported: LXC's CRIU images are not containerd's.
func (s *Service) Checkpoint(context.Context, *api.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("checkpoint: %w", errdefs.ErrNotImplemented)
}
