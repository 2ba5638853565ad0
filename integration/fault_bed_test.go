//go:build bed

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// journal holds the topics of events, by container.
type journal struct {
	mu     sync.Mutex
	topics map[string][]string
}

// listen records the events of all tasks until the test ends.
func listen(t *testing.T) *journal {
	t.Helper()
	b := &box{t: t, ctx: background(t), client: connect(t)}
	ctx, cancel := context.WithCancel(b.ctx)
	t.Cleanup(cancel)
	found, failed := b.client.Subscribe(ctx)
	subscribed(t, b, found)
	j := &journal{topics: map[string][]string{}}
	go func() {
		for {
			select {
			case e := <-found:
				if topic, ok := strings.CutPrefix(e.Topic, "/tasks/"); ok {
					id := containerOf(t, e.Event)
					j.mu.Lock()
					j.topics[id] = append(j.topics[id], topic)
					j.mu.Unlock()
				}
			case <-failed:
				return
			}
		}
	}()
	return j
}

// expect waits for a container's events.
func (j *journal) expect(t *testing.T, id, want string) {
	t.Helper()
	var got string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		j.mu.Lock()
		got = strings.Join(j.topics[id], " ")
		j.mu.Unlock()
		if got == want {
			return
		}
	}
	t.Errorf("events of %s: %q, want %q", id, got, want)
}

// calm are the counts once what earlier containers have left to containerd's
// garbage collection is gone.
func calm(t *testing.T) map[string]int {
	t.Helper()
	last := count(t)
	for range 20 {
		time.Sleep(time.Second)
		now := count(t)
		if now["datasets"] == last["datasets"] && now["runtime files"] == last["runtime files"] {
			return now
		}
		last = now
	}
	return last
}

// oneMore runs and removes one container more, so that what is still to be
// removed is: a dataset that was busy is tried again with the next removal.
func oneMore(t *testing.T) {
	t.Helper()
	t.Run("one more", func(t *testing.T) { run(t, options{image: busybox, args: []string{"true"}}) })
}

// bystander starts a container that has nothing to do with what happens to the
// others; the function returned checks that nothing happened to it.
func bystander(t *testing.T) func() {
	t.Helper()
	b := start(t, options{args: []string{"sleep", "10000"}})
	pid := b.task.Pid()
	return func() {
		t.Helper()
		b.ctx = background(t)
		if st, err := b.task.Status(b.ctx); err != nil || st.Status != client.Running || b.task.Pid() != pid {
			t.Errorf("the bystander: %v, %v", st, err)
		}
		if out, code, err := b.execIn([]string{"echo", "untouched"}, nil); err != nil || code != 0 || out != "untouched\n" {
			t.Errorf("exec in the bystander: %q, %d, %v", out, code, err)
		}
	}
}

// shimOf is the pid of the shim that serves the container.
func shimOf(t *testing.T, id string) int {
	t.Helper()
	out, _ := command("pgrep", "-f", "containerd-shim-pve-v2.* -id "+id+"( |$)")
	pid, err := strconv.Atoi(strings.Fields(out + " none")[0])
	if err != nil {
		t.Fatalf("no shim of %s: %q", id, out)
	}
	return pid
}

