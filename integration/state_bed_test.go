//go:build bed

package integration

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/snapshotter/mounts"
)

// toolRun runs `containerd-pve container` and wants its status.
func toolRun(t *testing.T, status int, args ...string) string {
	t.Helper()
	out, code := command(append([]string{"containerd-pve", "container"}, args...)...)
	if code != status {
		t.Fatalf("container %v: %d, %s", args, code, out)
	}
	return out
}

// again is the task that a rollback began.
func (b *box) again() {
	b.t.Helper()
	before := b.task.Pid()
	task, err := b.container.Task(b.ctx, nil)
	must(b.t, err)
	if task.Pid() == before {
		b.t.Error("it is the task of before")
	}
	b.task = task
	st, err := task.Status(b.ctx)
	must(b.t, err)
	if st.Status != client.Running {
		b.t.Errorf("it is %s", st.Status)
	}
}

func (b *box) isFile(name, want string) {
	b.t.Helper()
	if out, _, err := b.execIn([]string{"cat", name}, nil); err != nil || strings.TrimSpace(out) != want {
		b.t.Errorf("%s: %q, %v, not %q", name, out, err, want)
	}
}

func (b *box) write(name, text string) {
	b.t.Helper()
	if out, code, err := b.execIn(sh("echo "+text+" >"+name), nil); err != nil || code != 0 {
		b.t.Fatalf("%s: %d, %s, %v", name, code, out, err)
	}
}

// TestState: a container's state is kept, and taken back to, by its id.
func TestState(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	b := start(t, options{id: "stateful", args: sh("echo begun; sleep 1000"), io: cio.LogFile(file)})
	b.write("/data", "1")
	toolRun(t, 0, "snapshot", "one", "stateful", "-d", "before it breaks")
	b.write("/data", "2")
	toolRun(t, 0, "snapshot", "two", "stateful")
	b.isFile("/data", "2") // it runs on
	var list []struct{ Name, Description, Image string }
	must(t, json.Unmarshal([]byte(toolRun(t, 0, "snapshots", "stateful", "--format", "json")), &list))
	if len(list) != 2 || list[0].Name != "one" || list[0].Description != "before it breaks" || list[1].Name != "two" || !strings.HasPrefix(list[0].Image, debian+"@sha256:") {
		t.Errorf("%+v", list)
	}
	if out := toolRun(t, 0, "snapshots", "stateful"); !strings.Contains(out, "before it breaks") {
		t.Errorf("table: %s", out)
	}
	b.write("/added", "3")
	for _, name := range []string{"one", "two"} {
		out := toolRun(t, 0, "diff", name, "stateful")
		if strings.Contains(out, "C /data\n") != (name == "one") || !strings.Contains(out, "A /added\n") {
			t.Errorf("what changed since %s:\n%s", name, out)
		}
	}
	if out := toolRun(t, 0, "diff", "two", "stateful", "--format", "json"); !strings.Contains(out, `"path": "/added"`) {
		t.Errorf("as JSON: %s", out)
	}
	toolRun(t, 0, "rollback", "two", "stateful")
	b.again()
	b.isFile("/data", "2")
	if out := toolRun(t, 0, "diff", "two", "stateful"); strings.Contains(out, "/added") {
		t.Errorf("what changed since the rollback:\n%s", out)
	}
	for _, refused := range [][]string{
		{"rollback", "one", "stateful"}, {"rollback", "none", "stateful"}, {"snapshot", "one", "stateful"}, {"snapshot", "a b", "stateful"}, {"snapshot", "snapshot", "stateful"},
		{"rm-snapshot", "none", "stateful"}, {"diff", "none", "stateful"}, {"diff", "one", "stateful", "--format", "xml"}, {"snapshot", "x1", "none"}, {"snapshot", "x1", "stateful", "-n", "other"}, {"snapshots", "stateful", "--format", "xml"}, {"snapshot", "x1"},
	} {
		t.Log(refused, toolRun(t, 1, refused...))
	}
	// Its configuration is taken back as well.
	spec, err := b.container.Spec(b.ctx)
	must(t, err)
	spec.Process.Env = append(spec.Process.Env, "LATER=1")
	must(t, b.container.Update(b.ctx, client.UpdateContainerOpts(client.WithSpec(spec))))
	toolRun(t, 0, "rollback", "one", "stateful", "--force")
	b.again()
	b.isFile("/data", "1")
	if env, _, err := b.execIn([]string{"cat", "/proc/1/environ"}, nil); err != nil || strings.Contains(env, "LATER") || !strings.Contains(env, "PATH=") {
		t.Errorf("its environment: %q, %v", env, err)
	}
	eventually(t, time.Minute, "the output of three tasks is there", func() bool {
		text, err := os.ReadFile(file)
		return err == nil && string(text) == "begun\nbegun\nbegun\n"
	})
	// One that does not run is not started.
	must(t, b.task.Pause(b.ctx))
	toolRun(t, 0, "snapshot", "paused", "stateful")
	if st, err := b.task.Status(b.ctx); err != nil || st.Status != client.Paused {
		t.Errorf("a paused one is %v, %v", st, err)
	}
	must(t, b.task.Resume(b.ctx))
	if _, err := b.task.Delete(b.ctx, client.WithProcessKill); err != nil {
		t.Fatal(err)
	}
	toolRun(t, 0, "rollback", "paused", "stateful")
	if _, err := b.container.Task(b.ctx, nil); err == nil {
		t.Error("a task was begun where none ran")
	}
	b.task = nil
	toolRun(t, 0, "rm-snapshot", "paused", "stateful")
	dataset := datasetOf(t, b)
	if out, code := command("zfs", "list", "-H", "-o", "name", "-t", "snapshot", "-d", "1", dataset); code != 0 || out != dataset+"@one\n" {
		t.Errorf("snapshots: %s", out)
	}
	// What is left goes with the container.
	b.remove()
	eventually(t, time.Minute, "the dataset is destroyed", func() bool {
		collect(t)
		_, code := command("zfs", "list", dataset)
		return code != 0
	})

	o := start(t, options{id: "overlay", snapshotter: "overlayfs", args: []string{"sleep", "1000"}})
	if out := toolRun(t, 1, "snapshot", "one", "overlay"); !strings.Contains(out, "overlayfs") {
		t.Errorf("another snapshotter: %s", out)
	}
	o.remove()
}

