package main

import (
	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/tree"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// devLinks are the symlinks of the runtime spec.
var devLinks = []struct{ name, target string }{
	{"fd", "/proc/self/fd"}, {"stdin", "/proc/self/fd/0"}, {"stdout", "/proc/self/fd/1"},
	{"stderr", "/proc/self/fd/2"}, {"ptmx", "pts/ptmx"},
}

// makeDevices makes the device nodes and the symlinks of /dev.
func (r root) makeDevices(p *plan.Mounts, t trees) error {
	for i := range p.Devices {
		if err := r.makeDevice(&p.Devices[i], t); err != nil {
			return failed(plan.ErrorInvalid, "linux.devices: "+p.Devices[i].Path, err)
		}
	}
next:
	for i := range tree.DefaultDevices {
		for j := range p.Devices {
			if p.Devices[j].Path == tree.DefaultDevices[i].Path {
				continue next // the spec's own mode and owner count
			}
		}
		if err := r.makeDevice(&plan.Device{LinuxDevice: tree.DefaultDevices[i]}, t); err != nil {
			return failed(plan.ErrorInternal, "making "+tree.DefaultDevices[i].Path, err)
		}
	}
	dev, err := r.create("/dev", true)
	if err != nil {
		return failed(plan.ErrorInvalid, "making /dev", err)
	}
	defer unix.Close(dev)
	for _, l := range devLinks {
		if l.name == "ptmx" && !mountRoot(dev, l.name) {
			// An image's own ptmx would be the host's.
			if err := unix.Unlinkat(dev, l.name, 0); err != nil && err != unix.ENOENT {
				return failed(plan.ErrorInvalid, "replacing /dev/ptmx", err)
			}
		}
		if err := unix.Symlinkat(l.target, dev, l.name); err != nil && err != unix.EEXIST {
			return failed(plan.ErrorInvalid, "making /dev/"+l.name, err)
		}
	}
	if fd, err := r.open("/proc/kcore", unix.O_PATH); err == nil {
		unix.Close(fd)
		if err := unix.Symlinkat("/proc/kcore", dev, "core"); err != nil && err != unix.EEXIST {
			return failed(plan.ErrorInvalid, "making /dev/core", err)
		}
	}
	return nil
}

// makeDevice makes one node, or attaches the one that came along. Where neither
// can be, the host's is bound there.
func (r root) makeDevice(d *plan.Device, t trees) error {
	mode, number, ok := tree.Node(&d.LinuxDevice)
	if !ok {
		return fail(plan.ErrorInvalid, "unknown type "+d.Type)
	}
	dir, name := splitPath(d.Path)
	if name == "" || name == "." || name == ".." {
		return fail(plan.ErrorInvalid, "not a file's path")
	}
	at, err := r.create("/"+dir, true)
	if err != nil {
		return failed(plan.ErrorInvalid, "making "+dir, err)
	}
	defer unix.Close(at)
	if d.Tree > 0 {
		node, err := t.take(d.Tree)
		if err != nil {
			return err
		}
		defer unix.Close(node)
		if mountRoot(at, name) {
			return nil // a mount of the spec's
		}
		return attachNode(at, name, node)
	}
	err = unix.Mknodat(at, name, mode, int(number))
	if err == unix.EEXIST && !mountRoot(at, name) {
		// An image may bring anything under this name.
		if err = unix.Unlinkat(at, name, 0); err == nil {
			err = unix.Mknodat(at, name, mode, int(number))
		}
	} else if err == unix.EEXIST {
		return nil // a mount of the spec's
	}
	if err == nil {
		return own(at, name, &d.LinuxDevice)
	}
	if err != unix.EPERM || mode&unix.S_IFMT == unix.S_IFIFO {
		return err
	}
	return bindDevice(at, name, d.Path, mode&unix.S_IFMT, number)
}

// own gives a node made just now its owner.
func own(at int, name string, d *specs.LinuxDevice) error {
	uid, gid := -1, -1
	if d.UID != nil {
		uid = int(*d.UID)
	}
	if d.GID != nil {
		gid = int(*d.GID)
	}
	if uid == -1 && gid == -1 {
		return nil
	}
	return unix.Fchownat(at, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
}

// bindDevice mounts the host's node of the same path over an empty file.
func bindDevice(at int, name, host string, kind uint32, number uint64) error {
	node, err := tree.Clone(unix.AT_FDCWD, host, false)
	if err != nil {
		return err
	}
	defer unix.Close(node)
	var st unix.Stat_t
	if err := unix.Fstat(node, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != kind || st.Rdev != number {
		return fail(plan.ErrorInvalid, "the host's "+host+" is another device")
	}
	return attachNode(at, name, node)
}

// attachNode mounts a node over a file of that name, which is made if it is missing.
func attachNode(at int, name string, node int) error {
	fd, err := unix.Openat(at, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_WRONLY, 0o644)
	if err == nil {
		unix.Close(fd)
	} else if err != unix.EEXIST {
		return err
	}
	target, err := openBelow(at, name, unix.O_PATH|unix.O_NOFOLLOW, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	return tree.Attach(node, target)
}

// mountRoot says whether something is mounted exactly there.
func mountRoot(at int, name string) bool {
	var st unix.Statx_t
	err := unix.Statx(at, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
