package compare

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// mounted is a filesystem that no other process sees, read-only.
type mounted struct{ root *os.File }

// attach mounts a dataset that may be mounted elsewhere as well. viewed: nobody
// writes to it. To mount the same one for reading here and for writing there is
// refused, so it is the mount that is read-only and not the filesystem
// (zpl_super.c, zpl_mount_impl).
func attach(ctx context.Context, dataset string, viewed bool) (_ *mounted, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	fail := func(err error) (*mounted, error) { return nil, fmt.Errorf("mounting %s: %w", dataset, err) }
	fd, err := unix.Fsopen("zfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(fd)
	err = unix.FsconfigSetString(fd, "source", dataset)
	if err == nil && viewed {
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
	return &mounted{root: os.NewFile(uintptr(m), dataset)}, nil
}

func (m *mounted) close() error { return m.root.Close() }

// sync has all written that was changed.
func (m *mounted) sync() error {
	f, err := os.Open(m.path("/.")) // the root's descriptor is of the kind that only names (O_PATH)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// dir is the root's path. Nobody can put another mount or a link below it that
// was not in the filesystem.
func (m *mounted) dir() string { return fmt.Sprintf("/proc/self/fd/%d", m.root.Fd()) }

func (m *mounted) path(p string) string { return m.dir() + p }

func (m *mounted) list(dir string) (map[string]file, error) {
	f, err := os.Open(m.path(dir) + "/")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	infos, err := f.Readdir(-1)
	if err != nil {
		return nil, err
	}
	files := make(map[string]file, len(infos))
	for _, i := range infos {
		if dir == "/" && i.Name() == ".zfs" {
			continue // of snapdir=visible
		}
		files[i.Name()] = fileOf(i)
	}
	return files, nil
}

func (m *mounted) stat(p string) (file, error) {
	i, err := os.Lstat(m.path(p))
	if err != nil {
		return file{}, err
	}
	return fileOf(i), nil
}

func fileOf(i os.FileInfo) file {
	st := i.Sys().(*syscall.Stat_t)
	return file{object: st.Ino, dir: i.IsDir(), links: uint64(st.Nlink)}
}
