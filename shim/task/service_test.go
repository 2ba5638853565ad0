package task

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v2 "github.com/containerd/containerd/api/runtime/task/v2"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/containerd-pve/containerd-pve/lxc"
)

// fake is an engine and its containers, without LXC.
type fake struct {
	execErr, startErr error
	made              *fakeContainer // the last one
	pod               fakePod
	shut              bool
	making            chan struct{} // Create ends when it is closed; nil: at once
}

type fakePod struct{ serving, joined bool }

func (p *fakePod) Serving() bool    { return p.serving }
func (p *fakePod) Join(*specs.Spec) { p.joined = true }

func (f *fake) Create(_ context.Context, _ lxc.Config, _ lxc.CreateOptions) (Container, error) {
	if f.making != nil {
		<-f.making
	}
	f.made = &fakeContainer{fakeProcess: newFake(100), engine: f}
	return f.made, nil
}

type fakeProcess struct {
	pid  int
	done chan struct{}
	once sync.Once
	code uint32
}

func newFake(pid int) *fakeProcess { return &fakeProcess{pid: pid, done: make(chan struct{})} }

func (p *fakeProcess) Pid() int              { return p.pid }
func (p *fakeProcess) Console() *os.File     { return nil }
func (p *fakeProcess) Done() <-chan struct{} { return p.done }
func (p *fakeProcess) ExitStatus() lxc.ExitStatus {
	return lxc.ExitStatus{Code: p.code, At: time.Unix(1, 0)}
}
func (p *fakeProcess) Kill(_ context.Context, sig unix.Signal) error {
	p.once.Do(func() { p.code = 128 + uint32(sig); close(p.done) })
	return nil
}

type fakeContainer struct {
	*fakeProcess
	engine *fake
	mu     sync.Mutex
	execs  []*fakeProcess
	frozen bool
}

func (c *fakeContainer) Start(context.Context) error { return c.engine.startErr }
func (c *fakeContainer) Exec(context.Context, *specs.Process, lxc.Stdio) (Process, error) {
	if c.engine.execErr != nil {
		return nil, c.engine.execErr
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := newFake(200 + len(c.execs))
	c.execs = append(c.execs, p)
	return p, nil
}
func (c *fakeContainer) KillAll(ctx context.Context, sig unix.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.Kill(ctx, sig) // init first: its event must come last all the same
	for _, p := range c.execs {
		_ = p.Kill(ctx, sig)
	}
	return nil
}
func (c *fakeContainer) Pause(context.Context) error                         { c.freeze(true); return nil }
func (c *fakeContainer) Resume(context.Context) error                        { c.freeze(false); return nil }
func (c *fakeContainer) Update(context.Context, *specs.LinuxResources) error { return nil }
func (c *fakeContainer) Pids(context.Context) ([]int, error)                 { return []int{100, 200}, nil }
func (c *fakeContainer) CgroupPath() string                                  { return "/containerd-pve-test/none" }
func (c *fakeContainer) PayloadPath() string                                 { return c.CgroupPath() + "/payload" }
func (c *fakeContainer) OOMKills() uint64                                    { return 0 }
func (c *fakeContainer) Delete(context.Context) error                        { return nil }

// freeze is what LXC's own tools do as well.
func (c *fakeContainer) freeze(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frozen = on
}

func (c *fakeContainer) Frozen() (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.done:
		return false, errdefs.ErrNotFound
	default:
		return c.frozen, nil
	}
}

type recorder struct {
	mu     sync.Mutex
	topics []string
}

func (r *recorder) Publish(_ context.Context, topic string, _ events.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.topics = append(r.topics, strings.TrimPrefix(topic, "/tasks/"))
	return nil
}
func (r *recorder) Close() error { return nil }

