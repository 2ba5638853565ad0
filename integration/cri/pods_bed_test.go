//go:build bed

package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const busybox = "localhost:5000/busybox:latest"

func TestMain(m *testing.M) {
	if out, err := exec.Command("stack", "up").CombinedOutput(); err != nil {
		fmt.Printf("stack up: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	_ = exec.Command("stack", "down").Run()
	os.Exit(code)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bed is a test's node.
type bed struct {
	*testing.T
	*Node
	ctx context.Context
}

// node starts a node with the image and runs the tests on it. Afterwards nothing may be left.
func node(t *testing.T, o Options, tests map[string]func(*bed)) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	t.Cleanup(cancel)
	n, err := Start(ctx, o)
	must(t, err)
	t.Cleanup(func() { must(t, n.Stop()) })
	_, err = n.Images.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: busybox, RuntimeHandler: Handler}})
	must(t, err)
	t.Run("pods", func(t *testing.T) {
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				if !alone[name] {
					t.Parallel()
				}
				begin := time.Now()
				defer func() { t.Logf("%.1f s", time.Since(begin).Seconds()) }()
				test(&bed{t, n, ctx})
			})
		}
	})
	t.Run("nothing is left", func(t *testing.T) {
		eventually(t, "what is left: "+strings.Join(left(), ", "), func() bool { return len(left()) == 0 })
	})
}

// programs are the processes whose name begins so. What their program is cannot be seen of those that hold a pod's namespaces.
func programs(name string) (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, f := range files {
		if comm, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(comm), name) {
			pid, _ := strconv.Atoi(strings.Split(f, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

func left() (what []string) {
	for _, name := range []string{"containerd-shim", "lxc-start", "pve-init"} {
		if pids := programs(name); len(pids) > 0 {
			what = append(what, fmt.Sprint(name, pids))
		}
	}
	for _, pattern := range []string{
		"/sys/fs/cgroup/kubepods*/*pod*", "/sys/fs/cgroup/containerd-pve/monitor/*/cgroup.procs", "/sys/fs/cgroup/containerd-pve/containers/*/cgroup.procs", "/var/lib/containerd-pve/lxc/*", "/run/netns/*", "/run/containerd/s/*",
		"/run/containerd/io.containerd.*/k8s.io/*", "/run/containerd/io.containerd.grpc.v1.cri/*/*", "/var/lib/containerd/io.containerd.grpc.v1.cri/*/*",
	} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if filepath.Dir(f) != "/run/containerd/io.containerd.grpc.v1.cri/containerd" {
				what = append(what, f)
			}
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " /run/containerd/") || strings.Contains(line, " /run/netns/") {
			what = append(what, strings.Fields(line)[4])
		}
	}
	slices.Sort(what)
	return what
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within a minute: " + what)
		}
	}
}

// pod runs a pod until the test ends.
func (b *bed) pod(name string, change func(*api.PodSandboxConfig)) *Pod {
	b.Helper()
	p, err := b.RunPod(b.ctx, name, change)
	b.Cleanup(func() {
		if err := p.Remove(b.ctx); err != nil {
			b.Errorf("pod %s: %v", name, err)
		}
	})
	must(b.T, err)
	return p
}

func sh(script string) []string { return []string{"sh", "-c", script} }

func (b *bed) start(p *Pod, name string, args []string, change func(*api.ContainerConfig)) *Container {
	b.Helper()
	c, err := p.Start(b.ctx, name, busybox, args, change)
	if err != nil {
		b.Fatalf("container %s: %v", name, err)
	}
	return c
}

// exec runs a script that has to end well, and answers its output.
func (b *bed) exec(c *Container, script string) string {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	out, code, err := c.Exec(ctx, sh(script)...)
	if err != nil || code != 0 {
		b.Errorf("%s: %s: %d, %q, %v", c.Config.Metadata.Name, script, code, out, err)
	}
	return strings.TrimSpace(out)
}

func (b *bed) is(what, got, want string) {
	b.Helper()
	if got != want {
		b.Errorf("%s: %q, not %q", what, got, want)
	}
}

