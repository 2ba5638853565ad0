//go:build bed

package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A container that is given this program as /probe calls the 32-bit kernel by it.
func init() {
	if len(os.Args) == 2 && os.Args[1] == "int80" {
		fmt.Println("int80", int80(20)) // getpid
		os.Exit(0)
	}
}

// int80 makes a system call as 32-bit programs do.
func int80(number uint32) int {
	code := []byte{0xb8, byte(number), byte(number >> 8), byte(number >> 16), byte(number >> 24), // mov eax, number
		0x53, 0x31, 0xdb, 0xcd, 0x80, 0x5b, 0xc3} // push rbx; xor ebx, ebx; int 0x80; pop rbx; ret
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	copy(page, code)
	entry := unsafe.Pointer(&page[0])
	target := unsafe.Pointer(&entry)
	return int(int32((*(*func() uintptr)(unsafe.Pointer(&target)))()))
}

func errnoRet(n uint) *uint { return &n }

// rules are profiles of one syscall each, on syscalls that answer EBADF (9) to a
// bad descriptor; what a rule says is seen by its errno.
func rules() *specs.LinuxSeccomp {
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64}}
	add := func(name string, action specs.LinuxSeccompAction, errno uint, args ...specs.LinuxSeccompArg) {
		s := specs.LinuxSyscall{Names: []string{name}, Action: action, Args: args}
		if errno > 0 {
			s.ErrnoRet = errnoRet(errno)
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	arg := func(index uint, op specs.LinuxSeccompOperator, value, second uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: index, Value: value, ValueTwo: second, Op: op}
	}
	const big = 1<<32 + 10
	bad := arg(0, specs.OpGreaterThan, 1000, 0) // the C library needs these for good descriptors
	add("lseek", specs.ActErrno, 101, bad, arg(1, specs.OpLessThan, big, 0))
	add("ftruncate", specs.ActErrno, 102, bad, arg(1, specs.OpNotEqual, big, 0))
	add("pread64", specs.ActErrno, 103, bad, arg(3, specs.OpLessEqual, big, 0))
	add("pwrite64", specs.ActErrno, 104, arg(3, specs.OpEqualTo, big, 0))
	add("readahead", specs.ActErrno, 105, arg(1, specs.OpGreaterEqual, big, 0))
	add("fadvise64", specs.ActErrno, 106, arg(1, specs.OpGreaterThan, big, 0))
	add("sync_file_range", specs.ActErrno, 107, arg(1, specs.OpMaskedEqual, 0xf0, 0x50)) // mask, value
	add("fallocate", specs.ActErrno, 108, arg(1, specs.OpEqualTo, 7, 0), arg(2, specs.OpEqualTo, 8, 0))
	add("fchmod", specs.ActErrno, 109, arg(1, specs.OpEqualTo, 1, 0))
	add("fchmod", specs.ActErrno, 110, arg(1, specs.OpEqualTo, 2, 0))
	add("fchdir", specs.ActErrno, 111, arg(0, specs.OpEqualTo, 5, 0))
	add("fchdir", specs.ActErrno, 112)
	add("flock", specs.ActErrno, 113, arg(1, specs.OpGreaterEqual, 10, 0), arg(1, specs.OpLessEqual, 20, 0))
	add("syncfs", specs.ActAllow, 0, arg(0, specs.OpEqualTo, 5, 0))
	add("syncfs", specs.ActErrno, 114)
	add("fsync", specs.ActErrno, 0)
	add("fdatasync", specs.ActTrace, 0)
	add("fchown", specs.ActLog, 0)
	add("mkdir", specs.ActTrap, 0)
	add("rmdir", specs.ActKillProcess, 0)
	add("symlink", specs.ActKillThread, 0)
	add("link", specs.ActKill, 0)
	add("no_such_syscall", specs.ActKillProcess, 0)
	return p
}

