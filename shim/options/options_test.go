package options

import (
	"strings"
	"testing"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
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
		o, err := Parse(a)
		if c.fail != nil {
			if err == nil || !c.fail(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", c.name, err)
			}
		} else if err != nil || !c.want(o) {
			t.Errorf("%s: %+v, %v", c.name, o, err)
		}
	}
}