// ended waits for the container's end.
func (b *bed) ended(c *Container) *api.ContainerStatus {
	b.Helper()
	var st *api.ContainerStatus
	eventually(b.T, c.Config.Metadata.Name+" has ended", func() bool {
		var err error
		st, err = c.Status(b.ctx)
		must(b.T, err)
		return st.State == api.ContainerState_CONTAINER_EXITED
	})
	return st
}

// namespaces are those of a process in the container.
func (b *bed) namespaces(c *Container) map[string]string {
	b.Helper()
	ns := map[string]string{}
	for _, line := range strings.Fields(b.exec(c, "for n in net ipc uts pid mnt user cgroup; do echo $n=$(readlink /proc/self/ns/$n); done")) {
		name, id, _ := strings.Cut(line, "=")
		ns[name] = id
	}
	return ns
}

// same wants exactly these namespaces to be the same ones.
func (b *bed) same(what string, one, other map[string]string, want ...string) {
	b.Helper()
	for name, id := range one {
		if (other[name] == id) != slices.Contains(want, name) {
			b.Errorf("%s: namespace %s: %s and %s", what, name, id, other[name])
		}
	}
}

// kept wants the pod's namespaces to be those of one that ended, whose own may have come back under the same numbers.
func (b *bed) kept(what string, one, other map[string]string) {
	b.Helper()
	for _, name := range []string{"net", "ipc", "uts", "user"} {
		if one[name] != other[name] {
			b.Errorf("%s: namespace %s: %s and %s", what, name, one[name], other[name])
		}
	}
}

func hostNamespaces(t *testing.T) map[string]string {
	ns := map[string]string{}
	for _, name := range []string{"net", "ipc", "uts", "pid", "mnt", "user", "cgroup"} {
		var err error
		ns[name], err = os.Readlink("/proc/self/ns/" + name)
		must(t, err)
	}
	return ns
}

var all = map[string]func(*bed){
	"life": life, "streams": streams, "security": security, "volumes": volumes, "processes": processes, "host": host, "users": users,
	"out of memory": outOfMemory, "restart": restart, "death": death, "forsaken": forsaken,
}

// alone are those that count, or stop containerd.
var alone = map[string]bool{"life": true, "restart": true, "shims": true, "forsaken": true}

// TestPods: what a kubelet asks of a runtime, with a pause container in each pod.
func TestPods(t *testing.T) { node(t, Options{Sandboxer: "podsandbox"}, all) }

// TestSandboxAPI: the same without one: the shim keeps the pod.
func TestSandboxAPI(t *testing.T) { node(t, Options{Sandboxer: "shim"}, all) }

// TestPodsSystemd: the same with systemd's cgroup driver, as far as it matters there. Its cgroup paths ask for it; the handler's
// options may say so too, and come to the shim as the text that they are in the configuration.
func TestPodsSystemd(t *testing.T) {
	t.Run("podsandbox", func(t *testing.T) {
		node(t, Options{Sandboxer: "podsandbox", Systemd: true, Table: true}, map[string]func(*bed){"life": life})
	})
	t.Run("shim", func(t *testing.T) {
		node(t, Options{Sandboxer: "shim", Systemd: true}, map[string]func(*bed){"life": life, "users": users})
	})
}

// TestLongOldContainerd: one shim a pod with those that start the shim's program for each container, too.
func TestLongOldContainerd(t *testing.T) {
	for _, version := range []string{"2.2", "1.7"} {
		t.Run(version, func(t *testing.T) {
			node(t, Options{Sandboxer: "podsandbox", Containerd: version}, map[string]func(*bed){"shims": shims})
		})
	}
}

// shims are counted while a pod has containers.
func shims(b *bed) {
	p := b.pod("shims", nil)
	q := b.pod("others", nil)
	count := func(what string, want int) {
		b.Helper()
		eventually(b.T, fmt.Sprintf("%s: %d shims: %v", what, want, programs("containerd-shim")), func() bool { return len(programs("containerd-shim")) == want })
	}
	count("two pods", 2)
	one := b.start(p, "one", []string{"sleep", "1000"}, nil)
	b.start(p, "two", []string{"sleep", "1000"}, nil)
	b.start(q, "one", []string{"sleep", "1000"}, nil)
	count("three containers", 2)
	b.same("two pods", b.namespaces(one), hostNamespaces(b.T), "user")
	must(b.T, one.Remove(b.ctx))
	count("two containers", 2)
	must(b.T, b.Restart(b.ctx, func() {}))
	b.start(p, "three", []string{"sleep", "1000"}, nil)
	count("after a restart of containerd", 2)
}

