//go:build bed

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestOverlayfs(t *testing.T) {
	out, _, code := run(t, options{snapshotter: "overlayfs", args: sh("touch /x && grep ' / ' /proc/mounts | cut -d' ' -f1")})
	if code != 0 || out != "overlay\n" {
		t.Errorf("exit code %d, %q", code, out)
	}
}

func TestRootIsAClone(t *testing.T) {
	b := start(t, options{args: []string{"sleep", "1000"}})
	out, _, err := b.execIn(sh("grep ' / ' /proc/mounts | cut -d' ' -f1"), nil)
	if err != nil {
		t.Fatal(err)
	}
	origin, code := command("zfs", "get", "-H", "-o", "value", "origin", strings.TrimSpace(out))
	if code != 0 || !strings.Contains(origin, "@") {
		t.Errorf("root %q has the origin %q", out, origin)
	}
}

// TestStates walks a task through its life and checks what each call answers.
func TestStates(t *testing.T) {
	b, err := create(t, options{args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	is := func(want client.ProcessStatus) {
		t.Helper()
		if st, err := b.task.Status(b.ctx); err != nil || st.Status != want {
			t.Errorf("status %q, %v; want %q", st.Status, err, want)
		}
	}
	is(client.Created)
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", b.task.Pid())); err != nil {
		t.Error(err)
	}
	if err := b.task.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	is(client.Running)
	if err := b.task.Start(b.ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	if err := b.task.Resume(b.ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resume of a running task: %v", err)
	}
	if err := b.task.Pause(b.ctx); err != nil {
		t.Fatal(err)
	}
	is(client.Paused)
	if err := b.task.Resume(b.ctx); err != nil {
		t.Fatal(err)
	}
	is(client.Running)
	if _, err := b.task.Checkpoint(b.ctx); !errdefs.IsNotImplemented(err) {
		t.Errorf("checkpoint: %v", err)
	}
	limit := int64(50 << 20)
	if err := b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})); err != nil {
		t.Error(err)
	}
	metric, err := b.task.Metrics(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(metric.Data)
	if err != nil {
		t.Fatal(err)
	}
	if m := v.(*stats.Metrics); m.Memory.UsageLimit != 50<<20 || m.Memory.Usage == 0 || m.Pids.Current != 1 {
		t.Errorf("metrics: %v", m)
	}
	pids, err := b.task.Pids(b.ctx)
	if err != nil || len(pids) != 1 || pids[0].Pid != b.task.Pid() {
		t.Errorf("pids: %v, %v", pids, err)
	}
	if _, err := b.task.Delete(b.ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running task: %v", err)
	}
	if err := b.task.Kill(b.ctx, syscall.SIGKILL, client.WithKillAll); err != nil {
		t.Fatal(err)
	}
	<-b.exit
	is(client.Stopped)
	if err := b.task.Kill(b.ctx, syscall.SIGKILL); !errdefs.IsNotFound(err) {
		t.Errorf("kill of a stopped task: %v", err)
	}
	again, err := b.task.Wait(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st := <-again; st.ExitCode() != 137 {
		t.Errorf("wait after the end: %d", st.ExitCode())
	}
}

func TestEventsInOrder(t *testing.T) {
	b, err := create(t, options{id: "events", args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	found, failed := b.client.Subscribe(ctx, `topic~="/tasks/"`)
	time.Sleep(300 * time.Millisecond) // until the subscription is there
	if err := b.task.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.execIn([]string{"true"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.task.Kill(b.ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.wait()
	var topics []string
	for len(topics) < 6 {
		select {
		case e := <-found:
			topics = append(topics, strings.TrimPrefix(e.Topic, "/tasks/"))
		case err := <-failed:
			t.Fatal(err)
		case <-time.After(20 * time.Second):
			t.Fatalf("no more events after %v", topics)
		}
	}
	if got, want := strings.Join(topics, " "), "start exec-added exec-started exit exit delete"; got != want {
		t.Errorf("events %q, want %q", got, want)
	}
}

const big = 100 << 20

func TestOutputOf100MB(t *testing.T) {
	out, _, code := run(t, options{args: sh(fmt.Sprintf("head -c %d /dev/zero", big))})
	if code != 0 || len(out) != big {
		t.Errorf("exit code %d, %d bytes", code, len(out))
	}
}

// zeros is a reader of n bytes that calls end at its end.
type zeros struct {
	n   int
	end func()
}

func (z *zeros) Read(p []byte) (int, error) {
	if z.n == 0 {
		z.end()
		return 0, io.EOF
	}
	n := min(len(p), z.n)
	clear(p[:n])
	z.n -= n
	return n, nil
}

func TestInputOf100MB(t *testing.T) {
	started := make(chan struct{})
	var b *box
	in := &zeros{n: big, end: func() {
		<-started
		if err := b.task.CloseIO(b.ctx, client.WithStdinCloser); err != nil {
			t.Error(err)
		}
	}}
	b = start(t, options{args: []string{"wc", "-c"}, stdin: in})
	close(started)
	if code := b.wait(); code != 0 || b.out.String() != fmt.Sprintln(big) {
		t.Errorf("exit code %d, %q bytes", code, b.out)
	}
}

func TestTerminal(t *testing.T) {
	b, err := create(t, options{terminal: true, args: sh("test -t 0 && test -t 1 && tty; read x; stty size; exit 5"), stdin: readerFunc(func(p []byte) (int, error) {
		time.Sleep(2 * time.Second)
		return copy(p, "\n"), nil
	})})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.task.Resize(b.ctx, 91, 33); err != nil {
		t.Fatal(err)
	}
	if err := b.task.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(); code != 5 || !strings.Contains(b.out.String(), "/dev/") || !strings.Contains(b.out.String(), "33 91") {
		t.Errorf("exit code %d, output %q", code, b.out)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestLogFile(t *testing.T) {
	log := filepath.Join(t.TempDir(), "deep", "log")
	out, code := command("ctr", "run", "-d", "--runtime", ours, "--snapshotter", zfs, "--log-uri", "file://"+log, debian, "logfile", "sh", "-c", "echo out; echo err >&2")
	if code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() { command("ctr", "task", "rm", "-f", "logfile"); command("ctr", "container", "rm", "logfile") })
	eventually(t, 20*time.Second, "both lines in the log", func() bool {
		text, _ := os.ReadFile(log)
		return bytes.Contains(text, []byte("out\n")) && bytes.Contains(text, []byte("err\n"))
	})
}

func TestLogProgram(t *testing.T) {
	dir := t.TempDir()
	program, log := filepath.Join(dir, "logger"), filepath.Join(dir, "log")
	script := "#!/bin/sh\nexec 5>&-\n{ echo $CONTAINER_NAMESPACE/$CONTAINER_ID $1 $2; cat <&3; cat <&4; } >" + log + "\n"
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	out, code := command("ctr", "run", "--rm", "--runtime", ours, "--snapshotter", zfs, "--log-uri", "binary://"+program+"?k=v", debian, "logprogram", "sh", "-c", "echo out; echo err >&2")
	if code != 0 {
		t.Fatal(out)
	}
	text, err := os.ReadFile(log)
	if want := "default/logprogram k v\nout\nerr\n"; err != nil || string(text) != want {
		t.Errorf("%q, %v; want %q", text, err, want)
	}
}

func TestOOM(t *testing.T) {
	b, err := create(t, options{args: []string{"tail", "/dev/zero"}, spec: []oci.SpecOpts{oci.WithMemoryLimit(32 << 20)}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	found, failed := b.client.Subscribe(ctx, `topic=="/tasks/oom"`)
	time.Sleep(300 * time.Millisecond)
	if err := b.task.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(); code != 137 {
		t.Errorf("exit code %d", code)
	}
	select {
	case <-found:
	case err := <-failed:
		t.Fatal(err)
	case <-time.After(20 * time.Second):
		t.Error("no OOM event")
	}
}

func TestNamespaceByPath(t *testing.T) {
	if out, code := command("ip", "netns", "add", "bypath"); code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() { command("ip", "netns", "del", "bypath") })
	if out, code := command("ip", "-n", "bypath", "link", "add", "seen", "type", "dummy"); code != 0 {
		t.Fatal(out)
	}
	out, stderr, code := run(t, options{args: sh("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort"), spec: []oci.SpecOpts{
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/run/netns/bypath"}),
	}})
	if code != 0 || out != "lo\nseen\n" {
		t.Errorf("exit code %d, %q, %q", code, out, stderr)
	}
}

// TestErrors: what goes wrong is named, and nothing is left behind.
func TestErrors(t *testing.T) {
	run(t, options{args: []string{"true"}}) // whatever is made once is made now
	before := count(t)
	for _, c := range []struct {
		name string
		o    options
		want string
		is   func(error) bool
	}{
		{"entrypoint not found", options{args: []string{"no-such-program"}}, "no-such-program", errdefs.IsNotFound},
		{"entrypoint not executable", options{args: []string{"/etc/passwd"}}, "/etc/passwd", errdefs.IsPermissionDenied},
		{"cwd is a file", options{args: []string{"true"}, spec: []oci.SpecOpts{oci.WithProcessCwd("/etc/passwd")}}, "cwd", nil},
		{"source of a mount missing", options{args: []string{"true"}, spec: []oci.SpecOpts{oci.WithMounts([]specs.Mount{{Type: "bind", Source: "/no/such/source", Destination: "/mnt", Options: []string{"bind"}}})}}, "/no/such/source", nil},
		{"sysctl of the host", options{args: []string{"true"}, edit: func(s *oci.Spec) { s.Linux.Sysctl = map[string]string{"vm.swappiness": "1"} }}, "vm.swappiness", errdefs.IsInvalidArgument},
		{"user namespace", options{args: []string{"true"}, edit: func(s *oci.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}}, "namespaces", errdefs.IsNotImplemented},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := create(t, c.o)
			if err == nil {
				err = b.task.Start(b.ctx)
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !c.is(err) {
				t.Errorf("error %v", err)
			}
			t.Log(err)
		})
	}
	t.Run("lxc-start missing", func(t *testing.T) {
		path := "/usr/bin/lxc-start"
		if err := os.Rename(path, path+".away"); err != nil {
			t.Skip(err)
		}
		defer os.Rename(path+".away", path)
		_, err := create(t, options{args: []string{"true"}})
		if err == nil || !strings.Contains(err.Error(), "apt-get install lxc") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("id taken", func(t *testing.T) {
		start(t, options{id: "taken", args: []string{"sleep", "1000"}})
		out, code := command("ctr", "run", "--runtime", ours, "--snapshotter", zfs, debian, "taken", "true")
		if code == 0 || !strings.Contains(out, "already exists") {
			t.Errorf("status %d: %s", code, out)
		}
	})
	t.Run("image unknown", func(t *testing.T) {
		out, code := command("ctr", "run", "--runtime", ours, "--snapshotter", zfs, "localhost:5000/nothing:1", "x", "true")
		if code == 0 || !strings.Contains(out, "localhost:5000/nothing:1") {
			t.Errorf("status %d: %s", code, out)
		}
	})
	t.Run("pool missing", func(t *testing.T) {
		out, code := command("containerd-pve", "serve", "--dataset", "nopool/x", "--root", t.TempDir(), "--address", filepath.Join(t.TempDir(), "s"))
		if code == 0 || !strings.Contains(out, "nopool") || !strings.Contains(out, "zpool import") {
			t.Errorf("status %d: %s", code, out)
		}
	})
	same(t, before)
}

// same waits until the counts are as they were.
func same(t *testing.T, before map[string]int) {
	t.Helper()
	var differ []string
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(time.Second) {
		differ = nil
		for k, v := range count(t) {
			// Of udev's helpers some may have ended meanwhile.
			if before[k] < v || before[k] != v && k != "processes" {
				differ = append(differ, fmt.Sprintf("%s: %d before, %d now", k, before[k], v))
			}
		}
		if differ == nil {
			return
		}
		if time.Now().After(end) {
			t.Errorf("left behind: %s", strings.Join(differ, "; "))
			return
		}
	}
}

// TestShimKilled: containerd's `delete` cleans up after a shim that was killed.
func TestShimKilled(t *testing.T) {
	run(t, options{args: []string{"true"}}) // whatever is made once is made now
	before := count(t)
	t.Run("kill", func(t *testing.T) {
		b := start(t, options{id: "orphan", args: sh("sleep 1000 & sleep 1000")})
		out, code := command("pgrep", "-f", "containerd-shim-pve-v2.* -id orphan")
		if code != 0 {
			t.Fatal("no shim")
		}
		var pid int
		if _, err := fmt.Sscan(out, &pid); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		select {
		case <-b.exit:
		case <-time.After(30 * time.Second):
			t.Error("nobody told the end")
		}
		eventually(t, 30*time.Second, "the task is gone", func() bool {
			_, err := b.container.Task(b.ctx, nil)
			return errdefs.IsNotFound(err)
		})
		b.task = nil
		for _, dir := range []string{"/sys/fs/cgroup/default/orphan", "/var/lib/containerd-pve/lxc/default--orphan", "/run/containerd/io.containerd.runtime.v2.task/default/orphan"} {
			eventually(t, 30*time.Second, dir+" is gone", func() bool {
				_, err := os.Stat(dir)
				return errors.Is(err, os.ErrNotExist)
			})
		}
	})
	// The client's FIFOs are the client's, which never came to delete the task.
	files, _ := filepath.Glob("/run/containerd/fifo/*")
	for _, f := range files {
		os.RemoveAll(f)
	}
	same(t, before)
}

// TestNothingIsLeft runs and removes 200 containers in a row.
func TestNothingIsLeft(t *testing.T) {
	runs := 200
	if testing.Short() {
		runs = 10
	}
	one := func(i int) {
		if out, code := command("ctr", "run", "--rm", "--runtime", ours, "--snapshotter", zfs, busybox, fmt.Sprintf("leak%d", i), "true"); code != 0 {
			t.Fatal(out)
		}
	}
	one(0)
	before := count(t)
	for i := range runs {
		one(i + 1)
	}
	same(t, before)
}

// TestVersions: the same programs serve the older containerds, by Task version 2.
func TestVersions(t *testing.T) {
	t.Cleanup(func() {
		if out, code := command("stack", "up"); code != 0 {
			t.Log(out)
		}
	})
	for _, version := range []string{"2.2", "1.7"} {
		t.Run(version, func(t *testing.T) {
			if out, code := command("stack", "down"); code != 0 {
				t.Fatal(out)
			}
			if out, code := command("stack", "up", "--containerd", version); code != 0 {
				t.Fatal(out)
			}
			bin := map[string]string{"2.2": "/opt/containerd-2.2/bin", "1.7": "/opt/containerd-1.7/usr/bin"}[version]
			ctr := func(args ...string) (string, int) { return command(append([]string{bin + "/ctr"}, args...)...) }
			if out, _ := ctr("version"); !regexp.MustCompile(`Version: +v?` + regexp.QuoteMeta(version)).MatchString(out) {
				t.Fatalf("another containerd answers: %s", out)
			}
			if out, code := ctr("images", "pull", "--plain-http", "--snapshotter", zfs, debian); code != 0 {
				t.Fatal(out)
			}
			if out, code := ctr("run", "--rm", "--runtime", ours, "--snapshotter", zfs, debian, "old1", "sh", "-c", "echo old; exit 3"); code != 3 || out != "old\n" {
				t.Errorf("status %d, %q", code, out)
			}
			if out, code := ctr("run", "-d", "--runtime", ours, "--snapshotter", zfs, debian, "old2", "sleep", "1000"); code != 0 {
				t.Fatal(out)
			}
			if out, code := ctr("task", "exec", "--exec-id", "e", "old2", "sh", "-c", "echo in; exit 4"); code != 4 || out != "in\n" {
				t.Errorf("exec: status %d, %q", code, out)
			}
			if out, code := ctr("task", "kill", "-s", "KILL", "old2"); code != 0 {
				t.Error(out)
			}
			eventually(t, 20*time.Second, "the task is stopped", func() bool { out, _ := ctr("task", "ls"); return strings.Contains(out, "STOPPED") })
			if out, code := ctr("task", "rm", "old2"); code != 137 && code != 0 {
				t.Errorf("status %d: %s", code, out)
			}
			if out, code := ctr("container", "rm", "old2"); code != 0 {
				t.Error(out)
			}
		})
	}
}
