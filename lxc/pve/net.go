package pve

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Net is a network interface of a container, as the property net0 and its like
// say (pve-container, src/PVE/LXC/Config.pm, $netconf_desc). Of that what is built here is a
// veth at a bridge with fixed addresses, by DHCP or without.
type Net struct {
	Name   string // in the container
	Bridge string
	HWAddr string // empty: not said
	MTU    int    // 0: the bridge's
	Tag    int    // VLAN; 0: none
	// IP4 and IP6 are addresses with their networks; not valid if there is none.
	IP4, IP6 netip.Prefix
	// GW4 and GW6 are default gateways; not valid if there is none.
	GW4, GW6 netip.Addr
	DHCP4    bool
}

var (
	ifName = regexp.MustCompile(`^[-_.A-Za-z0-9]{1,15}$`) // IFNAMSIZ, with its NUL, is 16
	hwAddr = regexp.MustCompile(`^(?i)[a-f0-9][02468ace](:[a-f0-9]{2}){5}$`)
)

// ParseNet reads Proxmox's syntax, "bridge=vmbr0,ip=10.0.0.5/24,gw=10.0.0.1".
// index is that of the property, which an interface without a name is called
// after. Errors: InvalidArgument names the key; NotImplemented, one that is Proxmox's own.
func ParseNet(text string, index int) (Net, error) {
	n := Net{Name: fmt.Sprintf("eth%d", index)}
	seen := map[string]bool{}
	for part := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(part, "=")
		bad := func(why string) error {
			return fmt.Errorf("net%d: %.80q: %s: %w", index, part, why, errdefs.ErrInvalidArgument)
		}
		if !ok || value == "" {
			return Net{}, bad("not of the form key=value")
		}
		if seen[key] {
			return Net{}, bad("it is there twice")
		}
		seen[key] = true
		var why string
		switch key {
		case "type":
			why = unless(value == "veth", "Proxmox knows veth only")
		case "name":
			n.Name = value
			why = unless(ifName.MatchString(value) && value != "lo" && strings.Trim(value, ".") != "", "no name of an interface")
		case "bridge":
			n.Bridge = value
			why = unless(ifName.MatchString(value) && strings.Trim(value, ".") != "", "no name of a bridge")
		case "hwaddr":
			n.HWAddr = strings.ToUpper(value)
			why = unless(hwAddr.MatchString(value), "no MAC address of a single interface")
		case "mtu":
			n.MTU, why = whole(value, 64, 65535)
		case "tag":
			n.Tag, why = whole(value, 1, 4094)
		case "ip":
			switch value {
			case "dhcp":
				n.DHCP4 = true
			case "manual":
			default:
				n.IP4, why = prefix(value, true)
			}
		case "ip6":
			// The kernel configures itself by router advertisements unless it is told not to.
			switch value {
			case "auto", "manual":
			case "dhcp":
				return Net{}, fmt.Errorf("net%d: ip6=dhcp: only auto, manual or an address can be had here: %w", index, errdefs.ErrNotImplemented)
			default:
				n.IP6, why = prefix(value, false)
			}
		case "gw":
			n.GW4, why = gateway(value, true)
		case "gw6":
			n.GW6, why = gateway(value, false)
		case "firewall", "link_down", "host-managed":
			// What is built here is what host-managed=1 means.
			if value != "0" && (key != "host-managed" || value != "1") {
				return Net{}, fmt.Errorf("net%d: %s: Proxmox's own tools would set that up: %w", index, part, errdefs.ErrNotImplemented)
			}
		case "rate", "trunks":
			return Net{}, fmt.Errorf("net%d: %s: Proxmox's own tools would set that up: %w", index, part, errdefs.ErrNotImplemented)
		default:
			why = "Proxmox knows no such key"
		}
		if why != "" {
			return Net{}, bad(why)
		}
	}
	var why string
	switch {
	case n.Bridge == "":
		why = "no bridge"
	case n.GW4.IsValid() && !n.IP4.IsValid():
		why = "a gateway without an address (ip=ADDRESS/BITS)"
	case n.GW6.IsValid() && !n.IP6.IsValid():
		why = "a gateway without an address (ip6=ADDRESS/BITS)"
	}
	if why != "" {
		return Net{}, fmt.Errorf("net%d: %.120q: %s: %w", index, text, why, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

func unless(ok bool, why string) string {
	if ok {
		return ""
	}
	return why
}

func whole(text string, least, most int) (int, string) {
	n, err := strconv.Atoi(text)
	return n, unless(err == nil && n >= least && n <= most && strconv.Itoa(n) == text, fmt.Sprintf("no number from %d to %d", least, most))
}

func prefix(text string, four bool) (netip.Prefix, string) {
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Addr().Is4() != four || p.Addr().Is4In6() {
		return netip.Prefix{}, "no address with its network, as " + map[bool]string{true: "10.0.0.5/24", false: "fd00::5/64"}[four]
	}
	return p, ""
}

func gateway(text string, four bool) (netip.Addr, string) {
	a, err := netip.ParseAddr(text)
	if err != nil || a.Is4() != four || a.Is4In6() || a.Zone() != "" {
		return netip.Addr{}, "no address of a gateway"
	}
	return a, ""
}

// String is the value of the property, in the order in which Proxmox writes it.
func (n Net) String() string {
	parts := []string{"name=" + n.Name, "bridge=" + n.Bridge}
	add := func(key, value string, there bool) {
		if there {
			parts = append(parts, key+"="+value)
		}
	}
	add("gw", n.GW4.String(), n.GW4.IsValid())
	add("gw6", n.GW6.String(), n.GW6.IsValid())
	add("hwaddr", n.HWAddr, n.HWAddr != "")
	add("ip", "dhcp", n.DHCP4)
	add("ip", n.IP4.String(), n.IP4.IsValid())
	add("ip6", n.IP6.String(), n.IP6.IsValid())
	add("mtu", strconv.Itoa(n.MTU), n.MTU != 0)
	add("tag", strconv.Itoa(n.Tag), n.Tag != 0)
	add("type", "veth", true)
	return strings.Join(parts, ",")
}

// HWAddrOf is the address of a container's interface, the same each time, with
// the prefix that Proxmox gives its guests.
func HWAddrOf(namespace, id string, index int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%s/%d", namespace, id, index))
	return strings.ToUpper(net.HardwareAddr(append([]byte{0xbc, 0x24, 0x11}, sum[:3]...)).String())
}
