package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

func TestSysctlPath(t *testing.T) {
	for key, want := range map[string]string{
		"net.ipv4.ip_forward":              "net/ipv4/ip_forward",
		"net/ipv4/ip_forward":              "net/ipv4/ip_forward",
		"net.ipv4.conf.eth0/100.rp_filter": "net/ipv4/conf/eth0.100/rp_filter",
		"net/ipv4/conf/eth0.100/rp_filter": "net/ipv4/conf/eth0.100/rp_filter",
		"plain":                            "plain",
	} {
		if got := sysctlPath(key); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
}

func TestCapabilities(t *testing.T) {
	if len(plan.Capabilities) != unix.CAP_LAST_CAP+1 {
		t.Errorf("%d names, the kernel has %d", len(plan.Capabilities), unix.CAP_LAST_CAP+1)
	}
	for name, bit := range map[string]int{"CAP_CHOWN": unix.CAP_CHOWN, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN,
		"CAP_MKNOD": unix.CAP_MKNOD, "CAP_SYSLOG": unix.CAP_SYSLOG, "CAP_CHECKPOINT_RESTORE": unix.CAP_CHECKPOINT_RESTORE} {
		if got := capSet([]string{name}); got != 1<<bit {
			t.Errorf("%s: %#x, want bit %d", name, got, bit)
		}
	}
	if got := capSet([]string{"CAP_KILL", "CAP_NOT_KNOWN", "kill"}); got != 1<<unix.CAP_KILL {
		t.Errorf("%#x", got)
	}
}

func TestHome(t *testing.T) {
	const passwd = "root:x:0:0::/root:/bin/sh\nbroken:x:5\nu:x:1000:1000::/home/u:/bin/sh\nr:x:7:7::relative:\nn:x:8:8::/nul\x00:\n"
	for uid, want := range map[uint32]string{0: "/root", 1000: "/home/u", 5: "", 7: "", 8: "", 9: ""} {
		if got := homeOf(passwd, uid); got != want {
			t.Errorf("%d: %q, want %q", uid, got, want)
		}
	}
	r := tempRoot(t)
	for _, c := range []struct{ env, want []string }{
		{[]string{"A=1", "HOME=/x"}, []string{"A=1", "HOME=/x"}},
		{[]string{"A=1"}, []string{"A=1", "HOME=/"}},
		{[]string{"HOME=", "A=1"}, []string{"A=1", "HOME=/"}},
	} {
		if got := withHome(c.env, r, 3); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: %q, want %q", c.env, got, c.want)
		}
	}
}

func TestReadFileTakesNoFIFO(t *testing.T) {
	r := tempRoot(t)
	if err := unix.Mkfifoat(r.fd, "fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := r.readFile("/fifo", 10); err != unix.EINVAL {
		t.Errorf("%v, want EINVAL", err)
	}
}

func tempRoot(t *testing.T) root {
	t.Helper()
	r, err := openRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(r.fd) })
	return r
}

