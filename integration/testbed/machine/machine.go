// Package machine boots the test guest in QEMU, from its disk or from a saved state, and
// ends it. It owns the QEMU process and its run directory; it knows nothing of what is
// tested in the guest.
package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd-pve/containerd-pve/integration/testbed/agent"
	"github.com/containerd-pve/containerd-pve/integration/testbed/build"
)

const (
	qmpName    = "qmp"
	serialName = "serial.log"
	logName    = "qemu.log"
	memory     = "2048"
	processors = "2"
	// emulated is the processor that QEMU emulates: all it can, but the promise that copying and clearing byte by byte is
	// fast. QEMU does it byte by byte, and the kernel and libc, told of no such promise, by eight (`dd if=/dev/zero` of a
	// gigabyte took 1.6 s, and 0.15 s without).
	emulated = "max,erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off"
)

// Systemd is the guest whose first process is systemd. Its root image is the same.
const Systemd = "systemd"

// Drive is one virtio disk.
type Drive struct {
	File, Format string
	Keep         bool // write to the file itself, not to a throw-away copy
}

// Options say what to boot.
type Options struct {
	Dir     string // run directory of this machine, made if missing
	Tools   string // tools stage: QEMU
	Disk    string // disk stage: kernel and initramfs
	Accel   string // kvm or tcg
	Init    string // what the guest boots: "" (busybox) or Systemd
	Drives  []Drive
	RAM     string // file that is the guest's memory; empty: anonymous
	KeepRAM bool   // write the guest's memory to RAM
	State   string // saved state to restore; empty: boot
	Outlive bool   // the machine goes on when the calling program ends
}

// Machine is a guest that was started or found.
type Machine struct {
	Client agent.Client
	PID    int
	opts   Options
	dead   chan struct{} // closed when QEMU has ended
}

// Start starts QEMU and, when restoring, lets the guest go on; it does not wait for the guest's agent.
func Start(ctx context.Context, o Options) (*Machine, error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		m, err := start(ctx, o)
		// the port was free when we looked; somebody may have been faster
		if err == nil || try == 5 || ctx.Err() != nil || !bytes.Contains(readFile(filepath.Join(o.Dir, logName)), []byte("host forwarding rule")) {
			return m, err
		}
	}
}

