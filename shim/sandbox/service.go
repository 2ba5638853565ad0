// Package sandbox is containerd's Sandbox service, version 1: a pod without a pause container. It owns the one pod of its
// shim: the process that holds the pod's namespaces, the files that its containers share, and its state. It never touches
// tasks, nor the pod's network, which containerd has made.
package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2"
	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/shim/options"
	"github.com/containerd-pve/containerd-pve/shim/rpc"
)

// state is where the pod is in its life.
type state int

const (
	none state = iota
	created
	starting // Start is at work
	ready
	ended    // its process has ended, what it had is still there
	stopping // Stop is at work
	stopped
)

var stateNames = [...]string{"not there", "created", "starting", "ready", "ended", "stopping", "stopped"}

func (s state) String() string { return stateNames[s] }

// Engine makes the pod's namespaces. It is the seam between the service and Linux.
type Engine interface {
	// Hold has the namespaces made.
	Hold(ctx context.Context, config lxc.Config, o lxc.PodOptions) (Holder, error)
	// Files makes the files that the pod's containers share in dir, and takes them away.
	Files(dir string, pod *cri.PodSandboxConfig) error
	RemoveFiles(dir string) error
}

// Holder is the process that holds the namespaces.
type Holder interface {
	Pid() int
	Done() <-chan struct{}
	ExitStatus() lxc.ExitStatus
	CgroupPath() string
	Delete(ctx context.Context) error
}

// Service is the sandbox service of one shim.
type Service struct {
	namespace string
	engine    Engine
	shutdown  func()

	mu        sync.Mutex
	state     state
	id        string
	bundle    string
	network   string
	config    *cri.PodSandboxConfig
	holder    Holder // from ready on
	createdAt time.Time
	exit      lxc.ExitStatus
	exited    chan struct{} // closed when the process has ended, or never will be there
}

// New returns a service. shutdown is called when containerd has asked for the pod's removal.
func New(namespace string, engine Engine, shutdown func()) *Service {
	return &Service{namespace: namespace, engine: engine, shutdown: shutdown, exited: make(chan struct{})}
}

// RegisterTTRPC offers the service.
func (s *Service) RegisterTTRPC(server *ttrpc.Server) error {
	server.RegisterService("containerd.runtime.sandbox.v1.Sandbox", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"CreateSandbox":   rpc.Method(s.CreateSandbox),
		"StartSandbox":    rpc.Method(s.StartSandbox),
		"Platform":        rpc.Method(s.Platform),
		"StopSandbox":     rpc.Method(s.StopSandbox),
		"WaitSandbox":     rpc.Method(s.WaitSandbox),
		"SandboxStatus":   rpc.Method(s.SandboxStatus),
		"PingSandbox":     rpc.Method(s.PingSandbox),
		"ShutdownSandbox": rpc.Method(s.ShutdownSandbox),
		"SandboxMetrics":  rpc.Method(s.SandboxMetrics),
	}})
	return nil
}

// Serving says whether there is a pod: then the shim stays, with tasks or without.
func (s *Service) Serving() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state != none
}

// find locks the service if id is its pod; unlock is to be called then.
func (s *Service) find(id string) (unlock func(), err error) {
	s.mu.Lock()
	if s.state == none || s.id != id {
		s.mu.Unlock()
		return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return s.mu.Unlock, nil
}

// CreateSandbox notes what the pod is to be. Errors: AlreadyExists; InvalidArgument, options that are not CRI's.
func (s *Service) CreateSandbox(_ context.Context, r *api.CreateSandboxRequest) (*api.CreateSandboxResponse, error) {
	config := &cri.PodSandboxConfig{}
	if o := r.Options; o.GetTypeUrl() != "" {
		if !typeurl.Is(o, config) {
			return nil, fmt.Errorf("sandbox %s: options of type %q are no pod's: %w", r.SandboxID, o.GetTypeUrl(), errdefs.ErrInvalidArgument)
		}
		if err := typeurl.UnmarshalTo(o, config); err != nil {
			return nil, fmt.Errorf("sandbox %s: options: %w: %w", r.SandboxID, err, errdefs.ErrInvalidArgument)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != none {
		return nil, fmt.Errorf("sandbox %s: this shim has %s, which is %s: %w", r.SandboxID, s.id, s.state, errdefs.ErrAlreadyExists)
	}
	s.state, s.id, s.bundle, s.network, s.config = created, r.SandboxID, r.BundlePath, r.NetnsPath, config
	return &api.CreateSandboxResponse{}, nil
}

// StartSandbox makes the pod. Errors: FailedPrecondition, it was not created, or was started already.
func (s *Service) StartSandbox(ctx context.Context, r *api.StartSandboxRequest) (*api.StartSandboxResponse, error) {
	s.mu.Lock()
	if s.state != created || s.id != r.SandboxID {
		defer s.mu.Unlock()
		st := s.state
		if s.id != r.SandboxID {
			st = none
		}
		return nil, fmt.Errorf("sandbox %s is %s and cannot be started: %w", r.SandboxID, st, errdefs.ErrFailedPrecondition)
	}
	s.state = starting
	s.mu.Unlock()

	holder, err := s.start(ctx)

	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.state = created
		return nil, fmt.Errorf("sandbox %s: %w", r.SandboxID, err)
	}
	s.state, s.holder, s.createdAt = ready, holder, time.Now()
	go s.watch(holder)
	return &api.StartSandboxResponse{Pid: uint32(holder.Pid()), CreatedAt: timestamppb.New(s.createdAt)}, nil
}

func (s *Service) start(ctx context.Context) (_ Holder, retErr error) {
	o, err := options.Parse(nil, options.File)
	if err != nil {
		return nil, err
	}
	p, err := podOptions(s.namespace, s.id, s.bundle, s.network, s.config)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, s.engine.RemoveFiles(s.bundle))
		}
	}()
	if err := s.engine.Files(s.bundle, s.config); err != nil {
		return nil, err
	}
	return s.engine.Hold(ctx, o.LXC, p)
}

