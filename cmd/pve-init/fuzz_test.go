package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

// FuzzSocket: a message is read as what JSON makes of the line, wherever the
// reads happen to cut it; the end of the socket is an end.
func FuzzSocket(f *testing.F) {
	f.Add([]byte(`{"args":["a"],"cwd":"/"}`+"\n"+`{"start":true}`+"\n"), 3)
	f.Add([]byte("\n\n{"), 1)
	f.Add([]byte(`{"finish":{"mounts":[{"destination":"/x"}]}}`+"\n"), 1000)
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[1])
		// A read must not wait for ever if the test is wrong.
		if err := unix.SetsockoptTimeval(fds[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
			t.Fatal(err)
		}
		go func() {
			rest := data
			for len(rest) > 0 {
				n := len(rest)
				if cut > 0 && cut < n {
					n = cut
				}
				if n, err = unix.Write(fds[0], rest[:n]); err != nil {
					break
				}
				rest = rest[n:]
			}
			unix.Close(fds[0])
		}()
		s := &socket{fd: fds[1]}
		lines := bytes.SplitAfter(data, []byte("\n"))
		for _, line := range lines[:len(lines)-1] {
			var got, want plan.Process
			open, err := s.receive(&got)
			wantErr := json.Unmarshal(line, &want)
			if !open || (err == nil) != (wantErr == nil) {
				t.Fatalf("%q: %v, %v; want %v", line, open, err, wantErr)
			}
			if a, b := asJSON(t, got), asJSON(t, want); err == nil && a != b {
				t.Errorf("%s, want %s", a, b)
			}
		}
		if open, err := s.receive(&plan.Process{}); open || err != nil {
			t.Errorf("at the end: %v, %v", open, err)
		}
	})
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// FuzzPasswd: the image's /etc/passwd is hostile. HOME is an absolute path of a
// line of the user's, or "/", and stands once in the environment.
func FuzzPasswd(f *testing.F) {
	f.Add([]byte("root:x:0:0::/root:/bin/sh\n"), uint32(0), "A=1")
	f.Add([]byte("a:b:4294967295:::/x\x00y:\n::::::\n"), uint32(1<<32-1), "HOME=")
	f.Add([]byte(strings.Repeat(":", 100)), uint32(7), "HOME=/h")
	dir := f.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		f.Fatal(err)
	}
	r, err := openRoot(dir)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, passwd []byte, uid uint32, variable string) {
		if err := os.WriteFile(filepath.Join(dir, "etc/passwd"), passwd, 0o644); err != nil {
			t.Fatal(err)
		}
		var homes []string
		for _, e := range withHome([]string{variable}, r, uid) {
			if h, ok := strings.CutPrefix(e, "HOME="); ok {
				homes = append(homes, h)
			}
		}
		if len(homes) != 1 || homes[0] == "" {
			t.Fatalf("HOME is %q", homes)
		}
		if strings.HasPrefix(variable, "HOME=") && variable != "HOME=" {
			return // the spec's own
		}
		if !strings.HasPrefix(homes[0], "/") || homes[0] != "/" && !bytes.Contains(passwd, []byte(homes[0])) || strings.ContainsAny(homes[0], "\n\x00") {
			t.Errorf("HOME %q of %q", homes[0], passwd)
		}
	})
}

// FuzzSysctlPath: only separators change places, and the first is one of a path.
func FuzzSysctlPath(f *testing.F) {
	for _, key := range []string{"net.ipv4.ip_forward", "net/ipv4/conf/eth0.1/x", "net.ipv4.conf.eth0/1.x", "", ".", "/..", "a./"} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		if !utf8.ValidString(key) {
			t.Skip() // nothing that JSON could hold
		}
		path := sysctlPath(key)
		if len(path) != len(key) {
			t.Fatalf("%q became %q", key, path)
		}
		i := strings.IndexAny(key, "./")
		if i >= 0 && path[i] != '/' {
			t.Errorf("%q became %q", key, path)
		}
	})
}

// FuzzCreate: no path of a spec makes anything outside of the root, whatever
// symlinks the image brings.
func FuzzCreate(f *testing.F) {
	f.Add("/a/b", "../../x", true)
	f.Add("/l/x", "/", false)
	f.Add("l/../..//./l/l", "l", true)
	f.Add("/l/../../outside", "../../../outside", false)
	f.Fuzz(func(t *testing.T, path, link string, dir bool) {
		top := t.TempDir()
		inside := filepath.Join(top, "root")
		if err := os.Mkdir(inside, 0o755); err != nil {
			t.Fatal(err)
		}
		if os.Symlink(link, filepath.Join(inside, "l")) != nil {
			t.Skip()
		}
		r, err := openRoot(inside)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(r.fd)
		begin := time.Now()
		if fd, err := r.create(path, dir); err == nil {
			at, err := fdPath(fd)
			unix.Close(fd)
			if err != nil || at != inside && !strings.HasPrefix(at, inside+"/") {
				t.Errorf("%q with l -> %q is %q, %v", path, link, at, err)
			}
		}
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%q with l -> %q took %s", path, link, took)
		}
		left, err := os.ReadDir(top)
		if err != nil || len(left) != 1 {
			t.Errorf("%q with l -> %q made something outside: %v, %v", path, link, left, err)
		}
	})
}
