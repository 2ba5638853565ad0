package task

import (
	"context"
	"fmt"
	"sync"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/shim/stdio"
)

// status is where a process is in its life.
type status int

const (
	created  status = iota
	starting        // Start is at work; the process's end waits for it
	running
	paused
	stopped
	deleting
)

var statusNames = [...]string{"created", "starting", "running", "paused", "stopped", "deleting"}

func (s status) String() string { return statusNames[s] }

// process is a task's init or one of its execs.
type process struct {
	task   *taskState
	execID string         // "" for init
	spec   *specs.Process // of an exec
	config stdio.Config

	exited chan struct{} // closed once the end is known and published

	mu      sync.Mutex
	settled *sync.Cond // status left starting
	status  status
	proc    Process // nil until it exists
	io      *stdio.IO
	exit    lxc.ExitStatus
	noStdin bool // CloseIO came before there was anything to close
}

func newProcess(t *taskState, execID string, config stdio.Config) *process {
	p := &process{task: t, execID: execID, config: config, exited: make(chan struct{})}
	p.settled = sync.NewCond(&p.mu)
	return p
}

// id is what events call the process.
func (p *process) id() string {
	if p.execID == "" {
		return p.task.id
	}
	return p.execID
}

func (p *process) name() string {
	if p.execID == "" {
		return "task " + p.task.id
	}
	return "exec " + p.execID + " of task " + p.task.id
}

func (p *process) errorf(kind error, format string, args ...any) error {
	return fmt.Errorf("%s %s: %w", p.name(), fmt.Sprintf(format, args...), kind)
}

// start calls fn, which makes the process run, and publishes event after it.
func (p *process) start(event func() any, fn func() error) error {
	p.mu.Lock()
	if p.status != created {
		defer p.mu.Unlock()
		return p.errorf(errdefs.ErrFailedPrecondition, "is %s and cannot be started", p.status)
	}
	p.status = starting
	p.mu.Unlock()

	err := fn()

	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.settled.Broadcast()
	if err != nil {
		p.status = created
		return err
	}
	p.task.service.events.put(event())
	p.status = running
	return nil
}

// watch waits for the end of the process. before is called when it has ended
// and must come back.
func (p *process) watch(before func()) {
	<-p.proc.Done()
	p.io.Exited()
	if before != nil {
		before()
	}
	p.end(p.proc.ExitStatus())
}

// end makes the end known: by event, by Wait, by State.
func (p *process) end(exit lxc.ExitStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.status == starting {
		p.settled.Wait()
	}
	p.status, p.exit = stopped, exit
	p.task.service.events.put(&eventsapi.TaskExit{
		ContainerID: p.task.id, ID: p.id(), Pid: uint32(p.pid()),
		ExitStatus: exit.Code, ExitedAt: timestamppb.New(exit.At),
	})
	close(p.exited)
}

// fail ends an exec that never ran: nothing is published, Wait comes back.
func (p *process) fail(exit lxc.ExitStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status, p.exit = stopped, exit
	close(p.exited)
}

// pid is 0 for an exec that does not run yet.
func (p *process) pid() int {
	if p.proc == nil {
		return 0
	}
	return p.proc.Pid()
}

// begun says whether the process counts among those whose end is to come.
func (p *process) begun() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status == starting || p.status == running
}

func (p *process) kill(ctx context.Context, sig unix.Signal) error {
	p.mu.Lock()
	proc, st := p.proc, p.status
	p.mu.Unlock()
	switch {
	case st == stopped || st == deleting:
		return p.errorf(errdefs.ErrNotFound, "has ended")
	case proc == nil:
		return p.errorf(errdefs.ErrFailedPrecondition, "is %s and has no process to signal", st)
	}
	return proc.Kill(ctx, sig)
}

// claim reserves the process for Delete; release gives it back.
func (p *process) claim() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch p.status {
	case deleting:
		return p.errorf(errdefs.ErrNotFound, "is being deleted")
	case stopped:
		p.status = deleting
		return nil
	case created:
		if p.execID != "" {
			p.status = deleting
			return nil
		}
	}
	return p.errorf(errdefs.ErrFailedPrecondition, "is %s: kill it before it is deleted", p.status)
}

func (p *process) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status = stopped
}

func (p *process) current() (status, int, lxc.ExitStatus, *stdio.IO) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status, p.pid(), p.exit, p.io
}

// apiStatus is containerd's word for the status.
func (s status) apiStatus() task.Status {
	switch s {
	case running:
		return task.Status_RUNNING
	case paused:
		return task.Status_PAUSED
	case stopped, deleting:
		return task.Status_STOPPED
	}
	return task.Status_CREATED
}
