//go:build bed

package snapshotter

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/log"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// daemonEnv holds root, dataset, way to ZFS and socket of the daemon that this
// program becomes when it is executed with it.
const daemonEnv = "SNAPSHOTTER_TEST_DAEMON"

func TestMain(m *testing.M) {
	if args := os.Getenv(daemonEnv); args != "" {
		fmt.Fprintln(os.Stderr, "daemon:", serveTest(strings.Fields(args)))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// serveTest is what `containerd-pve serve` does, with descriptor 3 to tell the
// test what it has to know: the number of the listener of its syscalls, and when
// it serves.
func serveTest(args []string) error {
	root, dataset, way, socket := args[0], args[1], args[2], args[3]
	if err := log.SetLevel("warn"); err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1) // the test has ended
	}()
	tell := os.NewFile(3, "tell")
	listener, err := listenToSyscalls()
	if err != nil {
		return err
	}
	fmt.Fprintln(tell, listener)
	z, err := zfs.New(context.Background(), way)
	if err != nil {
		return err
	}
	s, err := New(context.Background(), z, root, dataset)
	if err != nil {
		return err
	}
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	fmt.Fprintln(tell, "serving")
	return server.Serve(l)
}

// changing are the requests to /dev/zfs (snapshotter/zfs/device.go) that change something.
var changing = []uint32{0x5a16, 0x5a17, 0x5a18, 0x5a23, 0x5a3b, 0x5a42, 0x5a48}

// listenToSyscalls puts this process and its children under a filter that asks
// the test before every syscall that changes what is on a disk: requests to ZFS,
// the pages of the metadata, files that are made and renamed. What a killed
// process leaves depends on these alone, so the moments before each of them are
// all the moments at which it can be killed.
func listenToSyscalls() (int, error) {
	const offNumber, offArg1, offArg2 = 0, 16 + 8, 16 + 16
	ask, allow := bpf.RetConstant{Val: unix.SECCOMP_RET_USER_NOTIF}, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	load := func(off uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: off, Size: 4} }
	unless := func(v uint32) bpf.Instruction { return bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: v, SkipTrue: 1} }
	program := []bpf.Instruction{load(offNumber)}
	for _, number := range []uint32{unix.SYS_PWRITE64, unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2} {
		program = append(program, unless(number), ask)
	}
	program = append(program,
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_OPENAT, SkipTrue: 4},
		load(offArg2),
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: unix.O_CREAT, SkipTrue: 1}, ask, allow,
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_IOCTL, SkipTrue: 1}, allow,
		load(offArg1))
	for _, request := range changing {
		program = append(program, unless(request), ask)
	}
	raw, err := bpf.Assemble(append(program, allow))
	if err != nil {
		return 0, err
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH |
		unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV // a signal of the Go runtime's would have the syscall counted twice
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return 0, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}

// daemon is a snapshotter in a process of its own, in a process group of its
// own, and the client of its service, as containerd has one.
type daemon struct {
	snapshots.Snapshotter
	cmd      *exec.Cmd
	conn     *grpc.ClientConn
	stdin    io.Closer
	listener int
	ended    chan struct{} // no process is left

	mu    sync.Mutex
	left  int  // syscalls until it is killed; 0: it is not
	timed bool // it is killed when its time comes
	dead  bool
}

// startDaemon returns when it serves, or when it was killed before the syscall
// number kill (0: it is not).
func startDaemon(t *testing.T, root, dataset, way string, kill int) *daemon {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("starting the daemon: %v", err)
		}
	}
	socket := root + ".sock"
	r, w, err := os.Pipe()
	must(err)
	defer r.Close()
	d := &daemon{ended: make(chan struct{}), left: kill}
	d.cmd = exec.Command("/proc/self/exe")
	d.cmd.Env = append(os.Environ(), daemonEnv+"="+strings.Join([]string{root, dataset, way, socket}, " "))
	d.cmd.ExtraFiles = []*os.File{w}
	d.cmd.Stderr = os.Stderr
	d.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	d.stdin, err = d.cmd.StdinPipe()
	must(err)
	must(d.cmd.Start())
	w.Close()
	t.Cleanup(d.kill)
	told := bufio.NewScanner(r)
	if !told.Scan() {
		t.Fatal("the daemon ended before it was under the filter")
	}
	number, err := strconv.Atoi(told.Text())
	must(err)
	pidfd, err := unix.PidfdOpen(d.cmd.Process.Pid, 0)
	must(err)
	d.listener, err = unix.PidfdGetfd(pidfd, number, 0)
	unix.Close(pidfd)
	must(err)
	go d.answer()
	if !told.Scan() {
		if !d.spare() {
			t.Fatal("the daemon does not start")
		}
		d.kill()
		return d
	}
	d.conn, err = grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(err)
	d.Snapshotter = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(d.conn), "pve-zfs")
	return d
}

// notification is struct seccomp_notif.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	data  [64]byte
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	value int64
	error int32
	flags uint32
}

// answer lets the syscalls of the daemon and its children go on, until one is
// their last. It ends with the last of them.
func (d *daemon) answer() {
	defer close(d.ended)
	defer unix.Close(d.listener)
	for {
		fds := []unix.PollFd{{Fd: int32(d.listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			if fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0 {
				return
			}
			continue
		}
		var n notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.listener), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n))); errno != 0 {
			continue // it was killed meanwhile
		}
		if d.last() {
			continue
		}
		r := response{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(d.listener), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r)))
	}
}

// last counts a syscall, and kills the daemon if it is the one.
func (d *daemon) last() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left > 0 {
		if d.left--; d.left == 0 {
			d.strike()
		}
	}
	return d.dead
}

func (d *daemon) strike() {
	d.dead = true
	_ = unix.Kill(-d.cmd.Process.Pid, unix.SIGKILL)
}

// killAt has the daemon killed before the syscall number n from now.
func (d *daemon) killAt(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left = n
}

// killAfter has it killed some time from now.
func (d *daemon) killAfter(after time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.timed = true
	time.AfterFunc(after, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.timed && !d.dead {
			d.strike()
		}
	})
}

func (d *daemon) isDead() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dead
}

// spare calls both off, and says whether it was too late.
func (d *daemon) spare() (dead bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left, d.timed = 0, false
	return d.dead
}

// kill returns when nothing is left of the daemon; what it was doing is done or never will be.
func (d *daemon) kill() {
	d.mu.Lock()
	if !d.dead {
		d.strike()
	}
	d.mu.Unlock()
	if d.cmd.ProcessState == nil {
		_ = d.cmd.Wait() // killed
		d.stdin.Close()
	}
	if d.listener != 0 {
		<-d.ended
	}
	if d.conn != nil {
		d.conn.Close()
	}
}

func call(do func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	return do(ctx)
}

// mounted mounts a dataset or a snapshot while f runs.
func mounted(t *testing.T, source string, flags uintptr, f func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(source, dir, "zfs", flags, ""); err != nil {
		t.Fatalf("mounting %s: %v", source, err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmounting %s: %v", source, err)
		}
	}()
	f(dir)
}

// read is what the files in a directory hold.
func read(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(b)
	}
	return files
}