// monitorOf is the pid of the container's lxc-start.
func monitorOf(t *testing.T, id string) int {
	t.Helper()
	data, err := os.ReadFile("/sys/fs/cgroup/containerd-pve/monitor/default--" + id + "/cgroup.procs")
	must(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	must(t, err)
	return pid
}

func send(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	must(t, syscall.Kill(pid, sig))
}

// exitsWith is a program that ends with the code when it gets SIGTERM.
func exitsWith(code int) []string {
	return sh(fmt.Sprintf(`trap "exit %d" TERM; echo ready; while :; do sleep 0.1; done`, code))
}

// ready waits for the word of exitsWith.
func (b *box) ready() {
	b.t.Helper()
	eventually(b.t, time.Minute, b.container.ID()+" is ready", func() bool { return strings.Contains(b.out.String(), "ready") })
}

// traces are what a container has on the host while it is there.
func traces(id string) []string {
	return []string{"/sys/fs/cgroup/default/" + id, "/sys/fs/cgroup/containerd-pve/monitor/default--" + id,
		"/var/lib/containerd-pve/lxc/default--" + id, "/run/containerd/io.containerd.runtime.v2.task/default/" + id}
}

// gone waits until containerd knows no task any more and no trace is left.
func (b *box) gone() {
	b.t.Helper()
	id := b.container.ID()
	eventually(b.t, time.Minute, "the task of "+id+" is gone", func() bool {
		_, err := b.container.Task(b.ctx, nil)
		return errdefs.IsNotFound(err)
	})
	for _, path := range traces(id) {
		eventually(b.t, time.Minute, path+" is gone", func() bool { _, err := os.Stat(path); return errors.Is(err, os.ErrNotExist) })
	}
	if b.task != nil {
		b.task.IO().Cancel()
		b.task.IO().Close() // the client's FIFOs are the client's to remove
	}
	b.task = nil
}

// TestKilled: a part of a container is taken away, in each state. The end is
// known by event, by Wait and by State, with the right code; nothing is left.
func TestKilled(t *testing.T) {
	oneMore(t)
	untouched := bystander(t)
	before := calm(t)
	for _, c := range []struct {
		name   string
		args   []string
		kind   string // created, paused or "" for running
		fault  func(t *testing.T, b *box)
		code   uint32
		gone   bool // the task too, without a delete
		events string
	}{
		{name: "monitor by SIGKILL", fault: func(t *testing.T, b *box) { send(t, monitorOf(t, b.container.ID()), syscall.SIGKILL) },
			code: 137, events: "create start exit delete"},
		// lxc-start hands it on to init.
		{name: "monitor by SIGTERM", args: exitsWith(7), fault: func(t *testing.T, b *box) { send(t, monitorOf(t, b.container.ID()), syscall.SIGTERM) },
			code: 7, events: "create start exit delete"},
		// It cannot tell the end, so it is not waited for.
		{name: "init below a stopped monitor", fault: func(t *testing.T, b *box) {
			send(t, monitorOf(t, b.container.ID()), syscall.SIGSTOP)
			send(t, int(b.task.Pid()), syscall.SIGKILL)
		}, code: 137, events: "create start exit delete"},
		{name: "monitor before start", kind: "created", fault: func(t *testing.T, b *box) { send(t, monitorOf(t, b.container.ID()), syscall.SIGKILL) },
			code: 137, events: "create exit delete"},
		{name: "pve-init before start", kind: "created", fault: func(t *testing.T, b *box) { send(t, int(b.task.Pid()), syscall.SIGKILL) },
			code: 137, events: "create exit delete"},
		{name: "lxc-stop behind our back", fault: func(t *testing.T, b *box) {
			if out, code := command("lxc-stop", "-k", "-P", "/var/lib/containerd-pve/lxc", "-n", "default--"+b.container.ID()); code != 0 {
				t.Error(out)
			}
		}, code: 137, events: "create start exit delete"},
		{name: "lxc-stop of a paused one", kind: "paused", fault: func(t *testing.T, b *box) {
			if out, code := command("lxc-stop", "-k", "-P", "/var/lib/containerd-pve/lxc", "-n", "default--"+b.container.ID()); code != 0 {
				t.Error(out)
			}
		}, code: 137, events: "create start paused exit delete"},
		{name: "shim before start", kind: "created", fault: func(t *testing.T, b *box) { send(t, shimOf(t, b.container.ID()), syscall.SIGKILL) },
			code: 137, gone: true, events: "create exit delete"},
		{name: "shim of a paused one", kind: "paused", fault: func(t *testing.T, b *box) { send(t, shimOf(t, b.container.ID()), syscall.SIGKILL) },
			code: 137, gone: true, events: "create start paused exit delete"},
		{name: "shim and monitor at once", fault: func(t *testing.T, b *box) {
			shim, monitor := shimOf(t, b.container.ID()), monitorOf(t, b.container.ID())
			send(t, shim, syscall.SIGKILL)
			send(t, monitor, syscall.SIGKILL)
		}, code: 137, gone: true, events: "create start exit delete"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := "killed-" + strings.ReplaceAll(c.name, " ", "-")
			if c.args == nil {
				c.args = []string{"sleep", "1000"}
			}
			j := listen(t)
			b, err := create(t, options{id: id, args: c.args})
			must(t, err)
			if c.kind != "created" {
				must(t, b.task.Start(b.ctx))
			}
			if c.kind == "paused" {
				must(t, b.task.Pause(b.ctx))
			}
			if c.args[0] != "sleep" {
				b.ready()
			}
			c.fault(t, b)
			select {
			case st := <-b.exit:
				if st.ExitCode() != c.code && st.Error() == nil {
					t.Errorf("exit code %d, want %d", st.ExitCode(), c.code)
				}
				if st.Error() != nil && !c.gone {
					t.Errorf("wait: %v", st.Error())
				}
			case <-time.After(time.Minute):
				t.Fatal("nobody told the end")
			}
			if c.gone {
				b.gone()
			} else {
				if st, err := b.task.Status(b.ctx); err != nil || st.Status != client.Stopped || st.ExitStatus != c.code {
					t.Errorf("status %+v, %v", st, err)
				}
				if err := b.task.Start(b.ctx); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("start of what has ended: %v", err)
				}
				if st, err := b.task.Delete(b.ctx); err != nil || st.ExitCode() != c.code {
					t.Errorf("delete: %v, %v", st, err)
				}
				b.gone()
			}
			j.expect(t, id, c.events)
		})
	}
	oneMore(t)
	same(t, before)
	untouched()
}