func service(t *testing.T, f *fake) (*Service, *recorder, string) {
	t.Helper()
	r := &recorder{}
	s := New(t.Context(), "default", f, r, &f.pod, func() { f.shut = true })
	bundle := t.TempDir()
	data, err := json.Marshal(specs.Spec{Process: &specs.Process{Args: []string{"x"}}, Root: &specs.Root{Path: "."}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return s, r, bundle
}

func TestCallsAndErrors(t *testing.T) {
	s, r, bundle := service(t, &fake{})
	ctx := t.Context()
	proc := &anypb.Any{Value: []byte(`{"args":["y"]}`)}
	step := func(name string, err error, want func(error) bool) {
		t.Helper()
		if want == nil && err != nil || want != nil && !want(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	do := func(_ any, err error) error { return err }
	step("start unknown", do(s.Start(ctx, &api.StartRequest{ID: "a"})), errdefs.IsNotFound)
	step("state unknown", do(s.State(ctx, &api.StateRequest{ID: "a"})), errdefs.IsNotFound)
	step("kill unknown", do(s.Kill(ctx, &api.KillRequest{ID: "a", Signal: 9})), errdefs.IsNotFound)
	step("delete unknown", do(s.Delete(ctx, &api.DeleteRequest{ID: "a"})), errdefs.IsNotFound)
	step("connect unknown", do(s.Connect(ctx, &api.ConnectRequest{ID: "a"})), nil)
	step("create", do(s.Create(ctx, &api.CreateTaskRequest{ID: "a", Bundle: bundle})), nil)
	step("create again", do(s.Create(ctx, &api.CreateTaskRequest{ID: "a", Bundle: bundle})), errdefs.IsAlreadyExists)
	step("restore", do(s.Create(ctx, &api.CreateTaskRequest{ID: "b", Bundle: bundle, Checkpoint: "c"})), errdefs.IsNotImplemented)
	step("pause of created", do(s.Pause(ctx, &api.PauseRequest{ID: "a"})), errdefs.IsFailedPrecondition)
	step("start", do(s.Start(ctx, &api.StartRequest{ID: "a"})), nil)
	step("start again", do(s.Start(ctx, &api.StartRequest{ID: "a"})), errdefs.IsFailedPrecondition)
	step("exec", do(s.Exec(ctx, &api.ExecProcessRequest{ID: "a", ExecID: "e", Spec: proc})), nil)
	step("exec again", do(s.Exec(ctx, &api.ExecProcessRequest{ID: "a", ExecID: "e", Spec: proc})), errdefs.IsAlreadyExists)
	step("kill of an exec not started", do(s.Kill(ctx, &api.KillRequest{ID: "a", ExecID: "e", Signal: 9})), errdefs.IsFailedPrecondition)
	step("start of an unknown exec", do(s.Start(ctx, &api.StartRequest{ID: "a", ExecID: "z"})), errdefs.IsNotFound)
	step("start exec", do(s.Start(ctx, &api.StartRequest{ID: "a", ExecID: "e"})), nil)
	step("resize without a terminal", do(s.ResizePty(ctx, &api.ResizePtyRequest{ID: "a"})), errdefs.IsFailedPrecondition)
	step("checkpoint", do(s.Checkpoint(ctx, &api.CheckpointTaskRequest{ID: "a"})), errdefs.IsNotImplemented)
	step("signal 0", do(s.Kill(ctx, &api.KillRequest{ID: "a"})), errdefs.IsInvalidArgument)
	step("delete of running", do(s.Delete(ctx, &api.DeleteRequest{ID: "a"})), errdefs.IsFailedPrecondition)
	step("pause", do(s.Pause(ctx, &api.PauseRequest{ID: "a"})), nil)
	step("pause again", do(s.Pause(ctx, &api.PauseRequest{ID: "a"})), errdefs.IsFailedPrecondition)
	step("resume", do(s.Resume(ctx, &api.ResumeRequest{ID: "a"})), nil)
	pids, err := s.Pids(ctx, &api.PidsRequest{ID: "a"})
	if err != nil || len(pids.Processes) != 2 || pids.Processes[1].Info == nil || pids.Processes[0].Info != nil {
		t.Errorf("pids: %v, %v", pids, err)
	}
	step("kill all", do(s.Kill(ctx, &api.KillRequest{ID: "a", Signal: 9, All: true})), nil)
	w, err := s.Wait(ctx, &api.WaitRequest{ID: "a"})
	if err != nil || w.ExitStatus != 137 {
		t.Errorf("wait: %v, %v", w, err)
	}
	if w, err = s.Wait(ctx, &api.WaitRequest{ID: "a", ExecID: "e"}); err != nil || w.ExitStatus != 137 {
		t.Errorf("wait for the exec: %v, %v", w, err)
	}
	step("kill of stopped", do(s.Kill(ctx, &api.KillRequest{ID: "a", Signal: 9})), errdefs.IsNotFound)
	step("exec in stopped", do(s.Exec(ctx, &api.ExecProcessRequest{ID: "a", ExecID: "f", Spec: proc})), errdefs.IsFailedPrecondition)
	step("delete exec", do(s.Delete(ctx, &api.DeleteRequest{ID: "a", ExecID: "e"})), nil)
	step("delete", do(s.Delete(ctx, &api.DeleteRequest{ID: "a"})), nil)
	step("delete again", do(s.Delete(ctx, &api.DeleteRequest{ID: "a"})), errdefs.IsNotFound)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	want := strings.Fields("create start exec-added exec-started paused resumed exit exit delete")
	if !slices.Equal(r.topics, want) {
		t.Errorf("events %v, want %v", r.topics, want)
	}
}

// TestPausedByOthers: LXC's own tools pause and resume a container, which is
// seen, said and undone as one's own.
func TestPausedByOthers(t *testing.T) {
	f := &fake{}
	s, r, bundle := service(t, f)
	ctx := t.Context()
	_, err := s.Create(ctx, &api.CreateTaskRequest{ID: "a", Bundle: bundle})
	if err != nil {
		t.Fatal(err)
	}
	state := func(want task.Status) {
		t.Helper()
		if st, err := s.State(ctx, &api.StateRequest{ID: "a"}); err != nil || st.Status != want {
			t.Errorf("%v, %v, not %v", st, err, want)
		}
	}
	state(task.Status_CREATED)
	if _, err := s.Start(ctx, &api.StartRequest{ID: "a"}); err != nil {
		t.Fatal(err)
	}
	state(task.Status_RUNNING)
	f.made.freeze(true)
	state(task.Status_PAUSED)
	if _, err := s.Pause(ctx, &api.PauseRequest{ID: "a"}); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if _, err := s.Resume(ctx, &api.ResumeRequest{ID: "a"}); err != nil {
		t.Error(err)
	}
	state(task.Status_RUNNING)
	if _, err := s.Pause(ctx, &api.PauseRequest{ID: "a"}); err != nil {
		t.Error(err)
	}
	f.made.freeze(false)
	if _, err := s.Pause(ctx, &api.PauseRequest{ID: "a"}); err != nil {
		t.Errorf("paused again after somebody resumed it: %v", err)
	}
	if _, err := s.Kill(ctx, &api.KillRequest{ID: "a", Signal: 9}); err != nil {
		t.Error(err)
	}
	if _, err := s.Wait(ctx, &api.WaitRequest{ID: "a"}); err != nil {
		t.Error(err)
	}
	state(task.Status_STOPPED)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if want := strings.Fields("create start paused resumed paused resumed paused exit"); !slices.Equal(r.topics, want) {
		t.Errorf("events %v, want %v", r.topics, want)
	}
}

func TestFailedExecUnblocksWait(t *testing.T) {
	s, _, bundle := service(t, &fake{execErr: errdefs.ErrNotFound})
	ctx := t.Context()
	if _, err := s.Create(ctx, &api.CreateTaskRequest{ID: "a", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, &api.StartRequest{ID: "a"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Exec(ctx, &api.ExecProcessRequest{ID: "a", ExecID: "e", Spec: &anypb.Any{Value: []byte(`{"args":["y"]}`)}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx, &api.StartRequest{ID: "a", ExecID: "e"}); !errdefs.IsNotFound(err) {
		t.Errorf("start: %v", err)
	}
	if w, err := s.Wait(ctx, &api.WaitRequest{ID: "a", ExecID: "e"}); err != nil || w.ExitStatus != failedExec {
		t.Errorf("wait: %v, %v", w, err)
	}
}

// TestVersionsAreTheSameOnTheWire is what lets one implementation serve both.
func TestVersionsAreTheSameOnTheWire(t *testing.T) {
	old, current := v2.File_runtime_task_v2_shim_proto.Messages(), api.File_runtime_task_v3_shim_proto.Messages()
	for i := range old.Len() {
		a := old.Get(i)
		b := current.ByName(a.Name())
		if b == nil {
			t.Errorf("%s is not in version 3", a.Name())
			continue
		}
		for j := range a.Fields().Len() {
			x := a.Fields().Get(j)
			y := b.Fields().ByNumber(x.Number())
			if y == nil || x.Kind() != y.Kind() || x.Cardinality() != y.Cardinality() ||
				x.Kind() == protoreflect.MessageKind && x.Message().Name() != y.Message().Name() {
				t.Errorf("%s differs in version 3", x.FullName())
			}
		}
	}
}

// TestShutdown: a shim stays while it has a task, or a pod.
func TestShutdown(t *testing.T) {
	f := &fake{pod: fakePod{serving: true}}
	s, _, _ := service(t, f)
	ask := func(want bool) {
		t.Helper()
		if _, err := s.Shutdown(t.Context(), &api.ShutdownRequest{}); err != nil || f.shut != want {
			t.Errorf("shut down: %t, %v", f.shut, err)
		}
	}
	ask(false)
	f.pod.serving = false
	ask(true)
}

// TestKilledBeforeItIsMade: containerd's restart monitor kills a task that does not run yet, and deletes it then. Was it told that
// there is none, containerd ended the shim in the middle.
func TestKilledBeforeItIsMade(t *testing.T) {
	f := &fake{making: make(chan struct{})}
	s, _, bundle := service(t, f)
	ctx := t.Context()
	made, killed := make(chan error, 1), make(chan error, 1)
	go func() { made <- s.make("c", bundle) }()
	s.begun("c")
	go func() {
		_, err := s.Kill(ctx, &api.KillRequest{ID: "c", Signal: 9, All: true})
		killed <- err
	}()
	time.Sleep(10 * time.Millisecond)
	close(f.making)
	if err := errors.Join(<-made, <-killed); err != nil {
		t.Fatal(err)
	}
	if w, err := s.Wait(ctx, &api.WaitRequest{ID: "c"}); err != nil || w.ExitStatus != 137 {
		t.Errorf("it ended with %v, %v", w, err)
	}
}

// make is a Create.
func (s *Service) make(id, bundle string) error {
	_, err := s.Create(context.Background(), &api.CreateTaskRequest{ID: id, Bundle: bundle})
	return err
}

// begun waits for the begin of a task's Create.
func (s *Service) begun(id string) {
	for {
		s.mu.Lock()
		there := s.tasks[id] != nil
		s.mu.Unlock()
		if there {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// TestBeforeItIsMade: who asks for a task that is just being made, closes its input, or waits for its end (nerdctl's logging program), waits for that.
func TestBeforeItIsMade(t *testing.T) {
	f := &fake{making: make(chan struct{})}
	s, _, bundle := service(t, f)
	ctx := t.Context()
	failed := make(chan error, 4)
	go func() { failed <- s.make("c", bundle) }()
	s.begun("c")
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if r, err := s.State(short, &api.StateRequest{ID: "c"}); err != nil || r.Status != task.Status_CREATED || r.Pid != 0 {
		t.Errorf("without the time: %v, %v", r, err)
	}
	go func() {
		r, err := s.State(ctx, &api.StateRequest{ID: "c"})
		if err == nil && r.Status != task.Status_CREATED {
			t.Errorf("it is %s", r.Status)
		}
		failed <- err
	}()
	go func() {
		_, err := s.CloseIO(ctx, &api.CloseIORequest{ID: "c", Stdin: true})
		failed <- err
	}()
	go func() {
		w, err := s.Wait(ctx, &api.WaitRequest{ID: "c"})
		if err == nil && w.ExitStatus != 137 {
			t.Errorf("it ended with %d", w.ExitStatus)
		}
		failed <- err
	}()
	time.Sleep(10 * time.Millisecond)
	close(f.making)
	for i := range cap(failed) {
		if i == cap(failed)-1 { // all but Wait
			if _, err := s.Kill(ctx, &api.KillRequest{ID: "c", Signal: 9}); err != nil {
				t.Error(err)
			}
		}
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	// One that fails leaves nobody waiting.
	if _, err := s.Create(ctx, &api.CreateTaskRequest{ID: "d", Bundle: t.TempDir()}); err == nil {
		t.Error("a bundle without a configuration")
	}
	if _, err := s.State(ctx, &api.StateRequest{ID: "d"}); !errdefs.IsNotFound(err) {
		t.Errorf("after its failure: %v", err)
	}
}
