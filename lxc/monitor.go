package lxc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	fifoName = "monitor-fifo"
	// liblxc's struct lxc_msg (src/lxc/monitor.h): int type; char name[256]; int value.
	recordSize     = 4 + 256 + 4
	recordExitCode = 2
	// recordEnd is ours: written into the FIFO after lxc-start has ended, so
	// that the reader knows that nothing more can come.
	recordEnd = 1 << 30
)

// monitor is the lxc-start process of one container.
type monitor struct {
	cmd   *exec.Cmd
	fifo  *os.File
	err   error         // of cmd.Wait, once ended is closed
	ended chan struct{} // lxc-start is gone
	// status receives init's raw wait status, then is closed; closed without one
	// if the monitor was killed or never got that far.
	status chan syscall.WaitStatus
}

// startMonitor runs lxc-start in a mount namespace of its own, in which the
// monitor FIFO of the lxcpath is one that belongs to this container alone: on
// the shared one several readers steal each other's records.
//
// With a user namespace liblxc would ask newuidmap, and that /etc/subuid, for
// what the spec has decided; it does not find it in the PATH then. A time
// namespace is entered by lxc-start itself.
func startMonitor(start string, st *state, bundle string, stdio Stdio, extra []*os.File, t *translation) (_ *monitor, retErr error) {
	private := filepath.Join(stateDir(bundle), monitorDir)
	path := filepath.Join(private, fifoName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, fmt.Errorf("mkfifo %s: %w", path, err)
	}
	// Read and write: liblxc finds a reader, and we never see end of file.
	fifo, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			fifo.Close()
		}
	}()
	shared := filepath.Join("/run/lxc", st.LXCPath)
	if err := os.MkdirAll(shared, 0o755); err != nil {
		return nil, err
	}

	args := []string{start, "-F", "-q", "-n", st.Name, "-P", st.LXCPath,
		"-f", filepath.Join(st.LXCPath, st.Name, "config"),
		"-o", filepath.Join(stateDir(bundle), logFile), "-l", "WARN"}
	if t.time != nil && t.time.path != "" {
		// A Go program cannot: it takes a process of one thread.
		nsenter, err := program("", "nsenter", "install util-linux for a time namespace by path")
		if err != nil {
			return nil, err
		}
		args = append([]string{nsenter, "--time=" + t.time.path, "--"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	if t.user != nil {
		path = "PATH=/usr/local/sbin:/usr/sbin:/sbin"
	}
	cmd.Env = []string{path, "HOME=/root"}
	cmd.Dir = "/"
	cmd.ExtraFiles = extra
	stdio.apply(cmd)

	started := make(chan error, 1)
	go func() {
		// Never unlocked: the thread is not fit for anything else afterwards.
		runtime.LockOSThread()
		started <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			// Slave: an unmount on the host must reach this namespace.
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
				return fmt.Errorf("make / a slave: %w", err)
			}
			if err := unix.Mount(private, shared, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("bind %s on %s: %w", private, shared, err)
			}
			if p := t.process.AppArmorProfile; p != "" && p != "unconfined" {
				// Profiles for containers let the host's unconfined processes send signals.
				// lxc-start has a profile by its path, and its signals, of lxc-stop(1) for example,
				// would be refused.
				if err := os.WriteFile("/proc/thread-self/attr/apparmor/exec", []byte("exec unconfined"), 0); err != nil {
					return fmt.Errorf("lxc-start without AppArmor's profile for it: %w", err)
				}
			}
			if t.time != nil && t.time.path == "" {
				if err := newTimeNamespace(t.time.offsets); err != nil {
					return err
				}
			}
			return cmd.Start()
		}()
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", start, err)
	}
	m := &monitor{
		cmd:    cmd,
		fifo:   fifo,
		ended:  make(chan struct{}),
		status: make(chan syscall.WaitStatus, 1),
	}
	go m.read()
	go func() {
		m.err = cmd.Wait()
		var end [recordSize]byte
		binary.NativeEndian.PutUint32(end[:], recordEnd)
		_, _ = fifo.Write(end[:])
		close(m.ended)
	}()
	return m, nil
}

// newTimeNamespace makes one for what this thread starts.
func newTimeNamespace(offsets map[string]specs.LinuxTimeOffset) error {
	if err := unix.Unshare(unix.CLONE_NEWTIME); err != nil {
		return fmt.Errorf("linux.namespaces: a time namespace: %w", err)
	}
	var lines []byte
	for clock, o := range offsets {
		lines = fmt.Appendf(lines, "%s %d %d\n", clock, o.Secs, o.Nanosecs)
	}
	if lines == nil {
		return nil
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/timens_offsets", unix.Gettid()), lines, 0); err != nil {
		return fmt.Errorf("linux.timeOffsets: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// read takes the records of the FIFO until the one that carries the status.
func (m *monitor) read() {
	defer close(m.status)
	var record [recordSize]byte
	sent := false
	for {
		if _, err := io.ReadFull(m.fifo, record[:]); err != nil {
			return
		}
		switch binary.NativeEndian.Uint32(record[:4]) {
		case recordExitCode:
			if !sent {
				sent = true
				m.status <- syscall.WaitStatus(binary.NativeEndian.Uint32(record[recordSize-4:]))
			}
		case recordEnd:
			return
		}
	}
}

// wait until lxc-start is gone.
func (m *monitor) wait(ctx context.Context) error {
	select {
	case <-m.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for lxc-start (pid %d) to end: %w", m.cmd.Process.Pid, ctx.Err())
	}
}

// apply gives the files to the command. A typed nil must not get into its
// interface fields: os/exec would start a copy of nothing.
func (s Stdio) apply(cmd *exec.Cmd) {
	if s.Stdin != nil {
		cmd.Stdin = s.Stdin
	}
	if s.Stdout != nil {
		cmd.Stdout = s.Stdout
	}
	if s.Stderr != nil {
		cmd.Stderr = s.Stderr
	}
}