// ask calls them one after the other and prints the errno of each.
const ask = `
sub t { my ($name, $nr, @a) = @_; $! = 0; my $r = syscall($nr, @a); print "$name(@a[1..$#a]) ", $r == -1 ? $!+0 : "ok", "\n" }
$| = 1; my $b = 4294967306; my $e = "";
t("lt", 8, -1, $_, 0) for 9, $b-1, $b, $b+1;
t("ne", 77, -1, $_) for 10, $b, $b+4294967296;
t("le", 17, -1, 0, 0, $_) for 9, $b, $b+1;
t("eq", 18, -1, 0, 0, $_) for 10, $b, $b+4294967296;
t("ge", 187, -1, $_, 0) for 4294967295, $b-1, $b, $b+1;
t("gt", 221, -1, $_, 0, 0) for 11, $b, $b+1, $b*4;
t("masked", 277, -1, $_, 0, 0) for 0x50, 0x5f, 0x150, 0x60, 0xf0;
t("and", 285, -1, @$_, 1) for [7,8], [7,9], [6,8];
t("or", 91, -1, $_) for 1, 2, 3;
t("whole", 81, $_) for 5, 6;
t("range", 73, -1, $_) for 5, 15, 25;
t("default", 306, $_) for 5, 6;
t("errno", 74, -1); t("trace", 75, -1); t("log", 93, -1, 0, 0);
$SIG{SYS} = sub { print "trapped\n" };
mkdir "/tmp/x";
my $n = "0";
for ("rmdir", "symlink", "link") {
	my $p = fork; if (!$p) { $_ eq "rmdir" ? rmdir "/tmp/x" : $_ eq "symlink" ? symlink "a", "/tmp/y" : link "/etc/passwd", "/tmp/z"; exit 7 }
	waitpid $p, 0; print "$_ ", $? & 127, " ", $? >> 8, "\n";
}
print "done\n";
`

// TestSeccompRules: actions, operators, and how rules of one syscall go together;
// the same as runc in every case.
func TestSeccompRules(t *testing.T) {
	spec := []oci.SpecOpts{oci.WithProcessArgs("perl", "-e", ask), edit(func(s *oci.Spec) { s.Linux.Seccomp = rules() })}
	got, stderr, code := run(t, options{spec: spec})
	if code != 0 || !strings.HasSuffix(got, "done\n") {
		t.Fatalf("code %d, %s%s", code, got, stderr)
	}
	t.Log(got)
	lines(t, got,
		"lt(4294967305 0) 101", "lt(4294967306 0) 9", "ne(10) 102", "ne(4294967306) 9", "le(0 0 4294967306) 103", "le(0 0 4294967307) 9",
		"eq(0 0 10) 9", "eq(0 0 4294967306) 104", "ge(4294967305 0) 9", "ge(4294967306 0) 105", "gt(4294967306 0 0) 9", "gt(4294967307 0 0) 106",
		"masked(80 0 0) 107", "masked(95 0 0) 107", "masked(96 0 0) 9", "and(7 8 1) 108", "and(7 9 1) 9", "and(6 8 1) 9",
		"or(1) 109", "or(2) 110", "or(3) 9", "errno() 1", "trace() 38", "log(0 0) 9", "trapped", "rmdir 31 0", "symlink 31 0", "link 31 0")
	if theirs, _, _ := run(t, options{runtime: runc, spec: spec}); theirs != got {
		t.Errorf("runc:\n%s", theirs)
	}
}

// TestSeccompDefault: containerd's profile with another default errno, by the
// ways into the kernel that it lists.
func TestSeccompDefault(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	probe := oci.WithMounts([]specs.Mount{{Destination: "/probe", Type: "bind", Source: self, Options: []string{"rbind", "ro"}}})
	const script = `perl -e '$| = 1; for (246, 5000, 83) { $! = 0; syscall($_, 0, 0, 0); print "$_ ", $!+0, "\n" }'; /probe int80; echo $?`
	spec := []oci.SpecOpts{oci.WithProcessArgs("sh", "-c", script), probe, seccomp.WithDefaultProfile(), edit(func(s *oci.Spec) {
		s.Linux.Seccomp.DefaultErrnoRet = errnoRet(99)
	})}
	got, _, _ := run(t, options{spec: spec})
	// kexec_load is not in the profile; 5000 is newer than all of it; mkdir of nothing is EFAULT.
	lines(t, got, "246 99", "5000 38", "83 14")
	if !strings.Contains(got, "int80 ") {
		t.Errorf("a 32-bit call, which the profile lists: %s", got)
	}
	one, _, _ := run(t, options{spec: []oci.SpecOpts{oci.WithProcessArgs("sh", "-c", "/probe int80; echo $?"), probe, edit(func(s *oci.Spec) {
		profile(specs.ActErrno, "mkdir")(s)
		s.Linux.Seccomp.Flags = []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_TSYNC", specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow}
	})}})
	if one != "159\n" {
		t.Errorf("a 32-bit call, which the profile does not list: %s", one)
	}
	theirs, _, _ := run(t, options{runtime: runc, spec: spec})
	if first, _, _ := strings.Cut(theirs, "int80"); !strings.HasPrefix(got, first) {
		t.Errorf("ours:\n%s\nrunc:\n%s", got, theirs)
	}
}

