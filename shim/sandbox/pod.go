package sandbox

import (
	"fmt"
	"maps"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd-pve/containerd-pve/lxc"
)

const (
	// oomScoreAdj is what containerd gives a pause container.
	oomScoreAdj = -998
	// scopePrefix is what CRI's containers have in systemd.
	scopePrefix = "cri-containerd"
)

// podOptions translates CRI's words. A pod is what containerd's own sandboxer makes of the same request, sysctls that it adds by
// itself included.
func podOptions(namespace, id, bundle, network string, config *cri.PodSandboxConfig) (lxc.PodOptions, error) {
	context := config.GetLinux().GetSecurityContext()
	ns := context.GetNamespaceOptions()
	node := func(m cri.NamespaceMode) bool { return m == cri.NamespaceMode_NODE }
	o := lxc.PodOptions{
		Namespace: namespace, ID: id, Bundle: bundle, Network: network, Hostname: config.GetHostname(), OOMScoreAdj: oomScoreAdj,
		HostPID: node(ns.GetPid()), HostIPC: node(ns.GetIpc()), HostUTS: node(ns.GetNetwork()),
		Sysctl: maps.Clone(config.GetLinux().GetSysctls()),
	}
	if node(ns.GetNetwork()) {
		o.Network = ""
	} else if network == "" {
		return o, fmt.Errorf("a pod with a network of its own comes without its namespace: %w", errdefs.ErrInvalidArgument)
	}
	switch users := ns.GetUsernsOptions(); {
	case users == nil || node(users.GetMode()):
	case users.GetMode() == cri.NamespaceMode_POD:
		// containerd makes the network namespace in a user namespace with the pod's mapping.
		o.OfNetwork = true
	default:
		return o, fmt.Errorf("mode %s of a user namespace: %w", users.GetMode(), errdefs.ErrInvalidArgument)
	}
	if !node(ns.GetNetwork()) {
		if o.Sysctl == nil {
			o.Sysctl = map[string]string{}
		}
		add := map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
		if !o.OfNetwork {
			add["net.ipv4.ping_group_range"] = "0 2147483647"
		}
		for key, value := range add {
			if _, there := o.Sysctl[key]; !there {
				o.Sysctl[key] = value
			}
		}
	}
	if parent := config.GetLinux().GetCgroupParent(); strings.HasSuffix(parent, ".slice") {
		o.CgroupsPath, o.SystemdCgroup = strings.Join([]string{filepath.Base(parent), scopePrefix, id}, ":"), true
	} else if parent != "" {
		o.CgroupsPath = filepath.Join("/", parent, id)
	}
	return o, nil
}

// resolvConf is resolv.conf(5) as the pod asks for it.
func resolvConf(dns *cri.DNSConfig) string {
	var b strings.Builder
	if list := dns.GetSearches(); len(list) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(list, " "))
	}
	for _, server := range dns.GetServers() {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if list := dns.GetOptions(); len(list) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(list, " "))
	}
	return b.String()
}
