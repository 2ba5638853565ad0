package lxc

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestPodCheck: what would be the host's is refused.
func TestPodCheck(t *testing.T) {
	for name, c := range map[string]struct {
		o    PodOptions
		kind func(error) bool
	}{
		"nothing":                 {PodOptions{}, nil},
		"sysctl":                  {PodOptions{Network: "/n", Sysctl: map[string]string{"net.core.somaxconn": "1", "kernel.shmmni": "1"}}, nil},
		"sysctl of the host's":    {PodOptions{Sysctl: map[string]string{"net.core.somaxconn": "1"}}, errdefs.IsInvalidArgument},
		"sysctl of the host's ip": {PodOptions{HostIPC: true, Sysctl: map[string]string{"kernel.shmmni": "1"}}, errdefs.IsInvalidArgument},
		"sysctl of no namespace":  {PodOptions{Network: "/n", Sysctl: map[string]string{"kernel.panic": "1"}}, errdefs.IsInvalidArgument},
		"a long name":             {PodOptions{Hostname: strings.Repeat("h", 65)}, errdefs.IsInvalidArgument},
		"users of the host's net": {PodOptions{OfNetwork: true}, errdefs.IsNotImplemented},
	} {
		err := c.o.check()
		if c.kind == nil && err != nil || c.kind != nil && !c.kind(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if f := (&PodOptions{}).flags(); f != unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS {
		t.Errorf("flags %#x", f)
	}
	if f := (&PodOptions{HostPID: true, HostIPC: true, HostUTS: true}).flags(); f != unix.CLONE_NEWNS {
		t.Errorf("the host's: flags %#x", f)
	}
}
