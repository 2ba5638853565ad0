package main

import (
	"encoding/json"
	"os"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountHook is the verb mount: everything of the spec that shows in the file
// system. It runs in the container's namespaces before the pivot, so that
// host paths are still there and the container's root is below LXC_ROOTFS_MOUNT.
func mountHook(planFile string) int {
	unix.Umask(0)
	var p plan.Mounts
	err := func() error {
		data, err := os.ReadFile(planFile)
		if err != nil {
			return failed(plan.ErrorInternal, "reading the mount plan", err)
		}
		if err := json.Unmarshal(data, &p); err != nil {
			return failed(plan.ErrorInternal, "parsing the mount plan", err)
		}
		path := os.Getenv("LXC_ROOTFS_MOUNT")
		if path == "" {
			return fail(plan.ErrorInternal, "LXC_ROOTFS_MOUNT is not set: not run as LXC's mount hook")
		}
		r, err := openRoot(path)
		if err != nil {
			return failed(plan.ErrorInternal, "opening the root file system "+path, err)
		}
		return r.setup(&p)
	}()
	if err == nil {
		return 0
	}
	stderr(err.Error())
	if p.ErrorFile != "" {
		// liblxc swallows what a hook says on stderr.
		if err := os.WriteFile(p.ErrorFile, []byte(err.Error()+"\n"), 0o600); err != nil {
			stderr("writing the error file: " + err.Error())
		}
	}
	return exitFailure
}

// setup makes all of the plan true below the root.
func (r root) setup(p *plan.Mounts) error {
	if p.ProcTemporary {
		if err := r.mountOne(&specs.Mount{Destination: "/proc", Type: "proc", Options: []string{"nosuid", "nodev", "noexec"}}, p); err != nil {
			return failed(plan.ErrorInternal, "mounting a temporary /proc", err)
		}
	}
	if err := r.holdDev(p.Mounts); err != nil {
		return failed(plan.ErrorInvalid, "making /dev", err)
	}
	ownDev := true
	for i := range p.Mounts {
		m := &p.Mounts[i]
		if err := r.mountOne(m, p); err != nil {
			return failed(plan.ErrorInvalid, "mounts["+strconv.Itoa(i)+"] ("+m.Destination+")", err)
		}
		if parseOptions(*m).bind && strings.Join(components(m.Destination), "/") == "dev" {
			// Somebody else's /dev: nothing is ours to make there.
			ownDev = false
		}
	}
	if ownDev {
		if err := r.makeDevices(p); err != nil {
			return err
		}
	}
	if p.Terminal {
		if err := r.makeConsole(); err != nil {
			return failed(plan.ErrorInvalid, "process.terminal: making /dev/console", err)
		}
	}
	if p.Cwd != "" {
		fd, err := r.create(p.Cwd, true)
		if err != nil {
			return failed(plan.ErrorInvalid, "process.cwd: making "+p.Cwd, err)
		}
		unix.Close(fd)
	}
	if err := r.sysctl(p.Sysctl); err != nil {
		return err
	}
	return r.protect(p, "/dev/null")
}

// holdDev mounts the root's own /dev over itself if the spec mounts nothing there.
// liblxc, which has it open, unmounts what is at its pts when all is made
// (conf.c, lxc_finish_devpts_child), and that would be the spec's devpts.
func (r root) holdDev(mounts []specs.Mount) error {
	for i := range mounts {
		if strings.Join(components(mounts[i].Destination), "/") == "dev" {
			return nil
		}
	}
	dev, err := r.create("/dev", true)
	if err != nil {
		return err
	}
	defer unix.Close(dev)
	tree, _, err := cloneTree(dev, "", true)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return attach(tree, dev)
}

// sysctl writes the keys in a fixed order, so that errors repeat.
func (r root) sysctl(values map[string]string) error {
	keys := make([]string, 0, len(values))
	for k := range values {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		if err := r.writeProc("sys/"+sysctlPath(k), values[k]); err != nil {
			return failed(plan.ErrorInvalid, "linux.sysctl: writing "+values[k]+" to "+k, err)
		}
	}
	return nil
}

// sysctlPath is the path below /proc/sys of a key. As with sysctl(8) the first
// separator tells which one is meant: after a dot, a slash is a dot of a name.
func sysctlPath(key string) string {
	i := strings.IndexAny(key, "./")
	if i < 0 || key[i] == '/' {
		return key
	}
	return strings.Map(func(c rune) rune {
		switch c {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return c
	}, key)
}

// procFiles are the files of procfs a mount may cover; anything else there is
// how a hostile mount would redirect what is written to /proc.
var procFiles = []string{
	"/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime",
	"/proc/loadavg", "/proc/slabinfo", "/proc/sys/kernel/ns_last_pid", "/proc/sys/crypto/fips_enabled",
}

// mountOne makes one mount of the spec. The tree is made detached, gets all its
// attributes there, and is attached to a descriptor of the target last: no path
// is resolved twice.
func (r root) mountOne(m *specs.Mount, p *plan.Mounts) error {
	o := parseOptions(*m)
	if o.unsupported != "" {
		return fail(plan.ErrorInvalid, "option "+o.unsupported+" is not supported")
	}
	if m.Type == "tmpfs" && !o.bind {
		r.inheritMode(m.Destination, &o)
	}
	tree, isDir, err := detachedTree(m, &o, p)
	if err != nil {
		return err
	}
	defer unix.Close(tree)

	kernelFS := !o.bind && (m.Type == "proc" || m.Type == "sysfs")
	target, err := r.create(m.Destination, isDir)
	if err == nil && kernelFS {
		// Where a symlink leads to, nothing would mask or protect parts of it.
		unix.Close(target)
		target, err = openBelow(r.fd, m.Destination, unix.O_PATH|unix.O_DIRECTORY, 0, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_SYMLINKS)
		if err == unix.ELOOP {
			return fail(plan.ErrorInvalid, m.Type+" must be mounted on an ordinary directory, not on a symlink")
		}
	}
	if err != nil {
		return failed(plan.ErrorInvalid, "making the target", err)
	}
	defer unix.Close(target)
	if err := r.checkTarget(target, m, kernelFS && m.Type == "proc", tree); err != nil {
		return err
	}
	if o.copyUp {
		if err := copyUp(target, tree); err != nil {
			return failed(plan.ErrorInvalid, "option tmpcopyup", err)
		}
	}
	// A read-only tmpfs is filled before it becomes read-only.
	if err := applyAttrs(tree, &o); err != nil {
		return err
	}
	if err := attach(tree, target); err != nil {
		return failed(plan.ErrorInvalid, "attaching the mount", err)
	}
	return nil
}

// inheritMode gives a tmpfs the mode of the directory it covers, unless the
// spec says which one.
func (r root) inheritMode(path string, o *mountOptions) {
	for _, option := range o.data {
		if strings.HasPrefix(option, "mode=") {
			return
		}
	}
	fd, err := r.open(path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return // nothing there yet, or the mount will say what is wrong
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) == nil {
		o.data = append(o.data, "mode="+strconv.FormatUint(uint64(st.Mode&0o7777), 8))
	}
}

// checkTarget refuses to cover the root, and procfs but with what may.
func (r root) checkTarget(target int, m *specs.Mount, proc bool, tree int) error {
	path, err := fdPath(target)
	if err != nil {
		return failed(plan.ErrorInternal, "naming the target", err)
	}
	base, err := fdPath(r.fd)
	if err != nil {
		return failed(plan.ErrorInternal, "naming the root", err)
	}
	inside := "/" + strings.TrimPrefix(strings.TrimPrefix(path, strings.TrimSuffix(base, "/")), "/")
	switch {
	case inside == "/":
		return fail(plan.ErrorInvalid, "a mount cannot cover the root file system")
	case inside == "/proc" && !proc && !isType(tree, unix.PROC_SUPER_MAGIC):
		return fail(plan.ErrorInvalid, "only procfs can be mounted at /proc")
	case strings.HasPrefix(inside, "/proc/"):
		for _, ok := range procFiles {
			if inside == ok {
				return nil
			}
		}
		return fail(plan.ErrorInvalid, "nothing can be mounted at "+inside)
	}
	return nil
}

// fdPath is where a descriptor is, as this process sees it.
func fdPath(fd int) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlink("/proc/self/fd/"+strconv.Itoa(fd), buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// detachedTree makes what is to be mounted, attached nowhere. The target has to
// be a directory if isDir.
func detachedTree(m *specs.Mount, o *mountOptions, p *plan.Mounts) (fd int, isDir bool, err error) {
	fsType, source := m.Type, m.Source
	switch {
	case o.bind:
		return cloneTree(unix.AT_FDCWD, source, o.recursive)
	case fsType == "cgroup" && !p.CgroupNamespace:
		// A second mount of cgroup2 from the host's cgroup namespace would
		// change the options of the host's own.
		return cloneTree(unix.AT_FDCWD, "/sys/fs/cgroup", false)
	case fsType == "cgroup":
		// The host has cgroup v2 only; version 1 options mean nothing to it.
		fsType, source, o.data = "cgroup2", "cgroup", nil
	case fsType == "" || fsType == "none":
		return -1, false, fail(plan.ErrorInvalid, "type is missing")
	}
	fd, err = newFS(fsType, source, o)
	return fd, true, err
}

// cloneTree is a detached bind mount of path.
func cloneTree(dir int, path string, recursive bool) (fd int, isDir bool, err error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err = unix.OpenTree(dir, path, flags)
	if err != nil {
		return -1, false, failed(plan.ErrorInvalid, "source "+path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, false, failed(plan.ErrorInvalid, "source "+path, err)
	}
	return fd, st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

// newFS is a detached mount of a new file system.
func newFS(fsType, source string, o *mountOptions) (int, error) {
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, failed(plan.ErrorInvalid, "type "+fsType, err)
	}
	defer unix.Close(fs)
	if source == "" {
		source = fsType
	}
	if err := unix.FsconfigSetString(fs, "source", source); err != nil {
		return -1, failed(plan.ErrorInvalid, "source "+source, err)
	}
	for _, option := range o.super {
		if err := unix.FsconfigSetFlag(fs, option); err != nil {
			return -1, failed(plan.ErrorInvalid, "option "+option, err)
		}
	}
	for _, option := range o.data {
		if key, value, ok := strings.Cut(option, "="); ok {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, option)
		}
		if err != nil {
			return -1, failed(plan.ErrorInvalid, "option "+option, because(fs, err))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, failed(plan.ErrorInvalid, "creating the "+fsType, because(fs, err))
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, failed(plan.ErrorInvalid, "mounting the "+fsType, because(fs, err))
	}
	return mnt, nil
}

// because adds what the kernel wrote into the log of a file system context.
func because(fs int, err error) error {
	buf := make([]byte, 512)
	n, readErr := unix.Read(fs, buf)
	if readErr != nil || n <= 2 {
		return err
	}
	return fail(plan.ErrorInvalid, err.Error()+" ("+strings.TrimSpace(string(buf[2:n]))+")")
}

// applyAttrs sets a detached tree's attributes and propagation.
func applyAttrs(tree int, o *mountOptions) error {
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
			return failed(plan.ErrorInvalid, "setting the mount's flags", err)
		}
	}
	if !o.below.empty() {
		attr := o.below.mountAttr()
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
			return failed(plan.ErrorInvalid, "setting recursive flags", err)
		}
	}
	return propagate(tree, o.propagation)
}

func propagate(fd int, changes []propagation) error {
	for _, p := range changes {
		flags := uint(unix.AT_EMPTY_PATH)
		if p.recursive {
			flags |= unix.AT_RECURSIVE
		}
		if err := unix.MountSetattr(fd, "", flags, &unix.MountAttr{Propagation: p.flag}); err != nil {
			return failed(plan.ErrorInvalid, "setting the propagation", err)
		}
	}
	return nil
}

func attach(tree, target int) error {
	return unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// protect covers the masked paths, makes the read-only ones read-only, and the
// root itself. null is the /dev/null to cover files with.
func (r root) protect(p *plan.Mounts, null string) error {
	for _, path := range p.MaskedPaths {
		if err := r.mask(path, null); err != nil {
			return failed(plan.ErrorInvalid, "linux.maskedPaths: "+path, err)
		}
	}
	for _, path := range p.ReadonlyPaths {
		if err := r.readOnly(path); err != nil {
			return failed(plan.ErrorInvalid, "linux.readonlyPaths: "+path, err)
		}
	}
	if p.ReadonlyRoot {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(r.fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return failed(plan.ErrorInvalid, "root.readonly", err)
		}
	}
	return nil
}

// mask covers path with nothing: an empty read-only directory, or /dev/null.
// What is not there needs no cover.
func (r root) mask(path, null string) error {
	target, err := r.open(path, unix.O_PATH)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(target)
	var st unix.Stat_t
	if err := unix.Fstat(target, &st); err != nil {
		return err
	}
	var tree int
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		o := mountOptions{data: []string{"nr_blocks=1", "nr_inodes=1"}}
		if tree, err = newFS("tmpfs", "tmpfs", &o); err != nil {
			return err
		}
		defer unix.Close(tree)
		o.attrs.set = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
		if err := applyAttrs(tree, &o); err != nil {
			return err
		}
	} else {
		if tree, _, err = cloneTree(unix.AT_FDCWD, null, false); err != nil {
			return err
		}
		defer unix.Close(tree)
		if err := unix.Fstat(tree, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
			return fail(plan.ErrorInvalid, null+" is not the null device")
		}
	}
	return attach(tree, target)
}

// readOnly puts a read-only view of path over itself.
func (r root) readOnly(path string) error {
	target, err := r.open(path, unix.O_PATH)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(target)
	tree, _, err := cloneTree(target, "", true)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return err
	}
	return attach(tree, target)
}

// finish is what init does once liblxc is done with the root: liblxc makes every
// mount shared after the pivot, which the spec does not ask for.
func (r root) finish(p *plan.Mounts) error {
	change, ok := parsePropagation(p.Propagation)
	if !ok && p.Propagation != "" {
		return fail(plan.ErrorInvalid, "linux.rootfsPropagation: unknown value "+p.Propagation)
	}
	// What had a master keeps it, everything else becomes private.
	if err := propagate(r.fd, []propagation{{unix.MS_SLAVE, true}}); err != nil {
		return failed(plan.ErrorInternal, "linux.rootfsPropagation", err)
	}
	if ok {
		if err := propagate(r.fd, []propagation{change}); err != nil {
			return failed(plan.ErrorInvalid, "linux.rootfsPropagation", err)
		}
	}
	for i := range p.Mounts {
		m := &p.Mounts[i]
		changes := parseOptions(*m).propagation
		if len(changes) == 0 {
			continue
		}
		err := func() error {
			fd, err := r.open(m.Destination, unix.O_PATH)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return propagate(fd, changes)
		}()
		if err != nil {
			return failed(plan.ErrorInvalid, "mounts ("+m.Destination+")", err)
		}
	}
	return r.protect(p, "/dev/null")
}
