package lxc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/tree"
)

// trees are detached mounts that the mount hook attaches. They are made here, on
// the host, as it takes the host's rights to come by some sources, to map ids
// and to make device nodes for a user namespace, and the host's mounts to stay
// in their peer groups.
type trees struct {
	program *initProgram
	files   []*os.File
	users   []mappedUsers
}

// mappedUsers is a user namespace that is there for its mappings alone.
type mappedUsers struct {
	uid, gid []specs.LinuxIDMapping
	file     *os.File
}

// add takes the descriptor over and returns its number in the plan.
func (ts *trees) add(fd int, name string) int {
	ts.files = append(ts.files, os.NewFile(uintptr(fd), name))
	return len(ts.files)
}

func (ts *trees) close() {
	for _, f := range ts.files {
		f.Close()
	}
	for _, u := range ts.users {
		u.file.Close()
	}
}

// prepareTrees makes all trees of the plan and notes their numbers in it.
func prepareTrees(t *translation, program *initProgram, dir string) (_ *trees, retErr error) {
	ts := &trees{program: program}
	defer func() {
		if retErr != nil {
			ts.close()
		}
	}()
	for i := range t.mounts.Mounts {
		m := &t.mounts.Mounts[i]
		if err := ts.prepareMount(m, t.user); err != nil {
			return nil, fmt.Errorf("mounts[%d] (%s): %w", i, m.Destination, typedReason(err))
		}
	}
	if t.user != nil {
		if err := ts.prepareDevices(t, dir); err != nil {
			return nil, typedReason(err)
		}
	}
	return ts, nil
}

// typedReason is err, with the kind of errdefs if it is package tree's.
func typedReason(err error) error {
	var e *plan.Error
	if errors.As(err, &e) {
		return typed(e)
	}
	return err
}

// prepareMount makes the tree of one mount, unless it belongs to a namespace of
// the container.
func (ts *trees) prepareMount(m *plan.Mount, user *userNamespace) error {
	o := tree.Parse(&m.Mount)
	if o.Remount {
		return nil
	}
	here := o.Bind || user != nil && !tree.OfNamespace(m.Type)
	if !here {
		if o.IDMap {
			return fmt.Errorf("option idmap: a %s cannot be mapped: %w", m.Type, errdefs.ErrInvalidArgument)
		}
		if m.Type == "sysfs" && user != nil {
			// It shows a network namespace, which may be another user namespace's.
			fd, err := tree.Clone(unix.AT_FDCWD, "/sys", true)
			if err != nil {
				return err
			}
			m.Instead = ts.add(fd, "/sys")
			if err := tree.ReadOnly(fd); err != nil {
				return fmt.Errorf("/sys of the host, read-only: %w", err)
			}
			return tree.Propagate(fd, tree.SlaveBelow)
		}
		return nil
	}
	var fd int
	var err error
	if o.Bind {
		fd, err = tree.Clone(unix.AT_FDCWD, m.Source, o.Recursive)
	} else {
		fd, err = tree.New(&m.Mount, &o)
	}
	if err != nil {
		return err
	}
	m.Tree = ts.add(fd, m.Source)
	// The clone is in the peer group of the host's mount, where only those stay
	// that ask for it; and none that is another user's to mount in.
	if shared, _ := o.Shared(); !shared || user != nil {
		if err := tree.Propagate(fd, tree.SlaveBelow); err != nil {
			return err
		}
	}
	if o.IDMap {
		userns, err := ts.mappedUsers(&m.Mount, user)
		if err != nil {
			return err
		}
		if err := tree.MapIDs(fd, int(userns.Fd()), o.IDMapBelow); err != nil {
			return err
		}
	}
	return o.Apply(fd)
}

