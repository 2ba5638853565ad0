package lxc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// initProgram is pve-init, opened on a read-only mount that is attached nowhere: a
// container that opens its /proc/1/exe for writing (CVE-2019-5736) gets EROFS.
type initProgram struct {
	file *os.File

	mu   sync.Mutex
	copy *os.File // made by unreadable
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
	return &initProgram{file: file}, nil
}

// open returns a descriptor to execute pve-init through.
func (p *initProgram) open() (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", p.file.Fd()))
}

// unreadable is a sealed copy that everybody may execute and nobody may read. A
// process of it in a user namespace is the host's to the kernel: it cannot be
// dumped or traced by the root of that user namespace, who may well be a
// process of the image's. The caller does not close it.
func (p *initProgram) unreadable() (_ *os.File, retErr error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.copy != nil {
		return p.copy, nil
	}
	from, err := p.open()
	if err != nil {
		return nil, err
	}
	defer from.Close()
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("pve-init", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("pve-init", flags)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	to := os.NewFile(uintptr(fd), "pve-init")
	defer func() {
		if retErr != nil {
			to.Close()
		}
	}()
	if _, err := io.Copy(to, from); err != nil {
		return nil, fmt.Errorf("copy pve-init: %w", err)
	}
	if err := to.Chmod(0o111); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(to.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return nil, fmt.Errorf("seal the copy of pve-init: %w", err)
	}
	p.copy = to
	return to, nil
}
