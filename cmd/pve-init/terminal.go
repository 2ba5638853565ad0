package main

import (
	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/tree"
	"golang.org/x/sys/unix"
)

// openTerminal allocates a pty from the container's own devpts. The image may
// have put anything at /dev/ptmx, so the instance is looked at and its slave is
// asked for by the master, not by name.
func openTerminal(r root, rows, columns uint16) (master, slave int, err error) {
	pts, err := r.open("/dev/pts", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, -1, failed(plan.ErrorInvalid, "/dev/pts", err)
	}
	defer unix.Close(pts)
	if !isType(pts, unix.DEVPTS_SUPER_MAGIC) {
		return -1, -1, fail(plan.ErrorInvalid, "/dev/pts is not a devpts mount")
	}
	master, err = openBelow(pts, "ptmx", unix.O_RDWR|unix.O_NOCTTY,
		unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_XDEV)
	if err != nil {
		return -1, -1, failed(plan.ErrorInvalid, "/dev/pts/ptmx", err)
	}
	slave, err = openSlave(master)
	if err == nil && (rows != 0 || columns != 0) {
		err = unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
	}
	if err != nil {
		unix.Close(master)
		return -1, -1, failed(plan.ErrorInternal, "opening the pty", err)
	}
	return master, slave, nil
}

func openSlave(master int) (int, error) {
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, err
	}
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// makeConsole makes /dev/console exist as what bindConsole mounts over. An image
// may bring anything under this name: a symlink would have the terminal cover
// what it leads to.
func (r root) makeConsole() error {
	dev, err := r.create("/dev", true)
	if err != nil {
		return err
	}
	defer unix.Close(dev)
	var st unix.Stat_t
	switch err := unix.Fstatat(dev, "console", &st, unix.AT_SYMLINK_NOFOLLOW); {
	case err == unix.ENOENT:
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT != unix.S_IFLNK:
		return nil
	default:
		if err := unix.Unlinkat(dev, "console", 0); err != nil {
			return err
		}
	}
	fd, err := unix.Openat(dev, "console", unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_WRONLY, 0o644)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// bindConsole makes /dev/console the container's terminal. The hook has made the file.
func (p *process) bindConsole() error {
	dev, err := p.root.open("/dev", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(dev)
	target, err := openBelow(dev, "console", unix.O_PATH|unix.O_NOFOLLOW, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	console, err := tree.Clone(p.slave, "", false)
	if err != nil {
		return err
	}
	defer unix.Close(console)
	return tree.Attach(console, target)
}

// takeTerminal starts a session and, with a terminal, makes it the controlling
// one and the standard streams.
func (p *process) takeTerminal() error {
	if _, err := unix.Setsid(); err != nil && err != unix.EPERM { // EPERM: it leads one already
		return err
	}
	if p.slave < 0 {
		return nil
	}
	for fd := range firstInheritedFD {
		if err := unix.Dup3(p.slave, fd, 0); err != nil {
			return err
		}
	}
	return unix.IoctlSetInt(0, unix.TIOCSCTTY, 0)
}
