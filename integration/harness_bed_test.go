//go:build bed

package integration

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
)

const (
	socket  = "/run/containerd/containerd.sock"
	ours    = "io.containerd.pve.v2"
	runc    = "io.containerd.runc.v2"
	zfs     = "pve-zfs"
	debian  = "localhost:5000/debian:13"
	busybox = "localhost:5000/busybox:latest"
)

func TestMain(m *testing.M) {
	if err := bringUp(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if os.Getenv("TESTBED_READY") != "" {
		os.Exit(0) // the parts of these tests begin with what is there now
	}
	code := m.Run()
	_ = exec.Command("stack", "down").Run()
	os.Exit(code)
}

// bringUp starts the programs and pulls the images that every test may count on.
func bringUp() error {
	if out, err := exec.Command("stack", "up", "--pull").CombinedOutput(); err != nil {
		return fmt.Errorf("stack up: %w\n%s", err, out)
	}
	for _, i := range []string{busybox, debian} {
		if out, err := exec.Command("ctr", "images", "pull", "--plain-http", "--snapshotter", zfs, i).CombinedOutput(); err != nil {
			return fmt.Errorf("pull %s: %w\n%s", i, err, out)
		}
	}
	return nil
}

// pool is what the tests have for themselves: on a host there may be others.
func pool() string { return cmp.Or(os.Getenv("TESTBED_POOL"), "tank") }

// must ends the test for a step that it only builds on.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// background is a context of containerd's namespace "default".
func background(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "default"), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func connect(t *testing.T) *client.Client {
	t.Helper()
	c, err := client.New(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

var counter atomic.Int64

// options of a container under test.
type options struct {
	id          string
	image       string
	snapshotter string
	runtime     string // ours if empty
	args        []string
	spec        []oci.SpecOpts
	edit        func(*oci.Spec)
	root        func(dir string) // changes the root file system before the task is made
	stdin       io.Reader
	terminal    bool
	io          cio.Creator
	// snapshot makes the root, if it is not simply a clone of the image.
	snapshot func(id string, image client.Image) client.NewContainerOpts
}

// box is a container and its task.
type box struct {
	t         *testing.T
	ctx       context.Context
	client    *client.Client
	container client.Container
	task      client.Task
	exit      <-chan client.ExitStatus
	out, err  *bytes.Buffer
	removed   bool
}

// create makes a container and its task, not started.
func create(t *testing.T, o options) (*box, error) {
	t.Helper()
	b := &box{t: t, ctx: background(t), client: connect(t), out: &bytes.Buffer{}, err: &bytes.Buffer{}}
	if o.id == "" {
		o.id = fmt.Sprintf("t%d", counter.Add(1))
	}
	if o.image == "" {
		o.image = debian
	}
	if o.snapshotter == "" {
		o.snapshotter = zfs
	}
	if o.runtime == "" {
		o.runtime = ours
	}
	image, err := b.client.GetImage(b.ctx, o.image)
	if err != nil {
		t.Fatal(err)
	}
	if o.snapshotter != zfs { // for others nothing is unpacked before a test asks
		must(t, image.Unpack(b.ctx, o.snapshotter))
	}
	opts := []oci.SpecOpts{oci.WithImageConfig(image)}
	if len(o.args) > 0 {
		opts = append(opts, oci.WithProcessArgs(o.args...))
	}
	if o.terminal {
		opts = append(opts, oci.WithTTY)
	}
	opts = append(opts, o.spec...)
	if o.edit != nil {
		opts = append(opts, edit(o.edit))
	}
	snapshot := client.WithNewSnapshot(o.id, image)
	if o.snapshot != nil {
		snapshot = o.snapshot(o.id, image)
	}
	b.container, err = b.client.NewContainer(b.ctx, o.id, client.WithImage(image), client.WithSnapshotter(o.snapshotter),
		snapshot, client.WithNewSpec(opts...), client.WithRuntime(o.runtime, nil))
	if err != nil {
		return nil, err
	}
	t.Cleanup(b.remove)
	if o.root != nil {
		b.change(o.snapshotter, o.id, o.root)
	}
	creator := o.io
	if creator == nil {
		copts := []cio.Opt{cio.WithStreams(o.stdin, b.out, b.err)}
		if o.terminal {
			copts = []cio.Opt{cio.WithStreams(o.stdin, b.out, nil), cio.WithTerminal}
		}
		creator = cio.NewCreator(copts...)
	}
	if b.task, err = b.container.NewTask(b.ctx, creator); err != nil {
		b.task = nil
		return b, err
	}
	b.exit, err = b.task.Wait(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	return b, nil
}

// change mounts the container's snapshot for f.
func (b *box) change(snapshotter, key string, f func(dir string)) {
	b.t.Helper()
	mounts, err := b.client.SnapshotService(snapshotter).Mounts(b.ctx, key)
	if err != nil {
		b.t.Fatal(err)
	}
	dir := b.t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		b.t.Fatal(err)
	}
	defer func() {
		if err := mount.UnmountRecursive(dir, 0); err != nil {
			b.t.Fatal(err)
		}
	}()
	f(dir)
}

func edit(f func(*oci.Spec)) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error { f(s); return nil }
}

// start creates and starts one that is expected to run.
func start(t *testing.T, o options) *box {
	t.Helper()
	b, err := create(t, o)
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	if err := b.task.Start(b.ctx); err != nil {
		t.Fatalf("start: %v", err)
	}
	return b
}

// wait returns the exit code once all output is there.
func (b *box) wait() uint32 {
	b.t.Helper()
	select {
	case st := <-b.exit:
		if st.Error() != nil {
			b.t.Fatalf("wait: %v", st.Error())
		}
		b.task.IO().Wait()
		if _, err := b.task.Delete(b.ctx); err != nil {
			b.t.Fatalf("delete of the task: %v", err)
		}
		b.task = nil
		return st.ExitCode()
	case <-b.ctx.Done():
		b.t.Fatal("the container does not end")
		return 0
	}
}

// remove takes away what the test has left, once.
func (b *box) remove() {
	if b.removed {
		return
	}
	b.removed = true
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "default"), time.Minute)
	defer cancel()
	if b.task != nil {
		if _, err := b.task.Delete(ctx, client.WithProcessKill); err != nil {
			b.t.Logf("delete of the task: %v", err)
		}
	}
	if err := b.container.Delete(ctx, client.WithSnapshotCleanup); err != nil {
		b.t.Logf("delete of the container: %v", err)
	}
}

