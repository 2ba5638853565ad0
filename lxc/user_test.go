package lxc

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/tree"
)

// TestMakeDev: a root that its mount maps, and that lacks /dev, gets it from the container's root.
func TestMakeDev(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root maps mounts")
	}
	mapping := specs.LinuxIDMapping{HostID: 200000, Size: 65536}
	cmd := exec.Command("sleep", "1000")
	ids := []syscall.SysProcIDMap{{HostID: int(mapping.HostID), Size: int(mapping.Size)}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	if err := cmd.Start(); err != nil {
		t.Skipf("this kernel or sandbox lets no user namespace with mappings be made: %v", err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	users, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer users.Close()
	base := t.TempDir()
	// As containerd's bundles: others may pass.
	for dir := base; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", base, "tmpfs", 0, "mode=755"); err != nil {
		t.Skipf("no mounts here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(base, unix.MNT_DETACH) })
	from, root := filepath.Join(base, "from"), filepath.Join(base, "root")
	for _, dir := range []string{from, root} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := tree.Clone(unix.AT_FDCWD, from, false)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := tree.MapIDs(fd, int(users.Fd()), false); err != nil {
		t.Skipf("no mapped mounts here: %v", err)
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, root, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	list := []specs.LinuxIDMapping{mapping}
	if err := makeDev(root, nil); !errors.Is(err, unix.EOVERFLOW) {
		t.Errorf("as the host's root: %v", err)
	}
	for range 2 { // also when it is there
		if err := makeDev(root, &userNamespace{uid: list, gid: list}); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(filepath.Join(from, "dev"))
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != 0 || st.Sys().(*syscall.Stat_t).Gid != 0 {
		t.Errorf("/dev: %+v, %v", st, err)
	}
}
