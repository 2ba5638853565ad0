//go:build bed

package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// withoutMount takes mounts out of the spec.
func withoutMount(s *oci.Spec, destinations ...string) {
	var kept []specs.Mount
next:
	for _, m := range s.Mounts {
		for _, d := range destinations {
			if m.Destination == d {
				continue next
			}
		}
		kept = append(kept, m)
	}
	s.Mounts = kept
}

// replace puts a symlink where something was.
func replace(t *testing.T, path, target string) {
	t.Helper()
	must(t, os.RemoveAll(path))
	must(t, os.Symlink(target, path))
}

// up leads from anywhere to the host's root, if nothing holds it.
const up = "../../../../../../../../../../../.."

// TestHostileImage: whatever an image brings where the spec leads to, the
// container is refused with the field's name or stays in its root. What it
// could have reached on the host stays as it was.
func TestHostileImage(t *testing.T) {
	run(t, options{args: []string{"true"}})
	before := calm(t)
	outside := t.TempDir() // every "…/out" below is this directory on the host
	canary := func(t *testing.T) {
		t.Helper()
		if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
			t.Errorf("on the host: %v, %v", left, err)
		}
		for _, path := range []string{"/etc/null", "/etc/fd", "/fake"} {
			if _, err := os.Lstat(path); err == nil {
				t.Errorf("on the host: %s", path)
			}
		}
	}
	for _, c := range []struct {
		name     string
		root     func(t *testing.T, dir string)
		edit     func(*oci.Spec)
		args     []string
		terminal bool
		refused  string // part of the error, or
		want     string // stdout
	}{
		{name: "CVE-2019-19921 CVE-2023-27561 CVE-2023-28642 proc is a symlink", refused: "/proc",
			root: func(t *testing.T, dir string) {
				replace(t, filepath.Join(dir, "proc"), "/fake")
				must(t, os.MkdirAll(filepath.Join(dir, "fake/self/attr"), 0o777))
			}},
		{name: "proc is a symlink and not mounted", refused: "/proc",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "proc"), up+outside) },
			edit: func(s *oci.Spec) { withoutMount(s, "/proc") }},
		{name: "proc is a file", refused: "/proc",
			root: func(t *testing.T, dir string) {
				must(t, os.RemoveAll(filepath.Join(dir, "proc")))
				must(t, os.WriteFile(filepath.Join(dir, "proc"), nil, 0o644))
			}},
		{name: "sys is a symlink", refused: "/sys",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "sys"), "/etc") }},
		{name: "dev is a symlink", refused: "lxc-start",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "dev"), "/etc") }},
		{name: "passwd is a FIFO", args: sh("echo $HOME"), want: "/\n",
			root: func(t *testing.T, dir string) {
				must(t, os.Remove(filepath.Join(dir, "etc/passwd")))
				must(t, unix.Mkfifo(filepath.Join(dir, "etc/passwd"), 0o666))
			}},
		{name: "passwd is a device", args: sh("echo $HOME"), want: "/\n",
			root: func(t *testing.T, dir string) {
				must(t, os.Remove(filepath.Join(dir, "etc/passwd")))
				must(t, unix.Mknod(filepath.Join(dir, "etc/passwd"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
			}},
		{name: "passwd is a symlink to the host's", args: sh("echo $HOME"), want: "/\n",
			root: func(t *testing.T, dir string) {
				must(t, os.WriteFile(filepath.Join(outside, "../passwd"), []byte("root:x:0:0::/of-the-host:\n"), 0o644))
				replace(t, filepath.Join(dir, "etc/passwd"), up+filepath.Dir(outside)+"/passwd")
			}},
		{name: "mount target leads outside", args: sh("grep -o '" + outside + "/y tmpfs' /proc/mounts; ls -d /etc/new"), want: outside + "/y tmpfs\n/etc/new\n",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "l"), up+outside) },
			edit: func(s *oci.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/l/x/../y"},
					specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/../../l/../../../../../../etc/new"})
			}},
		{name: "mount over the root", refused: "cover the root",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "l"), "/") },
			edit: func(s *oci.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/l/.."})
			}},
		{name: "CVE-2019-16884 CVE-2025-52881 mount below proc", refused: "nothing can be mounted at /proc/",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "l"), "/proc/self") },
			edit: func(s *oci.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/l/attr"})
			}},
		{name: "CVE-2019-16884 mount over proc", refused: "only procfs",
			edit: func(s *oci.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: outside, Destination: "/usr/../proc", Options: []string{"bind"}})
			}},
		{name: "cwd leads outside", args: sh("pwd -P"), want: outside + "/cwd\n",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "l"), up+outside) },
			edit: func(s *oci.Spec) { s.Process.Cwd = "/l/cwd" }},
		{name: "CVE-2024-21626 cwd is a descriptor", refused: "cwd",
			edit: func(s *oci.Spec) { s.Process.Cwd = "/proc/self/fd/7" }},
		{name: "CVE-2024-21626 cwd is a symlink to a descriptor", refused: "cwd",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "l"), "/proc/self/fd/5") },
			edit: func(s *oci.Spec) { s.Process.Cwd = "/l" }},
		{name: "CVE-2025-31133 null is a symlink", args: sh("wc -c </etc/hostname; stat -c %F /etc/hostname; stat -c %F /dev/null; wc -c </etc/issue"),
			want: "0\ncharacter special file\ncharacter special file\n27\n",
			root: func(t *testing.T, dir string) {
				replace(t, filepath.Join(dir, "dev/null"), "/etc/issue")
				must(t, os.WriteFile(filepath.Join(dir, "etc/hostname"), []byte("secret"), 0o644))
				must(t, os.WriteFile(filepath.Join(dir, "etc/issue"), []byte("what the symlink leads to.\n"), 0o644))
			},
			edit: func(s *oci.Spec) {
				withoutMount(s, "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")
				s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "/etc/hostname")
			}},
		{name: "CVE-2025-52565 console is a symlink", terminal: true, args: sh("stat -c %F /dev/console; grep -c proc/sysrq /proc/mounts"),
			want: "character special file\r\n1\r\n",
			root: func(t *testing.T, dir string) {
				replace(t, filepath.Join(dir, "dev/console"), "/proc/sysrq-trigger")
				must(t, os.MkdirAll(filepath.Join(dir, "dev/pts"), 0o755))
			},
			edit: func(s *oci.Spec) { withoutMount(s, "/dev", "/dev/shm", "/dev/mqueue") }},
		{name: "device leads outside", args: sh("stat -c %F " + outside + "/node"), want: "character special file\n",
			root: func(t *testing.T, dir string) { replace(t, filepath.Join(dir, "l"), up+outside) },
			edit: func(s *oci.Spec) {
				s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/l/node", Type: "c", Major: 1, Minor: 3})
			}},
		{name: "masked and read-only paths lead outside", args: sh("ls " + outside + "; touch /etc/x 2>&1 | grep -o Read-only"), want: "Read-only\n",
			root: func(t *testing.T, dir string) {
				must(t, os.MkdirAll(filepath.Join(dir, outside, "secret"), 0o755))
				replace(t, filepath.Join(dir, "l"), up+outside)
				replace(t, filepath.Join(dir, "m"), up+"/etc")
			},
			edit: func(s *oci.Spec) {
				s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = []string{"/l"}, []string{"/m"}
			}},
		{name: "relative source is the bundle's", args: sh("head -c1 /c; touch /c 2>&1 | grep -o Read-only"), want: "{Read-only\n",
			edit: func(s *oci.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "config.json", Destination: "/c", Options: []string{"bind", "ro"}})
			}},
		{name: "newlines in annotations and domainname", args: sh("cat /proc/sys/kernel/domainname"), want: "a\nlxc.x = y\n",
			edit: func(s *oci.Spec) {
				s.Annotations = map[string]string{"a\nlxc.hook.start = /x": "b\nlxc.hook.start = /x"}
				s.Domainname = "a\nlxc.x = y"
			}},
		{name: "newline in the hostname", refused: "lxc.uts.name", edit: func(s *oci.Spec) { s.Hostname = "a\nlxc.x = y" }},
		{name: "newline in cgroupsPath", refused: "lxc.cgroup.dir.container", edit: func(s *oci.Spec) { s.Linux.CgroupsPath = "/default/a\nlxc.x = y" }},
		{name: "newline in mount options", refused: "mounts[",
			edit: func(s *oci.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "x", Destination: "/x", Options: []string{"size=1\nlxc.x = y"}})
			}},
		{name: "an environment of 3 MB", refused: "argument list too long",
			edit: func(s *oci.Spec) {
				for i := range 30 {
					s.Process.Env = append(s.Process.Env, fmt.Sprintf("V%d=%s", i, strings.Repeat("x", 100<<10)))
				}
			}},
		{name: "annotations of 2 MB and 300 mounts", args: sh("grep -c ' /many/' /proc/mounts"), want: "300\n",
			edit: func(s *oci.Spec) {
				s.Annotations = map[string]string{"a": strings.Repeat("x", 2<<20)}
				for i := range 300 {
					s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "x", Destination: fmt.Sprintf("/many/%d", i)})
				}
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options{args: c.args, edit: c.edit, terminal: c.terminal}
			if c.root != nil {
				o.root = func(dir string) { c.root(t, dir) }
			}
			if c.args == nil {
				o.args = []string{"true"}
			}
			b, err := create(t, o)
			if err == nil {
				err = b.task.Start(b.ctx)
			}
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("error %v, want one with %q", err, c.refused)
				}
			} else if err != nil {
				t.Error(err)
			} else if code := b.wait(); b.out.String() != c.want {
				t.Errorf("exit code %d, %q %q; want %q", code, b.out, b.err, c.want)
			}
			canary(t)
		})
	}
	same(t, before)
}

