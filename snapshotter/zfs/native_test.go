package zfs

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

func TestCheckVersion(t *testing.T) {
	for version, ok := range map[string]bool{
		"2.3.9-1": true, "2.0.0": true, "2.4.4-pve1": true, "0.8.6-1": false, "2.5.0": false, "3.0.0": false, "": false, "2.3": false, "2.10.1": false,
	} {
		if err := checkVersion(version); (err == nil) != ok || err != nil && !errdefs.IsNotImplemented(err) {
			t.Errorf("%q: %v", version, err)
		}
	}
}

func TestClonesAtOnce(t *testing.T) {
	for version, want := range map[string]bool{"2.0.7": false, "2.3.9-0+deb13u1": false, "2.4.0": true, "2.4.4-pve1": true} {
		if got := clonesAtOnce(version); got != want {
			t.Errorf("%s: %v", version, got)
		}
	}
}

// TestChoose: a module that was not tried is not used natively, and the log says so.
func TestChoose(t *testing.T) {
	unknown := func() (*Native, error) { return nil, checkVersion("9.9.1") }
	none := func() (*Native, error) { return nil, errdefs.ErrUnavailable }
	known := func() (*Native, error) { return &Native{}, nil }
	for _, tt := range []struct {
		way    string
		native func() (*Native, error)
		want   string
		why    string
		is     func(error) bool
	}{
		{Auto, known, "*zfs.Native", "", nil},
		{Auto, unknown, "zfs.goZFS", `ABI of ZFS module "9.9.1" is not known`, nil},
		{Auto, none, "", "", errdefs.IsUnavailable},
		{NativeOnly, unknown, "", "", errdefs.IsNotImplemented},
		{GoZFS, known, "zfs.goZFS", "", nil},
		{"libzfs", known, "", "", errdefs.IsInvalidArgument},
	} {
		z, unknown, err := choose(tt.way, tt.native)
		if tt.is != nil {
			if !tt.is(err) {
				t.Errorf("%s: %v", tt.way, err)
			}
			continue
		}
		if got := fmt.Sprintf("%T", z); err != nil || got != tt.want {
			t.Errorf("%s: %s, %v", tt.way, got, err)
		}
		if tt.why == "" && unknown != nil || tt.why != "" && !strings.Contains(fmt.Sprint(unknown), tt.why) {
			t.Errorf("%s: because of %v", tt.way, unknown)
		}
	}
}

func TestProperties(t *testing.T) {
	got, err := properties(Properties{"readonly": "on", "refquota": "10", "quota": "none", "mountpoint": "legacy", "a:b": "on", "acltype": "posixacl"})
	want := nvlist.List{"readonly": uint64(1), "refquota": uint64(10), "quota": uint64(0), "mountpoint": "legacy", "a:b": "on", "acltype": uint64(1)}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, p := range []Properties{{"readonly": "yes"}, {"refquota": "1G"}, {"nothing": "x"}, {"refquota": "-1"}} {
		if got, err := properties(p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v, %v", p, got, err)
		}
	}
}

func TestErrorKinds(t *testing.T) {
	for errno, is := range map[unix.Errno]func(error) bool{
		unix.EEXIST: errdefs.IsAlreadyExists, unix.EBUSY: errdefs.IsFailedPrecondition, unix.ENOSPC: errdefs.IsResourceExhausted,
		unix.EDQUOT: errdefs.IsResourceExhausted, unix.EROFS: errdefs.IsFailedPrecondition, unix.EAGAIN: errdefs.IsUnavailable,
		unix.EINVAL: errdefs.IsInvalidArgument, unix.ENOTTY: errdefs.IsNotImplemented, cmdUnavailable: errdefs.IsNotImplemented,
		argBadType: errdefs.IsNotImplemented, wrongParent: errdefs.IsInvalidArgument, unix.EIO: errdefs.IsUnknown,
	} {
		err := failure("x", "tank/a", errno)
		if !is(err) || !errors.Is(err, errno) {
			t.Errorf("%d: %v", int(errno), err)
		}
	}
	if err := dependents("destroy", "tank/a@b", unix.EEXIST); ReasonOf(err) != HasDependents || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
}