// execIn runs a process in the container and returns its output and status.
func (b *box) execIn(args []string, change func(*oci.Spec)) (string, uint32, error) {
	b.t.Helper()
	spec, err := b.container.Spec(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	spec.Process.Args, spec.Process.Terminal = args, false
	if change != nil {
		change(spec)
	}
	var out, stderr bytes.Buffer // two, as both are written at once
	p, err := b.task.Exec(b.ctx, fmt.Sprintf("e%d", counter.Add(1)), spec.Process, cio.NewCreator(cio.WithStreams(nil, &out, &stderr)))
	if err != nil {
		return "", 0, err
	}
	exit, err := p.Wait(b.ctx)
	if err != nil {
		return "", 0, err
	}
	if err := p.Start(b.ctx); err != nil {
		_, derr := p.Delete(b.ctx)
		return "", 0, errors.Join(err, derr)
	}
	st := <-exit
	p.IO().Wait()
	if _, err := p.Delete(b.ctx); err != nil {
		return "", 0, err
	}
	return out.String() + stderr.String(), st.ExitCode(), st.Error()
}

// run runs one to its end.
func run(t *testing.T, o options) (stdout, stderr string, code uint32) {
	t.Helper()
	b := start(t, o)
	code = b.wait()
	return b.out.String(), b.err.String(), code
}

// command runs a program of the guest and returns its whole output and status.
func command(argv ...string) (string, int) {
	cmd := exec.Command(argv[0], argv[1:]...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		return err.Error(), -1
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// collect has containerd collect its garbage now: a snapshot's dataset stays
// until it does, which is after a hundred changes otherwise.
func collect(t *testing.T) {
	t.Helper()
	c, err := client.New(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "default"), time.Minute)
	defer cancel()
	lease, err := c.LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = c.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// count are the things that must be the same before and after.
func count(t *testing.T) map[string]int {
	t.Helper()
	collect(t)
	n := map[string]int{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
		if err != nil || link == "" || e.Name()[0] < '0' || e.Name()[0] > '9' {
			continue // kernel threads have no exe
		}
		n["processes"]++
		base := filepath.Base(link)
		if base == "containerd" || base == "containerd-pve" {
			fds, err := os.ReadDir(filepath.Join("/proc", e.Name(), "fd"))
			if err == nil {
				n["open files of "+base] = len(fds)
			}
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	n["mounts"] = strings.Count(string(mounts), "\n")
	for name, dir := range map[string]string{
		"cgroups": "/sys/fs/cgroup", "runtime files": "/run/containerd", "lxc's runtime files": "/run/lxc",
		"LXC containers": "/var/lib/containerd-pve/lxc",
	} {
		_ = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
			if err == nil && (name != "cgroups" || d.IsDir()) {
				n[name]++
			}
			return nil
		})
	}
	n["datasets"] = len(datasetsBelow(pool()))
	return n
}

// datasetsBelow are the filesystems and snapshots there, without the spares, which come and go by themselves.
func datasetsBelow(dataset string) (names []string) {
	out, _ := command("zfs", "list", "-H", "-t", "all", "-o", "name,containerd-pve:id,containerd-pve:key", "-r", dataset)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 3 || f[1] == "-" || f[2] != "-" {
			names = append(names, f[0])
		}
	}
	return names
}

// eventually waits for something that follows asynchronously.
func eventually(t *testing.T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !f(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", limit, what)
		}
	}
}