// TestMountFlagsHold: setuid programs in nosuid, devices in nodev, programs in
// noexec do nothing; beside them they work.
func TestMountFlagsHold(t *testing.T) {
	const script = `cd $1; cp /usr/bin/id id; chmod 4755 id; mknod null c 1 3; chmod 666 null
setpriv --reuid 1000 --regid 1000 --clear-groups ./id -u 2>&1; setpriv --reuid 1000 sh -c 'echo x >null' 2>&1 | grep -o 'Permission denied'`
	flags := func(option string) specs.Mount {
		return specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/" + option, Options: []string{option}}
	}
	b := start(t, options{args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{oci.WithNewPrivileges, oci.WithMounts([]specs.Mount{
		flags("exec"), flags("nosuid"), flags("nodev"), flags("noexec"),
	})}})
	for dir, want := range map[string]string{
		"/exec": "0\n", "/nosuid": "1000\n", "/nodev": "0\nPermission denied\n",
	} {
		got, _, err := b.execIn([]string{"sh", "-c", script, "sh", dir}, nil)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", dir, got, err, want)
		}
	}
	if got, _, err := b.execIn([]string{"sh", "-c", script, "sh", "/noexec"}, nil); err != nil || !strings.Contains(got, "Permission denied") || strings.Contains(got, "0\n") {
		t.Errorf("/noexec: %q, %v", got, err)
	}
}