// life is that of a pod with two containers.
func life(b *bed) {
	p := b.pod("life", nil)
	a := b.start(p, "a", sh(`echo hello; echo oops >&2; trap "exit 7" TERM; sleep 1000 & wait`), nil)
	c := b.start(p, "c", []string{"sleep", "1000"}, nil)
	if shims := programs("containerd-shim"); len(shims) != 1 {
		b.Errorf("shims of one pod: %v", shims)
	}
	// A pause container is one more.
	want := 2
	if b.options.Sandboxer == "podsandbox" {
		want = 3
	}
	if made, err := filepath.Glob("/var/lib/containerd-pve/lxc/*"); err != nil || len(made) != want {
		b.Errorf("LXC containers: %v, %v", made, err)
	}
	st, err := p.Status(b.ctx)
	must(b.T, err)
	ip := st.GetNetwork().GetIp()
	if st.State != api.PodSandboxState_SANDBOX_READY || !strings.HasPrefix(ip, "10.87.") || st.CreatedAt <= 0 {
		b.Errorf("the pod: %+v", st)
	}
	mine, other := b.namespaces(a), b.namespaces(c)
	b.same("two containers", mine, other, "net", "ipc", "uts", "user")
	b.same("container and host", mine, hostNamespaces(b.T), "user")
	for script, want := range map[string]string{
		"hostname": "life", "cat /etc/hostname": "life", "cat /etc/resolv.conf": "search bed.local\nnameserver 10.87.0.53",
		"ip -o -4 addr show eth0 | grep -o '10[0-9.]*/'": ip + "/", "ip -o link show lo | grep -c UP": "1", "echo shared >/dev/shm/x": "",
		"ping -q -c 1 -W 5 " + Gateway + " >/dev/null && echo there": "there", "cat /proc/1/comm": "sh",
		"echo $HOSTNAME": "life",
	} {
		b.is(script, b.exec(a, script), want)
	}
	b.is("/dev/shm of the other", b.exec(c, "cat /dev/shm/x"), "shared")

	if out, code, err := a.Exec(b.ctx, sh("echo x; echo y >&2; exit 3")...); err != nil || code != 3 || out != "x\ny\n" {
		b.Errorf("exec: %q, %d, %v", out, code, err)
	}
	if _, err := b.ExecSync(b.ctx, &api.ExecSyncRequest{ContainerId: a.ID, Cmd: []string{"sleep", "777"}, Timeout: 1}); err == nil {
		b.Error("an exec over its time limit went on")
	}
	b.is("what is left of it", b.exec(a, "ps | grep -c '[s]leep 777' || true"), "0")
	if log, err := a.Log(); err != nil || !strings.Contains(log, "hello\n") || !strings.Contains(log, "oops\n") {
		b.Errorf("log: %q, %v", log, err)
	}
	stats(b, p, a)

	_, err = b.UpdateContainerResources(b.ctx, &api.UpdateContainerResourcesRequest{ContainerId: a.ID, Linux: &api.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuQuota: 50000, CpuPeriod: 100000, CpuShares: 512}})
	must(b.T, err)
	b.is("memory.max", b.exec(a, "cat /sys/fs/cgroup/memory.max"), fmt.Sprint(64<<20))
	b.is("cpu.max", b.exec(a, "cat /sys/fs/cgroup/cpu.max"), "50000 100000")

	must(b.T, a.Stop(b.ctx, 20*time.Second))
	if st := b.ended(a); st.ExitCode != 7 || st.Reason != "Error" || st.FinishedAt <= st.StartedAt {
		b.Errorf("stopped: %+v", st)
	}
	must(b.T, c.Stop(b.ctx, 0))
	if st := b.ended(c); st.ExitCode != 137 {
		b.Errorf("killed: %+v", st)
	}
	// Both have ended, the pod has not: the next attempt runs in the same namespaces.
	a2 := b.start(p, "a", []string{"sh", "-c", "exit 0"}, func(c *api.ContainerConfig) { c.Metadata.Attempt, c.LogPath = 1, "a1.log" })
	if st := b.ended(a2); st.ExitCode != 0 || st.Reason != "Completed" {
		b.Errorf("the second: %+v", st)
	}
	a3 := b.start(p, "a", []string{"sleep", "1000"}, func(c *api.ContainerConfig) { c.Metadata.Attempt, c.LogPath = 2, "a2.log" })
	b.kept("after the restart", mine, b.namespaces(a3))
	b.is("/dev/shm after it", b.exec(a3, "cat /dev/shm/x"), "shared")
	must(b.T, a.Remove(b.ctx))
	if _, err := a.Status(b.ctx); err == nil {
		b.Error("a container that was removed has a status")
	}
	// A container that was never started.
	created, err := p.Create(b.ctx, "created", busybox, []string{"true"}, nil)
	must(b.T, err)
	must(b.T, created.Remove(b.ctx))
	// One that cannot be.
	if _, err := p.Start(b.ctx, "wrong", busybox, []string{"/nonexistent"}, nil); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		b.Errorf("a program that is not there: %v", err)
	}

	must(b.T, p.Stop(b.ctx))
	must(b.T, p.Stop(b.ctx))
	if st, err := p.Status(b.ctx); err != nil || st.State != api.PodSandboxState_SANDBOX_NOTREADY {
		b.Errorf("a pod that was stopped: %+v, %v", st, err)
	}
	if st, err := a3.Status(b.ctx); err != nil || st.State != api.ContainerState_CONTAINER_EXITED {
		b.Errorf("a container of it: %+v, %v", st, err)
	}
}

