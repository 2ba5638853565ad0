package lxc

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// hostFacts is the spec with what only this host knows filled in: the mappings of
// a user namespace that is there already. It refuses what this host cannot do.
func hostFacts(ctx context.Context, spec *specs.Spec) (*specs.Spec, error) {
	if spec == nil || spec.Linux == nil {
		return spec, nil
	}
	if spec.Linux.MountLabel != "" {
		if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
			return nil, fmt.Errorf("linux.mountLabel %q: SELinux is off on this host: %w", spec.Linux.MountLabel, errdefs.ErrFailedPrecondition)
		}
	}
	i := slices.IndexFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.UserNamespace })
	if i < 0 || spec.Linux.Namespaces[i].Path == "" {
		return spec, nil
	}
	if err := checkOwners(spec.Linux.Namespaces, i); err != nil {
		return nil, err
	}
	field, path := fmt.Sprintf("linux.namespaces[%d]", i), spec.Linux.Namespaces[i].Path
	full, linux := *spec, *spec.Linux
	full.Linux = &linux
	var err error
	if len(linux.UIDMappings) == 0 {
		if linux.UIDMappings, err = mappingsOf(ctx, path, "uid_map"); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	if len(linux.GIDMappings) == 0 {
		if linux.GIDMappings, err = mappingsOf(ctx, path, "gid_map"); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	return &full, nil
}

// checkOwners refuses namespaces that cannot be joined from within the user
// namespace that is joined as well: liblxc enters that one first.
func checkOwners(namespaces []specs.LinuxNamespace, user int) error {
	open := func(i int) (*os.File, error) {
		f, err := os.Open(namespaces[i].Path)
		if err != nil {
			return nil, fmt.Errorf("linux.namespaces[%d].path: %w: %w", i, err, errdefs.ErrInvalidArgument)
		}
		return f, nil
	}
	owner, err := open(user)
	if err != nil {
		return err
	}
	defer owner.Close()
	want, err := owner.Stat()
	if err != nil {
		return err
	}
	for i, ns := range namespaces {
		// lxc-start and pve-init enter the other two, with the host's rights or not at all.
		if i == user || ns.Path == "" || ns.Type == specs.TimeNamespace || ns.Type == specs.CgroupNamespace {
			continue
		}
		same, err := func() (bool, error) {
			f, err := open(i)
			if err != nil {
				return false, err
			}
			defer f.Close()
			fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
			if err != nil {
				// Of a user namespace that is not below ours, or no namespace at all.
				return false, nil
			}
			of := os.NewFile(uintptr(fd), "user namespace")
			defer of.Close()
			st, err := of.Stat()
			return err == nil && os.SameFile(st, want), err
		}()
		if err != nil {
			return err
		}
		if !same {
			return fmt.Errorf("linux.namespaces[%d].path: a %s namespace that does not belong to the user namespace of linux.namespaces[%d] is not supported: %w", i, ns.Type, user, errdefs.ErrNotImplemented)
		}
	}
	return nil
}

// mappingsOf reads the mappings of a user namespace, which only its processes
// show: one is put in.
func mappingsOf(ctx context.Context, path, file string) ([]specs.LinuxIDMapping, error) {
	nsenter, err := program("", "nsenter", "install util-linux for a user namespace by path")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, nsenter, "--user="+path, "--", "cat", "/proc/self/"+file)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return nil, fmt.Errorf("read the mappings of %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return parseMappings(out)
}

// parseMappings reads the text of a uid_map.
func parseMappings(text []byte) (out []specs.LinuxIDMapping, err error) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		var m specs.LinuxIDMapping
		if _, err := fmt.Sscan(lines.Text(), &m.ContainerID, &m.HostID, &m.Size); err != nil {
			return nil, fmt.Errorf("mapping %q: %w", lines.Text(), err)
		}
		out = append(out, m)
	}
	return out, lines.Err()
}

// openPaths makes sure that the container's root, who is nobody on the host, gets
// where liblxc goes as him: to the lxcpath, and into the bundle, which containerd
// opens only to whom the spec names.
func (user *userNamespace) openPaths(lxcPath, bundle string) error {
	for dir := lxcPath; dir != "/"; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if st.Mode()&0o001 == 0 {
			return fmt.Errorf("a user namespace needs to pass through %s (chmod o+x %s): %w", dir, dir, errdefs.ErrFailedPrecondition)
		}
	}
	st, err := os.Stat(bundle)
	if err != nil || st.Mode()&0o001 != 0 {
		return err
	}
	gid, _ := hostID(user.gid, 0)
	if err := os.Chown(bundle, -1, int(gid)); err != nil {
		return err
	}
	return os.Chmod(bundle, st.Mode().Perm()|0o010)
}

// asRoot calls f, which works on files alone, as the container's root.
func (user *userNamespace) asRoot(f func() error) error {
	uid, _ := hostID(user.uid, 0) // both are mapped: see mapIDs
	gid, _ := hostID(user.gid, 0)
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread stays somebody else's
		if err := unix.Setfsgid(int(gid)); err != nil {
			result <- err
			return
		}
		if err := unix.Setfsuid(int(uid)); err != nil {
			result <- err
			return
		}
		result <- f()
	}()
	return <-result
}

// raiseLimits lets a process's hard limits be what they are to become, if that
// is more: its own root cannot.
func raiseLimits(pid int, list []specs.POSIXRlimit) error {
	for _, l := range list {
		resource, ok := plan.Rlimits[l.Type]
		if !ok {
			return fmt.Errorf("process.rlimits: unknown type %q: %w", l.Type, errdefs.ErrInvalidArgument)
		}
		var limit unix.Rlimit
		err := unix.Prlimit(pid, resource, nil, &limit)
		if err == nil && limit.Max < l.Hard {
			limit.Max = l.Hard
			err = unix.Prlimit(pid, resource, &limit, nil)
		}
		if err != nil {
			return fmt.Errorf("process.rlimits: %s: %w", l.Type, err)
		}
	}
	return nil
}

// own gives pipes to the container's user: its root may not, and a program that
// opens /dev/stdout anew could not either.
func (s Stdio) own(user *userNamespace, uid uint32) error {
	if user == nil {
		return nil
	}
	owner, ok := hostID(user.uid, uid)
	if !ok {
		return fmt.Errorf("process.user.uid %d is not mapped: %w", uid, errdefs.ErrInvalidArgument)
	}
	for _, f := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
		if f == nil {
			continue
		}
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if st.Mode()&os.ModeNamedPipe == 0 {
			continue
		}
		if err := f.Chown(int(owner), -1); err != nil {
			return fmt.Errorf("give a standard stream to the container's user: %w", err)
		}
	}
	return nil
}
