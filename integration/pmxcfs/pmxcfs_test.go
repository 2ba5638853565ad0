package pmxcfs

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
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
	for _, s := range []string{"temporary", "local/x", "lxc/100.conf.tmp.7", "lxc/temporary", "qemu-server/temporary"} {
		if err := put(filepath.Join(b, s), ""); err != nil {
			t.Error(err)
		}
	}
	// No name but a conf's own takes a number.
	if list, err := os.ReadFile(filepath.Join(b, ".vmlist")); err != nil || strings.Count(string(list), `"node"`) != 1 {
		t.Errorf("%s, %v", list, err)
	}
	for what, refused := range map[string]struct {
		err  error
		want error
	}{
		"the same number":                  {put(conf, ""), unix.EEXIST},
		"the same number on another node":  {put(filepath.Join(b, "lxc", "100.conf"), ""), unix.EEXIST},
		"the same number as a VM":          {put(filepath.Join(b, "qemu-server", "100.conf"), ""), unix.EEXIST},
		"a file renamed to that number":    {os.Rename(filepath.Join(b, "lxc/temporary"), filepath.Join(b, "lxc", "100.conf")), unix.EEXIST},
		"one that is called so in part":    {os.Rename(filepath.Join(b, "lxc/100.conf.tmp.7"), filepath.Join(b, "lxc", "100.conf")), unix.EEXIST},
		"a file renamed to it as a VM":     {os.Rename(filepath.Join(b, "qemu-server/temporary"), filepath.Join(b, "qemu-server", "100.conf")), unix.EEXIST},
		"to it as a VM of the same node":   {os.Rename(filepath.Join(a, "nodes/b/qemu-server/temporary"), filepath.Join(a, "qemu-server", "100.conf")), unix.EEXIST},
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
	// What is there under the same node and type is replaced.
	if err := os.Rename(filepath.Join(a, "nodes/b/lxc/100.conf.tmp.7"), conf); err != nil {
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

// whole is a conf of which a part can be told from the whole.
var whole = "#" + strings.Repeat("a line of some length\n#", 1000) + "\ntags: containerd\nunprivileged: 1\n"

func ofWhole(int) (*pve.Conf, error) { return pve.Parse([]byte(whole)), nil }

// confs are the confs of a node, as somebody reads them who takes no lock, and the names of its other files.
func confs(t *testing.T, root, node string) (texts map[string]string, others []string) {
	t.Helper()
	dir := filepath.Join(root, "nodes", node, "lxc")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	texts = map[string]string{}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".conf") {
			others = append(others, e.Name())
			continue
		}
		text, err := readOnce(filepath.Join(dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Error(err)
		}
		texts[e.Name()] = string(text)
	}
	return texts, others
}

// readOnce reads a file by one request. pmxcfs goes by names and not by what was opened (memdb_read): the second request
// of one who reads in parts is answered from what is in place by then, whoever put it there.
func readOnce(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, 128<<10)
	n, err := f.Read(b)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return b[:n], err
}

// TestComplete: a conf is there as a whole or not at all, for whoever reads without a lock, on every node, before
// and after each change; also where the making ended halfway, after which the number can be had.
func TestComplete(t *testing.T) {
	c, a, b := mounted(t)
	ctx := context.Background()
	n := &pve.Node{Root: a, Locks: t.TempDir()}
	var ops []string
	look := func(when string) (there bool) {
		t.Helper()
		texts, _ := confs(t, b, "a")
		for name, text := range texts {
			if text != whole {
				t.Errorf("%s: %s has %d bytes, not %d", when, name, len(text), len(whole))
			}
		}
		return len(texts) > 0
	}
	for end := 1; end < 10; end++ {
		done := 0
		ops = nil
		c.SetBefore(func(op, _ string) syscall.Errno {
			look("before " + op)
			if done++; done >= end {
				return syscall.EIO // also for what would be taken back: the process is gone
			}
			ops = append(ops, op)
			return 0
		})
		_, err := n.Register(ctx, 100, ofWhole)
		c.SetBefore(nil)
		there := look("at the end")
		if err == nil {
			if !there {
				t.Error("it is not there")
			}
			break
		}
		if there || !errdefs.IsUnavailable(err) {
			t.Errorf("ended after %v: there %v, %v", ops, there, err)
		}
		if err := n.Tidy(ctx); err != nil {
			t.Error(err)
		}
		if _, others := confs(t, a, "a"); len(others) > 0 {
			t.Errorf("ended after %v: left %v", ops, others)
		}
	}
	if want := []string{"create", "write", "rename"}; !slices.Equal(ops, want) {
		t.Errorf("it is made by %v, not %v", ops, want)
	}
	if _, others := confs(t, a, "a"); len(others) > 0 {
		t.Errorf("left: %v", others)
	}

	// A change is as whole.
	before := whole
	whole = strings.Replace(whole, "tags:", "memory: 64\ntags:", 1)
	defer func() { whole = before }()
	c.SetBefore(func(op, _ string) syscall.Errno {
		if texts, _ := confs(t, b, "a"); texts["100.conf"] != before {
			t.Errorf("before %s: %d bytes, not %d", op, len(texts["100.conf"]), len(before))
		}
		return 0
	})
	if err := n.Change(ctx, 100, func(c *pve.Conf) error { return c.Set("memory", "64") }); err != nil {
		t.Error(err)
	}
	c.SetBefore(nil)
	look("after the change")
}