// TestCVE20195736: a container that can trace everything, and mount, gets hold of
// pve-init's program and cannot write into it, not even after it has ended.
func TestCVE20195736(t *testing.T) {
	path, err := exec.LookPath("pve-init")
	must(t, err)
	before, err := os.ReadFile(path)
	must(t, err)
	b := start(t, options{args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{
		withAttack(t), oci.WithAddedCapabilities([]string{"CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"}),
	}})
	// A container that is created and not started is a pve-init that waits; in the
	// first one's pid namespace it can be seen and traced from there.
	if _, err := create(t, options{args: []string{"true"}, spec: []oci.SpecOpts{
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.PIDNamespace, Path: fmt.Sprintf("/proc/%d/ns/pid", b.task.Pid())}),
	}}); err != nil {
		t.Fatal(err)
	}
	out, code, err := b.execIn([]string{attackProgram}, func(s *oci.Spec) { s.Process.Env = append(s.Process.Env, attackVariable+"=overwrite") })
	if err != nil || code != 0 || !strings.Contains(out, "done\n") || strings.Contains(out, "opened for writing") {
		t.Errorf("exit code %d, %v:\n%s", code, err, out)
	}
	t.Log(out)
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("%s has changed: %v", path, err)
	}
}

// TestCVE202421626: no descriptor but stdio gets into a process of exec, and none
// that leads to the host can be its working directory.
func TestCVE202421626(t *testing.T) {
	b := start(t, options{args: []string{"sleep", "1000"}})
	for n := range 20 {
		cwd := fmt.Sprintf("/proc/self/fd/%d", n)
		out, code, err := b.execIn(sh("[ . -ef / ] && echo inside"), func(s *oci.Spec) { s.Process.Cwd = cwd })
		if err == nil && (out != "inside\n" || code != 0) || err != nil && !strings.Contains(err.Error(), "cwd") {
			t.Errorf("%s: %q, %d, %v", cwd, out, code, err)
		}
	}
	for _, path := range []string{"/proc/self/fd", "/proc/1/fd"} {
		if out, _, err := b.execIn([]string{"ls", path}, nil); err != nil || strings.Join(strings.Fields(out), " ") != map[string]string{"/proc/self/fd": "0 1 2 3", "/proc/1/fd": "0 1 2"}[path] {
			t.Errorf("%s: %q, %v", path, out, err)
		}
	}
}

