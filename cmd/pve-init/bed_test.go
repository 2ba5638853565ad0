//go:build bed

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/seccomp"
	"github.com/containerd-pve/containerd-pve/lxc/tree"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// box is one container under lxc-start, with this package's program as hook and init.
type box struct {
	t      *testing.T
	name   string
	path   string
	rootfs string
	mounts plan.Mounts
	// stdout of the entrypoint, once it has ended.
	stdout, stderr bytes.Buffer
	cmd            *exec.Cmd
	sync           *shimEnd
}

// shimEnd is the shim's end of a sync socket.
type shimEnd struct {
	conn  *net.UnixConn
	lines *bufio.Reader
	// fds came along with messages.
	fds []*os.File
}

func program(t *testing.T) string {
	if p := os.Getenv("PVE_INIT"); p != "" {
		return p
	}
	p, err := exec.LookPath("pve-init")
	if err != nil {
		t.Skip("pve-init is not on PATH and PVE_INIT is not set")
	}
	return p
}

// newBox makes a root file system of busybox.
func newBox(t *testing.T) *box {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	b := &box{t: t, name: "pveinit" + strconv.Itoa(os.Getpid()), path: t.TempDir()}
	b.rootfs = filepath.Join(b.path, "rootfs")
	for _, dir := range []string{"bin", "etc", "dev", "proc", "sys", "tmp", "full"} {
		b.must(os.MkdirAll(filepath.Join(b.rootfs, dir), 0o755))
	}
	for d := b.path; d != filepath.Clean(os.TempDir()); d = filepath.Dir(d) {
		b.must(os.Chmod(d, 0o755))
	}
	busybox, err := os.ReadFile("/bin/busybox")
	b.must(err)
	b.must(os.WriteFile(filepath.Join(b.rootfs, "bin/busybox"), busybox, 0o755))
	for _, applet := range []string{"sh", "cat", "ls", "id", "grep", "mkdir", "touch", "env", "pwd", "stat", "tty", "stty", "echo", "true", "readlink", "sleep"} {
		b.must(os.Symlink("busybox", filepath.Join(b.rootfs, "bin", applet)))
	}
	b.must(os.WriteFile(filepath.Join(b.rootfs, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nu:x:1000:1000::/home/u:/bin/sh\n"), 0o644))
	b.must(os.WriteFile(filepath.Join(b.rootfs, "full/kept"), []byte("kept\n"), 0o640))
	b.must(os.WriteFile(filepath.Join(b.rootfs, "bin/data"), []byte("#!/nothing\n"), 0o755))
	b.must(os.WriteFile(filepath.Join(b.rootfs, "bin/plain"), nil, 0o644))
	b.mounts = plan.Mounts{
		Mounts: planned(
			specs.Mount{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			specs.Mount{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev", "relatime"}},
			specs.Mount{Destination: "/run", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		),
		MaskedPaths:   []string{"/proc/kcore", "/proc/acpi", "/proc/timer_list", "/sys/firmware", "/not/there"},
		ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
	}
	return b
}

func planned(mounts ...specs.Mount) (out []plan.Mount) {
	for _, m := range mounts {
		out = append(out, plan.Mount{Mount: m})
	}
	return out
}

func (b *box) add(mounts ...specs.Mount) {
	b.mounts.Mounts = append(b.mounts.Mounts, planned(mounts...)...)
}

func (b *box) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// pair is a sync socket.
func (b *box) pair() (*shimEnd, *os.File) {
	b.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	b.must(err)
	ours := os.NewFile(uintptr(fds[0]), "sync")
	conn, err := net.FileConn(ours)
	b.must(err)
	ours.Close()
	b.t.Cleanup(func() { conn.Close() })
	s := &shimEnd{conn: conn.(*net.UnixConn)}
	s.lines = bufio.NewReader(s)
	return s, os.NewFile(uintptr(fds[1]), "sync")
}

// Read reads the socket and keeps a descriptor that comes along.
func (s *shimEnd) Read(p []byte) (int, error) {
	oob := make([]byte, 64)
	n, oobn, _, _, err := s.conn.ReadMsgUnix(p, oob)
	if oobn > 0 {
		if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for _, m := range messages {
				if fds, err := unix.ParseUnixRights(&m); err == nil {
					for _, fd := range fds {
						s.fds = append(s.fds, os.NewFile(uintptr(fd), "passed"))
					}
				}
			}
		}
	}
	if (n == 0 && err == nil) || errors.Is(err, unix.ECONNRESET) {
		// A reset: the other end closed with a message unread.
		err = io.EOF
	}
	return max(n, 0), err
}

func (s *shimEnd) send(v any) error { return json.NewEncoder(s.conn).Encode(v) }

// event waits for the next message: nil for ready or the end of the socket.
func (s *shimEnd) event() (ready bool, err error) {
	if err := s.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		return false, err
	}
	line, err := s.lines.ReadBytes('\n')
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return false, err
	}
	var e plan.Event
	if err := json.Unmarshal(line, &e); err != nil {
		return false, err
	}
	if e.Error != nil {
		return false, e.Error
	}
	return e.Ready, nil
}

// create starts the container up to ready; an error is the init's or the hook's.
func (b *box) create(p plan.Process) error {
	b.t.Helper()
	exe := program(b.t)
	config := strings.Join([]string{
		"lxc.rootfs.path = dir:" + b.rootfs, "lxc.uts.name = box", "lxc.autodev = 0", "lxc.console.path = none",
		"lxc.pty.max = 0", "lxc.tty.max = 0", "lxc.net.0.type = empty", "lxc.apparmor.profile = unconfined",
		"lxc.hook.mount = " + exe + " mount 6 #", "lxc.init.cmd = /proc/self/fd/4 init 3", "",
	}, "\n")
	b.must(os.WriteFile(filepath.Join(b.path, "config"), []byte(config), 0o600))
	var theirs *os.File
	b.sync, theirs = b.pair()
	defer theirs.Close()
	self, err := os.Open(exe)
	b.must(err)
	defer self.Close()
	leak, err := os.Open("/")
	b.must(err)
	defer leak.Close()
	b.cmd = exec.Command("lxc-start", "-F", "-n", b.name, "-P", b.path, "-f", filepath.Join(b.path, "config"),
		"-o", filepath.Join(b.path, "log"), "-l", "INFO")
	b.cmd.Stdout, b.cmd.Stderr = &b.stdout, &b.stderr
	hook, theirHook := b.pair()
	b.cmd.ExtraFiles = []*os.File{theirs, self, leak, theirHook}
	b.must(b.cmd.Start())
	theirHook.Close()
	b.t.Cleanup(func() {
		if b.cmd.ProcessState == nil {
			b.sync.conn.Close()
			_ = exec.Command("lxc-stop", "-k", "-n", b.name, "-P", b.path).Run()
			_ = b.cmd.Wait()
		}
	})
	b.must(b.sync.send(p))
	theirs.Close()
	if err := b.mount(hook); err != nil {
		return err
	}
	ready, err := b.sync.event()
	if err == nil && !ready {
		b.wait()
		log, _ := os.ReadFile(filepath.Join(b.path, "log"))
		b.t.Fatalf("the container ended without a reason: %s\n%s", b.stderr.String(), log)
	}
	if ready {
		// The last one is the socket to go on with.
		last := len(b.sync.fds) - 1
		conn, err := net.FileConn(b.sync.fds[last])
		b.must(err)
		b.sync.fds[last].Close()
		b.sync.conn.Close()
		b.sync.conn, b.sync.fds = conn.(*net.UnixConn), b.sync.fds[:last]
		b.t.Cleanup(func() { conn.Close() })
	}
	return err
}

// mount is the shim's side of the mount hook.
func (b *box) mount(hook *shimEnd) error {
	b.t.Helper()
	var fds []int
	for i := range b.mounts.Mounts {
		m := &b.mounts.Mounts[i]
		o := tree.Parse(&m.Mount)
		if !o.Bind {
			continue
		}
		fd, err := tree.Clone(unix.AT_FDCWD, m.Source, o.Recursive)
		if err != nil {
			hook.conn.Close()
			return err
		}
		defer unix.Close(fd)
		b.must(o.Apply(fd))
		fds = append(fds, fd)
		m.Tree = len(fds)
	}
	data, err := json.Marshal(b.mounts)
	b.must(err)
	_, _, err = hook.conn.WriteMsgUnix(append(data, '\n'), unix.UnixRights(fds...), nil)
	b.must(err)
	if ready, err := hook.event(); err != nil || !ready {
		return err
	}
	b.must(hook.send(plan.Command{Start: true}))
	_, err = hook.event()
	return err
}

func (b *box) start() error {
	b.t.Helper()
	b.must(b.sync.send(plan.Command{Start: true}))
	_, err := b.sync.event()
	return err
}

func (b *box) wait() { _ = b.cmd.Wait() }

// run is a container's whole life; it returns what the entrypoint wrote.
func (b *box) run(p plan.Process) string {
	b.t.Helper()
	if err := b.create(p); err != nil {
		log, _ := os.ReadFile(filepath.Join(b.path, "log"))
		b.t.Fatalf("create: %v\n%s", err, log)
	}
	if err := b.start(); err != nil {
		b.t.Fatalf("start: %v", err)
	}
	b.wait()
	return b.stdout.String()
}

func shell(script string) plan.Process {
	all := plan.Capabilities
	return plan.Process{
		Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/",
		Capabilities: &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all},
		Finish:       &plan.Finish{},
	}
}

// expect checks that each line is in the output.
func expect(t *testing.T, out string, lines ...string) {
	t.Helper()
	for _, want := range lines {
		if !strings.Contains("\n"+out, "\n"+want+"\n") {
			t.Errorf("no line %q in:\n%s", want, out)
			return
		}
	}
}

func TestBedDefault(t *testing.T) {
	b := newBox(t)
	b.mounts.ReadonlyRoot, b.mounts.Cwd = true, "/work/deep"
	b.mounts.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmni": "1234"}
	b.add(
		specs.Mount{Destination: "/full", Type: "tmpfs", Options: []string{"tmpcopyup", "size=1m"}},
		specs.Mount{Destination: "/new/file", Type: "bind", Source: "/etc/hostname", Options: []string{"rbind", "ro", "nosuid", "noexec"}},
	)
	p := shell(`
echo pid $$
pwd; readlink /dev/fd; readlink /dev/ptmx; cat /full/kept; stat -c '%a %n' /full /full/kept
for d in null zero full random urandom tty; do stat -c '%F %t:%T %a %n' /dev/$d; done
cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni
echo 0 > /proc/sys/kernel/shmmni || echo sysctl is read-only
touch /x || echo root is read-only
touch /run/x && echo run is writable
cat /proc/timer_list; ls /sys/firmware; echo masked
ls /proc/self/fd | cat
echo "HOME $HOME"
grep -E '^(Sig(Blk|Ign)|NoNewPrivs|Seccomp|Umask):' /proc/self/status
cat /proc/self/cgroup; ls -d /sys/fs/cgroup/cgroup.procs
grep ' /new/file ' /proc/self/mountinfo | grep -c ' ro,nosuid,noexec'
grep -c shared: /proc/self/mountinfo
grep Max.open /proc/self/limits
for a in "$@"; do echo "[$a]"; done`)
	p.Cwd = "/work/deep"
	p.Args = append(p.Args, "argv0", "a b", "", "c\nd", `"'\`)
	p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1000, Hard: 1111}}
	out := b.run(p)
	t.Log(out, b.stderr.String())
	expect(t, out, "pid 1", "/work/deep", "/proc/self/fd", "pts/ptmx", "kept", "755 /full", "640 /full/kept",
		"character special file 1:3 666 /dev/null", "character special file 5:0 666 /dev/tty", "1", "1234",
		"sysctl is read-only", "root is read-only", "run is writable", "masked", "0\n1\n2\n3", "HOME /root",
		"SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000", "NoNewPrivs:\t0", "Umask:\t0022", "0::/", "/sys/fs/cgroup/cgroup.procs",
		"[a b]", "[]", "[c\nd]", `["'\]`, "Max open files            1000                 1111                 files     ", "1\n0")
}

func TestBedUser(t *testing.T) {
	b := newBox(t)
	p := shell(`id; pwd; umask; echo "HOME $HOME"; cat /proc/self/oom_score_adj
grep -E '^(Groups|Cap...|NoNewPrivs|Seccomp):' /proc/self/status; grep Max.open /proc/self/limits
mkdir /tmp/x; echo "mkdir $?"; stat -c %u /proc/self/fd/1`)
	p.UID, p.GID, p.Groups, p.Cwd = 1000, 1001, []uint32{7, 8}, "/made/by/root"
	umask, adj := uint32(0o027), 321
	p.Umask, p.OOMScoreAdj, p.NoNewPrivileges = &umask, &adj, true
	few := []string{"CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_NOT_KNOWN"}
	p.Capabilities = &specs.LinuxCapabilities{Bounding: few, Permitted: few, Effective: few, Inheritable: few, Ambient: few[:1]}
	filter, err := seccomp.Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}}})
	b.must(err)
	p.Seccomp = filter
	out := b.run(p)
	t.Log(out, b.stderr.String())
	expect(t, out, "uid=1000(u) gid=1001 groups=7,8", "/made/by/root", "0027", "HOME /home/u", "321", "Groups:\t7 8 ",
		"CapInh:\t0000000000000420", "CapPrm:\t0000000000000400", "CapEff:\t0000000000000400", "CapBnd:\t0000000000000420",
		"CapAmb:\t0000000000000400", "NoNewPrivs:\t1", "Seccomp:\t2", "mkdir 1", "1000")
}

