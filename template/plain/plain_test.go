package plain

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

func nodeIn(t *testing.T) *Node {
	dir := t.TempDir()
	return &Node{Path: filepath.Join(dir, "lxc"), Default: filepath.Join(dir, "default.conf"), Pool: "tank/c-templates", Locks: filepath.Join(dir, "locks")}
}

func confOf(text string) func(int) (*pve.Conf, error) {
	return func(int) (*pve.Conf, error) { return pve.Parse([]byte(text)), nil }
}

const web = `arch: amd64
entrypoint: nginx -g "daemon off;"
hostname: nginx-latest
lock: create
memory: 256
rootfs: plain:basevol-100-disk-0,size=5G
swap: 256
tags: containerd-template
template: 1
lxc.signal.halt: 3
lxc.environment.runtime: A=b c
`

// TestConfig: LXC is told of a template once that is finished, in its own words.
func TestConfig(t *testing.T) {
	n := nodeIn(t)
	number, err := n.Register(t.Context(), 0, confOf(web))
	if err != nil || number != 100 {
		t.Fatal(number, err)
	}
	name := filepath.Join(n.Path, "100", "config")
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("LXC has one that is not finished: %v", err)
	}
	if err := n.Change(t.Context(), 100, func(c *pve.Conf) error { return c.SetLock("") }); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	lines := slices.DeleteFunc(strings.Split(string(got), "\n"), func(l string) bool { return strings.HasPrefix(l, "lxc.include") })
	want := "# A template that containerd-pve made: `lxc-copy -s` clones it.\n" +
		"lxc.rootfs.path = zfs:tank/c-templates/basevol-100-disk-0\nlxc.uts.name = nginx-latest\nlxc.arch = amd64\n" +
		"lxc.cgroup2.memory.max = 268435456\nlxc.cgroup2.memory.swap.max = 268435456\n" +
		`lxc.hook.pre-start = sh -c 'test "$LXC_NAME" != 100 || { echo "containerd-pve: 100 is a template: lxc-copy -n 100 -N NAME -s clones it" >&2; exit 1; }'` + "\n" +
		`lxc.hook.destroy = sh -c 'test "$LXC_NAME" != 100 || { echo "containerd-pve: 100 is a template: containerd-pve template rm 100 removes it" >&2; exit 1; }'` + "\n" +
		"lxc.init.cmd = nginx -g \"daemon off;\"\nlxc.signal.halt = 3\nlxc.environment = A=b c\n"
	if strings.Join(lines, "\n") != want {
		t.Errorf("%s\nnot\n%s", got, want)
	}
}

// TestRegister: no two have one number, and another's container is no template.
func TestRegister(t *testing.T) {
	n := nodeIn(t)
	if err := os.MkdirAll(filepath.Join(n.Path, "101"), 0o755); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var all []int
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			number, err := n.Register(t.Context(), 0, confOf(web))
			mu.Lock()
			defer mu.Unlock()
			if all = append(all, number); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	slices.Sort(all)
	if want := []int{100, 102, 103, 104, 105}; !slices.Equal(all, want) {
		t.Errorf("%v", all)
	}
	if got, err := n.Guests(); err != nil || !slices.Equal(got, all) {
		t.Errorf("%v, %v", got, err)
	}
	for want, is := range map[int]func(error) bool{101: errdefs.IsAlreadyExists, 5: errdefs.IsInvalidArgument} {
		if _, err := n.Register(t.Context(), want, confOf(web)); !is(err) {
			t.Errorf("%d: %v", want, err)
		}
	}
	if _, err := n.Register(t.Context(), 200, confOf(web+"net0: name=eth0,bridge=vmbr0\n")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a network: %v", err)
	}
	n.Range = pve.Range{Lower: 100, Upper: 102}
	if _, err := n.Register(t.Context(), 0, confOf(web)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a full range: %v", err)
	}
	failed := errors.New("no")
	for _, f := range []func() error{
		func() error { _, err := n.Read(200); return err },
		func() error { return n.Change(t.Context(), 101, func(*pve.Conf) error { return nil }) },
	} {
		if err := f(); !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
	if err := n.Change(t.Context(), 100, func(c *pve.Conf) error { return errors.Join(failed, c.Set("memory", "1024")) }); !errors.Is(err, failed) {
		t.Error(err)
	}
	if c, err := n.Read(100); err != nil || strings.Contains(string(c.Bytes()), "1024") {
		t.Errorf("a change that failed: %v", err)
	}
}

// TestRemove: nothing goes that is another's or whose dataset did not.
func TestRemove(t *testing.T) {
	n := nodeIn(t)
	if _, err := n.Register(t.Context(), 100, confOf(web)); err != nil {
		t.Fatal(err)
	}
	yes, no := func(*pve.Conf) bool { return true }, func(*pve.Conf) bool { return false }
	failed := errors.New("busy")
	if err := n.Remove(t.Context(), 100, no, nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if err := n.Remove(t.Context(), 100, yes, func(*pve.Conf) error { return failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
	if _, err := n.Read(100); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := n.Remove(t.Context(), 100, yes, func(*pve.Conf) error { return nil }); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(n.Path, "100")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
