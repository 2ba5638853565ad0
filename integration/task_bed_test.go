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
	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
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
	// Before there is a task: containerd sends on what a shim reports later than it answers.
	all := listen(t)
	b := start(t, options{id: "events", args: []string{"sleep", "1000"}})
	if _, _, err := b.execIn([]string{"true"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.task.Kill(b.ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.wait()
	all.expect(t, "events", "create start exec-added exec-started exit exit delete")
}

// subscribed comes back when events arrive: a subscription has no answer of its own.
func subscribed(t *testing.T, b *box, found <-chan *events.Envelope) {
	t.Helper()
	for range 100 {
		if err := b.client.EventService().Publish(b.ctx, "/test/subscribed", &eventsapi.ContainerCreate{ID: "probe"}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-found:
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.Fatal("no event arrives")
}

func containerOf(t *testing.T, e typeurl.Any) string {
	t.Helper()
	v, err := typeurl.UnmarshalAny(e)
	if err != nil {
		t.Fatal(err)
	}
	if c, ok := v.(interface{ GetContainerID() string }); ok {
		return c.GetContainerID()
	}
	return ""
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
	eventually(t, time.Minute, "both lines in the log", func() bool {
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
	found, failed := b.client.Subscribe(ctx, `topic=="/tasks/oom"`, `topic=="/test/subscribed"`)
	subscribed(t, b, found)
	if err := b.task.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(); code != 137 {
		t.Errorf("exit code %d", code)
	}
	for {
		select {
		case e := <-found:
			if e.Topic == "/tasks/oom" {
				return
			}
		case err := <-failed:
			t.Fatal(err)
		case <-time.After(time.Minute):
			t.Fatal("no OOM event")
		}
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
		{"user namespace without mappings", options{args: []string{"true"}, edit: func(s *oci.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}}, "linux.uidMappings", errdefs.IsInvalidArgument},
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
	t.Run("no ZFS module", func(t *testing.T) {
		hidden := "mount -t tmpfs tmpfs /sys/module && exec containerd-pve serve --dataset tank/x --root /nowhere --address /nowhere/s"
		out, code := command("unshare", "-m", "sh", "-c", hidden)
		if code == 0 || !strings.Contains(out, "modprobe zfs") {
			t.Errorf("status %d: %s", code, out)
		}
		t.Log(out)
	})
	same(t, before)
}

// TestDaemonDown: what runs goes on without the snapshotter, what is new is
// refused with its socket's name, and all is well when it is back.
func TestDaemonDown(t *testing.T) {
	b := start(t, options{id: "survivor", args: []string{"sleep", "1000"}})
	pid, err := os.ReadFile("/run/stack/containerd-pve.pid")
	if err != nil {
		t.Fatal(err)
	}
	back := func() {
		if out, code := command("stack", "up"); code != 0 {
			t.Fatal(out)
		}
	}
	t.Cleanup(back)
	if out, code := command("kill", strings.Fields(string(pid))[0]); code != 0 {
		t.Fatal(out)
	}
	eventually(t, time.Minute, "the daemon has ended", func() bool {
		out, _ := command("stack", "status")
		return strings.Contains(out, "containerd-pve down")
	})
	ctrRun := func(id string) (string, int) {
		return command("ctr", "run", "--rm", "--runtime", ours, "--snapshotter", zfs, debian, id, "true")
	}
	out, code := ctrRun("refused")
	if code == 0 || !strings.Contains(out, "/run/containerd-pve/snapshotter.sock") {
		t.Errorf("status %d: %s", code, out)
	}
	t.Log(out)
	if out, _, err := b.execIn([]string{"echo", "still here"}, nil); err != nil || out != "still here\n" {
		t.Errorf("exec without the snapshotter: %q, %v", out, err)
	}
	back()
	eventually(t, time.Minute, "containerd has found the daemon again", func() bool {
		_, code := ctrRun("served")
		return code == 0
	})
}

// TestCtr: what `ctr run` can ask for, asked by ctr itself.
func TestCtr(t *testing.T) {
	if out, code := command("ip", "netns", "add", "withns"); code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() { command("ip", "netns", "del", "withns") })
	if out, code := command("ip", "-n", "withns", "link", "add", "seen", "type", "dummy"); code != 0 {
		t.Fatal(out)
	}
	dir := t.TempDir()
	const cgroupMount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"
	host, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		flags  []string
		script string
		want   string // the whole output, or with a * a part of it
	}{
		{[]string{"--with-ns", "network:/run/netns/withns"}, "grep -c seen /proc/net/dev", "1"},
		{[]string{"--seccomp"}, "grep ^Seccomp: /proc/self/status | tr -d '\t '; unshare -U true 2>&1", "*Seccomp:2"},
		{[]string{"--seccomp"}, "unshare -U true 2>&1", "*Operation not permitted"},
		{[]string{"--read-only"}, "touch /x 2>&1; touch /dev/shm/x && echo shm", "*Read-only file system"},
		{[]string{"--read-only"}, "touch /dev/shm/x && echo writable", "writable"},
		{[]string{"--privileged"}, "grep ^CapEff /proc/self/status | cut -f2; test -b /dev/vda -o -c /dev/kmsg && echo devices", "*devices"},
		{[]string{"--privileged"}, "mkdir /m && mount -t tmpfs x /m && umount /m && echo mounted", "mounted"},
		{[]string{"--net-host"}, "readlink /proc/self/ns/net", host},
		{[]string{"--cwd", "/made/on/demand"}, "pwd", "/made/on/demand"},
		{[]string{"--cwd", "/var/tmp"}, "pwd", "/var/tmp"},
		{[]string{"--env", "A=b c", "--env", "B="}, `echo "$A|$B"`, "b c|"},
		{[]string{"--user", "33:33"}, "id -u; id -g", "33\n33"},
		{[]string{"--hostname", "some-name"}, "cat /proc/sys/kernel/hostname", "some-name"},
		{[]string{"--memory-limit", "67108864", "--mount", cgroupMount}, "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max", "67108864"},
		{[]string{"--cpus", "0.5", "--mount", cgroupMount}, "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/cpu.max", "50000 100000"},
		{[]string{"--mount", "type=bind,src=" + dir + ",dst=/mnt,options=rbind:ro"}, "touch /mnt/x 2>&1", "*Read-only file system"},
		{[]string{"--mount", "type=tmpfs,dst=/mnt,options=size=1m"}, "stat -f -c %T /mnt", "tmpfs"},
		{[]string{"--device", "/dev/fuse"}, "test -c /dev/fuse && echo device", "device"},
		{[]string{"--cap-drop", "CAP_CHOWN"}, "chown 1 /etc/passwd 2>&1", "*Operation not permitted"},
		{[]string{"--cap-add", "CAP_SYS_TIME"}, "test $((0x$(grep CapEff /proc/self/status | cut -f2) >> 25 & 1)) = 1 && echo time", "time"},
		{[]string{"--allow-new-privs"}, "grep NoNewPrivs /proc/self/status | cut -f2", "0"},
		{nil, "grep NoNewPrivs /proc/self/status | cut -f2", "1"},
		{[]string{"--rlimit-nofile", "100"}, "ulimit -n", "100"},
		{[]string{"--pid-file", filepath.Join(dir, "pid")}, "true", ""},
	} {
		t.Run(strings.Join(c.flags, " ")+" "+c.script, func(t *testing.T) {
			args := append([]string{"ctr", "run", "--rm", "--runtime", ours, "--snapshotter", zfs}, c.flags...)
			out, code := command(append(args, debian, fmt.Sprintf("ctr%d", i), "sh", "-c", c.script)...)
			out = strings.TrimSuffix(out, "\n")
			part, isPart := strings.CutPrefix(c.want, "*")
			if isPart && !strings.Contains(out, part) || !isPart && (out != c.want || code != 0) {
				t.Errorf("status %d, %q; want %q", code, out, c.want)
			}
		})
	}
	if pid, err := os.ReadFile(filepath.Join(dir, "pid")); err != nil || len(pid) == 0 {
		t.Errorf("--pid-file: %q, %v", pid, err)
	}
	t.Run("-t", func(t *testing.T) {
		// ctr wants a terminal of its own: script makes one. It tells the size after the start.
		const sized = `test -t 0 || exit 1; until [ "$(stty size)" != "0 0" ]; do sleep 0.1; done; stty size; exit 9`
		out, code := command("script", "-qec",
			"stty rows 21 cols 77; ctr run --rm -t --runtime "+ours+" --snapshotter "+zfs+" "+debian+" ctrtty sh -c '"+sized+"'", "/dev/null")
		if code != 9 || !strings.Contains(out, "21 77") {
			t.Errorf("status %d, %q", code, out)
		}
	})
}

// same waits until the counts are as they were.
func same(t *testing.T, before map[string]int) {
	t.Helper()
	var differ []string
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(time.Second) {
		differ = nil
		for k, v := range count(t) {
			// Of udev's helpers some may have ended meanwhile, and idle connections been closed.
			if fewer := k == "processes" || strings.HasPrefix(k, "open files"); before[k] < v || before[k] != v && !fewer {
				differ = append(differ, fmt.Sprintf("%s: %d before, %d now", k, before[k], v))
			}
		}
		if differ == nil {
			return
		}
		if time.Now().After(end) {
			datasets, _ := command("zfs", "list", "-H", "-t", "all", "-o", "name,creation", "-r", pool())
			t.Errorf("left behind: %s; datasets:\n%s", strings.Join(differ, "; "), datasets)
			return
		}
	}
}

// TestShimKilled: containerd's `delete` cleans up after a shim that was killed.
func TestShimKilled(t *testing.T) {
	run(t, options{args: []string{"true"}}) // whatever is made once is made now
	removeFIFOs()
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
		case <-time.After(time.Minute):
			t.Error("nobody told the end")
		}
		eventually(t, time.Minute, "the task is gone", func() bool {
			_, err := b.container.Task(b.ctx, nil)
			return errdefs.IsNotFound(err)
		})
		b.task = nil
		for _, dir := range []string{"/sys/fs/cgroup/default/orphan", "/var/lib/containerd-pve/lxc/default--orphan", "/run/containerd/io.containerd.runtime.v2.task/default/orphan"} {
			eventually(t, time.Minute, dir+" is gone", func() bool {
				_, err := os.Stat(dir)
				return errors.Is(err, os.ErrNotExist)
			})
		}
	})
	removeFIFOs()
	same(t, before)
}

// removeFIFOs takes away the FIFOs of clients that never came to delete their
// task, because its shim was killed: they are the client's to remove.
func removeFIFOs() {
	files, _ := filepath.Glob("/run/containerd/fifo/*")
	for _, f := range files {
		os.RemoveAll(f)
	}
}

// TestNothingIsLeft runs and removes containers in a row (STRESS_CONTAINERS of them),
// with exit codes from 0 to 255 (each single one is tried by TestRestarts). What each of them left would be seen after a few.
func TestNothingIsLeft(t *testing.T) {
	runs := fromEnv(t, "STRESS_CONTAINERS", 40)
	// By the client: so many ctr would take longer than what is tried.
	c := connect(t)
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "default"), 20*time.Minute)
	defer cancel()
	image, err := c.GetImage(ctx, busybox)
	must(t, err)
	one := func(i int) {
		id, code := fmt.Sprintf("leak%d", i), uint32(i*255/runs)
		container, err := c.NewContainer(ctx, id, client.WithImage(image), client.WithSnapshotter(zfs), client.WithNewSnapshot(id, image),
			client.WithNewSpec(oci.WithImageConfig(image), oci.WithProcessArgs("sh", "-c", fmt.Sprintf("echo out; exit %d", code))), client.WithRuntime(ours, nil))
		must(t, err)
		var out bytes.Buffer
		task, err := container.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, &out, nil)))
		must(t, err)
		exit, err := task.Wait(ctx)
		must(t, err)
		must(t, task.Start(ctx))
		st := <-exit
		task.IO().Wait()
		if st.Error() != nil || st.ExitCode() != code || out.String() != "out\n" {
			t.Fatalf("run %d: exit code %d, %v, output %q", i, st.ExitCode(), st.Error(), out.String())
		}
		_, err = task.Delete(ctx)
		must(t, err)
		must(t, container.Delete(ctx, client.WithSnapshotCleanup))
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
	// Another containerd begins with nothing, and so do the tests after this one.
	t.Cleanup(func() { must(t, bringUp()) })
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
			if out, code := ctr("images", "pull", "--plain-http", "--snapshotter", zfs, busybox); code != 0 {
				t.Fatal(out)
			}
			listed, _ := ctr("snapshots", "--snapshotter", zfs, "ls")
			layer := regexp.MustCompile(`sha256:\S+`).FindString(listed)
			if out, code := ctr("snapshots", "--snapshotter", zfs, "diff", layer); code != 0 || len(out) < 1000 {
				t.Errorf("exporting %s of %s: status %d, %d bytes: %.200q", layer, listed, code, len(out), out)
			}
			if out, code := ctr("run", "--rm", "--runtime", ours, "--snapshotter", zfs, busybox, "old1", "sh", "-c", "echo old; exit 3"); code != 3 || out != "old\n" {
				t.Errorf("status %d, %q", code, out)
			}
			if out, code := ctr("run", "-d", "--runtime", ours, "--snapshotter", zfs, busybox, "old2", "sleep", "1000"); code != 0 {
				t.Fatal(out)
			}
			if out, code := ctr("task", "exec", "--exec-id", "e", "old2", "sh", "-c", "echo in; exit 4"); code != 4 || out != "in\n" {
				t.Errorf("exec: status %d, %q", code, out)
			}
			// 1.7 finds a shim again by what that wrote, 2.2 by what it wrote itself.
			for _, args := range [][]string{{"down"}, {"up", "--containerd", version}} {
				if out, code := command(append([]string{"stack"}, args...)...); code != 0 {
					t.Fatal(out)
				}
			}
			if out, code := ctr("task", "exec", "--exec-id", "e", "old2", "sh", "-c", "echo still; exit 5"); code != 5 || out != "still\n" {
				t.Errorf("after containerd's restart: status %d, %q", code, out)
			}
			if out, code := ctr("task", "kill", "-s", "KILL", "old2"); code != 0 {
				t.Error(out)
			}
			eventually(t, time.Minute, "the task is stopped", func() bool { out, _ := ctr("task", "ls"); return strings.Contains(out, "STOPPED") })
			if out, code := ctr("task", "rm", "old2"); code != 137 && code != 0 {
				t.Errorf("status %d: %s", code, out)
			}
			if out, code := ctr("container", "rm", "old2"); code != 0 {
				t.Error(out)
			}
		})
	}
}
