package lxc

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// initProgram is pve-init, opened on a detached read-only mount: a container
// that opens its /proc/1/exe for writing (CVE-2019-5736) gets EROFS.
type initProgram struct {
	tree *os.File // keeps the detached mount alive
}

func openInitProgram(path string) (*initProgram, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", path, err)
	}
	tree := os.NewFile(uintptr(fd), path)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		tree.Close()
		return nil, fmt.Errorf("mount_setattr of %s: %w", path, err)
	}
	return &initProgram{tree: tree}, nil
}

// open returns a descriptor to execute pve-init through.
func (p *initProgram) open() (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", p.tree.Fd()))
}