// TestCreate walks through roots with symlinks of all kinds: nothing may be made outside.
func TestCreate(t *testing.T) {
	outer := t.TempDir()
	for _, c := range []struct {
		name  string
		links map[string]string
		path  string
		dir   bool
		want  string // below the root
		err   error
	}{
		{name: "plain", path: "/a/b/c", dir: true, want: "a/b/c"},
		{name: "file", path: "a/b", want: "a/b"},
		{name: "dots", path: "/a/./b/../../../c", dir: true, want: "c"},
		{name: "absolute link", links: map[string]string{"l": outer}, path: "/l/x", dir: true, want: outer + "/x"},
		{name: "upward link", links: map[string]string{"l": "../../../../../../../../up"}, path: "/l/x", want: "up/x"},
		{name: "dangling at the end", links: map[string]string{"l": "/no/file"}, path: "/l", want: "no/file"},
		{name: "link to link", links: map[string]string{"l": "m/y", "m": "/z"}, path: "/l/x", dir: true, want: "z/y/x"},
		{name: "loop", links: map[string]string{"l": "m", "m": "l"}, path: "/l/x", err: unix.ELOOP},
		{name: "nothing", path: "", err: unix.ENOENT},
		{name: "the root", path: "/", dir: true, want: "."},
	} {
		dir := filepath.Join(t.TempDir(), "root")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, target := range c.links {
			if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		r, err := openRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := r.create(c.path, c.dir)
		if err != c.err {
			t.Errorf("%s: %v, want %v", c.name, err, c.err)
		}
		if c.err != nil {
			continue
		}
		var got, want unix.Stat_t
		if err := unix.Fstat(fd, &got); err != nil {
			t.Fatal(err)
		}
		if err := unix.Lstat(filepath.Join(dir, c.want), &want); err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if got.Ino != want.Ino || (want.Mode&unix.S_IFMT == unix.S_IFDIR) != c.dir {
			t.Errorf("%s: another file, or of another type, than %s", c.name, c.want)
		}
	}
	if left, err := os.ReadDir(outer); err != nil || len(left) != 0 {
		t.Errorf("made outside of the root: %v %v", left, err)
	}
}

// TestMakeConsole: an image's symlink is replaced, anything else it brings is kept.
func TestMakeConsole(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(path string) error
		mode os.FileMode
	}{
		{"missing", nil, 0},
		{"symlink", func(path string) error { return os.Symlink("../victim", path) }, 0},
		{"file", func(path string) error { return os.WriteFile(path, nil, 0o600) }, 0},
		{"FIFO", func(path string) error { return unix.Mkfifo(path, 0o600) }, os.ModeNamedPipe},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "victim"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(dir, "dev"), 0o755); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "dev/console")
		if c.make != nil {
			if err := c.make(path); err != nil {
				t.Fatal(err)
			}
		}
		r, err := openRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		err = r.makeConsole()
		unix.Close(r.fd)
		if st, lerr := os.Lstat(path); err != nil || lerr != nil || st.Mode().Type() != c.mode {
			t.Errorf("%s: %v, %v, %v", c.name, err, st, lerr)
		}
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"yes": 0o755, "no": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"PATH=/nothing:/also", "PATH=/nothing::" + dir + "/"}
	for _, c := range []struct {
		name, path string
		kind       plan.ErrorKind
		text       string
	}{
		{name: "yes", path: dir + "/yes"},
		{name: dir + "/yes", path: dir + "/yes"},
		{name: "no", kind: plan.ErrorNotFound, text: `exec: "no": executable file not found in $PATH`},
		{name: dir + "/no", kind: plan.ErrorPermission, text: "permission denied"},
		{name: dir, kind: plan.ErrorPermission, text: "is a directory"},
		{name: "/not/there", kind: plan.ErrorNotFound, text: `exec: "/not/there": stat /not/there: no such file or directory`},
		{name: "./no/such", kind: plan.ErrorNotFound, text: "no such file or directory"},
	} {
		got, err := lookPath(c.name, env)
		if got != c.path {
			t.Errorf("%s: %q, want %q", c.name, got, c.path)
		}
		if c.kind == "" {
			continue
		}
		e, ok := err.(*plan.Error)
		if !ok || e.Kind != c.kind || !strings.Contains(e.Message, c.text) {
			t.Errorf("%s: %v, want %s: %s", c.name, err, c.kind, c.text)
		}
	}
}

func TestExecError(t *testing.T) {
	for errno, kind := range map[unix.Errno]plan.ErrorKind{
		unix.ENOENT: plan.ErrorNotFound, unix.EACCES: plan.ErrorPermission, unix.ENOEXEC: plan.ErrorInvalid, unix.ENOMEM: plan.ErrorInternal,
	} {
		if got := execError("/x", errno); got.Kind != kind || !strings.HasPrefix(got.Message, "exec /x: ") {
			t.Errorf("%v: %+v", errno, got)
		}
	}
}

