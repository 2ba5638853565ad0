package bootstrap

import (
	"bytes"
	"context"
	"testing"

	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"

	"github.com/containerd-pve/containerd-pve/lxc/seccomp"
)

// TestInfo: what -info says about seccomp is what a profile may name, each by
// itself, and the cgroup drivers are both there.
func TestInfoIsTrue(t *testing.T) {
	info, err := manager{}.Info(context.Background(), &bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(info.Features)
	if err != nil {
		t.Fatal(err)
	}
	l := v.(*features.Features).Linux
	profile := func() *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActNotify, ListenerPath: "/x"}
	}
	for _, name := range l.Seccomp.Actions {
		p := profile()
		p.Syscalls = []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.LinuxSeccompAction(name)}}
		if _, err := seccomp.Compile(p); err != nil {
			t.Error(err)
		}
	}
	for _, name := range l.Seccomp.Operators {
		p := profile()
		p.Syscalls = []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Op: specs.LinuxSeccompOperator(name)}}}}
		if _, err := seccomp.Compile(p); err != nil {
			t.Error(err)
		}
	}
	for _, name := range l.Seccomp.Archs {
		p := profile()
		p.Architectures = []specs.Arch{specs.Arch(name)}
		if _, err := seccomp.Compile(p); err != nil {
			t.Error(err)
		}
	}
	for _, name := range l.Seccomp.SupportedFlags {
		p := profile()
		p.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlag(name)}
		if _, err := seccomp.Compile(p); err != nil {
			t.Error(err)
		}
	}
	if got := []int{len(l.Seccomp.Actions), len(l.Seccomp.Operators), len(l.Seccomp.SupportedFlags), len(l.Capabilities), len(l.MemoryPolicy.Modes), len(l.MemoryPolicy.Flags)}; got[0] != 9 || got[1] != 7 || got[2] != 4 || got[3] != 41 || got[4] != 7 || got[5] != 3 {
		t.Errorf("numbers of actions, operators, flags, capabilities, memory policies and their flags: %v", got)
	}
	if c := l.Cgroup; *c.V1 || !*c.V2 || !*c.Systemd || *c.SystemdUser || !*c.Rdma {
		t.Errorf("cgroup %+v", c)
	}
	if *l.IntelRdt.Enabled || !*l.Apparmor.Enabled || !*l.Selinux.Enabled {
		t.Error("intelRdt, apparmor or selinux")
	}
}
