package pmxcfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// mounted is a cluster with the mounts of the nodes a and b.
func mounted(t *testing.T) (c *Cluster, a, b string) {
	t.Helper()
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil || os.Getuid() != 0 {
		t.Skipf("no FUSE here, or not root: %v", err)
	} else {
		f.Close()
	}
	c = New([]string{"a", "b"})
	var dirs []string
	for _, name := range []string{"a", "b"} {
		dir := t.TempDir()
		unmount, err := c.Mount(name, dir)
		if err != nil {
			t.Skipf("FUSE cannot be mounted here: %v", err)
		}
		t.Cleanup(func() {
			if err := unmount(); err != nil {
				t.Error(err)
			}
		})
		dirs = append(dirs, dir)
	}
	return c, dirs[0], dirs[1]
}

func put(name, text string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// TestRefuses: what the real one refuses, by the same error.
func TestRefuses(t *testing.T) {
	c, a, b := mounted(t)
	conf := filepath.Join(a, "lxc", "100.conf")
	if err := put(conf, "memory: 512\n"); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(b, "nodes", "a", "lxc", "100.conf")); err != nil || string(text) != "memory: 512\n" {
		t.Errorf("the other node reads %q, %v", text, err)
	}
	for _, s := range []string{"temporary", "local/x"} {
		if err := put(filepath.Join(b, s), ""); err != nil {
			t.Error(err)
		}
	}
	for what, refused := range map[string]struct {
		err  error
		want error
	}{
		"the same number":                  {put(conf, ""), unix.EEXIST},
		"the same number on another node":  {put(filepath.Join(b, "lxc", "100.conf"), ""), unix.EEXIST},
		"the same number as a VM":          {put(filepath.Join(b, "qemu-server", "100.conf"), ""), unix.EEXIST},
		"a file renamed to that number":    {os.Rename(filepath.Join(b, "temporary"), filepath.Join(b, "lxc", "100.conf")), unix.EEXIST},
		"a symbolic link":                  {os.Symlink("x", filepath.Join(a, "s")), unix.ENOSYS},
		"a FIFO":                           {unix.Mkfifo(filepath.Join(a, "f"), 0o600), unix.ENOSYS},
		"an attribute":                     {unix.Setxattr(conf, "user.x", []byte("x"), 0), unix.ENOTSUP},
		"another mode":                     {os.Chmod(conf, 0o644), unix.EPERM},
		"another owner":                    {os.Chown(conf, 1, -1), unix.EPERM},
		"another group":                    {os.Chown(conf, -1, 0), unix.EPERM},
		"more than 1 MiB":                  {put(filepath.Join(a, "big"), strings.Repeat("x", maxFile+1)), unix.EFBIG},
		"a directory that is not empty":    {os.Remove(filepath.Join(a, "nodes")), unix.ENOTEMPTY},
		"a write to what is made":          {os.WriteFile(filepath.Join(a, ".vmlist"), []byte("x"), 0o600), nil},
		"renamed without replacing":        {unix.Renameat2(unix.AT_FDCWD, filepath.Join(b, "temporary"), unix.AT_FDCWD, filepath.Join(b, "t2"), unix.RENAME_NOREPLACE), unix.EINVAL},
		"a file in a directory that is no": {put(filepath.Join(a, "none", "x"), ""), unix.ENOENT},
	} {
		if refused.err == nil || refused.want != nil && !errors.Is(refused.err, refused.want) {
			t.Errorf("%s: %v, not %v", what, refused.err, refused.want)
		}
	}
	if err := os.Chmod(conf, 0o640); err != nil {
		t.Error(err)
	}

	c.SetQuorum(false)
	if err := os.WriteFile(conf, []byte("x"), 0o640); !errors.Is(err, unix.EACCES) {
		t.Errorf("without a quorum: %v", err)
	}
	if err := put(filepath.Join(a, "lxc", "200.conf"), ""); !errors.Is(err, unix.EACCES) {
		t.Errorf("without a quorum: %v", err)
	}
	c.SetQuorum(true)
	if err := os.Rename(conf, filepath.Join(a, "nodes", "b", "lxc", "100.conf")); err != nil {
		t.Errorf("to the other node: %v", err)
	}
}

// TestNode: two nodes' processes register, change and remove at once, and no
// number is given twice.
func TestNode(t *testing.T) {
	c, a, b := mounted(t)
	ctx := context.Background()
	locks := map[string]string{a: t.TempDir(), b: t.TempDir()}
	var mu sync.Mutex
	var got []int
	var all sync.WaitGroup
	for i := range 100 {
		root := []string{a, b}[i%2]
		all.Go(func() {
			n := &pve.Node{Root: root, Locks: locks[root]}
			vmid, err := n.Register(ctx, 0, func(int) (*pve.Conf, error) { return pve.Parse([]byte("tags: containerd\n")), nil })
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			got = append(got, vmid)
			mu.Unlock()
			if err := n.Change(ctx, vmid, func(c *pve.Conf) error { return c.Set("memory", "64") }); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	slices.Sort(got)
	if distinct := slices.Compact(slices.Clone(got)); len(distinct) != 100 {
		t.Errorf("%d numbers for 100: %v", len(distinct), got)
	}
	// A node that was renamed finds what is below its old name.
	renamed := t.TempDir()
	unmount, err := c.Mount("renamed", renamed)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	}()
	c.Leave("b")
	n := &pve.Node{Root: renamed, Locks: locks[b]}
	if self, err := n.Name(); err != nil || self != "renamed" {
		t.Errorf("its name is %q, %v", self, err)
	}
	for name, member := range map[string]bool{"a": true, "b": false, "renamed": true} {
		if got, err := n.IsMember(name); err != nil || got != member {
			t.Errorf("%s is a member: %v, %v", name, got, err)
		}
	}
	moved, err := os.ReadDir(filepath.Join(b, "lxc"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range moved {
		vmid, err := strconv.Atoi(strings.TrimSuffix(e.Name(), ".conf"))
		if err != nil {
			t.Fatal(err)
		}
		if at, err := n.Where(vmid); err != nil || at != "b" {
			t.Errorf("VMID %d is at %q, %v", vmid, at, err)
		}
		if err := n.Fetch(ctx, vmid, "b"); err != nil {
			t.Error(err)
		}
	}
	locks[renamed] = locks[b]
	total := 0
	for root, dir := range locks {
		n := &pve.Node{Root: root, Locks: dir}
		ours, err := n.Ours()
		if err != nil {
			t.Fatal(err)
		}
		total += len(ours)
		for _, vmid := range ours {
			conf, err := n.Read(vmid)
			if err != nil {
				t.Fatal(err)
			}
			if v, _ := conf.Get("memory"); v != "64" {
				t.Errorf("VMID %d: %s", vmid, conf.Bytes())
			}
			if err := n.Remove(ctx, vmid, func(*pve.Conf) bool { return true }, func(*pve.Conf) error { return nil }); err != nil {
				t.Error(err)
			}
		}
	}
	if total != 100 {
		t.Errorf("%d confs", total)
	}
	if left, err := os.ReadDir(filepath.Join(a, "nodes", "b", "lxc")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
