// Package detached mounts a ZFS filesystem where nobody sees it: for reading or writing it,
// or for keeping it mounted beyond somebody else's unmount. It owns no dataset.
package detached

import (
	"context"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Mount mounts a dataset that may be mounted elsewhere as well, read-only, until
// the file is closed, or with this process. The file only names (O_PATH).
//
// readonly: nobody writes to it. To mount the same filesystem read-only here and
// for writing there is refused, so otherwise the mount is read-only and not the
// filesystem (OpenZFS, zpl_super.c, zpl_mount_impl).
func Mount(ctx context.Context, dataset string, readonly bool) (*os.File, error) {
	return attach(ctx, dataset, readonly, unix.MOUNT_ATTR_RDONLY)
}

// Writable is Mount for writing to it.
func Writable(ctx context.Context, dataset string) (*os.File, error) {
	return attach(ctx, dataset, false, 0)
}

// Dir is the path of a mount's root in this process. Nobody can put another mount or a link
// below it that was not in the filesystem.
func Dir(root *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", root.Fd()) }

// In calls f with root as its root directory, in a thread of its own: no link in what it works on leads out. What f does in
// goroutines that it starts is done elsewhere.
func In(root *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// The first thread never ends, and its root is what /proc shows for the whole process.
			defer runtime.UnlockOSThread()
			done <- In(root, f)
			return
		}
		// The thread is not given back, so it ends with this function.
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Fchdir(int(root.Fd()))
		}
		if err == nil {
			err = unix.Chroot(".")
		}
		if err != nil {
			done <- fmt.Errorf("working in %s: %w", root.Name(), err)
			return
		}
		done <- f()
	}()
	return <-done
}

func attach(ctx context.Context, dataset string, readonly bool, attributes int) (*os.File, error) {
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
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attributes|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_NOATIME)
	if err != nil {
		return fail(err)
	}
	return os.NewFile(uintptr(m), dataset), nil
}
