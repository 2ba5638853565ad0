package main

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/integration/testbed/build"
)

//go:embed host.sh
var hostScript string

// hostSetup makes what the tests need and a host has not: containerd of our version, and the registry with its images.
func (b *bed) hostSetup(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("TESTBED=host needs root")
	}
	for _, program := range []string{"zpool", "lxc-start", "unshare", "ip", "curl"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("TESTBED=host: this host has no %s", program)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		return errors.New("TESTBED=host: /sys/fs/cgroup is no cgroup v2")
	}
	if out, err := exec.CommandContext(ctx, "modprobe", "zfs").CombinedOutput(); err != nil {
		return fmt.Errorf("TESTBED=host: the ZFS module cannot be loaded: %w\n%s", err, out)
	}
	parts, err := build.NewBed(b.cache, b.repo, build.FromEnv())
	if err != nil {
		return err
	}
	b.parts = parts
	for _, s := range parts.Host {
		if b.cache.Ready(s) {
			continue
		}
		if err := build.HostPackages(ctx, func(s string) { fmt.Fprintln(b.cache.Progress, "testbed:", s) }); err != nil {
			return err
		}
		if err := b.cache.Build(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// testOnHost runs one package's tests here, in namespaces, a cgroup and a pool (in a file) of their own.
func (b *bed) testOnHost(ctx context.Context, p *job, programs []string) (ok bool, err error) {
	dir, err := os.MkdirTemp("/var/tmp", "bed-host-")
	if err != nil {
		return false, err
	}
	name := filepath.Base(dir)
	cgroup := filepath.Join("/sys/fs/cgroup", name)
	var undo []func() error
	defer func() {
		for i := len(undo) - 1; i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()
	undo = append(undo, func() error { return os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return false, err
	}
	if err := b.hostTree(dir, p.testPackage, programs); err != nil {
		return false, err
	}
	sh := func(script string) error {
		out, err := exec.CommandContext(context.WithoutCancel(ctx), "sh", "-euc", script).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s: %w\n%s", script, err, out)
		}
		return err
	}
	if err := sh("truncate -s 8G " + dir + "/pool.img && zpool create -O mountpoint=" + dir + "/pool -O compression=lz4 " +
		"-O atime=off -O xattr=sa -O acltype=posixacl " + name + " " + dir + "/pool.img"); err != nil {
		return false, err
	}
	undo = append(undo, func() error { return sh("zpool destroy -f " + name) })
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return false, err
	}
	undo = append(undo, func() error { return removeCgroup(cgroup) })
	undo = append(undo, func() error { return removeMade(filepath.Join(dir, "made")) })

	limited, cancel, err := limit(ctx, perPackage)
	if err != nil {
		return false, err
	}
	defer cancel()
	group, err := os.Open(cgroup)
	if err != nil {
		return false, err
	}
	defer group.Close()
	deadline, _ := limited.Deadline()
	// The cgroup becomes the root of a cgroup namespace first, and is left then: one with processes in it can
	// delegate no controllers, and the outer unshare cannot be moved from within its own pid namespace.
	args := append([]string{"--cgroup", "sh", "-euc", `mkdir "$1/init.scope"; echo 0 >"$1/init.scope/cgroup.procs"; shift; exec "$@"`, "sh", cgroup,
		"unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "bash", "-c", hostScript, "host.sh"},
		p.argv("./bed.test", time.Until(deadline))...)
	cmd := exec.CommandContext(limited, "unshare", args...)
	cmd.Stdout, cmd.Stderr = p.out, p.out
	cmd.Env = append(os.Environ(), "T="+dir, "POOL="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	err = cmd.Run()
	var exit *exec.ExitError
	if limited.Err() != nil && ctx.Err() == nil {
		return false, errors.New("time limit reached; everything the tests started here is ended")
	}
	if errors.As(err, &exit) {
		return false, nil
	}
	return err == nil, err
}

// hostTree lays out what host.sh puts over the host's own directories.
func (b *bed) hostTree(dir string, p *testPackage, programs []string) error {
	script := `set -eu
mkdir -p "$T/tree/usr/local/bin" "$T/tree/usr/local/sbin" "$T/tree/opt/containerd-2.2/bin" "$T/test" "$T/pool"
cp "$CONTAINERD"/* "$CRANE"/* "$T/tree/usr/local/bin/"
cp "$CONTAINERD22"/* "$T/tree/opt/containerd-2.2/bin/"
cp -a "$ROOTFS/root/opt/containerd-1.7" "$T/tree/opt/"
cp -a "$IMAGES/registry" "$T/registry"
install -m 755 integration/testbed/guest/stack integration/testbed/guest/bed-registry "$T/tree/usr/local/sbin/"
cp "$TEST" "$T/test/bed.test"
[ ! -d "$DATA" ] || cp -a "$DATA" "$T/test/testdata"
[ $# = 0 ] || cp "$@" "$T/tree/usr/local/bin/"`
	cmd := exec.Command("sh", append([]string{"-c", script, "sh"}, programs...)...)
	cmd.Dir = b.repo
	cmd.Env = append(os.Environ(), "T="+dir, "TEST="+p.binary, "DATA="+filepath.Join(p.Dir, "testdata"))
	for _, s := range b.parts.Host {
		cmd.Env = append(cmd.Env, strings.ToUpper(s.Name)+"="+b.cache.Path(s))
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("lay out %s: %w\n%s", dir, err, out)
	}
	return nil
}

// removeCgroup removes a cgroup and those below it, once their last processes are reaped.
func removeCgroup(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil {
		return err
	}
	var err error
	for range 200 {
		var dirs []string
		err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return err
		})
		for i := len(dirs) - 1; i >= 0 && err == nil; i-- {
			err = unix.Rmdir(dirs[i])
		}
		if err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("remove cgroup %s: %w", dir, err)
}

// removeMade removes the mount points that host.sh had to make; what somebody else used meanwhile stays.
func removeMade(list string) error {
	data, err := os.ReadFile(list)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		info, err := os.Lstat(s.Text())
		if err == nil && (info.IsDir() || info.Size() == 0) {
			err = os.Remove(s.Text())
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return nil
}
