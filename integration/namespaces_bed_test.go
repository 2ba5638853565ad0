//go:build bed

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// The mappings of the containers with a user namespace.
var (
	uids = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	gids = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
)

// remapped is a container in a user namespace of its own, with a root whose ids
// are mapped by the mount: containerd knows from its configuration that the
// snapshotter can (remap-ids), and neither copies nor chowns a file.
func remapped(o options) options {
	o.spec = append([]oci.SpecOpts{oci.WithUserNamespace(uids, gids)}, o.spec...)
	o.snapshot = func(id string, image client.Image) client.NewContainerOpts {
		return client.WithNewSnapshot(id, image, client.WithUserNSRemapperLabels(uids, gids))
	}
	return o
}

// wholly compares output with what is wanted, line by line.
func wholly(t *testing.T, what, got string, want ...string) {
	t.Helper()
	if w := strings.Join(want, "\n") + "\n"; got != w {
		t.Errorf("%s:\n%s\nwant:\n%s", what, got, w)
	}
}

// shared gives a spec one namespace of a process.
func shared(kind specs.LinuxNamespaceType, pid uint32) oci.SpecOpts {
	file := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: "net", specs.PIDNamespace: "pid", specs.IPCNamespace: "ipc",
		specs.UTSNamespace: "uts", specs.CgroupNamespace: "cgroup", specs.UserNamespace: "user", specs.TimeNamespace: "time"}[kind]
	return oci.WithLinuxNamespace(specs.LinuxNamespace{Type: kind, Path: fmt.Sprintf("/proc/%d/ns/%s", pid, file)})
}

// readlinks is a script that shows namespaces of its own.
func readlinks(kinds ...string) string {
	return "for n in " + strings.Join(kinds, " ") + "; do readlink /proc/self/ns/$n; done"
}

// namespacesOf are the namespaces of a process, as readlink shows them.
func namespacesOf(t *testing.T, pid uint32, kinds ...string) (out []string) {
	t.Helper()
	for _, kind := range kinds {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, link)
	}
	return out
}

func TestUserNamespace(t *testing.T) {
	secret := t.TempDir() // only root gets there
	dir := filepath.Join(secret, "deep")
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("readable\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(secret, 0o700); err != nil {
		t.Fatal(err)
	}
	mode, owner := os.FileMode(0o640), uint32(7)
	adj := -321
	b := start(t, remapped(options{
		args: sh(`cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '
id -u; stat -c '%u:%g' / /etc/passwd /tmp
touch /new && stat -c %u:%g /new
for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done
stat -c '%a %u:%g' /dev/null /dev/mine
head -c 3 /dev/zero | wc -c; echo x >/dev/null && echo written
cat /vol/file
echo reopened >/dev/stdout
cat /proc/self/oom_score_adj; ulimit -Hn
mkdir /sys/fs/cgroup/sub && echo delegated
ls /sys/class/net
cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shmmni
grep -c ' /sys .* sysfs ' /proc/self/mountinfo
echo 1 2>/dev/null >/proc/sys/kernel/panic || echo read-only
wc -c </proc/timer_list
hostname; stat -c '%u' /scratch
cat /proc/self/attr/current
exec sleep 1000`),
		spec: []oci.SpecOpts{oci.WithHostname("mapped"), defaultProfile(t, "containerd-pve-mapped"), oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.CgroupNamespace}), oci.WithMounts([]specs.Mount{
			{Type: "bind", Source: dir, Destination: "/vol", Options: []string{"rbind"}},
			{Type: "tmpfs", Source: "tmpfs", Destination: "/scratch", Options: []string{"uid=12"}},
			{Type: "cgroup", Source: "cgroup", Destination: "/sys/fs/cgroup", Options: []string{"rw", "nosuid", "noexec", "nodev"}},
		})},
		edit: func(s *oci.Spec) {
			s.Process.OOMScoreAdj = &adj
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 1 << 20}}
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_default_ttl": "99", "kernel.shmmni": "1234"}
			s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/dev/mine", Type: "c", Major: 1, Minor: 3, FileMode: &mode, UID: &owner})
		},
	}))
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.task.Pid()))
	if err != nil || !strings.Contains(string(status), "Uid:\t100000\t") || !strings.Contains(string(status), "Gid:\t200000\t") {
		t.Errorf("%v: %s", err, status)
	}
	for _, c := range []struct {
		name   string
		script string
		change func(*oci.Spec)
		want   []string
	}{
		{"root", "id -u; id -G; pwd; tr -s ' ' </proc/self/uid_map; grep CapEff /proc/self/status | cut -f2; cat /proc/self/oom_score_adj; ulimit -Hn; echo again >/dev/stdout; cat /proc/self/attr/current", nil,
			[]string{"0", "0", "/", " 0 100000 65536", "00000000a80425fb", "-321", fmt.Sprint(1 << 20), "again", "containerd-pve-mapped (enforce)"}},
		{"user", "id -u; id -g; id -G; grep CapEff /proc/self/status | cut -f2; touch /etc/x 2>/dev/null || echo no; touch /tmp/mine && stat -c %u:%g /tmp/mine; echo out >/dev/stdout", func(s *oci.Spec) {
			s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 77}}
		}, []string{"1000", "1001", "1001 5 77", "0000000000000000", "no", "1000:1001", "out"}},
		{"namespaces", readlinks("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"), nil,
			namespacesOf(t, b.task.Pid(), "user", "mnt", "pid", "net", "ipc", "uts", "cgroup")},
	} {
		out, code, err := b.execIn(sh(c.script), c.change)
		if err != nil || code != 0 {
			t.Errorf("exec %s: code %d, %v", c.name, code, err)
		}
		wholly(t, "exec "+c.name, out, c.want...)
	}
	if _, code, err := b.execIn(sh("exit 42"), nil); err != nil || code != 42 {
		t.Errorf("exit 42: %d, %v", code, err)
	}
	if _, code, err := b.execIn(sh("kill -9 $$"), nil); err != nil || code != 137 {
		t.Errorf("kill -9: %d, %v", code, err)
	}
	if _, _, err := b.execIn([]string{"no-such-program"}, nil); err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("exec of nothing: %v", err)
	}
	if err := b.task.Kill(b.ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(); code != 137 {
		t.Errorf("exit code %d", code)
	}
	wholly(t, "container", b.out.String(), " 0 100000 65536", " 0 200000 65536", "0", "0:0", "0:0", "0:0", "0:0",
		"666 0:0", "640 7:0", "3", "written", "readable", "reopened", "-321", fmt.Sprint(1<<20), "delegated", "lo", "99", "1234", "1",
		"read-only", "0", "mapped", "12", "containerd-pve-mapped (enforce)")
	if b.err.Len() > 0 {
		t.Error(b.err)
	}
}