// watch notes the end of the process.
func (s *Service) watch(h Holder) {
	<-h.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == ready {
		s.state = ended
	}
	s.exit = h.ExitStatus()
	close(s.exited)
}

// Platform is this machine's.
func (s *Service) Platform(_ context.Context, r *api.PlatformRequest) (*api.PlatformResponse, error) {
	unlock, err := s.find(r.SandboxID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return &api.PlatformResponse{Platform: &types.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}}, nil
}

// StopSandbox ends the pod's process and takes away what it had. It can be repeated. Errors: NotFound;
// FailedPrecondition, it is just being started or stopped.
func (s *Service) StopSandbox(ctx context.Context, r *api.StopSandboxRequest) (*api.StopSandboxResponse, error) {
	unlock, err := s.find(r.SandboxID)
	if err != nil {
		return nil, err
	}
	switch s.state {
	case stopped:
		unlock()
		return &api.StopSandboxResponse{}, nil
	case created:
		s.state, s.exit = stopped, lxc.ExitStatus{At: time.Now()}
		close(s.exited)
		unlock()
		return &api.StopSandboxResponse{}, nil
	case starting, stopping:
		defer unlock()
		return nil, fmt.Errorf("sandbox %s is %s: %w", s.id, s.state, errdefs.ErrFailedPrecondition)
	}
	before := s.state
	s.state = stopping
	unlock()

	if r.TimeoutSecs > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.TimeoutSecs)*time.Second)
		defer cancel()
	}
	err = s.holder.Delete(ctx)
	if err == nil {
		err = s.engine.RemoveFiles(s.bundle)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.state = before
		select {
		case <-s.exited:
			s.state = ended
		default:
		}
		return nil, fmt.Errorf("sandbox %s: %w", s.id, err)
	}
	s.state = stopped
	return &api.StopSandboxResponse{}, nil
}

// WaitSandbox comes back when the pod has ended, for ever after.
func (s *Service) WaitSandbox(ctx context.Context, r *api.WaitSandboxRequest) (*api.WaitSandboxResponse, error) {
	unlock, err := s.find(r.SandboxID)
	if err != nil {
		return nil, err
	}
	unlock()
	select {
	case <-s.exited:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &api.WaitSandboxResponse{ExitStatus: s.exit.Code, ExitedAt: timestamppb.New(s.exit.At)}, nil
}

// SandboxStatus is what is known, with details for people if they are asked for.
func (s *Service) SandboxStatus(_ context.Context, r *api.SandboxStatusRequest) (*api.SandboxStatusResponse, error) {
	unlock, err := s.find(r.SandboxID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	answer := &api.SandboxStatusResponse{SandboxID: s.id, State: cri.PodSandboxState_SANDBOX_NOTREADY.String()}
	if s.holder != nil {
		answer.Pid, answer.CreatedAt = uint32(s.holder.Pid()), timestamppb.New(s.createdAt)
	}
	if s.state == ready {
		answer.State = cri.PodSandboxState_SANDBOX_READY.String()
	}
	select {
	case <-s.exited:
		answer.ExitedAt = timestamppb.New(s.exit.At)
	default:
	}
	if r.Verbose {
		// With the names that containerd's own has there.
		info, err := json.Marshal(map[string]any{"pid": answer.Pid, "processStatus": s.state.String()})
		if err != nil {
			return nil, err
		}
		answer.Info = map[string]string{"info": string(info)}
	}
	return answer, nil
}

// PingSandbox says that the pod is there.
func (s *Service) PingSandbox(_ context.Context, r *api.PingRequest) (*api.PingResponse, error) {
	unlock, err := s.find(r.SandboxID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return &api.PingResponse{}, nil
}

// ShutdownSandbox ends the shim, and before it the pod if that has not ended.
func (s *Service) ShutdownSandbox(ctx context.Context, r *api.ShutdownSandboxRequest) (*api.ShutdownSandboxResponse, error) {
	if _, err := s.StopSandbox(ctx, &api.StopSandboxRequest{SandboxID: r.SandboxID}); err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	log.G(ctx).Debugf("sandbox %s is shut down", r.SandboxID)
	s.shutdown()
	return &api.ShutdownSandboxResponse{}, nil
}

// SandboxMetrics are the counters of the pod's cgroup, of which its containers' are a part.
func (s *Service) SandboxMetrics(_ context.Context, r *api.SandboxMetricsRequest) (*api.SandboxMetricsResponse, error) {
	unlock, err := s.find(r.SandboxID)
	if err != nil {
		return nil, err
	}
	path, st := s.config.GetLinux().GetCgroupParent(), s.state
	if path == "" && s.holder != nil {
		path = s.holder.CgroupPath()
	}
	unlock()
	if st != ready {
		// containerd leaves a pod out of a list for this error; any other fails the list of all pods.
		return nil, fmt.Errorf("metrics of sandbox %s, which is %s: %w", r.SandboxID, st, errdefs.ErrNotFound)
	}
	m, err := cgroup2.Load(path)
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", r.SandboxID, err)
	}
	metrics, err := m.StatFiltered(cgroup2.StatCPU | cgroup2.StatMemory)
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", r.SandboxID, err)
	}
	a, err := typeurl.MarshalAny(metrics)
	if err != nil {
		return nil, err
	}
	return &api.SandboxMetricsResponse{Metrics: &types.Metric{
		Timestamp: timestamppb.Now(), ID: r.SandboxID, Data: &anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()},
	}}, nil
}
