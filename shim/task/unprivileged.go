package task

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/shim/options"
)

// annotationUnprivileged asks for a user namespace, true or false.
const annotationUnprivileged = "io.containerd.pve.unprivileged"

// idRange is how many ids an unprivileged container has: those of 16 bits, as Proxmox's have.
const idRange = 65536

// mapHost is where the host says which ids root may give away (subuid(5)), and
// whether its kernel and its ZFS map those of a mount.
type mapHost struct{ subUID, subGID, kernel, zfs string }

var thisHost = mapHost{"/etc/subuid", "/etc/subgid", "/proc/sys/kernel/osrelease", "/sys/module/zfs/version"}

// canMap says what is too old for a root file system of that type to be mapped by its mount.
func (h mapHost) canMap(fstype string) error {
	// mount_setattr(2): since Linux 5.12; zfs(4), zfs-idmap: since 2.2.
	old := func(what, file, want string) error {
		text, err := os.ReadFile(file)
		if version := strings.TrimSpace(string(text)); err == nil && !pve.AtLeast(version, want) {
			return fmt.Errorf("unprivileged containers need %s %s or later, which maps the owners of files; this host has %s: %w", what, want[1:], version, errdefs.ErrFailedPrecondition)
		}
		return nil // what cannot be read is tried
	}
	if err := old("Linux", h.kernel, "v5.12"); err != nil || fstype != "zfs" {
		return err
	}
	return old("ZFS", h.zfs, "v2.2")
}

// unprivilegedToo gives a container that is to have one a user namespace, if its
// spec has none: with root's first range of ids on this host, and its root file system and
// volumes mapped by their mounts, so that no file is copied or changed. Errors:
// InvalidArgument for the annotation; FailedPrecondition, what is missing.
func unprivilegedToo(spec *specs.Spec, mounts []*types.Mount, o *options.Options, h mapHost) error {
	asked := o.Unprivileged
	if v, there := spec.Annotations[annotationUnprivileged]; there {
		var err error
		if asked, err = strconv.ParseBool(v); err != nil {
			return fmt.Errorf("annotation %s: %q is neither true nor false: %w", annotationUnprivileged, v, errdefs.ErrInvalidArgument)
		}
	}
	if !asked || spec.Linux == nil || slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace }) {
		return nil
	}
	// An overlay's upper directory would need another owner; a mapped mount has to be one.
	for _, m := range mounts {
		if m.Type == "overlay" {
			return fmt.Errorf("an unprivileged container needs a root file system that a mount can map: use the snapshotter pve-zfs, not one of overlays: %w", errdefs.ErrFailedPrecondition)
		}
		if err := h.canMap(m.Type); err != nil {
			return err
		}
	}
	uid, err := mapping(h.subUID)
	if err != nil {
		return err
	}
	gid, err := mapping(h.subGID)
	if err != nil {
		return err
	}
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	spec.Linux.UIDMappings, spec.Linux.GIDMappings = []specs.LinuxIDMapping{uid}, []specs.LinuxIDMapping{gid}
	text := func(m specs.LinuxIDMapping) string { return fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Size) }
	for _, m := range mounts {
		m.Options = append(m.Options, "uidmap="+text(uid), "gidmap="+text(gid))
	}
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		bind := m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
		mapped := len(m.UIDMappings) > 0 || slices.ContainsFunc(m.Options, func(o string) bool { return strings.HasSuffix(o, "idmap") })
		if bind && !mapped {
			m.Options = append(m.Options, "idmap")
		}
	}
	return nil
}

// mapping is from 0 on to root's first range that is large enough.
func mapping(file string) (specs.LinuxIDMapping, error) {
	ranges, err := user.ParseSubIDFileFilter(file, func(s user.SubID) bool { return (s.Name == "root" || s.Name == "0") && s.Count >= idRange })
	if err == nil && len(ranges) > 0 {
		return specs.LinuxIDMapping{ContainerID: 0, HostID: uint32(ranges[0].SubID), Size: idRange}, nil
	}
	why := fmt.Errorf("unprivileged containers need a line \"root:100000:%d\" in %s: %w", idRange, file, errdefs.ErrFailedPrecondition)
	if err != nil {
		return specs.LinuxIDMapping{}, fmt.Errorf("%w: %w", why, err)
	}
	return specs.LinuxIDMapping{}, why
}
