// Package detached mounts a ZFS filesystem where nobody sees it: for reading it,
// or for keeping it mounted beyond somebody else's unmount. It owns no dataset.
package detached

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Mount mounts a dataset that may be mounted elsewhere as well, read-only, until
// the file is closed, or with this process. The file only names (O_PATH).
//
// readonly: nobody writes to it. To mount the same filesystem read-only here and
// for writing there is refused, so otherwise the mount is read-only and not the
// filesystem (OpenZFS, zpl_super.c, zpl_mount_impl).
func Mount(ctx context.Context, dataset string, readonly bool) (*os.File, error) {
	fail := func(err error) (*os.File, error) { return nil, fmt.Errorf("mounting %s: %w", dataset, err) }
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	fd, err := unix.Fsopen("zfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(fd)
	err = unix.FsconfigSetString(fd, "source", dataset)
	if err == nil && readonly {
		err = unix.FsconfigSetFlag(fd, "ro")
	}
	if err == nil {
		err = unix.FsconfigCreate(fd)
	}
	if err != nil {
		return fail(err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_NOATIME)
	if err != nil {
		return fail(err)
	}
	return os.NewFile(uintptr(m), dataset), nil
}
