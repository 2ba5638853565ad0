package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lingering is how long after its exit a silent command's output is still waited for:
// a daemon that it started and that kept its stdout must not hold the caller.
const lingering = 300 * time.Millisecond

// Serve runs commands for whoever connects to addr, as the calling user. It never returns nil.
func Serve(addr string) error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
		return fmt.Errorf("allow core files: %w", err)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			handle(c)
		}()
	}
}

func handle(c io.ReadWriter) {
	out := &frameWriter{w: c}
	in := bufio.NewReaderSize(c, 1<<16)
	kind, data, err := readFrame(in)
	if err != nil {
		return // nobody to tell
	}
	var q request
	if kind != kindRequest || json.Unmarshal(data, &q) != nil {
		_ = out.sendJSON(kindExit, exitStatus{Code: 126, Error: "the first frame is not a request"})
		return
	}
	var st exitStatus
	switch {
	case q.Time != 0:
		err = resumed(q.Time, q.Seed)
	case len(q.Argv) == 0:
		err = nil // a question whether we are here
	default:
		st.Code, err = runCommand(q, in, out)
	}
	if err != nil {
		st = exitStatus{Code: 127, Error: err.Error()}
	}
	_ = out.sendJSON(kindExit, st)
}

// resumed gives a restored guest the time it missed and randomness of its own.
func resumed(now int64, seed []byte) error {
	ts := unix.NsecToTimespec(now)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	pool := struct {
		entropy, size int32
		buf           [512]byte
	}{}
	n := copy(pool.buf[:], seed)
	pool.entropy, pool.size = int32(n*8), int32(n)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&pool))); e != 0 {
		return fmt.Errorf("add entropy: %w", e)
	}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDRESEEDCRNG, 0); e != 0 {
		return fmt.Errorf("reseed: %w", e)
	}
	return nil
}

func runCommand(q request, in io.Reader, out *frameWriter) (int, error) {
	cmd := exec.Command(q.Argv[0], q.Argv[1:]...)
	cmd.Env = append(os.Environ(), q.Env...)
	cmd.Dir = q.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}

	var stdin io.WriteCloser
	var pty *os.File
	var outputs []*os.File // our ends
	var kinds []byte
	var theirs []*os.File
	defer func() {
		for _, f := range append(theirs, outputs...) {
			f.Close()
		}
	}()
	if q.TTY != nil {
		master, slave, err := openPTY(*q.TTY)
		if err != nil {
			return 0, err
		}
		pty, stdin = master, master
		outputs, kinds, theirs = []*os.File{master}, []byte{kindStdout}, []*os.File{slave}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		cmd.SysProcAttr.Setctty = true
	} else {
		for _, k := range []byte{kindStdout, kindStderr} {
			r, w, err := os.Pipe()
			if err != nil {
				return 0, err
			}
			outputs, kinds, theirs = append(outputs, r), append(kinds, k), append(theirs, w)
		}
		cmd.Stdout, cmd.Stderr = theirs[0], theirs[1]
		if q.Stdin {
			w, err := cmd.StdinPipe()
			if err != nil {
				return 0, err
			}
			stdin = w
		}
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	for _, f := range theirs {
		f.Close()
	}
	theirs = nil

	var exited atomic.Bool
	go fromClient(in, stdin, pty, func() {
		if !exited.Load() { // the client went away: so does what it started
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
	})
	copied := make(chan struct{}, len(outputs))
	for i, f := range outputs {
		go func() {
			copyOut(out, kinds[i], f, &exited)
			copied <- struct{}{}
		}()
	}
	err := cmd.Wait()
	exited.Store(true)
	for _, f := range outputs {
		_ = f.SetReadDeadline(time.Now().Add(lingering))
	}
	for range outputs {
		<-copied
	}
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		return 0, err
	}
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}

func copyOut(out *frameWriter, kind byte, f *os.File, exited *atomic.Bool) {
	b := make([]byte, 1<<16)
	for {
		n, err := f.Read(b)
		if n > 0 && out.send(kind, b[:n]) != nil {
			return
		}
		if err != nil { // EOF, EIO of a terminal whose other side is closed, or the deadline
			return
		}
		if exited.Load() {
			_ = f.SetReadDeadline(time.Now().Add(lingering))
		}
	}
}

func fromClient(in io.Reader, stdin io.WriteCloser, pty *os.File, gone func()) {
	for {
		kind, data, err := readFrame(in)
		if err != nil {
			gone()
			return
		}
		switch {
		case kind == kindStdin && stdin != nil && len(data) > 0:
			_, _ = stdin.Write(data) // a command may close its input early
		case kind == kindStdin && stdin != nil && pty == nil:
			_ = stdin.Close()
		case kind == kindResize && pty != nil:
			var s size
			if json.Unmarshal(data, &s) == nil {
				_ = unix.IoctlSetWinsize(int(pty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Cols})
			}
		}
	}
}

func openPTY(s size) (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Cols})
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, fmt.Errorf("set up terminal: %w", err)
	}
	return master, slave, nil
}
