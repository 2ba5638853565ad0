package task

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// annotationNet asks for interfaces in Proxmox's syntax: io.containerd.pve.net0 and on.
const annotationNet = "io.containerd.pve.net%d"

// maxNets is how many Proxmox takes (pve-container, $MAX_LXC_NETWORKS).
const maxNets = 32

// interfaces is where the kernel shows those of the host.
const interfaces = "/sys/class/net"

// netsOf are the interfaces that a container asks for. Errors: those of
// pve.ParseNet; FailedPrecondition, the bridge is not among those of the host.
func netsOf(spec *specs.Spec, namespace, id, host string) ([]pve.Net, error) {
	var nets []pve.Net
	for i := range maxNets {
		text, there := spec.Annotations[fmt.Sprintf(annotationNet, i)]
		if !there {
			break
		}
		n, err := pve.ParseNet(text, i)
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %w", fmt.Sprintf(annotationNet, i), err)
		}
		if n.DHCP4 {
			return nil, fmt.Errorf("annotation %s: ip=dhcp cannot be had here yet, an address can (ip=ADDRESS/BITS): %w", fmt.Sprintf(annotationNet, i), errdefs.ErrNotImplemented)
		}
		if _, err := os.Stat(filepath.Join(host, n.Bridge)); err != nil {
			return nil, fmt.Errorf("annotation %s: this host has no bridge %s (`ip link show type bridge` lists them): %w", fmt.Sprintf(annotationNet, i), n.Bridge, errdefs.ErrFailedPrecondition)
		}
		if n.HWAddr == "" {
			n.HWAddr = pve.HWAddrOf(namespace, id, i)
		}
		nets = append(nets, n)
	}
	return nets, nil
}

// veths are what LXC makes of them. The host's ends are called as Proxmox calls
// them, by the VMID, or else by the address, which is the container's own too.
func veths(nets []pve.Net, name string) []lxc.Veth {
	var all []lxc.Veth
	for i, n := range nets {
		v := lxc.Veth{Name: n.Name, Host: fmt.Sprintf("veth%si%d", name, i), Bridge: n.Bridge, HWAddr: n.HWAddr, MTU: n.MTU, VLAN: n.Tag, GW4: n.GW4, GW6: n.GW6}
		if name == "" {
			v.Host = "veth" + n.HWAddr[9:11] + n.HWAddr[12:14] + n.HWAddr[15:]
		}
		if n.IP4.IsValid() {
			v.Addresses = append(v.Addresses, n.IP4)
		}
		if n.IP6.IsValid() {
			v.Addresses = append(v.Addresses, n.IP6)
		}
		all = append(all, v)
	}
	return all
}

const resolvConf = "/etc/resolv.conf"

// resolv gives a container with interfaces of its own the host's resolv.conf, as
// it is now, unless its spec has one.
func resolv(spec *specs.Spec, bundle, host string) error {
	if slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == resolvConf }) {
		return nil
	}
	text, err := os.ReadFile(host)
	if err != nil {
		return fmt.Errorf("the host's resolver: %w", err)
	}
	file := filepath.Join(bundle, "resolv.conf")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		return err
	}
	spec.Mounts = append(spec.Mounts, specs.Mount{Type: "bind", Source: file, Destination: resolvConf, Options: []string{"bind", "rw"}})
	return nil
}
