package main

import (
	"errors"
	"os"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/tree"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountHook is the verb mount: everything of the spec that shows in the file
// system. It runs in the container's namespaces before the pivot, so that
// host paths are still there and the container's root is below LXC_ROOTFS_MOUNT.
// before is what failed already.
func mountHook(fd int, before error) int {
	unix.Umask(0)
	s := &socket{fd: fd}
	err := func() error {
		if before != nil {
			return before
		}
		if err := closeInherited(fd); err != nil {
			return failed(plan.ErrorInternal, "closing inherited descriptors", err)
		}
		var p plan.Mounts
		trees, open, err := s.receiveFiles(&p)
		if err != nil {
			return failed(plan.ErrorInternal, "reading the mount plan", err)
		}
		if !open {
			return fail(plan.ErrorInternal, "the mount plan did not come")
		}
		path := os.Getenv("LXC_ROOTFS_MOUNT")
		if path == "" {
			return fail(plan.ErrorInternal, "LXC_ROOTFS_MOUNT is not set: not run as LXC's mount hook")
		}
		r, err := openRoot(path)
		if err != nil {
			return failed(plan.ErrorInternal, "opening the root file system "+path, err)
		}
		if err := r.setup(&p, trees); err != nil {
			return err
		}
		if err := s.send(plan.Event{Ready: true}); err != nil {
			return failed(plan.ErrorInternal, "reporting the mounts", err)
		}
		var c plan.Command
		if open, err := s.receive(&c); err != nil || !open || !c.Start {
			return fail(plan.ErrorInternal, "nobody said to go on")
		}
		// The container's first process waits for this one.
		if err := runHooks("createContainer", p.Hooks, p.State, os.Getppid()); err != nil {
			return err
		}
		return s.send(plan.Event{Ready: true})
	}()
	if err == nil {
		return 0
	}
	// liblxc swallows what a hook says on stderr.
	return report(s, err)
}

// trees are the detached trees that came along with a plan.
type trees []int

// take is the tree of that number; the caller closes it.
func (t trees) take(number int) (int, error) {
	if number < 1 || number > len(t) || t[number-1] < 0 {
		return -1, fail(plan.ErrorInternal, "tree "+strconv.Itoa(number)+" did not come along")
	}
	fd := t[number-1]
	t[number-1] = -1
	return fd, nil
}

// setup makes all of the plan true below the root.
func (r root) setup(p *plan.Mounts, t trees) error {
	if p.ProcTemporary {
		proc := plan.Mount{Mount: specs.Mount{Destination: "/proc", Type: "proc", Options: []string{"nosuid", "nodev", "noexec"}}}
		if err := r.mountOne(&proc, t); err != nil {
			return failed(plan.ErrorInternal, "mounting a temporary /proc", err)
		}
	}
	if err := r.holdDev(p.Mounts); err != nil {
		return failed(plan.ErrorInvalid, "making /dev", err)
	}
	ownDev := true
	for i := range p.Mounts {
		m := &p.Mounts[i]
		if err := r.mountOne(m, t); err != nil {
			return failed(plan.ErrorInvalid, "mounts["+strconv.Itoa(i)+"] ("+m.Destination+")", err)
		}
		if tree.Parse(&m.Mount).Bind && strings.Join(components(m.Destination), "/") == "dev" {
			// Somebody else's /dev: nothing is ours to make there.
			ownDev = false
		}
	}
	if ownDev {
		if err := r.makeDevices(p, t); err != nil {
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
func (r root) holdDev(mounts []plan.Mount) error {
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
	own, err := tree.Clone(dev, "", true)
	if err != nil {
		return err
	}
	defer unix.Close(own)
	return tree.Attach(own, dev)
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
func (r root) mountOne(m *plan.Mount, t trees) error {
	o := tree.Parse(&m.Mount)
	if o.Remount {
		return r.remount(m.Destination, &o)
	}
	fd, made, err := r.detached(m, &o, t)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	isDir, err := tree.IsDir(fd)
	if err != nil {
		return failed(plan.ErrorInternal, "looking at the mount", err)
	}
	kernelFS := !o.Bind && (m.Type == "proc" || m.Type == "sysfs")
	target, err := r.create(m.Destination, isDir)
	if err == nil && kernelFS {
		// Where a symlink leads to, nothing would mask or protect parts of it.
		unix.Close(target)
		target, err = openBelow(r.fd, m.Destination, unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_SYMLINKS)
		if err == unix.ELOOP {
			return fail(plan.ErrorInvalid, m.Type+" must be mounted on an ordinary directory, not on a symlink")
		}
	}
	if err != nil {
		return failed(plan.ErrorInvalid, "making the target", err)
	}
	defer unix.Close(target)
	if err := r.checkTarget(target, kernelFS && m.Type == "proc", fd); err != nil {
		return err
	}
	if o.CopyUp {
		if err := copyUp(target, fd); err != nil {
			return failed(plan.ErrorInvalid, "option tmpcopyup", err)
		}
	}
	if made {
		// A read-only tmpfs is filled before it becomes read-only.
		if err := o.Apply(fd); err != nil {
			return err
		}
	}
	if err := tree.Attach(fd, target); err != nil {
		return failed(plan.ErrorInvalid, "attaching the mount", err)
	}
	return nil
}

// detached is the tree of a mount: one that came along and is as it is to be,
// or one that is made here.
func (r root) detached(m *plan.Mount, o *tree.Options, t trees) (fd int, made bool, err error) {
	if m.Tree > 0 {
		fd, err = t.take(m.Tree)
		return fd, false, err
	}
	if o.Bind {
		return -1, false, fail(plan.ErrorInternal, "no tree came along for a bind mount")
	}
	spec := m.Mount
	switch spec.Type {
	case "cgroup":
		// The host has cgroup v2 only; version 1 options mean nothing to it.
		spec.Type, spec.Source, o.Data = "cgroup2", "cgroup", nil
	case "tmpfs":
		r.inheritMode(m.Destination, o)
	}
	fd, err = tree.New(&spec, o)
	if m.Instead > 0 && errors.Is(err, unix.EPERM) {
		fd, err = t.take(m.Instead)
		return fd, false, err
	}
	return fd, true, err
}

// remount changes a mount that is there already.
func (r root) remount(path string, o *tree.Options) error {
	fd, err := r.open(path, unix.O_PATH)
	if err != nil {
		return failed(plan.ErrorInvalid, "option remount: opening the mount", err)
	}
	defer unix.Close(fd)
	return tree.Reconfigure(fd, o)
}

// inheritMode gives a tmpfs the mode of the directory it covers, unless the
// spec says which one.
func (r root) inheritMode(path string, o *tree.Options) {
	for _, option := range o.Data {
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
		o.Data = append(o.Data, "mode="+strconv.FormatUint(uint64(st.Mode&0o7777), 8))
	}
}

// checkTarget refuses to cover the root, and procfs but with what may.
func (r root) checkTarget(target int, proc bool, fd int) error {
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
	case inside == "/proc" && !proc && !isType(fd, unix.PROC_SUPER_MAGIC):
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
	var cover int
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		empty := tree.Options{Data: []string{"nr_blocks=1", "nr_inodes=1"}}
		if cover, err = tree.New(&specs.Mount{Type: "tmpfs"}, &empty); err != nil {
			return err
		}
		defer unix.Close(cover)
		if err := tree.ReadOnly(cover); err != nil {
			return err
		}
	} else {
		if cover, err = tree.Clone(unix.AT_FDCWD, null, false); err != nil {
			return err
		}
		defer unix.Close(cover)
		if err := unix.Fstat(cover, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
			return fail(plan.ErrorInvalid, null+" is not the null device")
		}
	}
	return tree.Attach(cover, target)
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
	view, err := tree.Clone(target, "", true)
	if err != nil {
		return err
	}
	defer unix.Close(view)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(view, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return err
	}
	return tree.Attach(view, target)
}
