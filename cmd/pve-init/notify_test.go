//go:build !race

// The race detector makes syscalls of its own, on the thread under the filter, which
// nobody answers. The test bed runs these tests without it.

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// From linux/seccomp.h.
const (
	notifyReceive = 0xc0502100
	notifySend    = 0xc0182101
	goOn          = 1 // SECCOMP_USER_NOTIF_FLAG_CONTINUE
)

type notification struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type answer struct {
	id    uint64
	val   int64
	errno int32
	flags uint32
}

// agent answers for the listener until nobody is under the filter any more: mkdir
// fails with EXDEV, all else goes on. It counts what it was asked.
func agent(listener int) int {
	defer unix.Close(listener)
	asked := 0
	for {
		fds := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return asked
		}
		var n notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), notifyReceive, uintptr(unsafe.Pointer(&n))); errno != 0 {
			continue
		}
		asked++
		a := answer{id: n.id, flags: goOn}
		if n.nr == unix.SYS_MKDIR || n.nr == unix.SYS_MKDIRAT {
			a = answer{id: n.id, errno: -int32(unix.EXDEV)}
		}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(listener), notifySend, uintptr(unsafe.Pointer(&a)))
	}
}

// TestNotify: the listener is with the shim before the program runs, even if
// every single syscall is left to it; and nothing runs if the shim has no use for it.
func TestNotify(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	ask := specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/x", Syscalls: []specs.LinuxSyscall{
		{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActNotify}}}
	all := specs.LinuxSeccomp{DefaultAction: specs.ActNotify, ListenerPath: "/x"}
	for _, c := range []struct {
		name          string
		profile       *specs.LinuxSeccomp
		newPrivileges bool
		accept        bool
	}{
		{"mkdir", &ask, false, true},
		{"mkdir without no_new_privs", &ask, true, true},
		{"every syscall", &all, false, true},
		{"every syscall without no_new_privs", &all, true, true},
		{"not wanted", &all, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			filter, err := seccomp.Compile(c.profile)
			if err != nil {
				t.Fatal(err)
			}
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
			conn, err := net.FileConn(ours)
			if err != nil {
				t.Fatal(err)
			}
			ours.Close()
			defer conn.Close()
			var out bytes.Buffer
			cmd := exec.Command("/proc/self/exe", "exec", "3")
			cmd.Env = []string{"GODEBUG=asyncpreemptoff=1"}
			cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = []*os.File{theirs}, &out, &out
			cmd.WaitDelay = time.Second
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			theirs.Close()
			late := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
			defer late.Stop()
			p := plan.Process{Args: []string{"/bin/sh", "-c", "mkdir /tmp/pve-init-notify; echo done"}, Cwd: "/", Env: []string{"PATH=/bin:/usr/bin", "LC_ALL=C"},
				NoNewPrivileges: !c.newPrivileges, Seccomp: filter}
			data, err := json.Marshal(p)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write(append(data, '\n')); err != nil {
				t.Fatal(err)
			}
			listener := -1
			var events []plan.Event
			var text bytes.Buffer
			buf, oob := make([]byte, 4096), make([]byte, 64)
			for listener < 0 {
				n, oobn, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(buf, oob)
				if err != nil || n == 0 {
					t.Fatalf("%v after %q, output %q", err, text.String(), out.String())
				}
				text.Write(buf[:n])
				if oobn > 0 {
					m, err := unix.ParseSocketControlMessage(oob[:oobn])
					if err != nil {
						t.Fatal(err)
					}
					got, err := unix.ParseUnixRights(&m[0])
					if err != nil {
						t.Fatal(err)
					}
					listener = got[0]
				}
			}
			for s := bufio.NewScanner(&text); s.Scan(); {
				var e plan.Event
				if err := json.Unmarshal(s.Bytes(), &e); err != nil {
					t.Fatal(err)
				}
				events = append(events, e)
			}
			if len(events) != 2 || !events[0].Ready || !events[1].Listener {
				t.Fatalf("events %+v", events)
			}
			if !c.accept {
				conn.Close()
				defer unix.Close(listener)
				_ = cmd.Wait()
				if code := cmd.ProcessState.ExitCode(); code != exitFailure || out.Len() > 0 {
					t.Errorf("exit code %d, output %q", code, out.String())
				}
				return
			}
			asked := make(chan int)
			go func() { asked <- agent(listener) }()
			if _, err := conn.Write([]byte(`{"listening":true}` + "\n")); err != nil {
				t.Fatal(err)
			}
			if rest, err := io.ReadAll(conn); err != nil || len(rest) > 0 {
				t.Errorf("instead of the end of file: %q, %v", rest, err)
			}
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			n := <-asked
			if got := out.String(); !strings.Contains(got, "cross-device") || !strings.HasSuffix(got, "done\n") {
				t.Errorf("output %q", got)
			}
			if least := map[specs.LinuxSeccompAction]int{specs.ActAllow: 1, specs.ActNotify: 10}[c.profile.DefaultAction]; n < least {
				t.Errorf("asked %d times", n)
			}
		})
	}
}
