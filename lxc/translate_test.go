package lxc

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

func minimal() *specs.Spec {
	return &specs.Spec{
		Process: &specs.Process{Args: []string{"true"}, Cwd: "/"},
		Root:    &specs.Root{Path: "rootfs"},
		Linux: &specs.Linux{CgroupsPath: "/default/x", Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
		}},
	}
}

func translated(t *testing.T, change func(*specs.Spec)) (*translation, error) {
	t.Helper()
	s := minimal()
	if change != nil {
		change(s)
	}
	return translate(CreateOptions{Namespace: "default", ID: "x", Bundle: "/b", Rootfs: "/b/rootfs", Spec: s}, "default--x")
}

func TestConfigGolden(t *testing.T) {
	tr, err := translated(t, func(s *specs.Spec) { s.Hostname = "box" })
	if err != nil {
		t.Fatal(err)
	}
	const want = `lxc.rootfs.path = dir:/b/rootfs
lxc.autodev = 0
lxc.console.path = none
lxc.tty.max = 0
lxc.pty.max = 0
lxc.apparmor.profile = unconfined
lxc.signal.halt = 15
lxc.hook.post-stop = /usr/bin/test "$LXC_TARGET" != reboot #
lxc.hook.mount = /proc/self/fd/4 mount 5 #
lxc.init.cmd = /proc/self/fd/4 init 3
lxc.namespace.clone = mnt pid net ipc uts
lxc.net.0.type = empty
lxc.net.0.flags = up
lxc.uts.name = box
lxc.cgroup.dir.container = default/x/payload
lxc.cgroup.dir.monitor = containerd-pve/monitor/default--x
lxc.cgroup.dir.monitor.pivot = containerd-pve/pivot
`
	if tr.config != want {
		t.Errorf("config:\n%s\nwant:\n%s", tr.config, want)
	}
}

// TestConfigNotify: pve-init is told not to interrupt itself if, and only if,
// the filter notifies.
func TestConfigNotify(t *testing.T) {
	for action, want := range map[specs.LinuxSeccompAction]int{specs.ActNotify: 1, specs.ActErrno: 0} {
		tr, err := translated(t, func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/run/agent",
				Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: action}}}
		})
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(tr.config, "lxc.environment = GODEBUG=asyncpreemptoff=1\n"); n != want || tr.process.Seccomp.Notify != (want == 1) {
			t.Errorf("%s: %d lines in\n%s", action, n, tr.config)
		}
	}
}