// stats are asked in each way that a kubelet has.
func stats(b *bed, p *Pod, c *Container) {
	cs, err := b.ContainerStats(b.ctx, &api.ContainerStatsRequest{ContainerId: c.ID})
	must(b.T, err)
	if s := cs.GetStats(); s.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || s.GetMemory().GetWorkingSetBytes().GetValue() == 0 {
		b.Errorf("the container's: %+v", s)
	}
	list, err := b.ListContainerStats(b.ctx, &api.ListContainerStatsRequest{Filter: &api.ContainerStatsFilter{PodSandboxId: p.ID}})
	must(b.T, err)
	if len(list.GetStats()) != 2 {
		b.Errorf("the containers': %+v", list)
	}
	ps, err := b.PodSandboxStats(b.ctx, &api.PodSandboxStatsRequest{PodSandboxId: p.ID})
	must(b.T, err)
	if s := ps.GetStats().GetLinux(); s.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || s.GetMemory().GetWorkingSetBytes().GetValue() == 0 ||
		s.GetNetwork().GetDefaultInterface().GetName() != "eth0" || len(s.GetContainers()) != 2 || s.GetProcess().GetProcessCount().GetValue() == 0 {
		b.Errorf("the pod's: %+v", s)
	}
	pods, err := b.ListPodSandboxStats(b.ctx, &api.ListPodSandboxStatsRequest{Filter: &api.PodSandboxStatsFilter{Id: p.ID}})
	must(b.T, err)
	if len(pods.GetStats()) != 1 {
		b.Errorf("the pods': %+v", pods)
	}
}