func TestBedFilterWithoutNoNewPrivileges(t *testing.T) {
	b := newBox(t)
	p := shell(`grep -E '^(Cap(Eff|Bnd)|NoNewPrivs|Seccomp):' /proc/self/status; mkdir /tmp/x; echo "mkdir $?"`)
	p.Capabilities = nil
	p.UID = 1000
	filter, err := seccomp.Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}}})
	b.must(err)
	p.Seccomp = filter
	expect(t, b.run(p), "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t0", "Seccomp:\t2", "mkdir 1")
}

func TestBedErrors(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*box, *plan.Process)
		atRun  bool
		want   string
	}{
		"not found":      {func(_ *box, p *plan.Process) { p.Args = []string{"foo"} }, false, `exec: "foo": executable file not found in $PATH`},
		"no such file":   {func(_ *box, p *plan.Process) { p.Args = []string{"/foo"} }, false, `exec: "/foo": stat /foo: no such file or directory`},
		"not executable": {func(_ *box, p *plan.Process) { p.Args = []string{"/bin/plain"} }, false, `exec: "/bin/plain": permission denied`},
		"directory":      {func(_ *box, p *plan.Process) { p.Args = []string{"/etc"} }, false, `exec: "/etc": is a directory`},
		"interpreter":    {func(_ *box, p *plan.Process) { p.Args = []string{"data"} }, true, "exec /bin/data: no such file or directory"},
		"cwd is a file":  {func(_ *box, p *plan.Process) { p.Cwd = "/etc/passwd" }, false, "process.cwd: chdir to /etc/passwd: not a directory"},
		"rlimit":         {func(_ *box, p *plan.Process) { p.Rlimits = []specs.POSIXRlimit{{Type: "X"}} }, true, "process.rlimits: unknown type X"},
		"apparmor":       {func(_ *box, p *plan.Process) { p.AppArmorProfile = "nosuch" }, false, "process.apparmorProfile nosuch"},
		"apparmor after a hook": {func(_ *box, p *plan.Process) {
			p.AppArmorProfile = "nosuch"
			p.Hooks, p.State = []specs.Hook{{Path: "/bin/true"}}, &specs.State{}
		}, true, "process.apparmorProfile nosuch"},
		"hook": {func(_ *box, p *plan.Process) {
			p.Hooks = []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat; exit 3"}}}
			p.State = &specs.State{ID: "the state"}
		}, true, `hooks.startContainer[0]: /bin/sh: exited with status 3: {"ociVersion":"","id":"the state","status":"","pid":1,"bundle":""}`},
		"bind source": {func(b *box, _ *plan.Process) {
			b.add(specs.Mount{Destination: "/b", Source: "/not/there", Options: []string{"rbind"}})
		}, false, "source /not/there: no such file or directory"},
		"tmpfs option": {func(b *box, _ *plan.Process) {
			b.add(specs.Mount{Destination: "/b", Type: "tmpfs", Options: []string{"size=x"}})
		}, false, "mounts[8] (/b): option size=x"},
		"over the root": {func(b *box, _ *plan.Process) {
			b.add(specs.Mount{Destination: "/a/..", Type: "tmpfs"})
		}, false, "a mount cannot cover the root"},
		"over proc": {func(b *box, _ *plan.Process) {
			b.add(specs.Mount{Destination: "/proc/self/attr", Type: "tmpfs"})
		}, false, "nothing can be mounted at /proc/"},
		"proc on a symlink": {func(b *box, _ *plan.Process) {
			b.must(os.Remove(filepath.Join(b.rootfs, "proc")))
			b.must(os.Symlink("tmp", filepath.Join(b.rootfs, "proc")))
		}, false, "mounts[0] (/proc): proc must be mounted on an ordinary directory"},
		"sysctl": {func(b *box, _ *plan.Process) { b.mounts.Sysctl = map[string]string{"kernel.nosuch": "1"} }, false,
			"linux.sysctl: writing 1 to kernel.nosuch: no such file or directory"},
		"sysctl outside": {func(b *box, _ *plan.Process) { b.mounts.Sysctl = map[string]string{"/../../etc/passwd": "1"} }, false, "linux.sysctl"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			p := shell("true")
			c.change(b, &p)
			err := b.create(p)
			if (err != nil) == c.atRun {
				t.Fatalf("create: %v", err)
			}
			if c.atRun {
				err = b.start()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			b.wait()
		})
	}
}

