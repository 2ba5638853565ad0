package lxc

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// configKeys are all the keys a configuration of ours may hold.
var configKeys = map[string]bool{
	"lxc.rootfs.path": true, "lxc.autodev": true, "lxc.console.path": true, "lxc.tty.max": true, "lxc.pty.max": true,
	"lxc.apparmor.profile": true, "lxc.signal.halt": true, "lxc.hook.mount": true, "lxc.hook.post-stop": true, "lxc.init.cmd": true,
	"lxc.namespace.clone": true, "lxc.namespace.share.pid": true, "lxc.namespace.share.net": true,
	"lxc.namespace.share.ipc": true, "lxc.namespace.share.uts": true, "lxc.namespace.share.cgroup": true,
	"lxc.namespace.share.user": true, "lxc.namespace.share.time": true,
	"lxc.net.0.type": true, "lxc.net.0.flags": true, "lxc.uts.name": true, "lxc.cgroup.dir.container": true, "lxc.cgroup.dir.monitor": true,
	"lxc.cgroup.dir.monitor.pivot": true, "lxc.idmap": true, "lxc.environment": true, "lxc.time.offset.boot": true, "lxc.time.offset.monotonic": true,
}

// repeated are the keys of which each line counts.
var repeated = map[string]bool{"lxc.idmap": true}

// parseConfig reads a configuration as liblxc does (confile.c, parse_line): one
// pair of quotes around a value is taken away.
func parseConfig(t *testing.T, config string) map[string]string {
	t.Helper()
	got := map[string]string{}
	for line := range strings.SplitSeq(strings.TrimSuffix(config, "\n"), "\n") {
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || !configKeys[key] {
			t.Fatalf("a line that nobody meant: %q in\n%s", line, config)
		}
		if _, twice := got[key]; twice && !repeated[key] {
			t.Fatalf("%s is there twice in\n%s", key, config)
		}
		if strings.ContainsFunc(value, unicode.IsControl) || value == "" {
			t.Fatalf("%s has the value %q", key, value)
		}
		if n := len(value); n > 1 && (value[0] == '\'' || value[0] == '"') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		got[key] = value
	}
	return got
}

// FuzzTranslate: whatever a spec holds, the configuration is made of lines that
// we meant, with the spec's own values in them, and pve-init reads the plans
// that were written.
func FuzzTranslate(f *testing.F) {
	seed := func(change func(*specs.Spec)) {
		s := minimal()
		if change != nil {
			change(s)
		}
		data, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	seed(nil)
	for _, text := range []string{"a\nlxc.hook.start = /x", "'a'", `"a"`, " a", "a\r", "a\x00b", "#a", "a = b", "\u2028", "a\x7f", "ä"} {
		seed(func(s *specs.Spec) { s.Hostname = text })
		seed(func(s *specs.Spec) { s.Domainname = text })
		seed(func(s *specs.Spec) { s.Linux.CgroupsPath = text })
		seed(func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/" + text })
		seed(func(s *specs.Spec) { s.Process.Args, s.Process.Env = []string{text}, []string{text} })
		seed(func(s *specs.Spec) { s.Process.Cwd = "/" + text })
		seed(func(s *specs.Spec) { s.Annotations = map[string]string{text: text} })
		seed(func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net." + text: text} })
		seed(func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Type: text, Source: text, Destination: text, Options: []string{text, "bind"}}}
		})
	}
	seed(func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/x"}}}
		s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 3}}
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = []string{"/proc/kcore"}, []string{"/proc/sys"}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}}
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 1}}
	})
	f.Fuzz(func(t *testing.T, data []byte) {
		var spec specs.Spec
		if json.Unmarshal(data, &spec) != nil {
			t.Skip()
		}
		o := CreateOptions{Namespace: "default", ID: "x", Bundle: "/b", Rootfs: "/b/rootfs", Spec: &spec}
		tr, err := translate(o, "default--x")
		if err != nil {
			return
		}
		config := parseConfig(t, tr.config)
		inherited := ""
		if tr.cgroupNS != "" {
			inherited = " 6"
		}
		for key, want := range map[string]string{
			"lxc.rootfs.path": "dir:/b/rootfs", "lxc.init.cmd": "/proc/self/fd/4 init 3" + inherited,
			"lxc.hook.mount": "/proc/self/fd/4 mount 5" + inherited + " #", "lxc.apparmor.profile": "unconfined",
			"lxc.cgroup.dir.monitor": "containerd-pve/monitor/default--x", "lxc.cgroup.dir.container": tr.cgroup[1:] + "/payload",
		} {
			if config[key] != want {
				t.Errorf("%s is %q, want %q", key, config[key], want)
			}
		}
		if env, ok := config["lxc.environment"]; ok && env != quietInit {
			t.Errorf("environment %q", env)
		}
		if name, ok := config["lxc.uts.name"]; ok && name != spec.Hostname {
			t.Errorf("hostname %q became %q", spec.Hostname, name)
		}
		for _, ns := range spec.Linux.Namespaces {
			if got, ok := config["lxc.namespace.share."+namespaceKeys[ns.Type]]; ok && ns.Path != "" && got != ns.Path {
				t.Errorf("the path %q of the %s namespace became %q", ns.Path, ns.Type, got)
			}
		}
		if c := filepath.Clean(tr.cgroup); c != tr.cgroup || c == "/" || strings.HasPrefix(c, "/..") {
			t.Errorf("cgroup %q", tr.cgroup)
		}
		roundTrip(t, tr.mounts, &plan.Mounts{})
		roundTrip(t, tr.process, &plan.Process{})
	})
}