func TestConfigNamespaces(t *testing.T) {
	tr, err := translated(t, func(s *specs.Spec) {
		s.Linux.Namespaces = []specs.LinuxNamespace{
			{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
			{Type: specs.NetworkNamespace, Path: "/run/netns/a"}, {Type: specs.PIDNamespace, Path: "/proc/1/ns/pid"},
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"lxc.namespace.clone = mnt cgroup\n", "lxc.namespace.share.net = /run/netns/a\n", "lxc.namespace.share.pid = /proc/1/ns/pid\n"} {
		if !strings.Contains(tr.config, line) {
			t.Errorf("no %q in\n%s", line, tr.config)
		}
	}
	if strings.Contains(tr.config, "lxc.net.0") || !tr.sharedPID {
		t.Errorf("shared pid %v, config\n%s", tr.sharedPID, tr.config)
	}
}

func TestTranslateRefuses(t *testing.T) {
	swappiness := uint64(1)
	for _, c := range []struct {
		name   string
		change func(*specs.Spec)
		field  string
		kind   func(error) bool
	}{
		{"no args", func(s *specs.Spec) { s.Process.Args = nil }, "process.args", errdefs.IsInvalidArgument},
		{"NUL in args", func(s *specs.Spec) { s.Process.Args = []string{"a\x00"} }, "process.args[0]", errdefs.IsInvalidArgument},
		{"NUL in env", func(s *specs.Spec) { s.Process.Env = []string{"A=\x00"} }, "process.env[0]", errdefs.IsInvalidArgument},
		{"relative cwd", func(s *specs.Spec) { s.Process.Cwd = "x" }, "process.cwd", errdefs.IsInvalidArgument},
		{"no mount namespace", func(s *specs.Spec) { s.Linux.Namespaces = nil }, "linux.namespaces", errdefs.IsInvalidArgument},
		{"namespace twice", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace})
		}, "linux.namespaces[5]", errdefs.IsInvalidArgument},
		{"mount namespace by path", func(s *specs.Spec) { s.Linux.Namespaces[3].Path = "/a" }, "linux.namespaces[3].path", errdefs.IsNotImplemented},
		{"user namespace without mappings", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}, "linux.uidMappings", errdefs.IsInvalidArgument},
		{"user namespace without a root", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1, Size: 1}}
			s.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 1, HostID: 1, Size: 1}}
		}, "linux.gidMappings", errdefs.IsInvalidArgument},
		{"mappings without a user namespace", func(s *specs.Spec) {
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}}
		}, "linux.uidMappings", errdefs.IsInvalidArgument},
		{"time offsets without a time namespace", func(s *specs.Spec) {
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1}}
		}, "linux.timeOffsets", errdefs.IsInvalidArgument},
		{"time offset of no clock", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"x\n1": {Secs: 1}}
		}, "linux.timeOffsets", errdefs.IsInvalidArgument},
		{"idmap without a mapping", func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"idmap"}}}
		}, "mounts[0]", errdefs.IsInvalidArgument},
		{"half a mapping", func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Type: "bind", Source: "/a", Destination: "/b", UIDMappings: []specs.LinuxIDMapping{{Size: 1}}}}
		}, "mounts[0]", errdefs.IsInvalidArgument},
		{"hostname that is a config line", func(s *specs.Spec) { s.Hostname = "a\nlxc.x = y" }, "lxc.uts.name", errdefs.IsInvalidArgument},
		{"hostname in quotes", func(s *specs.Spec) { s.Hostname = "'a'" }, "lxc.uts.name", errdefs.IsInvalidArgument},
		{"namespace path that is a config line", func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/a\nlxc.x = y" }, "lxc.namespace.share.net", errdefs.IsInvalidArgument},
		{"root cgroup", func(s *specs.Spec) { s.Linux.CgroupsPath = "/x/.." }, "linux.cgroupsPath", errdefs.IsInvalidArgument},
		{"swappiness", func(s *specs.Spec) {
			s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: &swappiness}}
		}, "linux.resources.memory.swappiness", errdefs.IsNotImplemented},
		{"sysctl of the host", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.panic": "1"} }, "kernel.panic", errdefs.IsInvalidArgument},
		{"sysctl that climbs", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net/../kernel/panic": "1"} }, "net/../kernel/panic", errdefs.IsInvalidArgument},
		{"network device of the host's namespace", func(s *specs.Spec) {
			s.Linux.Namespaces = s.Linux.Namespaces[:4]
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}}
		}, "linux.netDevices", errdefs.IsInvalidArgument},
		{"network device with a name that is a path", func(s *specs.Spec) {
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {Name: "a/b"}}
		}, "linux.netDevices", errdefs.IsInvalidArgument},
		{"hook without an absolute path", func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{}}} }, "hooks.createContainer[0].path", errdefs.IsInvalidArgument},
		{"hook without time", func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/a", Timeout: new(int)}}} }, "hooks.poststop[0].timeout", errdefs.IsInvalidArgument},
	} {
		if _, err := translated(t, c.change); err == nil || !c.kind(err) || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestName(t *testing.T) {
	if n, err := Name("default", "x"); err != nil || n != "default--x" {
		t.Errorf("%q, %v", n, err)
	}
	for _, id := range []string{"", "a/b", "a\nb", strings.Repeat("x", 300)} {
		if _, err := Name("default", id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestUserNamespaceConfig(t *testing.T) {
	tr, err := translated(t, func(s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		s.Linux.Namespaces[4].Path = "/run/netns/a"
		s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 10}, {ContainerID: 10, HostID: 5, Size: 1}}
		s.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"lxc.namespace.clone = user mnt pid ipc uts\n", "lxc.namespace.share.net = /run/netns/a\n",
		"lxc.idmap = u 0 100000 10\nlxc.idmap = u 10 5 1\nlxc.idmap = g 0 200000 65536\n"} {
		if !strings.Contains(tr.config, line) {
			t.Errorf("no %q in\n%s", line, tr.config)
		}
	}
	if tr.enter() != unix.CLONE_NEWUSER {
		t.Errorf("an exec enters %#x", tr.enter())
	}
}

// TestCgroupNamespace: liblxc makes one when it joins any other namespace, which
// is put right afterwards.
func TestCgroupNamespace(t *testing.T) {
	for name, c := range map[string]struct {
		namespaces []specs.LinuxNamespace
		want       string
	}{
		"host's":             {nil, ""},
		"own":                {[]specs.LinuxNamespace{{Type: specs.CgroupNamespace}}, ""},
		"by path":            {[]specs.LinuxNamespace{{Type: specs.CgroupNamespace, Path: "/a"}}, "/a"},
		"host's, net joined": {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/n"}}, "/proc/self/ns/cgroup"},
		"own, net joined":    {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/n"}, {Type: specs.CgroupNamespace}}, ""},
	} {
		tr, err := translated(t, func(s *specs.Spec) {
			s.Linux.Namespaces = slices.Concat(c.namespaces, []specs.LinuxNamespace{{Type: specs.MountNamespace}})
		})
		if err != nil {
			t.Fatal(err)
		}
		if tr.cgroupNS != c.want || strings.Contains(tr.config, "init 3 6") != (c.want != "") || strings.Contains(tr.config, "share.cgroup") {
			t.Errorf("%s: %q, want %q, config\n%s", name, tr.cgroupNS, c.want, tr.config)
		}
	}
}

func TestHostID(t *testing.T) {
	m := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100, Size: 5}, {ContainerID: 1000, HostID: 7, Size: 1}}
	for id, want := range map[uint32]uint32{0: 100, 4: 104, 1000: 7} {
		if got, ok := hostID(m, id); !ok || got != want {
			t.Errorf("%d: %d %v", id, got, ok)
		}
	}
	for _, id := range []uint32{5, 999, 1001} {
		if got, ok := hostID(m, id); ok {
			t.Errorf("%d: %d", id, got)
		}
	}
}

func TestParseMappings(t *testing.T) {
	got, err := parseMappings([]byte("         0     100000      65536\n     70000          1          1\n"))
	if want := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}, {ContainerID: 70000, HostID: 1, Size: 1}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := parseMappings([]byte("0 1\n")); err == nil {
		t.Error("half a mapping is taken")
	}
}

func TestParentOf(t *testing.T) {
	if got, err := parentOf(os.Getpid()); err != nil || got != os.Getppid() {
		t.Errorf("%d, %v; want %d", got, err, os.Getppid())
	}
}

func TestFirstErrors(t *testing.T) {
	log := "lxc-start x 1 WARN     start - a.c:f:1 - warned\nlxc-start x 2 ERROR    conf - b.c:g:2 - No such file - broke\nnoise\n"
	if got := firstErrors([]byte(log)); got != "No such file - broke" {
		t.Errorf("%q", got)
	}
	if got := firstErrors(nil); got != "it gave no reason" {
		t.Errorf("%q", got)
	}
}

func TestTyped(t *testing.T) {
	err := typed(&plan.Error{Kind: plan.ErrorNotFound, Message: "no x"})
	if !errors.Is(err, errdefs.ErrNotFound) || err.Error() != "no x" {
		t.Errorf("%v", err)
	}
}
