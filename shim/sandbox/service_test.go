package sandbox

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd-pve/containerd-pve/lxc"
)

// fake is an engine and its holder, without Linux.
type fake struct {
	holdErr, deleteErr error
	done               chan struct{}
	once               sync.Once
	options            lxc.PodOptions
	files              int // made and not removed
}

func (f *fake) Hold(_ context.Context, _ lxc.Config, o lxc.PodOptions) (Holder, error) {
	f.options = o
	if f.holdErr != nil {
		return nil, f.holdErr
	}
	f.done, f.once = make(chan struct{}), sync.Once{}
	return f, nil
}
func (f *fake) Files(string, *cri.PodSandboxConfig) error { f.files++; return nil }
func (f *fake) RemoveFiles(string) error                  { f.files = 0; return nil }
func (f *fake) Pid() int                                  { return 77 }
func (f *fake) Done() <-chan struct{}                     { return f.done }
func (f *fake) ExitStatus() lxc.ExitStatus                { return lxc.ExitStatus{Code: 137, At: time.Unix(9, 0)} }
func (f *fake) CgroupPath() string                        { return "/pod" }
func (f *fake) Delete(context.Context) error {
	if f.deleteErr == nil {
		f.end()
	}
	return f.deleteErr
}
func (f *fake) end() { f.once.Do(func() { close(f.done) }) }

func asked(t *testing.T, v any) *anypb.Any {
	t.Helper()
	a, err := typeurl.MarshalAny(v)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()}
}

// calls are those of a client, with the kinds of their errors.
type calls struct {
	*testing.T
	*Service
	ctx context.Context
}

func (c calls) is(what string, err error, kind func(error) bool) {
	c.Helper()
	if kind == nil && err != nil || kind != nil && !kind(err) {
		c.Errorf("%s: %v", what, err)
	}
}

func (c calls) create(kind func(error) bool) {
	c.Helper()
	_, err := c.CreateSandbox(c.ctx, &api.CreateSandboxRequest{SandboxID: "p", BundlePath: "/b", NetnsPath: "/n", Options: asked(c.T, &cri.PodSandboxConfig{Hostname: "h"})})
	c.is("create", err, kind)
}

func (c calls) start(kind func(error) bool) *api.StartSandboxResponse {
	c.Helper()
	r, err := c.StartSandbox(c.ctx, &api.StartSandboxRequest{SandboxID: "p"})
	c.is("start", err, kind)
	return r
}

func (c calls) stop(kind func(error) bool) {
	c.Helper()
	_, err := c.StopSandbox(c.ctx, &api.StopSandboxRequest{SandboxID: "p"})
	c.is("stop", err, kind)
}

func (c calls) status(want string) *api.SandboxStatusResponse {
	c.Helper()
	r, err := c.SandboxStatus(c.ctx, &api.SandboxStatusRequest{SandboxID: "p", Verbose: true})
	if err != nil || r.State != want || !strings.Contains(r.Info["info"], `"pid":`) {
		c.Errorf("status: %+v, %v", r, err)
	}
	return r
}

const readyState, notReady = "SANDBOX_READY", "SANDBOX_NOTREADY"

// TestLife: each call in each state answers as containerd's own sandboxer would.
func TestLife(t *testing.T) {
	f, shut := &fake{}, 0
	c := calls{t, New("k8s.io", f, func() { shut++ }), t.Context()}
	c.start(errdefs.IsFailedPrecondition)
	c.stop(errdefs.IsNotFound)
	_, err := c.PingSandbox(c.ctx, &api.PingRequest{SandboxID: "p"})
	c.is("ping", err, errdefs.IsNotFound)
	_, err = c.WaitSandbox(c.ctx, &api.WaitSandboxRequest{SandboxID: "p"})
	c.is("wait", err, errdefs.IsNotFound)
	_, err = c.CreateSandbox(c.ctx, &api.CreateSandboxRequest{SandboxID: "p", Options: asked(t, &runcoptions.Options{})})
	c.is("options of something else", err, errdefs.IsInvalidArgument)
	if c.Serving() {
		t.Error("it serves a pod that is not there")
	}
	c.create(nil)
	c.create(errdefs.IsAlreadyExists)
	if !c.Serving() || c.status(notReady).Pid != 0 {
		t.Error("a created one")
	}
	_, err = c.StartSandbox(c.ctx, &api.StartSandboxRequest{SandboxID: "other"})
	c.is("start of another", err, errdefs.IsFailedPrecondition)

	f.holdErr = errdefs.ErrInvalidArgument
	c.start(errdefs.IsInvalidArgument)
	if f.files != 0 {
		t.Error("files of a pod that did not start are left")
	}
	f.holdErr = nil
	if r := c.start(nil); r.GetPid() != 77 || r.GetCreatedAt().AsTime().IsZero() {
		t.Errorf("start: %+v", r)
	}
	c.start(errdefs.IsFailedPrecondition)
	if f.options.ID != "p" || f.options.Namespace != "k8s.io" || f.options.Bundle != "/b" || f.options.Network != "/n" || f.options.Hostname != "h" {
		t.Errorf("asked for: %+v", f.options)
	}
	if c.status(readyState).Pid != 77 {
		t.Error("pid of one that is ready")
	}
	_, err = c.PingSandbox(c.ctx, &api.PingRequest{SandboxID: "p"})
	c.is("ping", err, nil)
	if p, err := c.Platform(c.ctx, &api.PlatformRequest{SandboxID: "p"}); err != nil || p.Platform.OS != "linux" || p.Platform.Architecture == "" {
		t.Errorf("platform: %+v, %v", p, err)
	}
	short, cancel := context.WithTimeout(c.ctx, 10*time.Millisecond)
	defer cancel()
	_, err = c.WaitSandbox(short, &api.WaitSandboxRequest{SandboxID: "p"})
	c.is("wait", err, func(err error) bool { return errors.Is(err, context.DeadlineExceeded) })

	f.deleteErr = errdefs.ErrUnavailable
	c.stop(errdefs.IsUnavailable)
	c.status(readyState)
	f.deleteErr = nil
	c.stop(nil)
	c.stop(nil)
	for range 2 {
		if w, err := c.WaitSandbox(c.ctx, &api.WaitSandboxRequest{SandboxID: "p"}); err != nil || w.ExitStatus != 137 || w.ExitedAt.AsTime() != time.Unix(9, 0).UTC() {
			t.Errorf("wait: %+v, %v", w, err)
		}
	}
	if st := c.status(notReady); st.ExitedAt.AsTime() != time.Unix(9, 0).UTC() || f.files != 0 {
		t.Errorf("a stopped one: %+v", st)
	}
	_, err = c.SandboxMetrics(c.ctx, &api.SandboxMetricsRequest{SandboxID: "p"})
	c.is("metrics", err, errdefs.IsNotFound)
	if shut != 0 {
		t.Error("the shim was ended")
	}
	if _, err := c.ShutdownSandbox(c.ctx, &api.ShutdownSandboxRequest{SandboxID: "p"}); err != nil || shut != 1 {
		t.Errorf("shutdown: %d, %v", shut, err)
	}
}