// TestUserNamespaceForeignNetwork: a network namespace of the host's, as a CNI
// plugin makes it, has a sysfs that the container's root may not mount.
func TestUserNamespaceForeignNetwork(t *testing.T) {
	if out, code := command("ip", "netns", "add", "foreign"); code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() { command("ip", "netns", "del", "foreign") })
	if out, code := command("ip", "-n", "foreign", "link", "add", "seen", "type", "dummy"); code != 0 {
		t.Fatal(out)
	}
	b := start(t, remapped(options{args: sh("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort; test -d /sys/class/net && grep ' /sys ' /proc/self/mountinfo | cut -d' ' -f6; id -u; touch /ready; exec sleep 1000"),
		spec: []oci.SpecOpts{oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/run/netns/foreign"})}}))
	eventually(t, time.Minute, "all is written", func() bool {
		_, code, err := b.execIn([]string{"test", "-e", "/ready"}, nil)
		return err == nil && code == 0
	})
	out, code, err := b.execIn(sh("grep -c seen /proc/net/dev; "+readlinks("user", "net")), nil)
	if err != nil || code != 0 {
		t.Errorf("exec: code %d, %v", code, err)
	}
	wholly(t, "exec", out, append([]string{"1"}, namespacesOf(t, b.task.Pid(), "user", "net")...)...)
	if err := b.task.Kill(b.ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.wait()
	if !strings.HasPrefix(b.out.String(), "lo\nseen\nro,nosuid,nodev,noexec") || !strings.HasSuffix(b.out.String(), "\n0\n") {
		t.Errorf("%s%s", b.out, b.err)
	}
}

func TestUserNamespaceTerminal(t *testing.T) {
	b := start(t, remapped(options{terminal: true, args: sh("test -t 0 && tty && stat -c %u:%g $(tty) && id -u && stat -c %t /dev/console; exit 5")}))
	if code := b.wait(); code != 5 || !strings.Contains(b.out.String(), "/dev/pts/0\r\n0:5\r\n0\r\n88\r\n") {
		t.Errorf("exit code %d, %q", code, b.out)
	}
}

// TestUserNamespaceCtr: as ctr asks for it.
func TestUserNamespaceCtr(t *testing.T) {
	out, code := command("ctr", "run", "--rm", "--runtime", ours, "--snapshotter", zfs, "--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536",
		busybox, "ctruser", "sh", "-c", "stat -c %u / /etc/passwd; tr -s ' ' </proc/self/uid_map")
	if code != 0 {
		t.Errorf("status %d", code)
	}
	wholly(t, "ctr", out, "0", "0", " 0 100000 65536")
}

// TestUserNamespaceByPath: a second container in the user namespace of a first
// one, with the namespaces that belong to it.
func TestUserNamespaceByPath(t *testing.T) {
	kinds := []string{"user", "net", "ipc", "uts", "pid"}
	first := start(t, remapped(options{args: []string{"sleep", "1000"}}))
	pid := first.task.Pid()
	o := remapped(options{args: sh("id -u; stat -c %u /etc/passwd; test $$ -gt 1 && echo joined; exec sleep 1000")})
	o.spec = append(o.spec, shared(specs.UserNamespace, pid), shared(specs.NetworkNamespace, pid), shared(specs.IPCNamespace, pid),
		shared(specs.UTSNamespace, pid), shared(specs.PIDNamespace, pid))
	o.edit = func(s *oci.Spec) { s.Linux.UIDMappings, s.Linux.GIDMappings = nil, nil }
	second := start(t, o)
	want := strings.Join(namespacesOf(t, pid, kinds...), "\n") + "\n"
	if got := strings.Join(namespacesOf(t, second.task.Pid(), kinds...), "\n") + "\n"; got != want {
		t.Errorf("namespaces\n%swant\n%s", got, want)
	}
	out, code, err := second.execIn(sh("id -u; "+readlinks(kinds...)), nil)
	if err != nil || code != 0 || out != "0\n"+want {
		t.Errorf("exec: code %d, %v, %s", code, err, out)
	}
	if err := second.task.Kill(second.ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := second.wait(); code != 137 {
		t.Errorf("exit code %d", code)
	}
	wholly(t, "second", second.out.String(), "0", "0", "joined")
	o.spec = append(o.spec, oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/proc/1/ns/net"}))
	if _, err := create(t, o); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "network namespace") {
		t.Errorf("the host's network in the container's user namespace: %v", err)
	}
	if st, err := first.task.Status(first.ctx); err != nil || st.Status != client.Running {
		t.Errorf("the first one is %s, %v", st.Status, err)
	}
}

func TestTimeNamespace(t *testing.T) {
	const clocks = "tr -s ' \t' ' ' </proc/self/timens_offsets; cut -d. -f1 /proc/uptime"
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		t.Fatal(err)
	}
	const days = 86400
	first := start(t, options{args: sh(clocks + "; exec sleep 1000"), edit: func(s *oci.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
		s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 50 * days, Nanosecs: 5}, "monotonic": {Secs: 7 * days, Nanosecs: 9}}
	}})
	check := func(what, out string) {
		t.Helper()
		var uptime int64
		rest, ok := strings.CutPrefix(out, fmt.Sprintf("monotonic %d 9\nboottime %d 5\n", 7*days, 50*days))
		if !ok {
			t.Errorf("%s: %q", what, out)
			return
		}
		if _, err := fmt.Sscan(rest, &uptime); err != nil || uptime < now.Sec+50*days || uptime > now.Sec+51*days {
			t.Errorf("%s: uptime %q, on the host it was %d", what, rest, now.Sec)
		}
	}
	out, code, err := first.execIn(sh(clocks), nil)
	if err != nil || code != 0 {
		t.Errorf("exec: code %d, %v", code, err)
	}
	check("exec", out)
	second := start(t, options{args: sh(clocks + "; readlink /proc/self/ns/time >&2; exec sleep 1000"), spec: []oci.SpecOpts{shared(specs.TimeNamespace, first.task.Pid())}})
	if out, code, err = second.execIn(sh(clocks), nil); err != nil || code != 0 {
		t.Errorf("exec by path: code %d, %v", code, err)
	}
	check("exec by path", out)
	want := namespacesOf(t, first.task.Pid(), "time")
	for name, b := range map[string]*box{"own": first, "by path": second} {
		if err := b.task.Kill(b.ctx, syscall.SIGTERM, client.WithKillAll); err != nil {
			t.Fatal(err)
		}
		if err := b.task.Kill(b.ctx, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if code := b.wait(); code != 137 {
			t.Errorf("%s: exit code %d", name, code)
		}
		check(name, b.out.String())
	}
	wholly(t, "by path", second.err.String(), want...)
	_, err = create(t, options{args: []string{"true"}, spec: []oci.SpecOpts{oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.TimeNamespace, Path: "/etc/passwd"})}})
	if err == nil || !strings.Contains(err.Error(), "time") {
		t.Errorf("time namespace that is none: %v", err)
	}
}

// TestNamespacesByPath: all that one container can take from another, and what
// stays the host's although liblxc would make a new one.
func TestNamespacesByPath(t *testing.T) {
	kinds := []string{"net", "ipc", "uts", "pid", "cgroup"}
	first := start(t, options{args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.CgroupNamespace})}})
	pid := first.task.Pid()
	second := start(t, options{args: sh(readlinks(kinds...) + "; hostname; cat /proc/sys/kernel/domainname; exec sleep 1000"),
		spec: []oci.SpecOpts{shared(specs.NetworkNamespace, pid), shared(specs.IPCNamespace, pid), shared(specs.UTSNamespace, pid),
			shared(specs.PIDNamespace, pid), shared(specs.CgroupNamespace, pid), oci.WithHostname("taken"), oci.WithDomainname("over")},
		edit: func(s *oci.Spec) { s.Hostname = "taken" }})
	want := namespacesOf(t, pid, kinds...)
	out, code, err := second.execIn(sh(readlinks(kinds...)), nil)
	if err != nil || code != 0 {
		t.Errorf("exec: code %d, %v", code, err)
	}
	wholly(t, "exec", out, want...)
	if out, _, err := first.execIn(sh("hostname"), nil); err != nil || out != "taken\n" {
		t.Errorf("hostname of the shared namespace: %q, %v", out, err)
	}
	if err := second.task.Kill(second.ctx, syscall.SIGTERM); err != nil { // no PID 1: it dies of it
		t.Fatal(err)
	}
	if code := second.wait(); code != 143 {
		t.Errorf("exit code %d", code)
	}
	wholly(t, "second", second.out.String(), append(want, "taken", "over")...)
	if st, err := first.task.Status(first.ctx); err != nil || st.Status != client.Running {
		t.Errorf("the first one is %s, %v", st.Status, err)
	}
	// A joined namespace and the host's cgroup namespace.
	out, _, _ = run(t, options{args: sh("readlink /proc/self/ns/cgroup; cat /proc/self/cgroup"), spec: []oci.SpecOpts{shared(specs.NetworkNamespace, pid)}})
	if host := namespacesOf(t, uint32(os.Getpid()), "cgroup")[0]; !strings.HasPrefix(out, host+"\n0::/default/") {
		t.Errorf("cgroup namespace %q, want %q", out, host)
	}
}