func TestSocket(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	s := &socket{fd: fds[1]}
	// Two messages in one write, the second longer than one read.
	long := strings.Repeat("x", 100<<10)
	go func() {
		_, _ = unix.Write(fds[0], []byte(`{"cwd":"/a"}`+"\n"+`{"cwd":"`+long+`"}`+"\n"))
		_ = unix.Shutdown(fds[0], unix.SHUT_WR)
	}()
	for _, want := range []string{"/a", long} {
		var p plan.Process
		if ok, err := s.receive(&p); !ok || err != nil || p.Cwd != want {
			t.Fatalf("%v %v, %d bytes", ok, err, len(p.Cwd))
		}
	}
	if ok, err := s.receive(&plan.Process{}); ok || err != nil {
		t.Errorf("at the end: %v %v", ok, err)
	}
	if code := report(s, fail(plan.ErrorNotFound, "why")); code != exitNotFound {
		t.Errorf("exit code %d", code)
	}
	buf := make([]byte, 200)
	n, err := unix.Read(fds[0], buf)
	if want := `{"error":{"kind":"not-found","message":"why"}}` + "\n"; err != nil || string(buf[:n]) != want {
		t.Errorf("%q %v, want %q", buf[:n], err, want)
	}
}

func TestFailedKeepsKind(t *testing.T) {
	if e := failed(plan.ErrorInternal, "doing it", fail(plan.ErrorNotFound, "why")); e.Kind != plan.ErrorNotFound || e.Error() != "doing it: why" {
		t.Errorf("%+v", e)
	}
	if e := failed(plan.ErrorInvalid, "doing it", unix.EPERM); e.Kind != plan.ErrorInvalid || e.Error() != "doing it: operation not permitted" {
		t.Errorf("%+v", e)
	}
}

func TestStringPointers(t *testing.T) {
	got := stringPointers([]string{"a b", ""})
	if len(got) != 3 || got[2] != nil || *got[1] != 0 || !bytes.Equal([]byte{*got[0]}, []byte("a")) {
		t.Errorf("%v", got)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{`/plain`: "/plain", `/a\040b\011c`: "/a b\tc", `/back\134slash`: `/back\slash`, `/end\04`: `/end\04`, `/x\999`: `/x\999`} {
		if got := unescape(in); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

func TestTreesAreTakenOnce(t *testing.T) {
	trees := trees{7}
	for number, want := range []bool{false, true, false, false} {
		fd, err := trees.take(number)
		if (err == nil) != want || want && fd != 7 {
			t.Errorf("%d: %d, %v", number, fd, err)
		}
	}
	if _, err := trees.take(1); err == nil {
		t.Error("a tree was given twice")
	}
}

// TestSocketWithFiles: descriptors come with any part of a message, and all with it.
func TestSocketWithFiles(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	s := &socket{fd: fds[1]}
	send := func(text string, files ...int) {
		t.Helper()
		if err := unix.Sendmsg(fds[0], []byte(text), unix.UnixRights(files...), nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	many := make([]int, 250)
	for i := range many {
		many[i] = fds[0]
	}
	send("{", many...)
	send(`"sysctl"`, fds[0], fds[1])
	send(":null}\n")
	var m plan.Mounts
	files, open, err := s.receiveFiles(&m)
	if err != nil || !open || len(files) != len(many)+2 {
		t.Errorf("%d descriptors, %v %v", len(files), open, err)
	}
	for _, fd := range files {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d: flags %#x, %v", fd, flags, err)
		}
		unix.Close(fd)
	}
}

func FuzzUnescape(f *testing.F) {
	f.Add(`/a\040b`, "/a b")
	f.Fuzz(func(t *testing.T, in, path string) {
		if out := unescape(in); len(out) > len(in) {
			t.Errorf("%q became %q", in, out)
		}
		escaped := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace(path)
		if out := unescape(escaped); out != path {
			t.Errorf("%q: %q", path, out)
		}
	})
}
