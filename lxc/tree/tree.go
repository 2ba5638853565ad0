package tree

import (
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// ofNamespace are the file systems whose content is that of a namespace of
// whoever mounts them. All others are the same from the host.
var ofNamespace = map[string]bool{
	"proc": true, "sysfs": true, "mqueue": true, "cgroup": true, "cgroup2": true, "devpts": true, "tmpfs": true, "binfmt_misc": true,
}

// OfNamespace says whether a file system has to be mounted in the container's
// namespaces, a tmpfs among them: its owners are named by the container's ids.
func OfNamespace(fsType string) bool { return ofNamespace[fsType] }

// Clone is a detached bind mount of path, or of dir itself without one.
func Clone(dir int, path string, recursive bool) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(dir, path, flags)
	if err != nil {
		return -1, plan.Failed(plan.ErrorInvalid, "source "+path, err)
	}
	return fd, nil
}

// IsDir says whether the tree's root, or any other open file, is a directory.
func IsDir(fd int) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

// New is a detached mount of a new file system.
func New(m *specs.Mount, o *Options) (int, error) {
	if m.Type == "" || m.Type == "none" {
		return -1, plan.Fail(plan.ErrorInvalid, "type is missing")
	}
	fs, err := unix.Fsopen(m.Type, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, plan.Failed(plan.ErrorInvalid, "type "+m.Type, err)
	}
	defer unix.Close(fs)
	source := m.Source
	if source == "" {
		source = m.Type
	}
	if err := unix.FsconfigSetString(fs, "source", source); err != nil {
		return -1, plan.Failed(plan.ErrorInvalid, "source "+source, err)
	}
	super := o.super
	if o.ReadOnly() && !ofNamespace[m.Type] {
		// A device that is write-protected cannot be mounted otherwise.
		super = append([]string{"ro"}, super...)
	}
	if err := configure(fs, super, o.Data); err != nil {
		return -1, err
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, plan.Failed(plan.ErrorInvalid, "creating the "+m.Type, because(fs, err))
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, plan.Failed(plan.ErrorInvalid, "mounting the "+m.Type, because(fs, err))
	}
	return mnt, nil
}

// configure hands the options to a file system context.
func configure(fs int, super, data []string) error {
	for _, option := range super {
		if err := unix.FsconfigSetFlag(fs, option); err != nil {
			return plan.Failed(plan.ErrorInvalid, "option "+option, err)
		}
	}
	for _, option := range data {
		var err error
		if key, value, ok := strings.Cut(option, "="); ok {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, option)
		}
		if err != nil {
			return plan.Failed(plan.ErrorInvalid, "option "+option, because(fs, err))
		}
	}
	return nil
}

// Reconfigure is the option remount: it changes the mount at fd, and the file
// system behind it if there are options for that and it is not a bind mount.
func Reconfigure(fd int, o *Options) error {
	if !o.Bind && len(o.super)+len(o.Data) > 0 {
		fs, err := unix.Fspick(fd, "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
		if err != nil {
			return plan.Failed(plan.ErrorInvalid, "option remount", err)
		}
		defer unix.Close(fs)
		if err := configure(fs, o.super, o.Data); err != nil {
			return err
		}
		if err := unix.FsconfigReconfigure(fs); err != nil {
			return plan.Failed(plan.ErrorInvalid, "option remount", because(fs, err))
		}
	}
	return o.Apply(fd)
}

// because adds what the kernel wrote into the log of a file system context.
func because(fs int, err error) error {
	buf := make([]byte, 512)
	n, readErr := unix.Read(fs, buf)
	if readErr != nil || n <= 2 {
		return err
	}
	return plan.Fail(plan.ErrorInvalid, err.Error()+" ("+strings.TrimSpace(string(buf[2:n]))+")")
}

// Apply sets a mount's attributes and propagation.
func (o *Options) Apply(tree int) error {
	if !o.attrs.empty() {
		attr := o.attrs.mountAttr()
		err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr)
		if err == unix.EPERM && o.attrs.clear != 0 {
			// In a user namespace what the host forbids stays forbidden; saying
			// "rw" or "dev" there is no error, as it is none with mount(8).
			keep := o.attrs
			keep.clear = 0
			attr = keep.mountAttr()
			err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr)
		}
		if err != nil {
			return plan.Failed(plan.ErrorInvalid, "setting the mount's flags", err)
		}
	}
	if !o.below.empty() {
		attr := o.below.mountAttr()
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
			return plan.Failed(plan.ErrorInvalid, "setting recursive flags", err)
		}
	}
	return Propagate(tree, o.Propagation...)
}

// Propagate changes the propagation type of the mount at fd.
func Propagate(fd int, changes ...Propagation) error {
	for _, p := range changes {
		flags := uint(unix.AT_EMPTY_PATH)
		if p.recursive {
			flags |= unix.AT_RECURSIVE
		}
		if err := unix.MountSetattr(fd, "", flags, &unix.MountAttr{Propagation: p.flag}); err != nil {
			return plan.Failed(plan.ErrorInvalid, "setting the propagation", err)
		}
	}
	return nil
}

// SlaveBelow takes a mount and all below it out of their peer groups: what had a
// master keeps it, what was a peer becomes a slave of the others, what was alone
// becomes private.
var SlaveBelow = Propagation{flag: unix.MS_SLAVE, recursive: true}

// One is the same change for one mount alone, and whether it was for all below it.
func (p Propagation) One() (one Propagation, below bool) {
	return Propagation{flag: p.flag}, p.recursive
}

// MapIDs makes the tree id-mapped by the user namespace.
func MapIDs(tree, userns int, below bool) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if below {
		flags |= unix.AT_RECURSIVE
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns)}
	if err := unix.MountSetattr(tree, "", flags, &attr); err != nil {
		return plan.Failed(plan.ErrorInvalid, "mapping the ids (does the file system support idmapped mounts?)", err)
	}
	return nil
}

// ReadOnly makes all of the tree read-only and without devices, programs or setuid.
func ReadOnly(tree int) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
	return unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr)
}

// Attach puts a detached tree on the open target.
func Attach(tree, target int) error {
	return unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}
