package options

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"

	"github.com/containerd-pve/containerd-pve/lxc"
)

func TestParse(t *testing.T) {
	body := func(s string) *runtimeoptions.Options { return &runtimeoptions.Options{ConfigBody: []byte(s)} }
	for _, c := range []struct {
		name string
		in   any
		want func(Options) bool
		fail func(error) bool
		says string
	}{
		{name: "nil", in: nil, want: func(o Options) bool { return o == Options{} }},
		{name: "runc's", in: &runcoptions.Options{IoUid: 5, IoGid: 6}, want: func(o Options) bool { return o.IOUID == 5 && o.IOGID == 6 }},
		{name: "runc's binary", in: &runcoptions.Options{BinaryName: "crun"}, fail: errdefs.IsInvalidArgument, says: "binary_name"},
		{name: "systemd by runc's", in: &runcoptions.Options{SystemdCgroup: true}, want: func(o Options) bool { return o == Options{SystemdCgroup: true} }},
		{name: "empty body", in: body(""), want: func(o Options) bool { return o == Options{} }},
		{name: "body", in: body("LXCPath = '/p'\nInit = '/i'"), want: func(o Options) bool { return o.LXC.Path == "/p" && o.LXC.Init == "/i" }},
		{name: "systemd off", in: body("SystemdCgroup = false"), want: func(o Options) bool { return o == Options{} }},
		{name: "systemd on", in: body("SystemdCgroup = true"), want: func(o Options) bool { return o == Options{SystemdCgroup: true} }},
		{name: "idmap", in: body("IdmapPassthrough = true"), want: func(o Options) bool { return o == Options{IdmapPassthrough: true} }},
		{name: "a policy", in: body("Register = 'best-effort'"), want: func(o Options) bool { return o.Register == BestEffort }},
		{name: "no policy", in: body("Register = 'maybe'"), fail: errdefs.IsInvalidArgument, says: "maybe"},
		{name: "unknown key", in: body("Foo = 1"), fail: errdefs.IsInvalidArgument, says: "Foo"},
		{name: "no TOML", in: body("= ="), fail: errdefs.IsInvalidArgument},
		{name: "missing file", in: &runtimeoptions.Options{ConfigPath: "/no/such/file"}, fail: errdefs.IsInvalidArgument, says: "/no/such/file"},
	} {
		var a typeurl.Any
		if c.in != nil {
			var err error
			if a, err = typeurl.MarshalAny(c.in); err != nil {
				t.Fatal(err)
			}
		}
		o, err := Parse(a, filepath.Join(t.TempDir(), "none"))
		if c.fail != nil {
			if err == nil || !c.fail(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", c.name, err)
			}
		} else if err != nil || !c.want(o) {
			t.Errorf("%s: %+v, %v", c.name, o, err)
		}
	}
}

// TestDefaults: what a client says goes before the file, and the rest is the file's.
func TestDefaults(t *testing.T) {
	name := filepath.Join(t.TempDir(), "runtime.toml")
	if err := os.WriteFile(name, []byte("SystemdCgroup = true\nRegister = 'off'\nLXCPath = '/p'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		in   any
		want Options
	}{
		{nil, Options{SystemdCgroup: true, Register: Off, LXC: lxc.Config{Path: "/p"}}},
		{&runcoptions.Options{IoUid: 5}, Options{SystemdCgroup: true, Register: Off, LXC: lxc.Config{Path: "/p"}, IOUID: 5}},
		{
			&runtimeoptions.Options{ConfigBody: []byte("SystemdCgroup = false\nRegister = 'required'")},
			Options{Register: Required, LXC: lxc.Config{Path: "/p"}},
		},
	} {
		var a typeurl.Any
		if c.in != nil {
			var err error
			if a, err = typeurl.MarshalAny(c.in); err != nil {
				t.Fatal(err)
			}
		}
		if o, err := Parse(a, name); err != nil || o != c.want {
			t.Errorf("%d: %+v, %v", i, o, err)
		}
	}
	if err := os.WriteFile(name, []byte("Foo = 1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(nil, name); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
		t.Errorf("a bad file: %v", err)
	}
}