// TestRacingSymlinks: one container exchanges directories of a shared volume with
// symlinks to the host while others are made with mount targets in it
// (CVE-2021-30465), and with targets to be made there (CVE-2024-45310).
func TestRacingSymlinks(t *testing.T) {
	volume, host := t.TempDir(), t.TempDir()
	for _, name := range []string{"dir", "deep"} {
		must(t, os.Mkdir(filepath.Join(volume, name), 0o777))
		must(t, os.Symlink(up+host, filepath.Join(volume, name+"-link")))
	}
	shared := specs.Mount{Type: "bind", Source: volume, Destination: "/vol", Options: []string{"rbind", "rw"}}
	swapper := start(t, options{args: []string{attackProgram}, spec: []oci.SpecOpts{
		withAttack(t), oci.WithMounts([]specs.Mount{shared}), oci.WithEnv([]string{attackVariable + "=swap"}),
	}})
	outcome := map[string]int{}
	for range 6 {
		b, err := create(t, options{image: busybox, args: sh("grep -c ' /vol/dir\\| " + host + " ' /proc/mounts"), spec: []oci.SpecOpts{oci.WithMounts([]specs.Mount{
			shared,
			{Type: "bind", Source: "/", Destination: "/vol/dir", Options: []string{"rbind", "ro"}},
			{Type: "tmpfs", Source: "tmpfs", Destination: "/vol/deep/new/target"},
		})}})
		if err == nil {
			err = b.task.Start(b.ctx)
		}
		if err != nil {
			outcome["refused"]++
			t.Log(err)
			continue
		}
		b.wait()
		outcome["made"]++
	}
	t.Log(outcome)
	if st, err := swapper.task.Status(swapper.ctx); err != nil || st.Status != "running" {
		t.Errorf("the one that swaps: %v, %v, %s%s", st, err, swapper.out, swapper.err)
	}
	if left, err := os.ReadDir(host); err != nil || len(left) > 0 {
		t.Errorf("made on the host: %v, %v", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte(host)) || bytes.Contains(mounts, []byte(volume)) {
		t.Errorf("mounted on the host (%v):\n%s", err, mounts)
	}
}

// TestHostileExec: what a container does to its /proc, its terminals and its C
// library does not lead an exec astray.
func TestHostileExec(t *testing.T) {
	b := start(t, options{args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{oci.WithAddedCapabilities([]string{"CAP_SYS_ADMIN"})}})
	setup := `set -e
echo /no/such/lib.so >/etc/ld.so.preload; echo 'passwd: evil' >/etc/nsswitch.conf
mkdir -p /tmp/p/self/attr/apparmor /tmp/p/sys; mount --bind /tmp/p /proc
mount -t tmpfs x /dev/pts; ln -s /etc/passwd /dev/pts/ptmx`
	if out, code, err := b.execIn(sh(setup), nil); err != nil || code != 0 {
		t.Fatal(out, code, err)
	}
	if out, code, err := b.execIn(sh("echo fine; exit 3"), nil); err != nil || code != 3 || !strings.Contains(out, "fine\n") {
		t.Errorf("exec with a /proc that is none: %q, %d, %v", out, code, err)
	}
	score := 7
	if _, _, err := b.execIn([]string{"true"}, func(s *oci.Spec) { s.Process.OOMScoreAdj = &score }); err == nil || !strings.Contains(err.Error(), "oomScoreAdj") {
		t.Errorf("what is written to a /proc that is none: %v", err)
	}
	if _, _, err := b.execIn([]string{"true"}, func(s *oci.Spec) { s.Process.ApparmorProfile = "lxc-container-default" }); err == nil || !strings.Contains(err.Error(), "apparmorProfile") {
		t.Errorf("a label written to a /proc that is none (CVE-2019-19921): %v", err)
	}
	out, code := command("script", "-qec", "ctr task exec -t --exec-id tty "+b.container.ID()+" true", "/dev/null")
	if code == 0 || !strings.Contains(out, "/dev/pts") {
		t.Errorf("a terminal of a /dev/pts that is none: status %d, %q", code, out)
	}
	if st, err := b.task.Status(b.ctx); err != nil || st.Status != "running" {
		t.Errorf("%v, %v", st, err)
	}
}

// TestScannedExec: a container that watches for processes of exec gets nothing of
// them before they are the container's own.
func TestScannedExec(t *testing.T) {
	b := start(t, options{args: []string{attackProgram}, spec: []oci.SpecOpts{
		withAttack(t), oci.WithEnv([]string{attackVariable + "=scan"}), oci.WithNewPrivileges,
	}})
	for range 8 {
		if out, code, err := b.execIn([]string{"true"}, nil); err != nil || code != 0 {
			t.Fatal(out, code, err)
		}
	}
	// The container ends as soon as the file is there, and may take touch with it.
	if out, code, err := b.execIn([]string{"touch", stopScan}, nil); err != nil || code != 0 && code != 137 {
		t.Fatal(out, code, err)
	}
	if code := b.wait(); code != 0 || b.out.String() != "met: true\n" {
		t.Errorf("exit code %d, %s%s", code, b.out, b.err)
	}
}

// TestCVE202229162 and CVE-2022-24769: no inheritable capabilities by default.
func TestCVE202229162(t *testing.T) {
	b := start(t, options{args: sh("grep ^CapInh /proc/self/status | cut -f2; exec sleep 1000")})
	eventually(t, time.Minute, "the init's set", func() bool { return b.out.String() == "0000000000000000\n" })
	if out, _, err := b.execIn(sh("grep ^CapInh /proc/self/status | cut -f2"), nil); err != nil || out != "0000000000000000\n" {
		t.Errorf("exec: %q, %v", out, err)
	}
}

// TestCVE202015257: the shim's socket is a file of root's; a container sees none
// of the host's abstract sockets.
func TestCVE202015257(t *testing.T) {
	b := start(t, options{args: []string{"sleep", "1000"}})
	sockets, err := filepath.Glob("/run/containerd/s/*")
	if err != nil || len(sockets) == 0 {
		t.Fatal(sockets, err)
	}
	for _, path := range append(sockets, "/run/containerd/s") {
		st, err := os.Stat(path)
		must(t, err)
		if st.Mode().Perm()&0o077 != 0 && path != "/run/containerd/s" || st.Sys() == nil || st.Mode()&0o022 != 0 {
			t.Errorf("%s has the mode %s", path, st.Mode())
		}
	}
	all, err := os.ReadFile("/proc/net/unix")
	if err != nil || strings.Contains(string(all), "@/containerd-shim") {
		t.Errorf("an abstract socket of a shim (%v):\n%s", err, all)
	}
	if out, _, err := b.execIn(sh("grep -c @ /proc/net/unix"), nil); err != nil || out != "0\n" {
		t.Errorf("abstract sockets seen: %q, %v", out, err)
	}
}