// TestDeath: a pod whose process dies is not ready; what it had is taken away by stop, or by shutdown.
func TestDeath(t *testing.T) {
	for _, end := range []string{"stop", "shutdown"} {
		f, shut := &fake{}, 0
		c := calls{t, New("k8s.io", f, func() { shut++ }), t.Context()}
		c.create(nil)
		c.start(nil)
		f.end()
		if w, err := c.WaitSandbox(c.ctx, &api.WaitSandboxRequest{SandboxID: "p"}); err != nil || w.ExitStatus != 137 {
			t.Errorf("wait: %+v, %v", w, err)
		}
		c.status(notReady)
		if f.files == 0 {
			t.Error("its files went before its containers")
		}
		if end == "stop" {
			c.stop(nil)
		} else if _, err := c.ShutdownSandbox(c.ctx, &api.ShutdownSandboxRequest{SandboxID: "p"}); err != nil || shut != 1 {
			t.Errorf("shutdown: %v", err)
		}
		if f.files != 0 {
			t.Errorf("%s left files", end)
		}
	}
}

// TestNeverStarted: one that was only created can be stopped, and Wait comes back.
func TestNeverStarted(t *testing.T) {
	c := calls{t, New("k8s.io", &fake{}, func() {}), t.Context()}
	c.create(nil)
	c.stop(nil)
	if _, err := c.WaitSandbox(c.ctx, &api.WaitSandboxRequest{SandboxID: "p"}); err != nil {
		t.Errorf("wait: %v", err)
	}
	c.start(errdefs.IsFailedPrecondition)
}

// TestJoin: a container has the pod's files, but for those that it has already.
func TestJoin(t *testing.T) {
	f := &fake{}
	c := calls{t, New("k8s.io", f, func() {}), t.Context()}
	spec := func() *specs.Spec {
		return &specs.Spec{Root: &specs.Root{Readonly: true}, Mounts: []specs.Mount{
			{Destination: "/etc/hosts", Source: "/kubelet/hosts", Type: "bind"}, {Destination: "/dev/shm", Source: "shm", Type: "tmpfs"},
		}}
	}
	s := spec()
	c.Join(s)
	if len(s.Mounts) != 2 {
		t.Errorf("without a pod: %+v", s.Mounts)
	}
	c.create(nil)
	c.start(nil)
	c.Join(s)
	got := map[string]string{}
	for _, m := range s.Mounts {
		got[m.Destination] = m.Source
		if m.Destination == "/etc/hostname" && !slices.Contains(m.Options, "ro") {
			t.Errorf("%+v may be written to", m)
		}
	}
	want := map[string]string{"/etc/hosts": "/kubelet/hosts", "/etc/hostname": "/b/hostname", "/etc/resolv.conf": "/b/resolv.conf", "/dev/shm": "/b/shm"}
	for path, source := range want {
		if got[path] != source {
			t.Errorf("%s is %q, not %q", path, got[path], source)
		}
	}
	// With the host's IPC namespace its /dev/shm is the host's, which containerd mounts.
	c.config.Linux = &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE}}}
	s = spec()
	c.Join(s)
	if s.Mounts[1].Source != "shm" {
		t.Errorf("/dev/shm with the host's: %+v", s.Mounts[1])
	}
}

// TestFiles: those that need no mount, as the pod asks for them.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	config := &cri.PodSandboxConfig{
		Hostname: "h", DnsConfig: &cri.DNSConfig{Servers: []string{"10.0.0.1", "10.0.0.2"}, Searches: []string{"a", "b"}, Options: []string{"ndots:5"}},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE}}},
	}
	if err := (linux{}).Files(dir, config); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"hostname": "h\n", "resolv.conf": "search a b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"} {
		if text, err := os.ReadFile(dir + "/" + file); err != nil || string(text) != want {
			t.Errorf("%s: %q, %v", file, text, err)
		}
	}
	if err := RemoveFiles(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := RemoveFiles(dir); err != nil {
		t.Errorf("once more: %v", err)
	}
}
