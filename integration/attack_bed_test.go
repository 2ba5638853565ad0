//go:build bed

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// attackVariable makes this test program a hostile program of a container,
// which is where the tests bind it.
const attackVariable = "ATTACK"

const attackProgram = "/attack"

var attacks = map[string]func() error{"scan": scan, "overwrite": overwrite, "swap": swap}

func init() {
	name := os.Getenv(attackVariable)
	if name == "" {
		return
	}
	if err := attacks[name](); err != nil {
		fmt.Println("attack:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// withAttack puts this program into the container.
func withAttack(t *testing.T) oci.SpecOpts {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return oci.WithMounts([]specs.Mount{{Type: "bind", Source: self, Destination: attackProgram, Options: []string{"bind", "ro"}}})
}

// processes are the others of the pid namespace, with their command lines.
func processes() map[int]string {
	out := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		line, err := os.ReadFile(dir + "/cmdline")
		if err == nil && pid != os.Getpid() {
			out[pid] = string(line)
		}
	}
	return out
}

const stopScan = "/stop-scan"

// scan tries to get hold of processes on their way into the container, until
// stopScan is there. It says how many it has met and all that it got.
func scan() error {
	runtime.LockOSThread() // a tracer is a thread
	met := map[int]bool{}
	got := map[string]bool{}
	coming := func(line string) bool {
		return strings.HasPrefix(line, "pve-init\x00") || strings.Contains(line, "containerd-shim")
	}
	for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		for pid, line := range processes() {
			if !coming(line) {
				continue
			}
			met[pid] = true
			dir := fmt.Sprintf("/proc/%d/", pid)
			try := func(what string, f func() error) {
				if f() != nil {
					return
				}
				// Only if it was not the container's own program by then.
				if line, err := os.ReadFile(dir + "cmdline"); err == nil && coming(string(line)) {
					got[what] = true
				}
			}
			for _, link := range []string{"exe", "root", "cwd"} {
				try("readlink "+link, func() error { _, err := os.Readlink(dir + link); return err })
				try("open "+link, func() error {
					fd, err := unix.Open(dir+link, unix.O_PATH|unix.O_CLOEXEC, 0)
					if err == nil {
						unix.Close(fd)
					}
					return err
				})
			}
			for _, file := range []string{"environ", "mem", "maps", "auxv"} {
				try("read "+file, func() error {
					f, err := os.Open(dir + file)
					if err != nil {
						return err
					}
					defer f.Close()
					n, err := f.ReadAt(make([]byte, 16), 0)
					if n == 0 {
						return errors.Join(err, errors.New("nothing"))
					}
					return nil
				})
			}
			// Their numbers are no secret to root.
			try("readlink of a descriptor", func() error {
				list, err := os.ReadDir(dir + "fd")
				for _, fd := range list {
					if _, err = os.Readlink(dir + "fd/" + fd.Name()); err == nil {
						return nil
					}
				}
				return errors.Join(err, errors.New("none"))
			})
			try("ptrace", func() error {
				if err := unix.PtraceSeize(pid); err != nil {
					return err
				}
				// Let it go again: the end of what is traced is told to the tracer first.
				if err := unix.PtraceInterrupt(pid); err == nil {
					_, _ = unix.Wait4(pid, nil, unix.WALL, nil)
				}
				_ = unix.PtraceDetach(pid)
				return nil
			})
		}
		if _, err := os.Stat(stopScan); err == nil {
			break
		}
	}
	for what := range got {
		fmt.Println("got:", what)
	}
	fmt.Println("met:", len(met) > 0)
	return nil
}

// overwrite tries to write into the program of a pve-init that waits for its start.
func overwrite() error {
	var pid int
	for end := time.Now().Add(time.Minute); pid == 0; time.Sleep(10 * time.Millisecond) {
		for p, line := range processes() {
			if strings.HasPrefix(line, "/proc/self/fd/") && strings.Contains(line, "\x00init\x00") {
				pid = p
			}
		}
		if time.Now().After(end) {
			return errors.New("no process to attack")
		}
	}
	exe, err := unix.Open(fmt.Sprintf("/proc/%d/exe", pid), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	again := fmt.Sprintf("/proc/self/fd/%d", exe)
	open := func(when string) {
		fd, err := unix.Open(again, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
			fmt.Println("opened for writing", when)
		}
	}
	open("at once")
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	fmt.Println("mount_setattr:", unix.MountSetattr(exe, "", unix.AT_EMPTY_PATH, &attr))
	fmt.Println("remount:", unix.Mount("", again, "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return err
	}
	for processes()[pid] != "" {
		time.Sleep(10 * time.Millisecond)
	}
	open("afterwards")
	fmt.Println("done")
	return nil
}

// swap exchanges, without end, a directory and a symlink of a shared volume.
func swap() error {
	// Without a pause every lookup on the machine would have to be repeated.
	for ; ; time.Sleep(20 * time.Microsecond) {
		for _, name := range []string{"/vol/dir", "/vol/deep"} {
			if err := unix.Renameat2(unix.AT_FDCWD, name, unix.AT_FDCWD, name+"-link", unix.RENAME_EXCHANGE); err != nil {
				return err
			}
		}
	}
}
