package main

import (
	"os"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// defaultDevices are in every container, as the runtime spec says.
var defaultDevices = []specs.LinuxDevice{
	charDevice("/dev/null", 1, 3), charDevice("/dev/zero", 1, 5), charDevice("/dev/full", 1, 7),
	charDevice("/dev/random", 1, 8), charDevice("/dev/urandom", 1, 9), charDevice("/dev/tty", 5, 0),
}

// devLinks are the symlinks of the runtime spec.
var devLinks = []struct{ name, target string }{
	{"fd", "/proc/self/fd"}, {"stdin", "/proc/self/fd/0"}, {"stdout", "/proc/self/fd/1"},
	{"stderr", "/proc/self/fd/2"}, {"ptmx", "pts/ptmx"},
}

func charDevice(path string, major, minor int64) specs.LinuxDevice {
	mode := os.FileMode(0o666)
	return specs.LinuxDevice{Path: path, Type: "c", Major: major, Minor: minor, FileMode: &mode}
}

// makeDevices makes the device nodes and the symlinks of /dev.
func (r root) makeDevices(p *plan.Mounts) error {
	for i := range p.Devices {
		if err := r.makeDevice(&p.Devices[i], p.UserNamespace); err != nil {
			return failed(plan.ErrorInvalid, "linux.devices: "+p.Devices[i].Path, err)
		}
	}
next:
	for i := range defaultDevices {
		for j := range p.Devices {
			if p.Devices[j].Path == defaultDevices[i].Path {
				continue next // the spec's own mode and owner count
			}
		}
		if err := r.makeDevice(&defaultDevices[i], p.UserNamespace); err != nil {
			return failed(plan.ErrorInternal, "making "+defaultDevices[i].Path, err)
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

// deviceMode is the file type of a spec's device.
func deviceMode(kind string) (uint32, bool) {
	switch kind {
	case "c", "u":
		return unix.S_IFCHR, true
	case "b":
		return unix.S_IFBLK, true
	case "p":
		return unix.S_IFIFO, true
	}
	return 0, false
}

// makeDevice makes one node. Where that is forbidden the host's is bound there.
func (r root) makeDevice(d *specs.LinuxDevice, bind bool) error {
	kind, ok := deviceMode(d.Type)
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
	mode, number := kind|0o666, unix.Mkdev(uint32(d.Major), uint32(d.Minor))
	if kind == unix.S_IFIFO {
		number = 0
	}
	if d.FileMode != nil {
		mode = kind | uint32(d.FileMode.Perm())
	}
	if !bind {
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
			return own(at, name, d)
		}
		if err != unix.EPERM || kind == unix.S_IFIFO {
			return err
		}
	} else if mountRoot(at, name) {
		return nil
	}
	return r.bindDevice(at, name, d.Path, kind, number)
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
func (r root) bindDevice(at int, name, host string, kind uint32, number uint64) error {
	tree, _, err := cloneTree(unix.AT_FDCWD, host, false)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	var st unix.Stat_t
	if err := unix.Fstat(tree, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != kind || (kind != unix.S_IFIFO && st.Rdev != number) {
		return fail(plan.ErrorInvalid, "the host's "+host+" is another device")
	}
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
	return attach(tree, target)
}

// mountRoot says whether something is mounted exactly there.
func mountRoot(at int, name string) bool {
	var st unix.Statx_t
	err := unix.Statx(at, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