// TestFirst: whoever has a number first keeps it: another node's or type's guest, which the cluster's filesystem sees to, one that
// moves here meanwhile, and what somebody puts here who takes no lock.
func TestFirst(t *testing.T) {
	for name, c := range map[string]struct {
		at   string // the change before which it happens
		does func(t *testing.T, a, b string)
		asks bool // for that number; else the next is given
	}{
		"another node's":           {"rename", func(t *testing.T, _, b string) { registers(t, b) }, false},
		"another node's, asked":    {"rename", func(t *testing.T, _, b string) { registers(t, b) }, true},
		"another node's, earlier":  {"write", func(t *testing.T, _, b string) { registers(t, b) }, true},
		"a VM":                     {"rename", func(t *testing.T, _, b string) { puts(t, b, "qemu-server/100.conf") }, false},
		"a VM of this node":        {"rename", func(t *testing.T, _, b string) { puts(t, b, "nodes/a/qemu-server/100.conf") }, false},
		"put here without a lock":  {"write", func(t *testing.T, _, b string) { puts(t, b, "nodes/a/lxc/100.conf") }, true},
		"put here, another number": {"write", func(t *testing.T, _, b string) { puts(t, b, "nodes/a/lxc/100.conf") }, false},
		"one that moves here": {"write", func(t *testing.T, _, b string) {
			puts(t, b, "lxc/100.conf")
			if err := os.Rename(filepath.Join(b, "lxc/100.conf"), filepath.Join(b, "nodes/a/lxc/100.conf")); err != nil {
				t.Error(err)
			}
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, a, b := mounted(t)
			cluster.SetBefore(func(op, p string) syscall.Errno {
				if op == c.at && strings.HasPrefix(p, "nodes/a/lxc/100.conf") {
					cluster.SetBefore(nil) // what it does is not looked at
					c.does(t, a, b)
				}
				return 0
			})
			n := &pve.Node{Root: a, Locks: t.TempDir()}
			want := 0
			if c.asks {
				want = 100
			}
			vmid, err := n.Register(context.Background(), want, ofWhole)
			if c.asks && !errdefs.IsAlreadyExists(err) || !c.asks && (err != nil || vmid != 101) {
				t.Errorf("%d, %v", vmid, err)
			}
			t.Log(err)
			here, others := confs(t, a, "a")
			if len(others) > 0 || here["100.conf"] == whole || c.asks != (here["101.conf"] == "") {
				t.Errorf("left: %d confs, %v", len(here), others)
			}
			messages := cluster.Messages()
			if _, err := n.Register(context.Background(), 100, ofWhole); !errdefs.IsAlreadyExists(err) || cluster.Messages() != messages {
				t.Errorf("asked for again: %v, by %d messages", err, cluster.Messages()-messages)
			}
		})
	}
}

func registers(t *testing.T, root string) {
	t.Helper()
	n := &pve.Node{Root: root, Locks: t.TempDir()}
	if vmid, err := n.Register(context.Background(), 100, func(int) (*pve.Conf, error) { return pve.Parse([]byte("tags: other\n")), nil }); err != nil || vmid != 100 {
		t.Errorf("the other node: %d, %v", vmid, err)
	}
}

func puts(t *testing.T, root, name string) {
	t.Helper()
	if err := put(filepath.Join(root, name), "tags: other\n"); err != nil {
		t.Error(err)
	}
}

// TestTidy: what was left of a conf that was not put in place goes, and nothing else.
func TestTidy(t *testing.T) {
	c, a, _ := mounted(t)
	ctx := context.Background()
	n := &pve.Node{Root: a, Locks: t.TempDir()}
	keep := []string{"100.conf.tmp.123", "100.conf.tmp.containerd-pve.x", "x.conf.tmp.containerd-pve", "0100.conf.tmp.containerd-pve", ".tmp-100.conf7", "notes"}
	for _, name := range append([]string{"100.conf.tmp.containerd-pve", "200.conf.tmp.containerd-pve"}, keep...) {
		puts(t, a, "lxc/"+name)
	}
	// One of them is being written.
	made := make(chan error)
	c.SetBefore(func(op, _ string) syscall.Errno {
		if op != "rename" {
			return 0
		}
		c.SetBefore(nil)
		tidy, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		if err := n.Tidy(tidy); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("while it is written: %v", err)
		}
		return 0
	})
	go func() {
		_, err := n.Register(ctx, 200, ofWhole)
		made <- err
	}()
	if err := <-made; err != nil {
		t.Error(err)
	}
	if err := n.Tidy(ctx); err != nil {
		t.Error(err)
	}
	texts, others := confs(t, a, "a")
	slices.Sort(keep)
	slices.Sort(others)
	if !slices.Equal(others, keep) || len(texts) != 1 || texts["200.conf"] != whole {
		t.Errorf("left: %v", others)
	}
	messages := c.Messages()
	if err := n.Tidy(ctx); err != nil || c.Messages() != messages {
		t.Errorf("nothing is to do: %v, %d messages", err, c.Messages()-messages)
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
	// Somebody who takes no lock reads meanwhile.
	reading, stop := make(chan struct{}), make(chan struct{})
	reads := 0
	go func() {
		defer close(reading)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for i, node := range []string{"a", "b"} {
				texts, _ := confs(t, []string{b, a}[i], node)
				for name, text := range texts {
					if reads++; !strings.HasSuffix(text, "tags: containerd\n") {
						t.Errorf("%s is %q", name, text)
					}
				}
			}
		}
	}()
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
	close(stop)
	<-reading
	t.Logf("%d reads", reads)
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