// restartContainerd ends the daemon by the signal and starts it again; down is called in between.
func restartContainerd(t *testing.T, sig syscall.Signal, down func()) {
	t.Helper()
	text, err := os.ReadFile("/run/stack/containerd.pid")
	must(t, err)
	pid, err := strconv.Atoi(strings.Fields(string(text))[0])
	must(t, err)
	send(t, pid, sig)
	eventually(t, time.Minute, "containerd has ended", func() bool { return syscall.Kill(pid, 0) != nil })
	down()
	if out, code := command("stack", "up"); code != 0 {
		t.Fatal(out)
	}
}

// TestContainerdRestart: containerd goes and comes back while tasks are in each
// state, and some end meanwhile. All is as if it had never been away.
func TestContainerdRestart(t *testing.T) {
	oneMore(t)
	before := calm(t)
	before["open files of containerd"] = 1 << 20 // it is another one afterwards
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			id := func(name string) string { return fmt.Sprintf("restart-%d-%s", sig, name) }
			created, err := create(t, options{id: id("created"), args: exitsWith(1)})
			must(t, err)
			running := start(t, options{id: id("running"), args: exitsWith(5)})
			paused := start(t, options{id: id("paused"), args: []string{"sleep", "1000"}})
			must(t, paused.task.Pause(paused.ctx))
			stopped := start(t, options{id: id("stopped"), args: sh("exit 3")})
			<-stopped.exit
			exits := start(t, options{id: id("exits"), args: exitsWith(9)})
			killed := start(t, options{id: id("killed"), args: []string{"sleep", "1000"}})
			orphan := start(t, options{id: id("orphan"), args: []string{"sleep", "1000"}})
			running.ready()
			exits.ready()
			restartContainerd(t, sig, func() {
				send(t, int(exits.task.Pid()), syscall.SIGTERM)
				send(t, int(killed.task.Pid()), syscall.SIGKILL)
				send(t, shimOf(t, id("orphan")), syscall.SIGKILL)
			})
			state := func(b *box, want client.ProcessStatus, code uint32) {
				t.Helper()
				var st client.Status
				var err error
				for range 50 { // the client's connection is made anew
					if st, err = b.task.Status(b.ctx); err == nil || !errdefs.IsUnavailable(err) {
						break
					}
					time.Sleep(100 * time.Millisecond)
				}
				if err != nil || st.Status != want || st.ExitStatus != code {
					t.Errorf("%s: %+v, %v; want %s, %d", b.container.ID(), st, err, want, code)
				}
				if b.exit, err = b.task.Wait(b.ctx); err != nil {
					t.Errorf("%s: wait: %v", b.container.ID(), err)
				}
			}
			state(created, client.Created, 0)
			state(running, client.Running, 0)
			state(paused, client.Paused, 0)
			state(stopped, client.Stopped, 3)
			state(exits, client.Stopped, 9)
			state(killed, client.Stopped, 137)
			orphan.gone()
			if t.Failed() {
				return
			}
			must(t, created.task.Start(created.ctx))
			created.ready() // its output still arrives
			for _, b := range []*box{created, running} {
				if out, code, err := b.execIn(sh("echo in; exit 4"), nil); err != nil || code != 4 || out != "in\n" {
					t.Errorf("exec in %s: %q, %d, %v", b.container.ID(), out, code, err)
				}
			}
			must(t, created.task.Kill(created.ctx, syscall.SIGTERM))
			must(t, running.task.Kill(running.ctx, syscall.SIGTERM))
			must(t, paused.task.Resume(paused.ctx))
			must(t, paused.task.Kill(paused.ctx, syscall.SIGKILL))
			for b, want := range map[*box]uint32{created: 1, running: 5, paused: 137, stopped: 3, exits: 9, killed: 137} {
				if code := b.wait(); code != want {
					t.Errorf("%s: exit code %d, want %d", b.container.ID(), code, want)
				}
			}
		})
	}
	oneMore(t)
	same(t, before)
}

