package lxc

import (
	"os"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// TestPrepareTrees: what the mount hook gets from the host. Any program serves as
// pve-init here: it is not run.
func TestPrepareTrees(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root makes mounts and device nodes")
	}
	program, err := openInitProgram("/proc/self/exe")
	if err != nil {
		t.Skipf("this sandbox lets no mount be cloned: %v", err)
	}
	defer program.file.Close()
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	if err := os.WriteFile(source, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	ids := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	mode, group := os.FileMode(0o640), uint32(5)
	tr := &translation{user: &userNamespace{uid: ids, gid: ids}, mounts: &plan.Mounts{
		Mounts: []plan.Mount{
			{Mount: specs.Mount{Destination: "/proc", Type: "proc"}},
			{Mount: specs.Mount{Destination: "/a", Type: "bind", Source: source, Options: []string{"ro", "nosuid"}}},
			{Mount: specs.Mount{Destination: "/sys", Type: "sysfs"}},
			{Mount: specs.Mount{Destination: "/b", Type: "bind", Source: dir, Options: []string{"idmap"}}},
		},
		Devices: []plan.Device{{LinuxDevice: specs.LinuxDevice{Path: "/dev/null", Type: "c", Major: 1, Minor: 3, FileMode: &mode, GID: &group}}},
	}}
	attached := filepath.Join(dir, "attached")
	if err := os.Mkdir(attached, 0o700); err != nil {
		t.Fatal(err)
	}
	ts, err := prepareTrees(tr, program, attached)
	if err != nil {
		t.Fatal(err)
	}
	defer ts.close()
	m := tr.mounts.Mounts
	if m[0].Tree != 0 || m[0].Instead != 0 || m[1].Tree != 1 || m[2].Tree != 0 || m[2].Instead != 2 || m[3].Tree != 3 {
		t.Errorf("%+v", m)
	}
	stat := func(number int) (st unix.Stat_t) {
		t.Helper()
		if err := unix.Fstat(int(ts.files[number-1].Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(ts.files[0].Fd()), &fs); err != nil || fs.Flags&(unix.ST_RDONLY|unix.ST_NOSUID) != unix.ST_RDONLY|unix.ST_NOSUID {
		t.Errorf("flags of a bind: %#x, %v", fs.Flags, err)
	}
	if st := stat(m[3].Tree); st.Uid != 100000 || st.Gid != 100000 {
		t.Errorf("id-mapped: %d:%d", st.Uid, st.Gid)
	}
	devices := tr.mounts.Devices
	if len(devices) != 6 {
		t.Fatalf("%d devices: %+v", len(devices), devices)
	}
	if st := stat(devices[0].Tree); st.Mode != unix.S_IFCHR|0o640 || st.Rdev != unix.Mkdev(1, 3) || st.Uid != 100000 || st.Gid != 100005 {
		t.Errorf("the spec's null: %+v", st)
	}
	if st := stat(devices[1].Tree); st.Mode != unix.S_IFCHR|0o666 || st.Uid != 100000 {
		t.Errorf("%s: %+v", devices[1].Path, st)
	}
	if left, err := os.ReadDir(attached); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestUnreadable: the copy that enters a user namespace can be executed, and
// neither read by others nor written by anybody.
func TestUnreadable(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root clones a mount")
	}
	program, err := openInitProgram("/proc/self/exe")
	if err != nil {
		t.Skipf("this sandbox lets no mount be cloned: %v", err)
	}
	defer program.file.Close()
	f, err := program.unreadable()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	again, err := program.unreadable()
	if err != nil || again != f {
		t.Errorf("a second copy was made: %v", err)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o111 || st.Size() != self.Size() {
		t.Errorf("mode %s, %d bytes; want 0111, %d", st.Mode(), st.Size(), self.Size())
	}
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("it can be written")
	}
}
