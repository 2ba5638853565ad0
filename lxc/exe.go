package lxc

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// initProgram is pve-init, opened on a read-only mount that is attached nowhere: a
// container that opens its /proc/1/exe for writing (CVE-2019-5736) gets EROFS.
type initProgram struct {
	path string
	file *os.File
}

func openInitProgram(path string) (*initProgram, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", path, err)
	}
	// Closing it dissolves the mount, which lives on in the descriptors opened
	// through it. One that is merely detached could be made writable again by a
	// container that may mount: mount_setattr(2) asks only whose a mount is that
	// has a place.
	defer unix.Close(fd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return nil, fmt.Errorf("mount_setattr of %s: %w", path, err)
	}
	file, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &initProgram{path: path, file: file}, nil
}

// open returns a descriptor to execute pve-init through.
func (p *initProgram) open() (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", p.file.Fd()))
}
