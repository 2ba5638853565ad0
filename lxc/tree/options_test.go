package tree

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestParseOptions(t *testing.T) {
	const ro, nosuid, nodev, noexec = unix.MOUNT_ATTR_RDONLY, unix.MOUNT_ATTR_NOSUID, unix.MOUNT_ATTR_NODEV, unix.MOUNT_ATTR_NOEXEC
	for _, c := range []struct {
		kind    string
		options string
		want    Options
	}{
		{"tmpfs", "nosuid strictatime mode=755 size=65536k", Options{
			attrs: attrs{set: nosuid, hasAtime: true, atime: unix.MOUNT_ATTR_STRICTATIME}, Data: []string{"mode=755", "size=65536k"}}},
		{"bind", "rbind ro nodev noexec rprivate", Options{
			Bind: true, Recursive: true, attrs: attrs{set: ro | nodev | noexec}, Propagation: []Propagation{{unix.MS_PRIVATE, true}}}},
		{"bind", "", Options{Bind: true}},
		{"none", "bind ro rw shared", Options{Bind: true, attrs: attrs{clear: ro}, Propagation: []Propagation{{flag: unix.MS_SHARED}}}},
		{"bind", "rro rnosuid rslave", Options{Bind: true, below: attrs{set: ro | nosuid}, Propagation: []Propagation{{unix.MS_SLAVE, true}}}},
		{"tmpfs", "rw noatime atime", Options{attrs: attrs{clear: ro}}},
		{"tmpfs", "noatime relatime", Options{attrs: attrs{hasAtime: true}}},
		{"tmpfs", "sync defaults tmpcopyup", Options{super: []string{"sync"}, CopyUp: true}},
		{"bind", "idmap", Options{Bind: true, IDMap: true}},
		{"tmpfs", "remount", Options{Remount: true}},
		{"bind", "rbind ridmap", Options{Bind: true, Recursive: true, IDMap: true, IDMapBelow: true}},
		// Not mistaken for a recursive variant of something.
		{"x", "resize=1 runbindable", Options{Data: []string{"resize=1"}, Propagation: []Propagation{{unix.MS_UNBINDABLE, true}}}},
	} {
		if got := Parse(&specs.Mount{Type: c.kind, Options: strings.Fields(c.options)}); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s %s:\n got %+v\nwant %+v", c.kind, c.options, got, c.want)
		}
	}
}

func TestMountAttr(t *testing.T) {
	a := attrs{set: unix.MOUNT_ATTR_RDONLY, clear: unix.MOUNT_ATTR_NODEV, atime: unix.MOUNT_ATTR_NOATIME, hasAtime: true}
	want := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOATIME, Attr_clr: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR__ATIME}
	if got := a.mountAttr(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestShared(t *testing.T) {
	for options, want := range map[string][2]bool{
		"": {}, "shared": {true, false}, "rbind rshared": {true, true}, "rshared rslave": {}, "rprivate shared": {true, false},
	} {
		o := Parse(&specs.Mount{Type: "bind", Options: strings.Fields(options)})
		if shared, below := o.Shared(); shared != want[0] || below != want[1] {
			t.Errorf("%s: %v %v", options, shared, below)
		}
	}
}

func TestMappedMountAsksForItsMapping(t *testing.T) {
	o := Parse(&specs.Mount{Type: "bind", UIDMappings: []specs.LinuxIDMapping{{Size: 1}}})
	if !o.IDMap || o.IDMapBelow {
		t.Errorf("%+v", o)
	}
}

// TestKnown compares with the list of the runtime spec 1.3 (config.md, "Linux mount options").
func TestKnown(t *testing.T) {
	known := Known()
	for _, option := range strings.Fields(`async atime bind defaults dev diratime dirsync exec iversion lazytime loud mand
		noatime nodev nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow private
		ratime rbind rdev rdiratime relatime remount rexec rnoatime rnodev rnodiratime rnoexec rnorelatime rnostrictatime
		rnosuid rnosymfollow ro rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw
		shared silent slave strictatime suid symfollow sync tmpcopyup unbindable idmap ridmap`) {
		if !slices.Contains(known, option) {
			t.Errorf("%s is not known", option)
		}
	}
}

// FuzzParse: every option is taken once: as one the spec knows or as the file system's.
func FuzzParse(f *testing.F) {
	f.Add("rbind ro rslave mode=755")
	f.Add("idmap remount tmpcopyup r rr rro shared")
	known := Known()
	f.Fuzz(func(t *testing.T, text string) {
		options := strings.Fields(text)
		o := Parse(&specs.Mount{Type: "tmpfs", Options: options})
		var data []string
		for _, option := range options {
			if !slices.Contains(known, option) {
				data = append(data, option)
			}
		}
		if !slices.Equal(o.Data, data) {
			t.Errorf("%q: the file system gets %q, want %q", options, o.Data, data)
		}
	})
}
