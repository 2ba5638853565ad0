//go:build bed

package systemdcgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	eventsapi "github.com/containerd/containerd/api/events"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const (
	ours   = "io.containerd.pve.v2"
	zfs    = "pve-zfs"
	debian = "localhost:5000/debian:13"
	slice  = "kubepods-besteffort-podabc_1.slice"
	slices = "/sys/fs/cgroup/kubepods.slice/kubepods-besteffort.slice/" + slice
)

func TestMain(m *testing.M) {
	if out, err := exec.Command("stack", "up", "--pull").CombinedOutput(); err != nil {
		fmt.Printf("stack up: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	_ = exec.Command("stack", "down").Run()
	os.Exit(code)
}

type box struct {
	t         *testing.T
	ctx       context.Context
	client    *client.Client
	container client.Container
	task      client.Task
	exit      <-chan client.ExitStatus
	out       bytes.Buffer
}

// create makes a container, whose scope is cri-containerd-ID.scope, and its task.
func create(t *testing.T, id string, options any, args []string, change func(*oci.Spec)) (*box, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "default"), 5*time.Minute)
	t.Cleanup(cancel)
	c, err := client.New("/run/containerd/containerd.sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	image, err := c.GetImage(ctx, debian)
	if err != nil {
		t.Fatal(err)
	}
	b := &box{t: t, ctx: ctx, client: c}
	edit := func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		s.Linux.CgroupsPath = slice + ":cri-containerd:" + id
		if change != nil {
			change(s)
		}
		return nil
	}
	b.container, err = c.NewContainer(ctx, id, client.WithImage(image), client.WithSnapshotter(zfs), client.WithNewSnapshot(id, image),
		client.WithNewSpec(oci.WithImageConfig(image), oci.WithProcessArgs(args...), edit), client.WithRuntime(ours, options))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "default"), time.Minute)
		defer cancel()
		if b.task != nil {
			_, _ = b.task.Delete(ctx, client.WithProcessKill)
		}
		_ = b.container.Delete(ctx, client.WithSnapshotCleanup)
	})
	task, err := b.container.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, &b.out, io.Discard)))
	if err != nil {
		return b, err
	}
	b.task = task
	if b.exit, err = task.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return b, nil
}

