package lxc

import (
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// moveNetDevices gives network devices of the host to the network namespace of a
// process, with their global addresses, and sets them up. Where they go in the
// end is the kernel's: physical ones come back, others end with the namespace.
func moveNetDevices(pid int, devices map[string]specs.LinuxNetDevice) error {
	if len(devices) == 0 {
		return nil
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return fmt.Errorf("linux.netDevices: %w", err)
	}
	defer f.Close()
	inside, err := netlink.NewHandleAt(netns.NsHandle(f.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("linux.netDevices: %w", err)
	}
	defer inside.Close()
	for _, name := range slices.Sorted(maps.Keys(devices)) {
		if err := moveNetDevice(inside, int(f.Fd()), name, devices[name].Name); err != nil {
			return fmt.Errorf("linux.netDevices %q: %w", name, err)
		}
	}
	return nil
}

func moveNetDevice(inside *netlink.Handle, ns int, name, newName string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	before, err := inside.LinkList()
	if err != nil {
		return err
	}
	if newName == "" {
		newName = name
	}
	// The kernel moves first and finds out then that the name is taken.
	if slices.ContainsFunc(before, func(l netlink.Link) bool { return l.Attrs().Name == newName }) {
		return fmt.Errorf("the container has a %s already: %w", newName, errdefs.ErrInvalidArgument)
	}
	request := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index = int32(link.Attrs().Index)
	request.AddData(message)
	request.AddData(nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(ns))))
	request.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(newName)))
	if _, err := request.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("move into the container as %s: %w: %w", newName, err, errdefs.ErrInvalidArgument)
	}
	// The kernel chooses the name of a template.
	links, err := inside.LinkList()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(links, func(l netlink.Link) bool {
		return !slices.ContainsFunc(before, func(old netlink.Link) bool { return old.Attrs().Index == l.Attrs().Index })
	})
	if i < 0 {
		return fmt.Errorf("it is not in the container after the move: %w", errdefs.ErrInternal)
	}
	link = links[i]
	for _, a := range addresses {
		if a.Scope != unix.RT_SCOPE_UNIVERSE || a.Flags&unix.IFA_F_PERMANENT == 0 {
			continue
		}
		kept := &netlink.Addr{IPNet: a.IPNet, Broadcast: a.Broadcast, Peer: a.Peer, Flags: a.Flags &^ unix.IFA_F_PERMANENT}
		if err := inside.AddrReplace(link, kept); err != nil {
			return fmt.Errorf("address %s: %w", a.IPNet, err)
		}
	}
	if err := inside.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

// maxNetDeviceName is the kernel's, without the NUL.
const maxNetDeviceName = unix.IFNAMSIZ - 1

// checkNetDevices refuses names that no network device can have.
func checkNetDevices(devices map[string]specs.LinuxNetDevice, hasNetwork bool) error {
	if len(devices) > 0 && !hasNetwork {
		return fmt.Errorf("linux.netDevices: they need a network namespace: %w", errdefs.ErrInvalidArgument)
	}
	for name, d := range devices {
		for _, n := range []string{name, d.Name} {
			if len(n) > maxNetDeviceName || n == "." || n == ".." || slices.ContainsFunc([]byte(n), func(c byte) bool { return c <= ' ' || c == '/' || c == ':' || c == 0x7f }) {
				return fmt.Errorf("linux.netDevices %q: %q is no name of a network device: %w", name, n, errdefs.ErrInvalidArgument)
			}
		}
		if name == "" {
			return fmt.Errorf("linux.netDevices: a name is empty: %w", errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