// nowhere is stdio whose output is a FIFO that nobody reads.
type nowhere struct{ fifo string }

func (n nowhere) creator(string) (cio.IO, error) {
	return n, unix.Mkfifo(n.fifo, 0o600)
}
func (n nowhere) Config() cio.Config { return cio.Config{Stdout: n.fifo, Stderr: n.fifo} }
func (n nowhere) Cancel()            {}
func (n nowhere) Wait()              {}
func (n nowhere) Close() error       { return os.Remove(n.fifo) }

// TestUnruly: containers that do what they can to be a nuisance. Their end is
// known, nothing is left of them, and the others do not notice.
func TestUnruly(t *testing.T) {
	oneMore(t)
	untouched := bystander(t)
	before := calm(t)
	t.Run("forks without end", func(t *testing.T) {
		b := start(t, options{args: sh(`f() { while :; do f & done; }; f 2>/dev/null & exec sleep 1000`), spec: []oci.SpecOpts{oci.WithPidsLimit(50)}})
		eventually(t, time.Minute, "the limit is reached", func() bool {
			data, _ := os.ReadFile("/sys/fs/cgroup/default/" + b.container.ID() + "/payload/pids.events")
			return strings.HasPrefix(string(data), "max ") && !strings.HasPrefix(string(data), "max 0\n")
		})
		untouched()
		if _, err := b.task.Pids(b.ctx); err != nil {
			t.Errorf("pids: %v", err)
		}
		must(t, b.task.Kill(b.ctx, syscall.SIGKILL))
		if code := b.wait(); code != 137 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("ignores SIGTERM", func(t *testing.T) {
		b := start(t, options{args: sh(`trap "" TERM HUP INT; echo ready; while :; do sleep 1; done`)})
		b.ready()
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT} {
			must(t, b.task.Kill(b.ctx, sig))
		}
		if out, _, err := b.execIn([]string{"echo", "lives"}, nil); err != nil || out != "lives\n" {
			t.Errorf("%q, %v", out, err)
		}
		must(t, b.task.Kill(b.ctx, syscall.SIGKILL))
		if code := b.wait(); code != 137 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("writes to a client that went away", func(t *testing.T) {
		fifo := filepath.Join(t.TempDir(), "fifo")
		b := start(t, options{args: []string{"yes"}, io: nowhere{fifo}.creator})
		// A reader comes, takes some, and goes.
		r, err := os.Open(fifo)
		must(t, err)
		if _, err := r.Read(make([]byte, 100)); err != nil {
			t.Error(err)
		}
		r.Close()
		if st, err := b.task.Status(b.ctx); err != nil || st.Status != client.Running {
			t.Errorf("%v, %v", st, err)
		}
		if out, code, err := b.execIn([]string{"echo", "lives"}, nil); err != nil || code != 0 || out != "lives\n" {
			t.Errorf("exec: %q, %d, %v", out, code, err)
		}
		must(t, b.task.Kill(b.ctx, syscall.SIGKILL))
		begin := time.Now()
		if code := b.wait(); code != 137 {
			t.Errorf("exit code %d", code)
		}
		if took := time.Since(begin); took > 40*time.Second {
			t.Errorf("output that nobody takes held the delete for %s", took)
		}
	})
	t.Run("fills its log's disk", func(t *testing.T) {
		dir := t.TempDir()
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"))
		defer unix.Unmount(dir, unix.MNT_DETACH)
		b := start(t, options{args: sh("head -c 3000000 /dev/zero; head -c 1000000 /dev/zero >&2; exit 4"), io: cio.LogFile(filepath.Join(dir, "log"))})
		if code := b.wait(); code != 4 {
			t.Errorf("exit code %d", code)
		}
		if st, err := os.Stat(filepath.Join(dir, "log")); err != nil || st.Size() < 4096 {
			t.Errorf("log: %v, %v", st, err)
		}
	})
	t.Run("its root is held busy", func(t *testing.T) {
		b := start(t, options{id: "busy", args: []string{"sleep", "1000"}})
		holder := exec.Command("sleep", "1000")
		holder.Dir = "/run/containerd/io.containerd.runtime.v2.task/default/busy/rootfs/etc"
		must(t, holder.Start())
		defer func() {
			_ = holder.Process.Kill()
			_ = holder.Wait()
		}()
		must(t, b.task.Kill(b.ctx, syscall.SIGKILL))
		if code := b.wait(); code != 137 {
			t.Errorf("exit code %d", code)
		}
		b.gone()
	})
	t.Run("leaves daemons behind", func(t *testing.T) {
		b := start(t, options{args: []string{"sleep", "1000"}})
		spec, err := b.container.Spec(b.ctx)
		must(t, err)
		spec.Process.Args = sh("setsid sleep 1000 & exit 6")
		p, err := b.task.Exec(b.ctx, "parent", spec.Process, cio.NewCreator(cio.WithStreams(nil, io.Discard, io.Discard)))
		must(t, err)
		exit, err := p.Wait(b.ctx)
		must(t, err)
		must(t, p.Start(b.ctx))
		if st := <-exit; st.ExitCode() != 6 {
			t.Errorf("exit code %d", st.ExitCode())
		}
		begin := time.Now()
		if _, err := p.Delete(b.ctx); err != nil {
			t.Error(err)
		}
		if took := time.Since(begin); took > 30*time.Second {
			t.Errorf("a daemon that holds the exec's output held its delete for %s", took)
		}
		if pids, err := b.task.Pids(b.ctx); err != nil || len(pids) != 2 {
			t.Errorf("pids: %v, %v", pids, err)
		}
		must(t, b.task.Kill(b.ctx, syscall.SIGKILL))
		if code := b.wait(); code != 137 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("leaves daemons behind in the host's pid namespace", func(t *testing.T) {
		_, _, code := run(t, options{args: sh("setsid sleep 1000 >/dev/null 2>&1 & exit 8"), spec: []oci.SpecOpts{oci.WithHostNamespace(specs.PIDNamespace)}})
		if code != 8 {
			t.Errorf("exit code %d", code)
		}
	})
	oneMore(t)
	same(t, before)
	untouched()
}

// attempt makes a container, starts it, runs an exec in it and removes it, as
// far as it gets. It says how far that was.
func attempt(t *testing.T, id string, runtime any) (reached string) {
	t.Helper()
	ctx, c := background(t), connect(t)
	image, err := c.GetImage(ctx, busybox)
	must(t, err)
	container, err := c.NewContainer(ctx, id, client.WithSnapshotter(zfs), client.WithNewSnapshot(id, image),
		client.WithNewSpec(oci.WithImageConfig(image), oci.WithProcessArgs("sleep", "1000")), client.WithRuntime(ours, runtime))
	if err != nil {
		return "nothing: " + err.Error()
	}
	b := &box{t: t, ctx: ctx, client: c, container: container}
	defer func() {
		b.remove()
		for _, path := range traces(id) {
			eventually(t, time.Minute, path+" is gone", func() bool { _, err := os.Stat(path); return errors.Is(err, os.ErrNotExist) })
		}
	}()
	if b.task, err = container.NewTask(ctx, cio.NullIO); err != nil {
		b.task = nil
		return "container: " + err.Error()
	}
	if err := b.task.Start(ctx); err != nil {
		return "created: " + err.Error()
	}
	out, code, err := b.execIn([]string{"echo", "x"}, nil)
	if err != nil || code != 0 || out != "x\n" {
		return fmt.Sprintf("running: %q, %d, %v", out, code, err)
	}
	return "exec"
}

// TestShortages: the host runs out of something at every point of a container's
// life. What cannot be done is an error; nothing is left; the others go on.
func TestShortages(t *testing.T) {
	oneMore(t)
	if got := attempt(t, "plenty", nil); got != "exec" {
		t.Fatal(got)
	}
	untouched := bystander(t)
	before := calm(t)

	// The shim's own cgroup, so that nobody but it is short.
	short := "/sys/fs/cgroup/short"
	must(t, os.Mkdir(short, 0o755))
	for _, c := range []struct {
		what, file string
		limits     []string
	}{
		{"pids", "pids.max", []string{"4", "8", "12", "40"}},
		{"memory", "memory.max", []string{"3M", "8M", "100M"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			var got string
			for _, limit := range c.limits {
				must(t, os.WriteFile(filepath.Join(short, c.file), []byte(limit), 0))
				got = attempt(t, "short-"+c.what+"-"+limit, &runcoptions.Options{ShimCgroup: "/short"})
				t.Logf("%s %s: %s", c.file, limit, got)
			}
			if got != "exec" {
				t.Errorf("with %s of %s too", c.limits[len(c.limits)-1], c.what)
			}
			must(t, os.WriteFile(filepath.Join(short, c.file), []byte("max"), 0))
		})
	}
	eventually(t, time.Minute, "the shims have ended", func() bool { return os.Remove(short) == nil })

	t.Run("descriptors", func(t *testing.T) {
		b := start(t, options{args: exitsWith(5)})
		b.ready()
		shim := shimOf(t, b.container.ID())
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", shim))
		must(t, err)
		var old unix.Rlimit
		must(t, unix.Prlimit(shim, unix.RLIMIT_NOFILE, nil, &old))
		failed := 0
		for more := 0; more < 32; more += 4 {
			must(t, unix.Prlimit(shim, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(fds) + more), Max: old.Max}, nil))
			if _, code, err := b.execIn([]string{"true"}, nil); err != nil || code != 0 {
				failed++
				t.Logf("%d more: %d, %v", more, code, err)
			}
		}
		must(t, unix.Prlimit(shim, unix.RLIMIT_NOFILE, &old, nil))
		if failed == 0 {
			t.Error("an exec needed no descriptor")
		}
		if out, code, err := b.execIn([]string{"echo", "again"}, nil); err != nil || code != 0 || out != "again\n" {
			t.Errorf("exec with enough again: %q, %d, %v", out, code, err)
		}
		eventually(t, time.Minute, "no descriptor is lost", func() bool {
			now, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", shim))
			return err == nil && len(now) <= len(fds)+2
		})
		must(t, b.task.Kill(b.ctx, syscall.SIGTERM))
		if code := b.wait(); code != 5 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("disk of LXC's configurations", func(t *testing.T) {
		must(t, unix.Mount("tmpfs", "/var/lib/containerd-pve/lxc", "tmpfs", 0, "nr_inodes=2"))
		got := attempt(t, "short-lxcpath", nil)
		must(t, unix.Unmount("/var/lib/containerd-pve/lxc", unix.MNT_DETACH))
		if !strings.HasPrefix(got, "container: ") || !strings.Contains(got, "no space left") {
			t.Error(got)
		}
	})
	t.Run("disk of the bundles", func(t *testing.T) {
		// Small, so that little is needed to fill it.
		must(t, unix.Mount("", "/run", "", unix.MS_REMOUNT, "size=8m"))
		defer func() { must(t, unix.Mount("", "/run", "", unix.MS_REMOUNT, "size=50%")) }()
		var st unix.Statfs_t
		for _, left := range []uint64{0, 3, 6, 9, 12, 100} { // pages
			must(t, unix.Statfs("/run", &st))
			f, err := os.Create("/run/filler")
			must(t, err)
			must(t, unix.Fallocate(int(f.Fd()), 0, 0, int64((st.Bavail-left)*uint64(st.Bsize))))
			t.Logf("%d pages: %s", left, attempt(t, fmt.Sprintf("short-run-%d", left), nil))
			f.Close()
			must(t, os.Remove("/run/filler"))
		}
		if got := attempt(t, "short-run-no-more", nil); got != "exec" {
			t.Error(got)
		}
	})
	t.Run("pool", func(t *testing.T) {
		used, code := command("zfs", "get", "-Hpo", "value", "used", pool()+"/containerd-pve")
		if code != 0 {
			t.Fatal(used)
		}
		n, err := strconv.Atoi(strings.TrimSpace(used))
		must(t, err)
		if out, code := command("zfs", "set", fmt.Sprintf("quota=%d", n+2<<20), pool()+"/containerd-pve"); code != 0 {
			t.Fatal(out)
		}
		defer command("zfs", "set", "quota=none", pool()+"/containerd-pve")
		stdout, stderr, exit := run(t, options{args: sh("head -c 12000000 /dev/urandom >/big; echo $?; sync; echo more >>/etc/hostname; exit 3")})
		if exit != 3 || !strings.HasPrefix(stdout, "1\n") || !strings.Contains(stderr, "head:") {
			t.Errorf("exit code %d, %q, %q", exit, stdout, stderr)
		}
	})
	oneMore(t)
	same(t, before)
	untouched()
}