// TestRollbackInterrupted: what a rollback left in the middle is not started, by whatever starts
// containers, until the same command ended it.
func TestRollbackInterrupted(t *testing.T) {
	b := start(t, options{id: "halfway", args: []string{"sleep", "1000"}})
	b.write("/data", "1")
	toolRun(t, 0, "snapshot", "one", "halfway")
	b.write("/data", "2")
	if _, err := b.task.Delete(b.ctx, client.WithProcessKill); err != nil {
		t.Fatal(err)
	}
	b.task = nil
	// As one that was killed after its first step.
	must(t, b.container.Update(b.ctx, func(_ context.Context, _ *client.Client, c *containers.Container) error {
		var spec specs.Spec
		if err := json.Unmarshal(c.Spec.GetValue(), &spec); err != nil {
			return err
		}
		spec.Annotations = map[string]string{"io.containerd.pve.rollback": "one"}
		var err error
		c.Spec, err = typeurl.MarshalAny(&spec)
		return err
	}))
	const way = "`containerd-pve container rollback one halfway`"
	if out, code := command("ctr", "task", "start", "-d", "halfway"); code == 0 || !strings.Contains(out, way) {
		t.Errorf("a task: %d, %s", code, out)
	}
	for _, args := range [][]string{{"snapshot", "two", "halfway"}, {"rm-snapshot", "one", "halfway"}} {
		if out := toolRun(t, 1, args...); !strings.Contains(out, way) {
			t.Errorf("%v: %s", args, out)
		}
	}
	toolRun(t, 0, "rollback", "one", "halfway")
	if out, code := command("ctr", "task", "start", "-d", "halfway"); code != 0 {
		t.Errorf("a task afterwards: %s", out)
	}
	task, err := b.container.Task(b.ctx, nil)
	must(t, err)
	b.task = task
	b.isFile("/data", "1")
	b.remove()
}

func datasetOf(t *testing.T, b *box) string {
	t.Helper()
	info, err := b.container.Info(b.ctx)
	must(t, err)
	m, err := b.client.SnapshotService(info.Snapshotter).Mounts(b.ctx, info.SnapshotKey)
	must(t, err)
	dataset, ok := mounts.Dataset(m[0])
	if !ok {
		t.Fatalf("mounts %+v", m)
	}
	return dataset
}

// TestProxmoxState: on a node of Proxmox a state is one of Proxmox's snapshots as well, with the limits of then.
func TestProxmoxState(t *testing.T) {
	proxmox(t)
	b := start(t, options{id: "stateful", args: []string{"sleep", "1000"}, edit: limitMemory(64 << 20)})
	b.write("/data", "1")
	toolRun(t, 0, "snapshot", "one", "100", "-d", "small") // by its VMID
	conf := confOf(t, 100)
	for _, want := range []string{"\nparent: one\n", "\n\n[one]\n#small\n", "\nsnaptime: "} {
		if !strings.Contains(conf, want) {
			t.Errorf("the conf lacks %q:\n%s", want, conf)
		}
	}
	b.write("/data", "2")
	memory := int64(128 << 20)
	must(t, b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory, Swap: &memory}})))
	toolRun(t, 0, "snapshot", "two", "stateful")
	if out := toolRun(t, 1, "rollback", "one", "stateful"); !strings.Contains(out, "two") {
		t.Errorf("newer ones: %s", out)
	}
	toolRun(t, 0, "rollback", "one", "stateful", "--force")
	b.again()
	b.isFile("/data", "1")
	conf = confOf(t, 100)
	if !strings.Contains(conf, "\nmemory: 64\n") || strings.Contains(conf, "[two]") || !strings.Contains(conf, "\nparent: one\n") {
		t.Errorf("the conf:\n%s", conf)
	}
	if got, err := os.ReadFile("/sys/fs/cgroup/default/stateful/payload/memory.max"); err != nil || strings.TrimSpace(string(got)) != "67108864" {
		t.Errorf("its limit is %q, %v", got, err)
	}
	if noConf(100) || !noConf(101) {
		t.Error("it has another VMID")
	}
	// Proxmox's own, by its tool: a section, and a snapshot without our mark.
	_, section, _ := strings.Cut(conf, "\n[one]\n#small\n")
	must(t, os.WriteFile("/etc/pve/lxc/100.conf", []byte(conf+"\n[theirs]\n"+section), 0o640))
	if out, code := command("zfs", "snapshot", volumes()+"/subvol-100-disk-0@theirs"); code != 0 {
		t.Fatal(out)
	}
	if out := toolRun(t, 1, "rm-snapshot", "theirs", "100"); !strings.Contains(out, "pct delsnapshot") {
		t.Errorf("one of Proxmox's: %s", out)
	}
	var names []string
	for line := range strings.Lines(toolRun(t, 0, "snapshots", "100")) {
		names = append(names, strings.Fields(line)[0])
	}
	if !slices.Equal(names, []string{"NAME", "one", "theirs"}) {
		t.Errorf("snapshots %v", names)
	}
	toolRun(t, 0, "rollback", "theirs", "100")
	b.again()
	b.remove()
	eventually(t, time.Minute, "the conf is gone", func() bool { return noConf(100) })
}
