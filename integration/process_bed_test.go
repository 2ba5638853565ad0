//go:build bed

package integration

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func sh(script string) []string { return []string{"sh", "-c", script} }

func printArgs(args ...string) []string {
	return append([]string{"sh", "-c", `for a; do printf '[%s]' "$a"; done`, "sh"}, args...)
}

func statusLine(key string) []string {
	return sh("grep ^" + key + ": /proc/self/status | tr -d ' \\t'")
}

// processCases is the table of what a container's process gets: each case is run
// as init of a container of its own.
var processCases = []struct {
	name string
	args []string
	spec []oci.SpecOpts
	edit func(*oci.Spec)
	want string // stdout; "*" for any
	code uint32
}{
	{name: "args with spaces", args: printArgs("a b", " c "), want: "[a b][ c ]"},
	{name: "args with quotes", args: printArgs(`"`, `'`, "`", `a"b'c`), want: "[\"]['][`][a\"b'c]"},
	{name: "args with newlines", args: printArgs("a\nb", "\n"), want: "[a\nb][\n]"},
	{name: "args that are empty", args: printArgs("", "x", ""), want: "[][x][]"},
	{name: "args a shell would expand", args: printArgs("$HOME", "*", "~", "$(id)", `\n`), want: `[$HOME][*][~][$(id)][\n]`},
	{name: "args of LXC's syntax", args: printArgs("lxc.init.cmd = x", "#", "="), want: "[lxc.init.cmd = x][#][=]"},
	{name: "args in UTF-8", args: printArgs("ä€😀"), want: "[ä€😀]"},
	{name: "args by the thousand", args: printArgs(slices.Repeat([]string{"x"}, 5000)...), want: strings.Repeat("[x]", 5000)},
	{name: "env", args: sh(`printf %s "$A"`), spec: []oci.SpecOpts{oci.WithEnv([]string{"A=b c=d"})}, want: "b c=d"},
	{name: "env with newlines", args: sh(`printf %s "$A"`), spec: []oci.SpecOpts{oci.WithEnv([]string{"A=x\nlxc.init.cmd = y\n"})}, want: "x\nlxc.init.cmd = y\n"},
	{name: "env that is empty", args: sh(`printf "[%s]" "${A-unset}"`), spec: []oci.SpecOpts{oci.WithEnv([]string{"A="})}, want: "[]"},
	{name: "env is the spec's and HOME", args: []string{"env"}, edit: func(s *oci.Spec) { s.Process.Env = []string{"PATH=/usr/bin:/bin", "ONE=1"} }, want: "PATH=/usr/bin:/bin\nONE=1\nHOME=/root\n"},
	{name: "uid and gid", args: sh("id -u; id -g"), spec: []oci.SpecOpts{oci.WithUIDGID(1234, 4321)}, want: "1234\n4321\n"},
	{name: "user by name", args: sh("id -un; id -gn"), spec: []oci.SpecOpts{oci.WithUser("www-data")}, want: "www-data\nwww-data\n"},
	{name: "additional groups", args: sh("id -G"), edit: func(s *oci.Spec) { s.Process.User.AdditionalGids = []uint32{5, 777} }, want: "0 5 777\n"},
	{name: "no additional groups", args: sh("id -G"), edit: func(s *oci.Spec) { s.Process.User.AdditionalGids = nil }, want: "0\n"},
	{name: "umask", args: sh("umask"), edit: func(s *oci.Spec) { u := uint32(0o027); s.Process.User.Umask = &u }, want: "0027\n"},
	{name: "cwd", args: sh("pwd"), spec: []oci.SpecOpts{oci.WithProcessCwd("/usr/share")}, want: "/usr/share\n"},
	{name: "cwd that is missing is made", args: sh("pwd"), spec: []oci.SpecOpts{oci.WithProcessCwd("/not/there/yet")}, want: "/not/there/yet\n"},
	{name: "cwd with spaces", args: sh("pwd"), spec: []oci.SpecOpts{oci.WithProcessCwd("/a b/c")}, want: "/a b/c\n"},
	{name: "capabilities by default", args: statusLine("CapEff"), want: "CapEff:00000000a80425fb\n"},
	{name: "bounding set by default", args: statusLine("CapBnd"), want: "CapBnd:00000000a80425fb\n"},
	{name: "ambient set by default", args: statusLine("CapAmb"), want: "CapAmb:0000000000000000\n"},
	{name: "capabilities all dropped", args: statusLine("CapBnd"), spec: []oci.SpecOpts{oci.WithCapabilities(nil)}, want: "CapBnd:0000000000000000\n"},
	{name: "capability added", args: statusLine("CapEff"), spec: []oci.SpecOpts{oci.WithCapabilities([]string{"CAP_NET_ADMIN"})}, want: "CapEff:0000000000001000\n"},
	{name: "capabilities of a user", args: statusLine("CapEff"), spec: []oci.SpecOpts{oci.WithUIDGID(1000, 1000)}, want: "CapEff:0000000000000000\n"},
	{name: "ambient capability of a user", args: statusLine("CapEff"), spec: []oci.SpecOpts{oci.WithUIDGID(1000, 1000)}, edit: func(s *oci.Spec) {
		c := []string{"CAP_NET_BIND_SERVICE"}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: c, Permitted: c, Inheritable: c, Effective: c, Ambient: c}
	}, want: "CapEff:0000000000000400\n"},
	{name: "privileged", args: statusLine("CapEff"), spec: []oci.SpecOpts{oci.WithPrivileged, oci.WithAllDevicesAllowed, oci.WithHostDevices}, want: "CapEff:000001ffffffffff\n"},
	{name: "no_new_privs by default", args: statusLine("NoNewPrivs"), want: "NoNewPrivs:1\n"},
	{name: "new privileges", args: statusLine("NoNewPrivs"), spec: []oci.SpecOpts{oci.WithNewPrivileges}, want: "NoNewPrivs:0\n"},
	{name: "rlimit nofile", args: sh("ulimit -Sn; ulimit -Hn"), edit: func(s *oci.Spec) {
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 123, Hard: 456}}
	}, want: "123\n456\n"},
	{name: "rlimit core", args: sh("ulimit -c"), edit: func(s *oci.Spec) {
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: 0, Hard: 0}}
	}, want: "0\n"},
	{name: "oom_score_adj", args: sh("cat /proc/self/oom_score_adj"), edit: func(s *oci.Spec) { v := 321; s.Process.OOMScoreAdj = &v }, want: "321\n"},
	{name: "no seccomp", args: statusLine("Seccomp"), want: "Seccomp:0\n"},
	{name: "seccomp of containerd", args: statusLine("Seccomp"), spec: []oci.SpecOpts{seccomp.WithDefaultProfile()}, want: "Seccomp:2\n"},
	{name: "seccomp of containerd lets work be done", args: sh("ls / >/dev/null && date >/dev/null && sleep 0 && echo fine"), spec: []oci.SpecOpts{seccomp.WithDefaultProfile()}, want: "fine\n"},
	{name: "seccomp errno", args: sh("mkdir /tmp/x 2>/dev/null || echo no"), edit: profile(specs.ActErrno, "mkdir", "mkdirat"), want: "no\n"},
	{name: "seccomp kill", args: sh("mkdir /tmp/x; echo $?"), edit: profile(specs.ActKillProcess, "mkdir", "mkdirat"), want: "159\n"},
	{name: "exit code 0", args: sh("exit 0")},
	{name: "exit code 1", args: sh("exit 1"), code: 1},
	{name: "exit code 42", args: sh("exit 42"), code: 42},
	{name: "exit code 126", args: sh("exit 126"), code: 126},
	{name: "exit code 137", args: sh("exit 137"), code: 137},
	{name: "exit code 255", args: sh("exit 255"), code: 255},
	{name: "exit at once", args: []string{"false"}, code: 1},
	{name: "pid 1", args: sh("echo $$"), want: "1\n"},
	{name: "hostname", args: sh("hostname; cat /proc/sys/kernel/hostname"), spec: []oci.SpecOpts{oci.WithHostname("box-7")}, want: "box-7\nbox-7\n"},
	{name: "read-only root", args: sh("touch /x 2>/dev/null || echo ro; touch /dev/shm/y && echo rw"), spec: []oci.SpecOpts{oci.WithRootFSReadonly()}, want: "ro\nrw\n"},
	{name: "masked path", args: sh("wc -c </proc/timer_list; ls /proc/scsi /sys/firmware | grep -v :; true"), want: "*"},
	{name: "read-only path", args: sh("echo 1 2>/dev/null >/proc/sys/kernel/panic || echo ro"), want: "ro\n"},
	{name: "devices", args: sh("for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; head -c3 /dev/zero | wc -c; echo x >/dev/null; ls /dev/mem 2>/dev/null"), code: 2, want: "3\n"},
	{name: "a device that is not allowed", args: sh("mknod /tmp/m c 1 1 && cat /tmp/m 2>&1 | head -c 60"), want: "cat: /tmp/m: Operation not permitted\n"},
	{name: "stdin is empty", args: sh("wc -c"), want: "0\n"},
	{name: "one process and no descriptors but stdio", args: sh("ls /proc/self/fd | wc -l"), want: "4\n"},
	{name: "tmpfs mount", args: sh("grep ' /scratch ' /proc/mounts | cut -d' ' -f2,3; stat -c %a /scratch"), spec: []oci.SpecOpts{oci.WithMounts([]specs.Mount{{Type: "tmpfs", Source: "tmpfs", Destination: "/scratch", Options: []string{"mode=700", "size=1m"}}})}, want: "/scratch tmpfs\n700\n"},
	{name: "bind mount, read-only", args: sh("cat '/host dir/fstab' >/dev/null 2>&1; touch '/host dir/x' 2>/dev/null || echo ro"), spec: []oci.SpecOpts{oci.WithMounts([]specs.Mount{{Type: "bind", Source: "/etc", Destination: "/host dir", Options: []string{"rbind", "ro"}}})}, want: "ro\n"},
	{name: "host network", args: sh("ls -l /proc/self/ns/net | grep -c " + "net:"), spec: []oci.SpecOpts{oci.WithHostNamespace(specs.NetworkNamespace)}, want: "1\n"},
	{name: "own network has lo alone", args: sh("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '"), want: "lo\n"},
	{name: "memory limit", args: sh("cat /sys/fs/cgroup/memory.max"), spec: []oci.SpecOpts{oci.WithMemoryLimit(64 << 20)}, edit: ownCgroup, want: fmt.Sprintf("%d\n", 64<<20)},
	{name: "cpu limit", args: sh("cat /sys/fs/cgroup/cpu.max"), spec: []oci.SpecOpts{oci.WithCPUCFS(50000, 100000)}, edit: ownCgroup, want: "50000 100000\n"},
	{name: "pids limit", args: sh("cat /sys/fs/cgroup/pids.max"), spec: []oci.SpecOpts{oci.WithPidsLimit(77)}, edit: ownCgroup, want: "77\n"},
	{name: "sysctl", args: sh("cat /proc/sys/net/ipv4/ip_default_ttl"), edit: func(s *oci.Spec) {
		s.Linux.Sysctl = map[string]string{"net.ipv4.ip_default_ttl": "77"}
	}, want: "77\n"},
}

