package main

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestMain lets the test be pve-init itself.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{"enter", "exec", "hold", "wait"}, os.Args[1]) {
		main()
	}
	os.Exit(m.Run())
}

// sleeper is a process in namespaces of its own.
func sleeper(t *testing.T, flags uintptr) (pid int, pidfd *os.File) {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, GidMappingsEnableSetgroups: true,
		UidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 1000}}, GidMappings: []syscall.SysProcIDMap{{HostID: 200000, Size: 1000}}}
	if err := cmd.Start(); err != nil {
		t.Skipf("this kernel or sandbox lets no user namespace with mappings be made: %v", err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	t.Cleanup(func() { f.Close() })
	return cmd.Process.Pid, f
}

// TestEnter: pve-init comes into a user namespace, as its root, and what it
// becomes is a child of whoever started pve-init.
func TestEnter(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root enters somebody else's user namespace")
	}
	pid, pidfd := sleeper(t, syscall.CLONE_NEWUSER|syscall.CLONE_NEWNS|syscall.CLONE_NEWUTS)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "sync"), os.NewFile(uintptr(fds[1]), "sync")
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	ours.Close()
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	// As the shim hands it over: nobody in the user namespace can read it.
	text, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	again := filepath.Join(t.TempDir(), "again")
	if err := os.WriteFile(again, text, 0o111); err != nil {
		t.Fatal(err)
	}
	self, err := os.Open(again)
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	out, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"pve-init", "enter", "3", "4", "5"}
	cmd.Env = []string{}
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = out, out, []*os.File{theirs, self, pidfd}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	adj := 300
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	encoder := json.NewEncoder(conn)
	if err := encoder.Encode(plan.Enter{Namespaces: unix.CLONE_NEWUSER, OOMScoreAdj: &adj,
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 10, Hard: before.Max}}}); err != nil {
		t.Fatal(err)
	}
	event := func() (e plan.Event, passed []int) {
		t.Helper()
		buf, oob := make([]byte, 4096), make([]byte, 64)
		n, oobn, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(buf, oob)
		if err != nil || n == 0 {
			t.Fatalf("no event: %v", err)
		}
		if err := json.Unmarshal(buf[:n], &e); err != nil {
			t.Fatalf("%q: %v", buf[:n], err)
		}
		if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(messages) > 0 {
			passed, _ = unix.ParseUnixRights(&messages[0])
		}
		return e, passed
	}
	e, passed := event()
	if e.Error != nil || !e.Ready || len(passed) != 1 {
		t.Fatalf("%+v, %d descriptors", e, len(passed))
	}
	defer unix.Close(passed[0])
	if err := cmd.Wait(); err != nil {
		t.Errorf("the way in: %v", err)
	}
	// Of a process that root of the user namespace may trace it is root's there.
	var owner unix.Stat_t
	if err := unix.Stat("/proc/"+utoa(uint32(pidOf(t, passed[0])))+"/status", &owner); err != nil || owner.Uid != 0 {
		t.Errorf("pve-init in the user namespace belongs to %d, %v", owner.Uid, err)
	}
	if err := encoder.Encode(plan.Process{Args: []string{"/bin/sh", "-c",
		"id -u; id -g; readlink /proc/self/ns/user /proc/self/ns/mnt /proc/self/ns/uts; cat /proc/self/oom_score_adj; ls /proc/self/fd | wc -l; exit 7"},
		Env: []string{"PATH=/usr/bin:/bin"}, Cwd: "/", UID: 5, GID: 6}); err != nil {
		t.Fatal(err)
	}
	if e, _ := event(); e.Error != nil || !e.Ready {
		t.Fatalf("%+v %v", e, e.Error)
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PIDFD, passed[0], &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatalf("it is not our child: %v", err)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(pidOf(t, passed[0]), &status, 0, nil); err != nil || status.ExitStatus() != 7 {
		t.Errorf("status %#x, %v", status, err)
	}
	var want []string
	for _, ns := range []string{"user", "mnt", "uts"} {
		link, err := os.Readlink("/proc/" + utoa(uint32(pid)) + "/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, link)
	}
	text, err = os.ReadFile(out.Name())
	if w := "5\n6\n" + strings.Join(want, "\n") + "\n300\n4\n"; err != nil || string(text) != w {
		t.Errorf("%v\n%swant\n%s", err, text, w)
	}
}

func pidOf(t *testing.T, pidfd int) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/fdinfo/" + utoa(uint32(pidfd)))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if pid, ok := strings.CutPrefix(line, "Pid:\t"); ok {
			n := 0
			for _, c := range strings.TrimSpace(pid) {
				n = 10*n + int(c-'0')
			}
			return n
		}
	}
	t.Fatal("no pid")
	return 0
}