// seccompAgent accepts one connection for each filter and lets every mkdir fail
// with EXDEV.
func seccompAgent(t *testing.T) (path string, states <-chan specs.ContainerProcessState) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	found := make(chan specs.ContainerProcessState, 10)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			buf, oob := make([]byte, 1<<16), make([]byte, 128)
			n, oobn, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(buf, oob)
			if err != nil {
				t.Error(err)
				return
			}
			rest, _ := io.ReadAll(conn) // the runtime has to close it
			conn.Close()
			var st specs.ContainerProcessState
			if err := json.Unmarshal(append(buf[:n], rest...), &st); err != nil {
				t.Errorf("%v: %q", err, buf[:n])
				return
			}
			m, err := unix.ParseSocketControlMessage(oob[:oobn])
			if err != nil || len(m) != 1 {
				t.Errorf("%d control messages, %v", len(m), err)
				return
			}
			fds, err := unix.ParseUnixRights(&m[0])
			if err != nil || len(fds) != 1 {
				t.Errorf("descriptors %v, %v", fds, err)
				return
			}
			go refuse(fds[0])
			found <- st
		}
	}()
	return path, found
}

// refuse answers what comes on a listener until nobody is left under its filter.
func refuse(fd int) {
	defer unix.Close(fd)
	const receive, send = 0xc0502100, 0xc0182101
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err == unix.EINTR {
			continue
		}
		if p[0].Revents&unix.POLLIN == 0 {
			return
		}
		var request [10]uint64
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), receive, uintptr(unsafe.Pointer(&request))); errno != 0 {
			continue
		}
		answer := struct {
			id    uint64
			val   int64
			errno int32
			flags uint32
		}{id: request[0], errno: -int32(unix.EXDEV)}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), send, uintptr(unsafe.Pointer(&answer)))
	}
}

// TestSeccompNotify: the agent has the listener and the state before anything
// of the container or of an exec runs.
func TestSeccompNotify(t *testing.T) {
	path, states := seccompAgent(t)
	notify := func(listener string) func(*oci.Spec) {
		return func(s *oci.Spec) {
			profile(specs.ActNotify, "mkdir", "mkdirat")(s)
			s.Linux.Seccomp.ListenerPath, s.Linux.Seccomp.ListenerMetadata = listener, "some words"
			s.Linux.Seccomp.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}
			s.Annotations = map[string]string{"some": "annotation"}
		}
	}
	next := func() specs.ContainerProcessState {
		t.Helper()
		select {
		case st := <-states:
			return st
		case <-time.After(time.Minute):
			t.Fatal("no listener arrives")
			return specs.ContainerProcessState{}
		}
	}
	const script = "mkdir /tmp/x 2>&1; sleep 0; exec sleep 1000"
	b := start(t, options{id: "notify", args: sh(script), edit: notify(path)})
	st := next()
	if st.Pid != int(b.task.Pid()) || st.State.Pid != st.Pid || st.State.ID != "notify" || st.State.Status != specs.StateCreated || st.Version == "" ||
		st.Metadata != "some words" || len(st.Fds) != 1 || st.Fds[0] != "seccompFd" || st.State.Annotations["some"] != "annotation" || st.State.Bundle == "" {
		t.Errorf("state %+v", st)
	}
	eventually(t, time.Minute, "mkdir is answered", func() bool { return strings.Contains(b.out.String(), "cross-device") })
	out, _, err := b.execIn(sh("mkdir /tmp/y 2>&1; echo $$"), nil)
	if err != nil || !strings.Contains(out, "cross-device") {
		t.Errorf("exec: %q, %v", out, err)
	}
	if st := next(); st.Pid == int(b.task.Pid()) || st.Pid == 0 || st.State.Pid != int(b.task.Pid()) || st.State.Status != specs.StateRunning {
		t.Errorf("state of the exec %+v", st)
	}

	// Nobody listens: at the create if there is no socket, else at the start.
	if _, err := create(t, options{args: []string{"true"}, edit: notify("/no/such/socket")}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "linux.seccomp.listenerPath") {
		t.Errorf("no socket: %v", err)
	}
	dead := filepath.Join(t.TempDir(), "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	c, err := create(t, options{args: []string{"true"}, edit: notify(dead)})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.task.Start(c.ctx); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "linux.seccomp.listenerPath") {
		t.Errorf("nobody listens: %v", err)
	}
}
