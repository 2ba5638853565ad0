package pve

import (
	_ "embed"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

//go:embed testdata/admin.conf
var admin string

func TestRead(t *testing.T) {
	c := Parse([]byte(admin))
	if d := cmp.Diff(admin, string(c.Bytes())); d != "" {
		t.Errorf("written is not what was read:\n%s", d)
	}
	for key, want := range map[string]string{"memory": "512", "hostname": "web.example.org", "some_new_key7": "a value nobody here knows", "parent": "before_upgrade"} {
		if got, ok := c.Get(key); !ok || got != want {
			t.Errorf("%s: %q", key, got)
		}
	}
	for _, none := range []string{"description", "snaptime", "lxc", "a line that is nothing"} {
		if v, ok := c.Get(none); ok {
			t.Errorf("%s: %q", none, v)
		}
	}
	if got, want := c.Description(), "Notes of an administrator: keep 100%\nsecond line, ä as ä\n\n"; got != want {
		t.Errorf("description %q", got)
	}
	if got, want := c.LXC(), []Entry{{"lxc.environment.runtime", "PATH=/usr/bin"}, {"lxc.cgroup2.devices.allow", "c 10:200 rwm"}}; !slices.Equal(got, want) {
		t.Errorf("LXC %v", got)
	}
	if got := c.Snapshots(); !slices.Equal(got, []string{"before_upgrade"}) {
		t.Errorf("snapshots %v", got)
	}
}

// TestChange: what is not changed stays to the byte.
func TestChange(t *testing.T) {
	c := Parse([]byte(admin))
	for key, value := range map[string]string{"memory": "2048", "cmode": "shell"} {
		if err := c.Set(key, value); err != nil {
			t.Fatal(err)
		}
	}
	c.Delete("features")
	if err := c.SetLXC([]Entry{{"lxc.signal.halt", "SIGQUIT"}}); err != nil {
		t.Fatal(err)
	}
	want := admin
	for old, now := range map[string]string{
		"hostname: web.example.org\nmemory: 512\n":                                                                   "hostname: web.example.org\nmemory: 2048\n",
		"arch: amd64\ncores: 2\nfeatures: nesting=1\n":                                                               "arch: amd64\ncmode: shell\ncores: 2\n",
		"lxc.environment.runtime: PATH=/usr/bin\nlxc.cgroup2.devices.allow = c 10:200 rwm\na line that is nothing\n": "a line that is nothing\nlxc.signal.halt: SIGQUIT\n",
	} {
		if strings.Count(want, old) != 1 {
			t.Fatalf("%q is not in the conf once", old)
		}
		want = strings.Replace(want, old, now, 1)
	}
	if d := cmp.Diff(want, string(c.Bytes())); d != "" {
		t.Error(d)
	}
}

// TestRefused: what Proxmox would not take, or would take for something else.
func TestRefused(t *testing.T) {
	for _, set := range [][2]string{
		{"memory", "15"}, {"memory", "1e3"}, {"memory", "64\nlock: backup"}, {"memory", " 64"}, {"memory", ""}, {"cores", "0"}, {"cores", "1.5"},
		{"cpulimit", "-1"}, {"cpulimit", "8193"}, {"cpuunits", "500001"}, {"arch", "x86_64"}, {"ostype", "windows"}, {"hostname", "a_b"}, {"hostname", "-a"},
		{"hostname", "a..b"}, {"hostname", strings.Repeat("a", 64)}, {"tags", "a b"}, {"tags", "a;;b"}, {"tags", "Ä"}, {"entrypoint", "sh -c 'x'"},
		{"entrypoint", "a\x1bb"}, {"unprivileged", "yes"}, {"description", "x"}, {"unknown", "x"}, {"lxc.init.cmd", "x"}, {"mpx", "x"}, {"lock", "mine"},
	} {
		c := Parse([]byte("memory: 512\n"))
		if err := c.Set(set[0], set[1]); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), set[0]) {
			t.Errorf("%q: %v", set, err)
		}
		if string(c.Bytes()) != "memory: 512\n" {
			t.Errorf("%q changed the conf to %q", set, c.Bytes())
		}
	}
	for _, e := range []Entry{
		{"lxc.rootfs.path", "/x"}, {"lxc.rootfs.options", "x"}, {"lxc.namespace.share.net", "1"}, {"lxc.no_new_privs", "1"}, {"lxc.proc.oom_score_adj", "1"},
		{"lxc.hook.mount", "/x\nlxc.hook.start: /y"}, {"lxc.hook.mount ", "/x"}, {"memory", "1"},
	} {
		if err := Parse(nil).SetLXC([]Entry{e}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", e, err)
		}
	}
	if err := Parse(nil).SetDescription(strings.Repeat("x", maxDescription+1)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a long description: %v", err)
	}
}

// FuzzConf: any text is kept to the byte, and what is set is read again, changing
// nothing else.
func FuzzConf(f *testing.F) {
	f.Add(admin, "web", "note")
	f.Add("", "a", "")
	f.Add("[x]\nmemory: 1\n", "a.b", "#[x]\nmemory: 1")
	f.Add("hostname: a\nhostname: b", "c", "%41:%\x00é\xff")
	f.Add("#\r\n\r\nlxc.a=b\n\n\n", "c", "\n\n")
	f.Fuzz(func(t *testing.T, text, name, note string) {
		c := Parse([]byte(text))
		if got := strings.TrimSuffix(string(c.Bytes()), "\n"); got != strings.TrimSuffix(text, "\n") {
			t.Fatalf("%q became %q", text, got)
		}
		snapshots, entries := c.Snapshots(), c.LXC()
		if err := c.Set("hostname", name); err != nil {
			name, _ = c.Get("hostname")
		}
		if err := c.SetDescription(note); err != nil {
			t.Skip() // longer than Proxmox takes: refused
		}
		again := Parse(c.Bytes())
		if got, _ := again.Get("hostname"); got != name {
			t.Errorf("hostname %q is read as %q in %q", name, got, c.Bytes())
		}
		if got := again.Description(); strings.TrimSuffix(got, "\n") != strings.TrimSuffix(note, "\n") {
			t.Errorf("description %q is read as %q", note, got)
		}
		if !slices.Equal(snapshots, again.Snapshots()) || !slices.Equal(entries, again.LXC()) {
			t.Errorf("sections %v became %v, LXC %v became %v", snapshots, again.Snapshots(), entries, again.LXC())
		}
	})
}
