package task

import (
	"context"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc"
)

// Engine makes containers. It is the seam between the task service and LXC.
type Engine interface {
	Create(ctx context.Context, config lxc.Config, o lxc.CreateOptions) (Container, error)
}

// Container is what package lxc offers for one container.
type Container interface {
	Process
	Start(ctx context.Context) error
	Exec(ctx context.Context, spec *specs.Process, stdio lxc.Stdio) (Process, error)
	KillAll(ctx context.Context, sig unix.Signal) error
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	Frozen() (bool, error)
	Update(ctx context.Context, r *specs.LinuxResources) error
	Pids(ctx context.Context) ([]int, error)
	CgroupPath() string
	PayloadPath() string
	OOMKills() uint64
	Delete(ctx context.Context) error
}

// Process is a container's init or a process executed in it.
type Process interface {
	Pid() int
	Console() *os.File
	Done() <-chan struct{}
	ExitStatus() lxc.ExitStatus
	Kill(ctx context.Context, sig unix.Signal) error
}

// Pod is the pod of the shim, if containerd has the shim keep it (the Sandbox service).
type Pod interface {
	// Serving says whether there is one. The shim stays as long.
	Serving() bool
	// Join gives a container of the pod what it shares with the others.
	Join(spec *specs.Spec)
}

// lxcEngine is the real one.
type lxcEngine struct{}

func (lxcEngine) Create(ctx context.Context, config lxc.Config, o lxc.CreateOptions) (Container, error) {
	r, err := lxc.New(config)
	if err != nil {
		return nil, err
	}
	c, err := r.Create(ctx, o)
	if err != nil {
		return nil, err
	}
	return lxcContainer{c}, nil
}

type lxcContainer struct{ *lxc.Container }

func (c lxcContainer) Exec(ctx context.Context, spec *specs.Process, stdio lxc.Stdio) (Process, error) {
	p, err := c.Container.Exec(ctx, spec, stdio)
	if err != nil {
		return nil, err
	}
	return p, nil
}
