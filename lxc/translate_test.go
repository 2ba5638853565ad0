package lxc

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

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
	return translate(CreateOptions{Namespace: "default", ID: "x", Bundle: "/b", Rootfs: "/b/rootfs", Spec: s}, "default--x", "/bin/pve-init")
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
lxc.hook.mount = '/bin/pve-init' mount '/b/lxc/mounts.json' #
lxc.hook.post-stop = test "$LXC_TARGET" != reboot #
lxc.init.cmd = /proc/self/fd/4 init 3
lxc.namespace.clone = mnt pid net ipc uts
lxc.net.0.type = empty
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
		{"user namespace", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}, "linux.namespaces[5]", errdefs.IsNotImplemented},
		{"hostname that is a config line", func(s *specs.Spec) { s.Hostname = "a\nlxc.x = y" }, "lxc.uts.name", errdefs.IsInvalidArgument},
		{"namespace path that is a config line", func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/a\nlxc.x = y" }, "lxc.namespace.share.net", errdefs.IsInvalidArgument},
		{"systemd's cgroup driver without the option", func(s *specs.Spec) { s.Linux.CgroupsPath = "a.slice:b:c" }, "linux.cgroupsPath", errdefs.IsInvalidArgument},
		{"root cgroup", func(s *specs.Spec) { s.Linux.CgroupsPath = "/x/.." }, "linux.cgroupsPath", errdefs.IsInvalidArgument},
		{"swappiness", func(s *specs.Spec) {
			s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: &swappiness}}
		}, "linux.resources.memory.swappiness", errdefs.IsNotImplemented},
		{"sysctl of the host", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.panic": "1"} }, "kernel.panic", errdefs.IsInvalidArgument},
		{"sysctl that climbs", func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net/../kernel/panic": "1"} }, "net/../kernel/panic", errdefs.IsInvalidArgument},
		{"createContainer hooks", func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{}}} }, "hooks.createContainer", errdefs.IsNotImplemented},
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

func TestQuote(t *testing.T) {
	if got := quote(`it's`); got != `'it'\''s'` {
		t.Error(got)
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