// streams are exec, attach and a forwarded port, as kubectl has them.
func streams(b *bed) {
	p := b.pod("streams", nil)
	c := b.start(p, "c", []string{"cat"}, func(c *api.ContainerConfig) { c.Stdin = true })
	begin := func(s *Stream, err error) *Stream {
		b.Helper()
		must(b.T, err)
		b.Cleanup(func() { s.Close() })
		return s
	}
	s := begin(c.ExecStream(b.ctx, false, sh("head -n 1; echo wrong >&2; exit 4")...))
	must(b.T, s.Send(ChannelStdin, "through\n"))
	if out, err := s.Until(ChannelStdout, "through\n"); err != nil {
		b.Errorf("exec: %q, %v", out, err)
	}
	if out, err := s.Until(ChannelError, "}"); err != nil || !strings.Contains(out, "exit code 4") {
		b.Errorf("exec's end: %q, %v", out, err)
	}
	s = begin(c.ExecStream(b.ctx, true, "sh"))
	must(b.T, s.Send(ChannelResize, `{"Width": 77, "Height": 33}`))
	must(b.T, s.Send(ChannelStdin, "until stty size | grep '33 77'; do sleep 0.2; done; tty; exit\n"))
	if out, err := s.Until(ChannelStdout, "/dev/pts/"); err != nil || !strings.Contains(out, "33 77") {
		b.Errorf("exec with a terminal: %q, %v", out, err)
	}
	s = begin(c.Attach(b.ctx))
	must(b.T, s.Send(ChannelStdin, "attached\n"))
	if out, err := s.Until(ChannelStdout, "attached\n"); err != nil {
		b.Errorf("attach: %q, %v", out, err)
	}
	b.start(p, "server", sh("while :; do echo answered | nc -l -p 8080; done"), nil)
	eventually(b.T, "the server listens", func() bool {
		out, _, err := c.Exec(b.ctx, sh("grep -c :1F90 /proc/net/tcp /proc/net/tcp6 | grep -v :0")...)
		return err == nil && out != ""
	})
	s = begin(p.PortForward(b.ctx, 8080))
	if out, err := s.Until(0, "answered"); err != nil {
		b.Errorf("port-forward: %q, %v", out, err)
	}
}

// security is what a pod's security context asks for.
func security(b *bed) {
	status, err := b.Status(b.ctx, &api.StatusRequest{})
	must(b.T, err)
	for _, h := range status.RuntimeHandlers {
		if h.Name == Handler && (!h.Features.GetUserNamespaces() || !h.Features.GetRecursiveReadOnlyMounts()) {
			b.Errorf("our handler's features: %+v", h.Features)
		}
	}
	p := b.pod("security", func(c *api.PodSandboxConfig) {
		c.Linux.SecurityContext.Privileged = true
		c.Linux.Sysctls = map[string]string{"net.core.somaxconn": "777", "kernel.shm_rmid_forced": "1"}
	})
	field := func(c *Container, name string) string {
		return b.exec(c, "sed -n 's/^"+name+":[[:space:]]*//p' /proc/self/status")
	}
	limited := b.start(p, "limited", []string{"sleep", "1000"}, func(c *api.ContainerConfig) {
		s := c.Linux.SecurityContext
		s.RunAsUser, s.RunAsGroup, s.SupplementalGroups = &api.Int64Value{Value: 1000}, &api.Int64Value{Value: 2000}, []int64{3000}
		s.ReadonlyRootfs, s.NoNewPrivs = true, true
		s.Capabilities = &api.Capability{DropCapabilities: []string{"ALL"}}
		s.MaskedPaths, s.ReadonlyPaths = []string{"/proc/kcore", "/proc/timer_list"}, []string{"/proc/sys"}
		c.Linux.Resources.OomScoreAdj = 500
	})
	b.is("the user", b.exec(limited, "echo $(id -u) $(id -g) $(id -G)"), "1000 2000 2000 3000")
	for name, want := range map[string]string{"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0000000000000000", "CapBnd": "0000000000000000"} {
		b.is(name, field(limited, name), want)
	}
	b.is("unshare", b.exec(limited, "unshare -U true 2>/dev/null || echo refused"), "refused")
	b.is("the root", b.exec(limited, "touch /tmp/x 2>&1 | grep -o 'Read-only'"), "Read-only")
	b.is("somaxconn", b.exec(limited, "cat /proc/sys/net/core/somaxconn"), "777")
	b.is("shm_rmid_forced", b.exec(limited, "cat /proc/sys/kernel/shm_rmid_forced"), "1")
	b.is("a masked path", b.exec(limited, "wc -c </proc/timer_list"), "0")
	b.is("oom_score_adj", b.exec(limited, "cat /proc/1/oom_score_adj"), "500")
	if on, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil && string(on) == "Y\n" {
		b.is("AppArmor", b.exec(limited, "cat /proc/1/attr/current"), "cri-containerd.apparmor.d (enforce)")
	}
	free := b.start(p, "privileged", []string{"sleep", "1000"}, func(c *api.ContainerConfig) {
		c.Linux.SecurityContext.Privileged = true
		c.Linux.SecurityContext.Seccomp = nil
	})
	b.is("Seccomp of the privileged", field(free, "Seccomp"), "0")
	mine, err := os.ReadFile("/proc/self/status")
	must(b.T, err)
	if caps := field(free, "CapEff"); !strings.Contains(string(mine), "CapEff:\t"+caps+"\n") {
		b.Errorf("its capabilities: %s", caps)
	}
	b.is("it may", b.exec(free, "mkdir /mnt && mount -t tmpfs none /mnt && touch /sys/fs/cgroup/cgroup.procs && test -c /dev/kmsg && echo all"), "all")
}