// mappedUsers is a user namespace with the mount's mapping, or else the container's.
func (ts *trees) mappedUsers(m *specs.Mount, user *userNamespace) (*os.File, error) {
	u := mappedUsers{uid: m.UIDMappings, gid: m.GIDMappings}
	if len(u.uid) == 0 {
		u.uid, u.gid = user.uid, user.gid
	}
	for _, have := range ts.users {
		if reflect.DeepEqual(have.uid, u.uid) && reflect.DeepEqual(have.gid, u.gid) {
			return have.file, nil
		}
	}
	var err error
	if u.file, err = newUserNamespace(ts.program, u.uid, u.gid); err != nil {
		return nil, fmt.Errorf("a user namespace with the mount's mapping: %w", err)
	}
	ts.users = append(ts.users, u)
	return u.file, nil
}

// newUserNamespace makes a user namespace. It takes a process to make one; this
// one is stopped before its first instruction, and ended.
func newUserNamespace(program *initProgram, uid, gid []specs.LinuxIDMapping) (*os.File, error) {
	ids := func(list []specs.LinuxIDMapping) (out []syscall.SysProcIDMap) {
		for _, m := range list {
			out = append(out, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
		}
		return out
	}
	// A traced process belongs to the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p, err := os.StartProcess(fmt.Sprintf("/proc/self/fd/%d", program.file.Fd()), []string{"pve-init"}, &os.ProcAttr{
		Env: []string{},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: ids(uid), GidMappings: ids(gid),
			Ptrace: true,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", p.Pid))
	killErr := p.Kill()
	_, waitErr := p.Wait()
	if err := errors.Join(err, killErr, waitErr); err != nil {
		if f != nil {
			f.Close()
		}
		return nil, err
	}
	return f, nil
}

// prepareDevices makes the nodes that a container's root may not make, the
// default ones among them, in a tmpfs of the host's that is attached nowhere
// any more. dir is where it is attached meanwhile, for this thread alone.
func (ts *trees) prepareDevices(t *translation, dir string) error {
	devices := t.mounts.Devices
next:
	for _, d := range tree.DefaultDevices {
		for i := range devices {
			if devices[i].Path == d.Path {
				continue next
			}
		}
		devices = append(devices, plan.Device{LinuxDevice: d})
	}
	t.mounts.Devices = devices
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: it is in a mount namespace of its own
		result <- ts.makeNodes(t, dir)
	}()
	return <-result
}

func (ts *trees) makeNodes(t *translation, dir string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make / a slave: %w", err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=711,size=64k"); err != nil {
		return fmt.Errorf("a tmpfs for device nodes: %w", err)
	}
	unix.Umask(0)
	for i := range t.mounts.Devices {
		d := &t.mounts.Devices[i]
		fd, err := makeNode(filepath.Join(dir, strconv.Itoa(i)), &d.LinuxDevice, t.user)
		if err != nil {
			return fmt.Errorf("linux.devices: %s: %w", d.Path, err)
		}
		d.Tree = ts.add(fd, d.Path)
	}
	return nil
}

// makeNode makes a device node with its mode and owner.
func makeNode(path string, d *specs.LinuxDevice, user *userNamespace) (int, error) {
	mode, number, ok := tree.Node(d)
	if !ok {
		return -1, fmt.Errorf("unknown type %q: %w", d.Type, errdefs.ErrInvalidArgument)
	}
	var owner [2]uint32
	for i, o := range []struct {
		field string
		id    *uint32
		in    []specs.LinuxIDMapping
	}{{"uid", d.UID, user.uid}, {"gid", d.GID, user.gid}} {
		var id uint32
		if o.id != nil {
			id = *o.id
		}
		if owner[i], ok = hostID(o.in, id); !ok {
			return -1, fmt.Errorf("%s %d is not mapped: %w", o.field, id, errdefs.ErrInvalidArgument)
		}
	}
	if err := unix.Mknod(path, mode, int(number)); err != nil {
		return -1, fmt.Errorf("mknod: %w", err)
	}
	if err := unix.Lchown(path, int(owner[0]), int(owner[1])); err != nil {
		return -1, fmt.Errorf("chown: %w", err)
	}
	return tree.Clone(unix.AT_FDCWD, path, false)
}
