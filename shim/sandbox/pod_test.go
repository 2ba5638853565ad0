package sandbox

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd-pve/containerd-pve/lxc"
)

func TestPodOptions(t *testing.T) {
	users := &cri.UserNamespace{Mode: cri.NamespaceMode_POD}
	config := func(parent string, ns *cri.NamespaceOption, sysctl map[string]string) *cri.PodSandboxConfig {
		return &cri.PodSandboxConfig{Hostname: "h", Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: parent, Sysctls: sysctl, SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: ns},
		}}
	}
	base := lxc.PodOptions{Namespace: "k8s.io", ID: "p", Bundle: "/b", Network: "/n", Hostname: "h", OOMScoreAdj: -998}
	with := func(change func(*lxc.PodOptions)) lxc.PodOptions {
		o := base
		o.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}
		change(&o)
		return o
	}
	for name, c := range map[string]struct {
		network string
		config  *cri.PodSandboxConfig
		want    lxc.PodOptions
		kind    func(error) bool
	}{
		"nothing said": {"/n", &cri.PodSandboxConfig{Hostname: "h"}, with(func(*lxc.PodOptions) {}), nil},
		"cgroupfs":     {"/n", config("/kubepods/pod1", nil, nil), with(func(o *lxc.PodOptions) { o.CgroupsPath = "/kubepods/pod1/p" }), nil},
		"systemd": {"/n", config("/kubepods.slice/kubepods-pod1.slice", nil, nil), with(func(o *lxc.PodOptions) {
			o.CgroupsPath, o.SystemdCgroup = "kubepods-pod1.slice:cri-containerd:p", true
		}), nil},
		"sysctls": {"/n", config("", nil, map[string]string{"net.ipv4.ip_unprivileged_port_start": "1024", "kernel.shmmni": "9"}), with(func(o *lxc.PodOptions) {
			o.Sysctl["net.ipv4.ip_unprivileged_port_start"], o.Sysctl["kernel.shmmni"] = "1024", "9"
		}), nil},
		"the host's": {"", config("", &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE}, nil), with(func(o *lxc.PodOptions) {
			o.Sysctl, o.Network, o.HostPID, o.HostIPC, o.HostUTS = nil, "", true, true, true
		}), nil},
		"users": {"/n", config("", &cri.NamespaceOption{UsernsOptions: users}, nil), with(func(o *lxc.PodOptions) {
			o.OfNetwork = true
			delete(o.Sysctl, "net.ipv4.ping_group_range")
		}), nil},
		"the host's users": {"/n", config("", &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_NODE}}, nil), with(func(*lxc.PodOptions) {}), nil},
		"no network":       {"", config("", nil, nil), lxc.PodOptions{}, errdefs.IsInvalidArgument},
		"users of nobody":  {"/n", config("", &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_TARGET}}, nil), lxc.PodOptions{}, errdefs.IsInvalidArgument},
	} {
		got, err := podOptions("k8s.io", "p", "/b", c.network, c.config)
		if c.kind != nil {
			if !c.kind(err) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if diff := cmp.Diff(c.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
}