func start(t *testing.T, id string, options any, args []string, change func(*oci.Spec)) *box {
	t.Helper()
	b, err := create(t, id, options, args, change)
	if err == nil {
		err = b.task.Start(b.ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wait takes the exit code and deletes the task.
func (b *box) wait() uint32 {
	b.t.Helper()
	select {
	case st := <-b.exit:
		b.task.IO().Wait()
		if _, err := b.task.Delete(b.ctx); err != nil {
			b.t.Error(err)
		}
		b.task = nil
		return st.ExitCode()
	case <-b.ctx.Done():
		b.t.Fatal("the container does not end")
		return 0
	}
}

var withSystemd = &runcoptions.Options{SystemdCgroup: true}

func sh(script string) []string { return []string{"sh", "-c", script} }

// show are properties of the container's scope.
func show(t *testing.T, id string, names ...string) string {
	t.Helper()
	out, err := exec.Command("systemctl", "show", "cri-containerd-"+id+".scope", "-p", strings.Join(names, ",")).CombinedOutput()
	if err != nil {
		t.Errorf("systemctl show: %v: %s", err, out)
	}
	return string(out)
}

func property(t *testing.T, id string, want ...string) {
	t.Helper()
	for _, w := range want {
		name, _, _ := strings.Cut(w, "=")
		if got := strings.TrimSpace(show(t, id, name)); got != w {
			t.Errorf("%s, want %s", got, w)
		}
	}
}

func files(t *testing.T, id string, want map[string]string) {
	t.Helper()
	for name, value := range want {
		for _, dir := range []string{".", "payload"} {
			got, err := os.ReadFile(filepath.Join(slices, "cri-containerd-"+id+".scope", dir, name))
			if err != nil || strings.TrimSpace(string(got)) != value {
				t.Errorf("%s/%s: %q, %v; want %q", dir, name, got, err, value)
			}
		}
	}
}

// gone waits until neither systemd nor the kernel knows the scope any more.
func gone(t *testing.T, id string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		state := show(t, id, "LoadState")
		_, err := os.Stat(filepath.Join(slices, "cri-containerd-"+id+".scope"))
		if strings.TrimSpace(state) == "LoadState=not-found" && errors.Is(err, os.ErrNotExist) {
			return
		}
		if time.Now().After(end) {
			t.Errorf("%s is left: %s, %v", id, state, err)
			return
		}
	}
}

// TestScope: a container's life in a scope of kubelet's slices.
func TestScope(t *testing.T) {
	limit, quota, period, pids := int64(64<<20), int64(50000), uint64(100000), int64(40)
	b := start(t, "life", withSystemd, sh("mknod /tmp/lc c 10 237; echo ready; exec sleep 1000"), func(s *oci.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}})
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
		s.Linux.Resources.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
		s.Linux.Resources.Pids = &specs.LinuxPids{Limit: &pids}
		s.Linux.Resources.Unified = map[string]string{"memory.high": strconv.Itoa(60 << 20)}
	})
	x := filepath.Join(slices, "cri-containerd-life.scope")
	property(t, "life", "ActiveState=active", "Slice="+slice, "Delegate=yes", "ControlGroup="+strings.TrimPrefix(x, "/sys/fs/cgroup"),
		"MemoryMax=67108864", "MemoryHigh=62914560", "TasksMax=40", "CPUQuotaPerSecUSec=500ms")
	want := map[string]string{"memory.max": "67108864", "memory.high": "62914560", "cpu.max": "50000 100000", "pids.max": "40"}
	files(t, "life", want)
	if procs, err := os.ReadFile(x + "/cgroup.procs"); err != nil || len(procs) > 0 {
		t.Errorf("processes in the scope itself: %q, %v", procs, err)
	}
	if _, err := os.Stat(x + "/holder"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the holder is still there: %v", err)
	}
	if pids, err := b.task.Pids(b.ctx); err != nil || len(pids) != 1 || pids[0].Pid != b.task.Pid() {
		t.Errorf("pids %v, %v", pids, err)
	}

	// systemd writes all it knows anew.
	if out, err := exec.Command("systemctl", "daemon-reload").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	files(t, "life", want)

	limit, quota, pids = 128<<20, 150000, 50
	if err := b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Quota: &quota}, Pids: &specs.LinuxPids{Limit: &pids},
		Unified: map[string]string{"memory.high": "max"},
	})); err != nil {
		t.Fatal(err)
	}
	property(t, "life", "MemoryMax=134217728", "MemoryHigh=infinity", "TasksMax=50", "CPUQuotaPerSecUSec=1.500000s")
	files(t, "life", map[string]string{"memory.max": "134217728", "memory.high": "max", "cpu.max": "150000 100000", "pids.max": "50"})

	if err := b.task.Pause(b.ctx); err != nil {
		t.Fatal(err)
	}
	if f, err := os.ReadFile(x + "/payload/cgroup.events"); err != nil || !strings.Contains(string(f), "frozen 1") {
		t.Errorf("paused: %q, %v", f, err)
	}
	metric, err := b.task.Metrics(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(metric.Data)
	if err != nil {
		t.Fatal(err)
	}
	if m := v.(*stats.Metrics); m.Memory.UsageLimit != 128<<20 || m.Memory.Usage == 0 || m.Pids.Current != 1 || m.Pids.Limit != 50 {
		t.Errorf("metrics %v", m)
	}
	if err := b.task.Resume(b.ctx); err != nil {
		t.Fatal(err)
	}

	// An exec is in the payload and finds the limits; the device filter holds.
	spec, err := b.container.Spec(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	spec.Process.Args = sh("cat /proc/self/cgroup /sys/fs/cgroup/memory.max; (: </tmp/lc) 2>&1; cat /dev/null && echo null")
	var out bytes.Buffer
	p, err := b.task.Exec(b.ctx, "e", spec.Process, cio.NewCreator(cio.WithStreams(nil, &out, io.Discard)))
	if err != nil {
		t.Fatal(err)
	}
	exit, err := p.Wait(b.ctx)
	if err == nil {
		err = p.Start(b.ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	<-exit
	p.IO().Wait()
	if got := out.String(); !strings.HasPrefix(got, "0::/\n134217728\n") || !strings.Contains(got, "Operation not permitted") || !strings.HasSuffix(got, "null\n") {
		t.Errorf("exec: %q", got)
	}
	if _, err := p.Delete(b.ctx); err != nil {
		t.Error(err)
	}
	if err := b.task.Kill(b.ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	gone(t, "life")
}

// TestEnds: exact codes of containers that end at once, by either kind of
// options or by the path alone; nothing is left, not even of those that fail.
func TestEnds(t *testing.T) {
	cri := &runtimeoptions.Options{TypeUrl: "runtimeoptions.v1.Options", ConfigBody: []byte("SystemdCgroup = true\n")}
	for i := range 6 {
		options, id := []any{withSystemd, cri, nil}[i%3], fmt.Sprintf("end%d", i)
		b := start(t, id, options, sh(fmt.Sprintf("cut -d: -f3 /proc/self/cgroup; exit %d", 40+i)), nil)
		if code := b.wait(); code != uint32(40+i) || b.out.String() != strings.TrimPrefix(slices, "/sys/fs/cgroup")+"/cri-containerd-"+id+".scope/payload\n" {
			t.Errorf("code %d, %q", code, b.out.String())
		}
		gone(t, id)
	}
	if _, err := create(t, "fails", withSystemd, []string{"no-such-program"}, nil); !errdefs.IsNotFound(err) {
		t.Errorf("entrypoint not found: %v", err)
	}
	gone(t, "fails")
	if _, err := create(t, "badlimit", withSystemd, []string{"true"}, func(s *oci.Spec) { s.Linux.Resources.Unified = map[string]string{"no.such": "1"} }); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown unified key: %v", err)
	}
	gone(t, "badlimit")
	if _, err := create(t, "form", withSystemd, []string{"true"}, func(s *oci.Spec) { s.Linux.CgroupsPath = "/default/form" }); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "linux.cgroupsPath") {
		t.Errorf("a path of cgroupfs: %v", err)
	}
	// The default path, and cgroupfs on the same host.
	b := start(t, "default", withSystemd, sh("cut -d: -f3 /proc/self/cgroup"), func(s *oci.Spec) { s.Linux.CgroupsPath = "" })
	if code := b.wait(); code != 0 || b.out.String() != "/system.slice/containerd-pve-default--default.scope/payload\n" {
		t.Errorf("code %d, %q", code, b.out.String())
	}
	b = start(t, "fs", nil, sh("cut -d: -f3 /proc/self/cgroup"), func(s *oci.Spec) { s.Linux.CgroupsPath = "/default/fs" })
	if code := b.wait(); code != 0 || b.out.String() != "/default/fs/payload\n" {
		t.Errorf("code %d, %q", code, b.out.String())
	}
	if out, err := exec.Command("systemctl", "list-units", "--failed", "--no-legend", "*.scope").CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("failed units: %s, %v", out, err)
	}
}

// TestOOMInScope: a kill that leaves init alone is told. (Of init's own systemd
// may be the first to know, and take the scope with its counters away.)
func TestOOMInScope(t *testing.T) {
	limit := int64(32 << 20)
	limited := func(s *oci.Spec) { s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit} }
	if code := start(t, "oominit", withSystemd, []string{"tail", "/dev/zero"}, limited).wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	gone(t, "oominit")
	b, err := create(t, "oom", withSystemd, sh("tail /dev/zero; sleep 1000"), limited)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	found, failed := b.client.Subscribe(ctx, `topic=="/tasks/oom"`, `topic=="/test/subscribed"`)
	for ready := false; !ready; {
		if err := b.client.EventService().Publish(b.ctx, "/test/subscribed", &eventsapi.ContainerCreate{ID: "probe"}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-found:
			ready = true
		case <-time.After(100 * time.Millisecond):
		}
	}
	if err := b.task.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	for told := false; !told; {
		select {
		case e := <-found:
			if e.Topic != "/tasks/oom" {
				continue
			}
			v, err := typeurl.UnmarshalAny(e.Event)
			if err != nil {
				t.Fatal(err)
			}
			told = v.(*eventsapi.TaskOOM).ContainerID == "oom"
		case err := <-failed:
			t.Fatal(err)
		case <-time.After(20 * time.Second):
			t.Fatal("no OOM event")
		}
	}
	if err := b.task.Kill(b.ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	gone(t, "oom")
}

// TestShimKilledInScope: `delete` stops the scope.
func TestShimKilledInScope(t *testing.T) {
	b := start(t, "orphan", withSystemd, sh("sleep 1000 & sleep 1000"), nil)
	out, err := exec.Command("pgrep", "-f", "containerd-shim-pve-v2.* -id orphan").Output()
	if err != nil {
		t.Fatal("no shim")
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-b.exit:
	case <-time.After(time.Minute):
		t.Error("nobody told the end")
	}
	gone(t, "orphan")
	b.task = nil
}