func start(ctx context.Context, o Options) (*Machine, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	m := &Machine{opts: o, dead: make(chan struct{}), Client: agent.Client{Addr: "127.0.0.1:" + strconv.Itoa(port)}}
	for _, f := range []string{qmpName, serialName} {
		if err := os.Remove(filepath.Join(o.Dir, f)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	cmd := build.Tool(context.WithoutCancel(ctx), o.Tools, "qemu-system-x86_64", m.args(port)...)
	cmd.Dir = o.Dir
	cmd.Env = append(os.Environ(), "TMPDIR="+o.Dir) // where throw-away disks grow
	log, err := os.Create(filepath.Join(o.Dir, logName))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if !o.Outlive {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the death signal comes when the starting thread ends, so it must live as long as QEMU
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
			close(m.dead)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	m.PID = cmd.Process.Pid
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	q, err := m.monitor(ctx)
	if err == nil {
		if o.State != "" {
			err = q.restore(ctx, o.State)
		}
		q.conn.Close()
	}
	if err != nil {
		return nil, errors.Join(err, m.Kill())
	}
	return m, nil
}

func (m *Machine) args(port int) []string {
	o := m.opts
	share := filepath.Join(o.Tools, "root/usr/share")
	a := []string{
		"-L", filepath.Join(share, "qemu"), "-L", filepath.Join(share, "seabios"),
		"-name", "containerd-pve-testbed", "-smp", processors, "-m", memory,
		"-display", "none", "-nodefaults", "-no-reboot",
		"-serial", "file:" + serialName, "-qmp", "unix:" + qmpName + ",server=on,wait=off",
		"-kernel", filepath.Join(o.Disk, "vmlinux"), "-initrd", filepath.Join(o.Disk, "initrd.cpio"),
		"-append", kernelLine(o.Init),
		"-netdev", fmt.Sprintf("user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:%d-:7000", port),
		"-device", "virtio-net-pci,netdev=n0,romfile=",
	}
	if o.Accel == "kvm" {
		a = append(a, "-accel", "kvm", "-cpu", "host")
	} else {
		a = append(a, "-accel", "tcg,thread=multi", "-cpu", emulated)
	}
	if o.RAM == "" {
		a = append(a, "-M", "q35")
	} else {
		a = append(a, "-M", "q35,memory-backend=ram", "-object",
			"memory-backend-file,id=ram,size="+memory+"M,mem-path="+o.RAM+",share="+onOff(o.KeepRAM))
	}
	for _, d := range o.Drives {
		a = append(a, "-drive", fmt.Sprintf("file=%s,format=%s,if=virtio,cache=unsafe,discard=unmap,snapshot=%s", d.File, d.Format, onOff(!d.Keep)))
	}
	if o.State != "" {
		a = append(a, "-incoming", "defer")
	}
	return a
}

func kernelLine(init string) string {
	line := "console=ttyS0 panic=-1 quiet mitigations=off init_on_alloc=0 net.ifnames=0"
	if init == Systemd {
		line += " bed.init=systemd systemd.unit=bed.target systemd.show_status=no"
	}
	return line
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// Find is the machine that another program started with the run directory dir and left running.
func Find(dir string, pid int, addr string) (*Machine, bool) {
	m := &Machine{Client: agent.Client{Addr: addr}, PID: pid, opts: Options{Dir: dir}, dead: make(chan struct{})}
	return m, m.alive()
}

// alive looks at the working directory, so that a reused process id is not taken for ours.
func (m *Machine) alive() bool {
	cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", m.PID))
	if err != nil {
		return false
	}
	want, err := filepath.EvalSymlinks(m.opts.Dir)
	return err == nil && cwd == want
}

// Dead is closed when the machine that this program started has ended.
func (m *Machine) Dead() <-chan struct{} { return m.dead }

// Reset presses the reset button: the guest gets no word of it, and boots again
// from its disks, which keep what it had written to them. It returns when the
// guest answers.
func (m *Machine) Reset(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	q, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	defer q.conn.Close()
	// Otherwise a guest that boots again ends the machine.
	if _, err := q.call("set-action", map[string]any{"reboot": "reset"}); err != nil {
		return err
	}
	if _, err := q.call("system_reset", nil); err != nil {
		return err
	}
	// Until then the old guest might answer.
	if err = q.event(ctx, "RESET"); err == nil {
		err = m.Client.Wait(ctx)
	}
	if err == nil {
		err = m.Client.Resumed(ctx)
	}
	if err == nil {
		_, err = q.call("set-action", map[string]any{"reboot": "shutdown"})
	}
	if err != nil {
		return fmt.Errorf("guest after a reset: %w; its console:\n%s", err, m.Console())
	}
	return nil
}

// Kill ends the machine, and returns when it is gone.
func (m *Machine) Kill() error {
	for range 1000 {
		if !m.alive() {
			return nil
		}
		if err := syscall.Kill(m.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end QEMU: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return fmt.Errorf("QEMU (pid %d) does not end", m.PID)
}

// Console is the end of what the guest wrote on its serial line.
func (m *Machine) Console() string {
	b := readFile(filepath.Join(m.opts.Dir, serialName))
	return string(b[max(0, len(b)-4000):])
}

func (m *Machine) log() string { return string(readFile(filepath.Join(m.opts.Dir, logName))) }

func readFile(name string) []byte {
	b, err := os.ReadFile(name)
	if err != nil {
		return []byte(err.Error())
	}
	return b
}

// Accel tells which accelerator boots our kernel here. A /dev/kvm can be there and not do it,
// so it is tried once and the answer remembered in the cache.
func Accel(ctx context.Context, c *build.Cache, bed *build.Bed) (string, error) {
	if a := os.Getenv("BED_ACCEL"); a != "" {
		return a, nil
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg", nil
	}
	f.Close()
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "", err
	}
	name := filepath.Join(c.Dir, "accel-"+string(bytes.TrimSpace(release))+"-"+bed.Kernel.Key())
	if b, err := os.ReadFile(name); err == nil {
		return string(b), nil
	}
	dir, err := os.MkdirTemp(c.Dir, "probe-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintln(c.Progress, "testbed: trying hardware acceleration")
	try, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	accel := "kvm"
	m, err := Start(try, Options{Dir: dir, Tools: c.Path(bed.Tools), Disk: c.Path(bed.Disk), Accel: "kvm",
		Drives: []Drive{{File: filepath.Join(c.Path(bed.Disk), "root.img"), Format: "raw"}}})
	if err == nil {
		err = m.Client.Wait(try)
		if kerr := m.Kill(); kerr != nil {
			return "", kerr
		}
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		accel = "tcg"
	}
	fmt.Fprintf(c.Progress, "testbed: the guest will run with %s\n", accel)
	return accel, os.WriteFile(name, []byte(accel), 0o644)
}

// Saved is the stage that holds a booted and prepared guest; init is as in Options.
func Saved(c *build.Cache, bed *build.Bed, accel, init string) (*build.Stage, error) {
	params := map[string]string{"ACCEL": accel, "MEMORY": memory, "PROCESSORS": processors, "FORM": "1", "INIT": init, "CPU": emulated}
	if accel == "kvm" { // the guest has seen this host's processor
		b, err := os.ReadFile("/proc/cpuinfo")
		if err != nil {
			return nil, err
		}
		cpu, _, _ := bytes.Cut(b, []byte("cpu MHz"))
		flags := b[max(0, bytes.Index(b, []byte("\nflags"))):]
		flags, _, _ = bytes.Cut(flags[min(1, len(flags)):], []byte("\n"))
		params["CPU"] = string(cpu) + string(flags)
	}
	s := &build.Stage{Name: "saved", Params: params, Deps: []*build.Stage{bed.Tools, bed.Disk}}
	s.Go = func(ctx context.Context, out string) error { return save(ctx, c, bed, accel, init, out) }
	return s, nil
}

func save(ctx context.Context, c *build.Cache, bed *build.Bed, accel, init, out string) error {
	tools, disk := c.Path(bed.Tools), c.Path(bed.Disk)
	if err := overlay(ctx, tools, filepath.Join(out, rootFile), filepath.Join(disk, "root.img"), "raw"); err != nil {
		return err
	}
	if err := diskImage(ctx, tools, "-f", "qcow2", filepath.Join(out, dataFile), "8G"); err != nil {
		return err
	}
	return freeze(ctx, Options{Tools: tools, Disk: disk, Accel: accel, Init: init}, out, func(ctx context.Context, m *Machine) error {
		var output bytes.Buffer
		code, err := m.Client.Run(ctx, agent.Command{Argv: []string{"bed-prepare"}, Dir: "/", Stdout: &output, Stderr: &output})
		if err == nil && code != 0 {
			err = fmt.Errorf("status %d", code)
		}
		if err != nil {
			err = fmt.Errorf("bed-prepare: %w\n%s", err, output.String())
		}
		return err
	})
}

// What a directory with a guest that was stopped holds.
const (
	rootFile  = "root.qcow2"
	dataFile  = "data.qcow2"
	ramFile   = "ram"
	stateFile = "state"
)

// diskImage makes one.
func diskImage(ctx context.Context, tools string, args ...string) error {
	if b, err := build.Tool(ctx, tools, "qemu-img", append([]string{"create", "-q"}, args...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img: %w: %s", err, b)
	}
	return nil
}

// overlay is a disk that begins as another is.
func overlay(ctx context.Context, tools, file, of, format string) error {
	return diskImage(ctx, tools, "-f", "qcow2", "-F", format, "-b", of, file)
}

// freeze starts a guest with the disks that are in the directory out, and the memory and the devices' state if it is one to
// go on, has it prepared, and stops it for good, all of it in out.
func freeze(ctx context.Context, o Options, out string, prepare func(context.Context, *Machine) error) error {
	o.Dir = filepath.Join(out, "run")
	o.Drives = []Drive{{filepath.Join(out, rootFile), "qcow2", true}, {filepath.Join(out, dataFile), "qcow2", true}}
	o.RAM, o.KeepRAM = filepath.Join(out, ramFile), true
	m, err := Start(ctx, o)
	if err != nil {
		return err
	}
	defer func() { _ = m.Kill() }() // it has ended by itself unless something failed before
	limited, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	err = m.Client.Wait(limited)
	if err == nil {
		err = m.Client.Resumed(limited)
	}
	if err == nil {
		err = prepare(limited, m)
	}
	var q *qmp
	if err == nil {
		q, err = m.monitor(limited)
	}
	if err == nil {
		err = q.save(limited, filepath.Join(out, stateFile))
		q.conn.Close()
	}
	if err != nil {
		return fmt.Errorf("%w\nthe guest's console:\n%s", err, m.Console())
	}
	select {
	case <-m.dead:
	case <-limited.Done():
		return context.Cause(limited)
	}
	return os.RemoveAll(o.Dir)
}

// Prepare has a guest that goes on from the directory from prepared, and leaves it stopped in the directory out, which it
// makes. From there it goes on as often as one likes.
func Prepare(ctx context.Context, c *build.Cache, bed *build.Bed, from, accel, out string, prepare func(context.Context, *Machine) error) error {
	if err := os.Mkdir(out, 0o700); err != nil {
		return err
	}
	tools := c.Path(bed.Tools)
	for _, disk := range []string{rootFile, dataFile} {
		if err := overlay(ctx, tools, filepath.Join(out, disk), filepath.Join(from, disk), "qcow2"); err != nil {
			return err
		}
	}
	// Most of it is holes.
	if b, err := exec.CommandContext(ctx, "cp", "--reflink=auto", filepath.Join(from, ramFile), filepath.Join(out, ramFile)).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w: %s", err, b)
	}
	return freeze(ctx, Options{Tools: tools, Disk: c.Path(bed.Disk), Accel: accel, State: filepath.Join(from, stateFile)}, out, prepare)
}

// Restore starts a guest that goes on from the directory from, a saved stage's or one of Prepare, and waits until it answers.
func Restore(ctx context.Context, c *build.Cache, bed *build.Bed, from, accel, dir string, outlive bool) (*Machine, error) {
	c.Ready(bed.Tools)
	c.Ready(bed.Disk)
	m, err := Start(ctx, Options{Dir: dir, Tools: c.Path(bed.Tools), Disk: c.Path(bed.Disk), Accel: accel, Outlive: outlive,
		Drives: []Drive{{File: filepath.Join(from, rootFile), Format: "qcow2"}, {File: filepath.Join(from, dataFile), Format: "qcow2"}},
		RAM:    filepath.Join(from, ramFile), State: filepath.Join(from, stateFile)})
	if err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err = m.Client.Wait(limited); err == nil {
		err = m.Client.Resumed(limited)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("restored guest: %w; its console:\n%s", err, m.Console()), m.Kill())
	}
	return m, nil
}