// TestNetDevices: devices of the host are the container's, with their addresses.
func TestNetDevices(t *testing.T) {
	for _, argv := range [][]string{
		{"ip", "link", "add", "nd0", "type", "dummy"}, {"ip", "link", "add", "nd1", "mtu", "1400", "type", "dummy"},
		{"ip", "addr", "add", "10.9.8.7/24", "dev", "nd0"}, {"ip", "addr", "add", "fd00::7/64", "dev", "nd0"},
	} {
		if out, code := command(argv...); code != 0 {
			t.Fatal(out)
		}
	}
	t.Cleanup(func() { command("ip", "link", "del", "nd0"); command("ip", "link", "del", "nd1") })
	b := start(t, options{args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) {
		s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"nd0": {Name: "eth7"}, "nd1": {Name: "made%d"}}
	}})
	out, code := command("nsenter", "-t", fmt.Sprint(b.task.Pid()), "-n", "--", "ip", "-o", "addr")
	for _, want := range []string{"eth7    inet 10.9.8.7/24", "eth7    inet6 fd00::7/64"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	out, code = command("nsenter", "-t", fmt.Sprint(b.task.Pid()), "-n", "--", "ip", "-o", "link")
	for _, want := range []string{"lo: <LOOPBACK,UP,LOWER_UP>", "eth7: <BROADCAST,NOARP,UP,LOWER_UP>", "made0: <BROADCAST,NOARP,UP,LOWER_UP> mtu 1400"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if out, code := command("ip", "link", "show", "nd0"); code == 0 {
		t.Errorf("it is on the host still: %s", out)
	}
	for name, device := range map[string]specs.LinuxNetDevice{"nosuchdevice": {}, "nd2": {Name: "lo"}} {
		command("ip", "link", "add", "nd2", "type", "dummy")
		_, err := create(t, options{args: []string{"true"}, edit: func(s *oci.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{name: device} }})
		if err == nil || !strings.Contains(err.Error(), "linux.netDevices") {
			t.Errorf("%s as %q: %v", name, device.Name, err)
		}
	}
	if out, code := command("ip", "link", "del", "nd2"); code != 0 {
		t.Errorf("it did not stay on the host: %s", out)
	}
}
