package task

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/shim/dhcp"
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

// dhcp gets the addresses of those interfaces that are to have one so, before the
// entrypoint runs, and has the container ask the name servers that come with it.
func (t *taskState) dhcp(ctx context.Context, nets []pve.Net, pid int) error {
	for _, n := range nets {
		if !n.DHCP4 {
			continue
		}
		c, err := dhcp.Start(ctx, fmt.Sprintf("/proc/%d/ns/net", pid), n.Name)
		if err != nil {
			return err
		}
		t.leases = append(t.leases, c)
		var text strings.Builder
		if d := c.Domain(); d != "" && !strings.ContainsFunc(d, unicode.IsControl) {
			fmt.Fprintf(&text, "search %s\n", d)
		}
		for _, s := range c.Nameservers() {
			fmt.Fprintf(&text, "nameserver %s\n", s)
		}
		file := filepath.Join(t.bundle, resolvFile)
		if _, err := os.Stat(file); err != nil || len(c.Nameservers()) == 0 {
			continue // the spec has one of its own, or the server told none
		}
		// The same file: it is mounted.
		if err := os.WriteFile(file, []byte(text.String()), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// endLeases lets the network namespace go.
func (t *taskState) endLeases() {
	for _, c := range t.leases {
		c.Close()
	}
	t.leases = nil
}

const (
	resolvConf = "/etc/resolv.conf"
	resolvFile = "resolv.conf" // in the bundle
)

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
	file := filepath.Join(bundle, resolvFile)
	if err := os.WriteFile(file, text, 0o644); err != nil {
		return err
	}
	spec.Mounts = append(spec.Mounts, specs.Mount{Type: "bind", Source: file, Destination: resolvConf, Options: []string{"bind", "rw"}})
	return nil
}