func TestBedHostileRoot(t *testing.T) {
	b := newBox(t)
	outside := t.TempDir()
	b.must(os.Symlink(outside, filepath.Join(b.rootfs, "out")))
	b.must(os.Symlink("../../../../../../../../.."+outside, filepath.Join(b.rootfs, "up")))
	b.add(specs.Mount{Destination: "/out/a", Source: "/etc/hostname", Type: "bind"},
		specs.Mount{Destination: "/up/b/c", Type: "tmpfs"})
	mode := os.FileMode(0o600)
	b.mounts.Devices = []plan.Device{{LinuxDevice: specs.LinuxDevice{Path: "/out/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: &mode}}}
	out := b.run(shell("ls -R " + outside + "; stat -c '%F %t:%T %a' " + outside + "/dev/fuse"))
	expect(t, out, "a", "b", "character special file a:e5 600")
	if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
		t.Errorf("written outside of the root: %v %v", left, err)
	}
}

func TestBedTerminalAndExec(t *testing.T) {
	b := newBox(t)
	b.mounts.Terminal = true
	p := shell("tty; stty size; stat -c %t /dev/console; echo hello > /dev/console; read x; echo got $x; exec sleep 60")
	p.Terminal, p.Rows, p.Columns = true, 30, 100
	if err := b.create(p); err != nil {
		t.Fatal(err)
	}
	if len(b.sync.fds) != 1 {
		t.Fatalf("%d descriptors came along, want the console", len(b.sync.fds))
	}
	console := b.sync.fds[0]
	b.must(b.start())
	_, err := console.WriteString("word\n")
	b.must(err)
	var out string
	buf := make([]byte, 4096)
	for !strings.Contains(out, "got word") {
		n, err := console.Read(buf)
		b.must(err)
		out += strings.ReplaceAll(string(buf[:n]), "\r", "")
	}
	expect(t, out, "/dev/pts/0", "30 100", "88", "hello")

	info, err := exec.Command("lxc-info", "-n", b.name, "-P", b.path, "-p", "-H").Output()
	b.must(err)
	pid := strings.TrimSpace(string(info))
	enter := func(p plan.Process) (string, error) {
		s, theirs := b.pair()
		self, err := os.Open(program(t))
		b.must(err)
		var stdout, stderr bytes.Buffer
		cmd := exec.Command("nsenter", "-t", pid, "-m", "-u", "-i", "-n", "-p", "--", "/proc/self/fd/4", "exec", "3")
		cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &stdout, &stderr, []*os.File{theirs, self}
		b.must(cmd.Start())
		theirs.Close()
		self.Close()
		b.must(s.send(p))
		ready, err := s.event()
		if ready {
			_, err = s.event()
		}
		werr := cmd.Wait()
		t.Log(stdout.String(), stderr.String(), werr)
		return stdout.String(), err
	}
	p = shell("echo pid $$; id -u; ls /proc/self/fd | cat; grep -E '^(CapBnd|SigIgn|SigBlk):' /proc/self/status; pwd")
	p.UID, p.Cwd, p.Finish, p.Capabilities = 1000, "/tmp", nil, nil
	got, err := enter(p)
	b.must(err)
	expect(t, got, "1000", "0\n1\n2\n3", "CapBnd:\t0000000000000000", "SigIgn:\t0000000000000000", "SigBlk:\t0000000000000000", "/tmp")
	p.Args = []string{"nosuch"}
	if _, err := enter(p); err == nil || !strings.Contains(err.Error(), "executable file not found") {
		t.Errorf("exec of nothing: %v", err)
	}
	p.Args, p.Cwd = []string{"true"}, "/not/there"
	if _, err := enter(p); err == nil || !strings.Contains(err.Error(), "process.cwd: chdir to /not/there: no such file") {
		t.Errorf("exec without its cwd: %v", err)
	}
}

func TestBedDeletedBeforeStart(t *testing.T) {
	b := newBox(t)
	if err := b.create(shell("echo never")); err != nil {
		t.Fatal(err)
	}
	b.sync.conn.Close()
	b.wait()
	if b.stdout.Len() != 0 {
		t.Errorf("the entrypoint ran: %s", b.stdout.String())
	}
}

func TestBedDevOfTheImage(t *testing.T) {
	b := newBox(t)
	// An image's own idea of /dev, with no tmpfs in front of it.
	b.must(os.WriteFile(filepath.Join(b.rootfs, "dev/null"), []byte("hostile"), 0o666))
	b.must(os.Symlink("/etc/passwd", filepath.Join(b.rootfs, "dev/zero")))
	b.must(os.Symlink("/etc/passwd", filepath.Join(b.rootfs, "dev/ptmx")))
	b.mounts.Mounts = append(b.mounts.Mounts[:1], b.mounts.Mounts[5:]...)
	b.add(specs.Mount{Destination: "/vol", Type: "bind", Source: "/tmp", Options: []string{"rbind", "rshared"}})
	p := shell(`stat -c '%F %t:%T %n' /dev/null /dev/zero; readlink /dev/ptmx; grep -c shared: /proc/self/mountinfo; grep ' /vol ' /proc/self/mountinfo | grep -c shared:`)
	for _, m := range b.mounts.Mounts {
		p.Finish.Mounts = append(p.Finish.Mounts, m.Mount)
	}
	expect(t, b.run(p), "character special file 1:3 /dev/null", "character special file 1:5 /dev/zero", "pts/ptmx", "1\n1")
}