// roundTrip checks that reading what was written and writing it again is the same.
func roundTrip(t *testing.T, v, into any) {
	t.Helper()
	first, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.ContainsAny(first, "\n") {
		t.Fatal("a message of more than one line")
	}
	if err := json.Unmarshal(first, into); err != nil {
		t.Fatal(err)
	}
	second, err := json.Marshal(into)
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("%s\nbecame\n%s (%v)", first, second, err)
	}
}

// FuzzExecPlan: the process of an exec comes from a client as it likes.
func FuzzExecPlan(f *testing.F) {
	f.Add([]byte(`{"args":["x"],"cwd":"/","user":{"uid":1,"umask":18},"rlimits":[{"type":"x"}]}`))
	f.Add([]byte(`{"args":["x\u0000"]}`))
	f.Add([]byte(`{"args":[""],"consoleSize":{"height":99999999,"width":1},"oomScoreAdj":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var p specs.Process
		if json.Unmarshal(data, &p) != nil {
			t.Skip()
		}
		out, err := processPlan(&p, minimal())
		if err != nil {
			return
		}
		if len(out.Args) == 0 || !filepath.IsAbs(out.Cwd) || strings.Contains(strings.Join(out.Args, "")+strings.Join(out.Env, ""), "\x00") {
			t.Errorf("%+v", out)
		}
		roundTrip(t, out, &plan.Process{})
	})
}

// FuzzSysctl: a key that is let through leads to the container's own part of /proc/sys.
func FuzzSysctl(f *testing.F) {
	for _, key := range []string{"net.ipv4.ip_forward", "net/ipv4/conf/eth0.1/x", "kernel.sem", "kernel/shmmax", "fs.mqueue.msg_max", "net.a/../b", "net/../kernel/panic", "kernel.domainname", "net", "net."} {
		f.Add(key)
	}
	all := map[specs.LinuxNamespaceType]bool{specs.IPCNamespace: true, specs.NetworkNamespace: true, specs.UTSNamespace: true}
	f.Fuzz(func(t *testing.T, key string) {
		if checkSysctl(map[string]string{key: "1"}, all) != nil {
			return
		}
		// As pve-init makes a path of it: the first separator is the separator.
		path := key
		if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '.' {
			path = strings.NewReplacer(".", "/", "/", ".").Replace(key)
		}
		clean := filepath.Clean("/" + path)
		for _, ok := range []string{"/net", "/fs/mqueue", "/kernel/msg", "/kernel/sem", "/kernel/shm", "/kernel/domainname", "/kernel.", "/fs.", "/net."} {
			if strings.HasPrefix(clean, ok) {
				return
			}
		}
		t.Errorf("%q is let through and leads to %s", key, clean)
	})
}

// FuzzMonitorRecords: whatever comes out of the FIFO, the reader ends with it and
// gives the first exit status, if there is one.
func FuzzMonitorRecords(f *testing.F) {
	record := func(kind, value uint32) []byte {
		var r [recordSize]byte
		binary.NativeEndian.PutUint32(r[:4], kind)
		binary.NativeEndian.PutUint32(r[recordSize-4:], value)
		return r[:]
	}
	f.Add(record(recordExitCode, 0x0700))
	f.Add(append(record(0, 3), record(recordExitCode, 9)...))
	f.Add(append(record(recordEnd, 0), record(recordExitCode, 9)...))
	f.Add(append(record(recordExitCode, 1), record(recordExitCode, 2)[:100]...))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		m := &monitor{fifo: r, status: make(chan syscall.WaitStatus, 1)}
		go m.read()
		go func() {
			_, _ = w.Write(data)
			w.Close()
		}()
		var want *syscall.WaitStatus
		for at := 0; at+recordSize <= len(data) && want == nil; at += recordSize {
			kind := binary.NativeEndian.Uint32(data[at:])
			if kind == recordExitCode {
				ws := syscall.WaitStatus(binary.NativeEndian.Uint32(data[at+recordSize-4:]))
				want = &ws
			} else if kind == recordEnd {
				break
			}
		}
		select {
		case got, ok := <-m.status:
			if ok != (want != nil) || ok && got != *want {
				t.Errorf("status %v, %v", got, ok)
			}
			if ok {
				_ = exitOf(got)
			}
		case <-time.After(10 * time.Second):
			t.Error("the reader hangs")
		}
	})
}

// FuzzState: a bundle's files may be cut or overwritten; what cannot be read is
// an error or unknown, never another container's.
func FuzzState(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "lxc")
	if err := os.Mkdir(dir, 0o700); err != nil {
		f.Fatal(err)
	}
	for _, text := range []string{"", "{", `{"namespace":"a","id":"b","name":"a--b","lxcPath":"/x","cgroup":"/c"}`, `{"code":3,"at":"2026-01-02T03:04:05Z"}`, `{"code":-1}`, "null", `[]`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, name := range []string{stateFile, exitFile} {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		bundle := filepath.Dir(dir)
		if st, err := readState(bundle); err == nil {
			if st.Name != st.Namespace+"--"+st.ID || strings.HasPrefix(filepath.Clean(st.Cgroup), "/..") || filepath.Join("/sys/fs/cgroup", st.Cgroup) == "/sys/fs/cgroup" || st.LXCPath == "" {
				t.Errorf("taken for a state: %+v", st)
			}
		}
		readExit(bundle)
	})
}