func testProcess(t *testing.T, runtime string) {
	for _, c := range processCases {
		t.Run(c.name, func(t *testing.T) {
			stdout, stderr, code := run(t, options{runtime: runtime, args: c.args, spec: c.spec, edit: c.edit})
			if code != c.code || c.want != "*" && stdout != c.want {
				t.Errorf("exit code %d, stdout %q, stderr %q; want %d, %q", code, stdout, stderr, c.code, c.want)
			}
		})
	}
}

// TestProcess: the table holds for our runtime.
func TestProcess(t *testing.T) { testProcess(t, ours) }

// TestLongProcessOfRunc: it holds for runc as well, which it is measured by.
func TestLongProcessOfRunc(t *testing.T) { testProcess(t, runc) }

// ownCgroup shows the container its cgroup as the root of a file system.
func ownCgroup(s *oci.Spec) {
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}})
}

// profile allows all but the calls given.
func profile(action specs.LinuxSeccompAction, calls ...string) func(*oci.Spec) {
	return func(s *oci.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Architectures: []specs.Arch{specs.ArchX86_64},
			Syscalls:      []specs.LinuxSyscall{{Names: calls, Action: action}},
		}
	}
}

// TestExecStatus: a process of exec gives every code and dies of every signal.
func TestExecStatus(t *testing.T) {
	b := start(t, options{args: []string{"sleep", "1000"}})
	for code := range uint32(256) {
		_, got, err := b.execIn([]string{"sh", "-c", fmt.Sprintf("exit %d", code)}, nil)
		if err != nil || got != code {
			t.Errorf("exit %d: %d, %v", code, got, err)
		}
	}
	for sig := 1; sig <= 31; sig++ {
		switch syscall.Signal(sig) {
		case syscall.SIGCHLD, syscall.SIGCONT, syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, syscall.SIGURG, syscall.SIGWINCH:
			continue // they do not end a process
		}
		_, got, err := b.execIn([]string{"sh", "-c", fmt.Sprintf("ulimit -c 0; kill -%d $$; exit 1", sig)}, nil)
		if err != nil || got != uint32(128+sig) {
			t.Errorf("death by signal %d: %d, %v", sig, got, err)
		}
	}
}