// volumes are directories of the host's, with each propagation.
func volumes(b *bed) {
	dir := b.TempDir()
	must(b.T, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	b.Cleanup(func() { must(b.T, unix.Unmount(dir, unix.MNT_DETACH)) })
	must(b.T, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	for _, name := range []string{"late", "theirs"} {
		must(b.T, os.Mkdir(filepath.Join(dir, name), 0o755))
	}
	p := b.pod("volumes", func(c *api.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	c := b.start(p, "c", []string{"sleep", "1000"}, func(c *api.ContainerConfig) {
		c.Linux.SecurityContext.Privileged = true
		c.Mounts = []*api.Mount{
			{HostPath: dir, ContainerPath: "/private"},
			{HostPath: dir, ContainerPath: "/slave", Propagation: api.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{HostPath: dir, ContainerPath: "/shared", Propagation: api.MountPropagation_PROPAGATION_BIDIRECTIONAL},
			{HostPath: dir, ContainerPath: "/ro", Readonly: true},
			{HostPath: dir, ContainerPath: "/rro", Readonly: true, RecursiveReadOnly: true},
			{HostPath: filepath.Join(dir, "made"), ContainerPath: "/made"},
		}
	})
	late := filepath.Join(dir, "late")
	must(b.T, unix.Mount("tmpfs", late, "tmpfs", 0, ""))
	must(b.T, os.WriteFile(filepath.Join(late, "file"), nil, 0o644))
	b.is("mounted later", b.exec(c, "ls -d /private/late/file /slave/late/file /shared/late/file 2>/dev/null || true"), "/shared/late/file\n/slave/late/file")
	b.exec(c, "mount -t tmpfs none /shared/theirs && touch /shared/theirs/file")
	if _, err := os.Stat(filepath.Join(dir, "theirs", "file")); err != nil {
		b.Errorf("mounted in the container: %v", err)
	}
	b.is("read-only", b.exec(c, "for d in /ro /rro; do touch $d/x 2>/dev/null || echo $d; done"), "/ro\n/rro")
	b.exec(c, "umount /shared/theirs; touch /made/x")
	must(b.T, unix.Unmount(late, 0))
}

// processes may be shared: by the whole pod, or by one container with another.
func processes(b *bed) {
	p := b.pod("processes", func(c *api.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = api.NamespaceMode_POD
	})
	a := b.start(p, "a", []string{"sleep", "4321"}, nil)
	c := b.start(p, "c", []string{"sleep", "1000"}, nil)
	b.same("a pod with one", b.namespaces(a), b.namespaces(c), "net", "ipc", "uts", "user", "pid")
	b.is("one sees the other", b.exec(c, "ps | grep -c '[s]leep 4321'"), "1")
	// A process that outlives its container's first one goes with the container.
	b.exec(a, "setsid sleep 5432 >/dev/null 2>&1 </dev/null & true")
	must(b.T, a.Stop(b.ctx, 0))
	b.ended(a)
	b.is("what is left of a", b.exec(c, "ps | grep -c '[s]leep [45]' || true"), "0")

	q := b.pod("debugged", nil)
	d := b.start(q, "d", []string{"sleep", "6543"}, nil)
	e := b.start(q, "debugger", []string{"sleep", "1000"}, func(c *api.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &api.NamespaceOption{Pid: api.NamespaceMode_TARGET, TargetId: d.ID}
	})
	b.same("with its target", b.namespaces(d), b.namespaces(e), "net", "ipc", "uts", "user", "pid")
	b.is("the target's first process", b.exec(e, "tr '\\0' ' ' </proc/1/cmdline"), "sleep 6543")
	// The target's end is the debugger's.
	must(b.T, d.Stop(b.ctx, 0))
	if st := b.ended(e); st.ExitCode != 137 {
		b.Errorf("the debugger: %+v", st)
	}
}

// host is a pod that has the host's namespaces.
func host(b *bed) {
	p := b.pod("host", func(c *api.PodSandboxConfig) {
		c.Hostname = ""
		c.Linux.SecurityContext.NamespaceOptions = &api.NamespaceOption{Network: api.NamespaceMode_NODE, Pid: api.NamespaceMode_NODE, Ipc: api.NamespaceMode_NODE}
	})
	c := b.start(p, "c", sh("trap 'exit 5' TERM; sleep 1000 & wait"), nil)
	b.same("with the host", b.namespaces(c), hostNamespaces(b.T), "net", "ipc", "uts", "user", "pid")
	st, err := p.Status(b.ctx)
	must(b.T, err)
	if st.State != api.PodSandboxState_SANDBOX_READY || st.GetNetwork().GetIp() != "" {
		b.Errorf("the pod: %+v", st)
	}
	must(b.T, c.Stop(b.ctx, 20*time.Second))
	if st := b.ended(c); st.ExitCode != 5 {
		b.Errorf("stopped: %+v", st)
	}
}

// users is a pod with a user namespace (hostUsers: false).
func users(b *bed) {
	ids := []*api.IDMapping{{HostId: 200000, ContainerId: 0, Length: 65536}}
	p := b.pod("users", func(c *api.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &api.UserNamespace{Mode: api.NamespaceMode_POD, Uids: ids, Gids: ids}
		c.Linux.Sysctls = map[string]string{"net.core.somaxconn": "777"}
	})
	dir := b.TempDir()
	must(b.T, os.Chmod(dir, 0o777))
	run := func(name string) *Container {
		return b.start(p, name, []string{"sleep", "1000"}, func(c *api.ContainerConfig) {
			c.Mounts = []*api.Mount{{HostPath: dir, ContainerPath: "/volume", UidMappings: ids, GidMappings: ids}}
		})
	}
	a, c := run("a"), run("c")
	b.same("two containers", b.namespaces(a), b.namespaces(c), "net", "ipc", "uts", "user")
	b.is("the mapping", b.exec(a, "cat /proc/self/uid_map | tr -s ' '"), "0 200000 65536")
	b.is("an owner of the image", b.exec(a, "stat -c %u:%g /etc/passwd"), "0:0")
	b.is("somaxconn", b.exec(a, "cat /proc/sys/net/core/somaxconn"), "777")
	b.is("/dev/shm", b.exec(a, "echo shared >/dev/shm/x; cat /dev/shm/x"), "shared")
	b.exec(a, "touch /volume/x")
	if st, err := os.Stat(filepath.Join(dir, "x")); err != nil || st.Sys().(*syscall.Stat_t).Uid != 0 {
		b.Errorf("a file of the volume: %+v, %v", st, err)
	}
}

// outOfMemory: a container that the kernel ended says so.
func outOfMemory(b *bed) {
	p := b.pod("memory", nil)
	c := b.start(p, "c", []string{"tail", "/dev/zero"}, func(c *api.ContainerConfig) {
		c.Linux.Resources = &api.LinuxContainerResources{MemoryLimitInBytes: 32 << 20, MemorySwapLimitInBytes: 32 << 20}
	})
	if st := b.ended(c); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		b.Errorf("ended with %s, %d", st.Reason, st.ExitCode)
	}
}

// restart is one of containerd, with a pod that runs.
func restart(b *bed) {
	p := b.pod("restart", nil)
	stays := b.start(p, "stays", sh("echo begun; while :; do sleep 0.2; [ ! -e /say ] || { cat /say; rm /say; }; done"), nil)
	ends := b.start(p, "ends", sh("trap 'exit 9' TERM; sleep 1000 & wait"), nil)
	before := b.namespaces(stays)
	pid := b.pid(ends)
	must(b.T, b.Restart(b.ctx, func() {
		must(b.T, unix.Kill(pid, unix.SIGTERM))
		eventually(b.T, "it has ended", func() bool { return unix.Kill(pid, 0) != nil })
	}))
	if st, err := p.Status(b.ctx); err != nil || st.State != api.PodSandboxState_SANDBOX_READY || !strings.HasPrefix(st.GetNetwork().GetIp(), "10.87.") {
		b.Errorf("the pod: %+v, %v", st, err)
	}
	if st, err := stays.Status(b.ctx); err != nil || st.State != api.ContainerState_CONTAINER_RUNNING {
		b.Errorf("what runs on: %+v, %v", st, err)
	}
	if st := b.ended(ends); st.ExitCode != 9 {
		b.Errorf("what ended meanwhile: %+v", st)
	}
	b.exec(stays, "echo later >/say2; mv /say2 /say")
	eventually(b.T, "the log goes on", func() bool {
		log, err := stays.Log()
		return err == nil && log == "begun\nlater\n"
	})
	next := b.start(p, "next", []string{"sleep", "1000"}, nil)
	b.kept("one that is made later", before, b.namespaces(next))
	b.is("its host name", b.exec(next, "hostname; cat /etc/hostname; head -n 1 /etc/resolv.conf; echo x >/dev/shm/y"), "restart\nrestart\nsearch bed.local")
	b.is("/dev/shm", b.exec(stays, "cat /dev/shm/y"), "x")
	if shims := programs("containerd-shim"); len(shims) != 1 {
		b.Errorf("shims of one pod: %v", shims)
	}
}

// forsaken is a pod whose shim containerd takes for dead, as it does after a restart if the shim does not answer within
// its time: all of it ends, the shim too, which nobody would ever ask to end again.
func forsaken(b *bed) {
	p := b.pod("forsaken", nil)
	b.start(p, "c", []string{"sleep", "1000"}, nil)
	must(b.T, b.Restart(b.ctx, func() {
		files, err := filepath.Glob("/run/containerd/io.containerd.*/k8s.io/*/bootstrap.json")
		must(b.T, err)
		if len(files) == 0 {
			b.Error("no shim has an address")
		}
		for _, f := range files {
			must(b.T, os.Remove(f))
		}
	}))
	for _, name := range []string{"containerd-shim", "lxc-start", "pve-init"} {
		eventually(b.T, "no "+name, func() bool { return len(programs(name)) == 0 })
	}
}

// pid is that of the container's first process.
func (b *bed) pid(c *Container) int {
	answer, err := b.ContainerStatus(b.ctx, &api.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	must(b.T, err)
	return pidOf(b.T, answer.GetInfo()["info"])
}

func pidOf(t *testing.T, info string) int {
	var i struct{ Pid int }
	must(t, json.Unmarshal([]byte(info), &i))
	if i.Pid <= 1 {
		t.Fatalf("no pid in %s", info)
	}
	return i.Pid
}

// death is that of the process that holds the pod's namespaces: the pod is not ready any more, and can be removed.
func death(b *bed) {
	p := b.pod("death", nil)
	c := b.start(p, "c", []string{"sleep", "1000"}, nil)
	answer, err := b.PodSandboxStatus(b.ctx, &api.PodSandboxStatusRequest{PodSandboxId: p.ID, Verbose: true})
	must(b.T, err)
	must(b.T, unix.Kill(pidOf(b.T, answer.GetInfo()["info"]), unix.SIGKILL))
	eventually(b.T, "the pod is not ready", func() bool {
		st, err := p.Status(b.ctx)
		return err == nil && st.State == api.PodSandboxState_SANDBOX_NOTREADY
	})
	must(b.T, c.Stop(b.ctx, 0))
}
