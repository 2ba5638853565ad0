package compare

import (
	"context"
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/detached"
)

// mounted is a filesystem that no other process sees, read-only.
type mounted struct{ root *os.File }

func attach(ctx context.Context, of side) (*mounted, error) {
	root, err := detached.Mount(ctx, of.dataset, of.view)
	if err != nil {
		return nil, err
	}
	return &mounted{root: root}, nil
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

// dir is the root's path.
func (m *mounted) dir() string { return detached.Dir(m.root) }

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
	return file{object: st.Ino, dir: i.IsDir(), links: st.Nlink}
}