// TestInitSignal: a container that shares the host's pid namespace has an init
// that any signal ends; its status tells which.
func TestInitSignal(t *testing.T) {
	for _, sig := range []syscall.Signal{1, 2, 3, 6, 9, 10, 11, 13, 14, 15} {
		b := start(t, options{args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{oci.WithHostNamespace(specs.PIDNamespace)}, edit: func(s *oci.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}}
		}})
		if err := b.task.Kill(b.ctx, sig); err != nil {
			t.Fatal(err)
		}
		if code := b.wait(); code != 128+uint32(sig) {
			t.Errorf("signal %d: exit code %d", sig, code)
		}
	}
}

// TestExecProcess: an exec gets its own user, env, cwd, capabilities.
func TestExecProcess(t *testing.T) {
	b := start(t, options{args: []string{"sleep", "1000"}})
	for _, c := range []struct {
		name   string
		args   []string
		change func(*oci.Spec)
		want   string
	}{
		{"args", printArgs("a b", "", "\n"), nil, "[a b][][\n]"},
		{"user", sh("id -u; id -g; id -G"), func(s *oci.Spec) {
			s.Process.User = specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{9}}
		}, "7\n8\n8 9\n"},
		{"env", sh(`printf %s "$X"`), func(s *oci.Spec) { s.Process.Env = append(s.Process.Env, "X=1\n2") }, "1\n2"},
		{"cwd", sh("pwd"), func(s *oci.Spec) { s.Process.Cwd = "/usr" }, "/usr\n"},
		{"capabilities", statusLine("CapEff"), nil, "CapEff:00000000a80425fb\n"},
		{"bounding set", statusLine("CapBnd"), nil, "CapBnd:00000000a80425fb\n"},
		{"no_new_privs", statusLine("NoNewPrivs"), nil, "NoNewPrivs:1\n"},
		{"init is pid 1", sh("tr '\\0' ' ' </proc/1/cmdline"), nil, "sleep 1000 "},
	} {
		got, code, err := b.execIn(c.args, c.change)
		if err != nil || code != 0 || got != c.want {
			t.Errorf("%s: %q, code %d, %v; want %q", c.name, got, code, err, c.want)
		}
	}
}
