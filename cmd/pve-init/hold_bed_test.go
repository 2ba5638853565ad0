//go:build bed

package main

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

// holding starts pve-init as the first process of a pod's namespaces. With users these belong to a user namespace that is there
// already, as containerd makes it for the pod's network.
func holding(t *testing.T, users bool, h plan.Hold) (pid int, err *plan.Error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root makes namespaces for others")
	}
	fail := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	fds, e := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	fail(e)
	ours, theirs := os.NewFile(uintptr(fds[0]), "sync"), os.NewFile(uintptr(fds[1]), "sync")
	conn, e := net.FileConn(ours)
	fail(e)
	ours.Close()
	defer conn.Close()
	fail(conn.SetDeadline(time.Now().Add(time.Minute)))
	text, e := os.ReadFile("/proc/self/exe")
	fail(e)
	again := filepath.Join(t.TempDir(), "again")
	fail(os.WriteFile(again, text, 0o111))
	self, e := os.Open(again)
	fail(e)
	defer self.Close()
	const flags = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	cmd := exec.Command("/proc/self/exe")
	cmd.Args, cmd.Env, cmd.Stderr, cmd.ExtraFiles = []string{"pve-init", "hold", "3", "4"}, []string{}, os.Stderr, []*os.File{theirs, self}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags | unix.CLONE_NEWNET}
	if users {
		_, pidfd := sleeper(t, syscall.CLONE_NEWUSER)
		cmd.Args, cmd.ExtraFiles = []string{"pve-init", "enter", "3", "4", "5"}, append(cmd.ExtraFiles, pidfd)
		cmd.SysProcAttr = nil
	}
	if e := cmd.Start(); e != nil {
		t.Skipf("this kernel or sandbox lets no namespaces be made: %v", e)
	}
	theirs.Close()
	pid, encoder := cmd.Process.Pid, json.NewEncoder(conn)
	event := func() (e plan.Event, passed []int) {
		t.Helper()
		buf, oob := make([]byte, 4096), make([]byte, 64)
		n, oobn, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(buf, oob)
		if n == 0 && (err == nil || errors.Is(err, io.EOF)) {
			return e, nil
		}
		fail(err)
		fail(json.Unmarshal(buf[:n], &e))
		if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(messages) > 0 {
			passed, _ = unix.ParseUnixRights(&messages[0])
		}
		return e, passed
	}
	if users {
		for _, m := range []any{plan.Enter{Hold: true}, plan.Hold{Split: flags}} {
			fail(encoder.Encode(m))
			e, passed := event()
			if e.Error != nil || len(passed) != 1 {
				t.Fatalf("%+v, %v", m, e.Error)
			}
			var status unix.WaitStatus
			if _, err := unix.Wait4(pid, &status, 0, nil); err != nil || status != 0 {
				t.Fatalf("%+v: its process: %#x, %v", m, status, err)
			}
			pid = pidOf(t, passed[0])
			unix.Close(passed[0])
		}
	}
	t.Cleanup(func() {
		_ = unix.Kill(pid, unix.SIGKILL)
		var status unix.WaitStatus
		if _, err := unix.Wait4(pid, &status, 0, nil); err != nil {
			t.Errorf("it is not our child: %v", err)
		}
	})
	fail(encoder.Encode(h))
	answer, _ := event()
	return pid, answer.Error
}

// TestHold: the process has namespaces of its own with what they are to have, no right, no file, and stays whatever it is sent.
func TestHold(t *testing.T) {
	for name, users := range map[string]bool{"root": false, "users": true} {
		t.Run(name, func(t *testing.T) {
			h := plan.Hold{Hostname: "held", Sysctl: map[string]string{"kernel.shmmni": "1234"}}
			if users {
				h.Sysctl = nil // kernels before 6.6 leave those of ipc to the host's root
			}
			pid, failure := holding(t, users, h)
			if failure != nil {
				t.Fatal(failure)
			}
			proc := "/proc/" + utoa(uint32(pid)) + "/"
			status, err := os.ReadFile(proc + "status")
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"} {
				if !strings.Contains(string(status), want+"\n") {
					t.Errorf("it lacks %s:\n%s", want, status)
				}
			}
			if entries, err := os.ReadDir(proc + "root/"); err != nil || len(entries) != 0 {
				t.Errorf("it sees %v, %v", entries, err)
			}
			threads, err := filepath.Glob(proc + "task/*/status")
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range threads {
				if text, err := os.ReadFile(file); err == nil && !strings.Contains(string(text), "CapEff:\t0000000000000000\n") {
					t.Errorf("one of its threads has rights:\n%s", text)
				}
			}
			for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGURG, unix.SIGCHLD} {
				if err := unix.Kill(pid, sig); err != nil {
					t.Error(err)
				}
			}
			for _, ns := range []string{"mnt", "pid", "ipc", "uts"} {
				mine, _ := os.Readlink("/proc/self/ns/" + ns)
				if link, err := os.Readlink(proc + "ns/" + ns); err != nil || link == mine {
					t.Errorf("namespace %s: %s, %v", ns, link, err)
				}
			}
			out, err := exec.Command("nsenter", "--uts="+proc+"ns/uts", "--ipc="+proc+"ns/ipc", "sh", "-c", "hostname; cat /proc/sys/kernel/shmmni").CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), "held\n") || !users && string(out) != "held\n1234\n" {
				t.Errorf("in its namespaces: %q, %v", out, err)
			}
			// What loses its parent in the process namespace leaves no zombie.
			if out, err := exec.Command("nsenter", "--pid="+proc+"ns/pid", "sh", "-c", "(sleep 0.1 &)").CombinedOutput(); err != nil {
				t.Fatalf("%s: %v", out, err)
			}
			time.Sleep(500 * time.Millisecond)
			if children, err := os.ReadFile(proc + "task/" + utoa(uint32(pid)) + "/children"); err == nil && len(children) != 0 {
				t.Errorf("its children: %s", children)
			}
		})
	}
}

// TestHoldFails: what cannot be set is named.
func TestHoldFails(t *testing.T) {
	_, failure := holding(t, false, plan.Hold{Sysctl: map[string]string{"kernel.nosuch": "1"}})
	if failure == nil || !strings.Contains(failure.Message, "kernel.nosuch") || failure.Kind != plan.ErrorInvalid {
		t.Errorf("%v", failure)
	}
}
