package snapshotter

import (
	"testing"

	"github.com/moby/sys/mountinfo"
)

// Which of a filesystem's mounts a tool gets a bind mount of.
func TestWritable(t *testing.T) {
	info := func(at, root, options, super string) *mountinfo.Info {
		return &mountinfo.Info{Mountpoint: at, Root: root, Options: options, VFSOptions: super}
	}
	for _, c := range []struct {
		name string
		all  []*mountinfo.Info
		want string
	}{
		{"none", nil, ""},
		{"one", []*mountinfo.Info{info("/a", "/", "rw,relatime", "rw,xattr")}, "/a"},
		{"a filesystem that is read-only", []*mountinfo.Info{info("/a", "/", "ro", "ro,xattr")}, ""},
		{"a mount that is read-only", []*mountinfo.Info{info("/a", "/", "ro", "rw"), info("/b", "/", "rw", "rw")}, "/b"},
		{"a part of it", []*mountinfo.Info{info("/a", "/etc", "rw", "rw"), info("/b", "/", "rw", "rw")}, "/b"},
		{"owners as on the disk before others", []*mountinfo.Info{info("/a", "/", "rw,idmapped", "rw"), info("/b", "/", "rw,nodev", "rw")}, "/b"},
		{"mapped owners if there are no others", []*mountinfo.Info{info("/a", "/", "rw,idmapped", "rw")}, "/a"},
		{"one that is covered", []*mountinfo.Info{info("/covered", "/", "rw", "rw"), info("/b", "/", "rw", "rw")}, "/b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			if i := writable(c.all, func(i *mountinfo.Info) bool { return i.Mountpoint != "/covered" }); i != nil {
				got = i.Mountpoint
			}
			if got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}
