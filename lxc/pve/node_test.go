package pve

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// newNode is a node on a plain directory; what the cluster's filesystem refuses
// is tried in the test bed.
func newNode(t *testing.T, vmlist string) *Node {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{".vmlist": vmlist} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(root, "nodes/self/lxc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nodes/self/lxc", filepath.Join(root, "lxc")); err != nil {
		t.Fatal(err)
	}
	return &Node{Root: root, Locks: filepath.Join(t.TempDir(), "locks")}
}

func (n *Node) put(t *testing.T, vmid int, text string) {
	t.Helper()
	if err := os.WriteFile(n.conf(vmid), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func tagged(int) (*Conf, error) { return Parse([]byte("tags: containerd\n")), nil }

// TestRegister: the first that is free of all that the cluster knows.
func TestRegister(t *testing.T) {
	ctx := context.Background()
	n := newNode(t, `{"version": 7, "ids": {"100": {"node": "a", "type": "qemu", "version": 1}, "102": {"node": "b", "type": "lxc", "version": 2}}}`)
	n.put(t, 101, "") // not in the list yet
	for _, want := range []int{103, 104} {
		vmid, err := n.Register(ctx, 0, func(vmid int) (*Conf, error) {
			return Parse(fmt.Appendf(nil, "rootfs: tank:subvol-%d-disk-0\ntags: containerd\n", vmid)), nil
		})
		if err != nil || vmid != want {
			t.Fatalf("%d, %v, not %d", vmid, err, want)
		}
		conf, err := n.Read(vmid)
		if err != nil {
			t.Fatal(err)
		}
		if v, _ := conf.Get("rootfs"); v != fmt.Sprintf("tank:subvol-%d-disk-0", want) {
			t.Errorf("rootfs %q", v)
		}
	}
	if vmid, err := n.Register(ctx, 5000, tagged); err != nil || vmid != 5000 {
		t.Errorf("%d, %v", vmid, err)
	}
	if ours, err := n.Ours(); err != nil || !slices.Equal(ours, []int{103, 104, 5000}) {
		t.Errorf("ours: %v, %v", ours, err)
	}
	for want, is := range map[int]func(error) bool{5000: errdefs.IsAlreadyExists, 99: errdefs.IsInvalidArgument, 1_000_000_000: errdefs.IsInvalidArgument} {
		if _, err := n.Register(ctx, want, tagged); !is(err) {
			t.Errorf("%d: %v", want, err)
		}
	}
	n.Range = Range{103, 105}
	if _, err := n.Register(ctx, 0, tagged); !errdefs.IsResourceExhausted(err) {
		t.Errorf("no id is left: %v", err)
	}
	stop := errors.New("stop")
	if _, err := n.Register(ctx, 7000, func(int) (*Conf, error) { return nil, stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	if _, err := n.Read(7000); !errdefs.IsNotFound(err) {
		t.Errorf("a conf that could not be made is there: %v", err)
	}
}

// TestRegisterMany: a hundred at once get a hundred.
func TestRegisterMany(t *testing.T) {
	n := newNode(t, `{"ids": {}}`)
	var mu sync.Mutex
	var got []int
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			other := *n // as another process has it
			vmid, err := other.Register(context.Background(), 0, tagged)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			got = append(got, vmid)
			mu.Unlock()
		})
	}
	all.Wait()
	slices.Sort(got)
	if len(slices.Compact(got)) != 100 || got[0] != 100 {
		t.Errorf("%v", got)
	}
}

func TestChangeAndRemove(t *testing.T) {
	ctx := context.Background()
	n := newNode(t, `{"ids": {}}`)
	const text = "#note\nmemory: 512\ntags: web;containerd\n"
	n.put(t, 200, text)
	set := func(c *Conf) error { return c.Set("memory", "64") }
	if err := n.Change(ctx, 200, set); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(n.conf(200)); string(b) != strings.Replace(text, "512", "64", 1) {
		t.Errorf("%q", b)
	}
	var before, after unix.Stat_t
	_ = unix.Stat(n.conf(200), &before)
	if err := n.Change(ctx, 200, set); err != nil {
		t.Fatal(err)
	}
	if _ = unix.Stat(n.conf(200), &after); before.Ino != after.Ino {
		t.Error("what was not changed was written")
	}
	if err := n.Change(ctx, 300, set); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	mine := func(*Conf) bool { return true }
	none := func(*Conf) error { return nil }
	if err := n.Remove(ctx, 200, func(*Conf) bool { return false }, none); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	stop := errors.New("stop")
	if err := n.Remove(ctx, 200, mine, func(*Conf) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	n.put(t, 201, "lock: backup\n")
	if err := n.Remove(ctx, 201, mine, none); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "pct unlock 201") {
		t.Error(err)
	}
	for range 2 { // the second time it is gone
		if err := n.Remove(ctx, 200, mine, none); err != nil {
			t.Error(err)
		}
	}

	// While one of Proxmox's tools changes it, nobody else does.
	n.put(t, 202, text)
	lock, err := os.OpenFile(filepath.Join(n.Locks, "pve-config-202.lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 3*lockPause)
	defer cancel()
	if err := n.Change(short, 202, set); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a locked conf: %v", err)
	}
	fd := int(lock.Fd())
	time.AfterFunc(2*lockPause, func() { _ = unix.Flock(fd, unix.LOCK_UN) })
	if err := n.Change(ctx, 202, set); err != nil {
		t.Error(err)
	}
}

func TestParseRange(t *testing.T) {
	for text, want := range map[string]Range{
		"":                           {100, 1000000},
		"keyboard: de\n":             {100, 1000000},
		"next-id: lower=1000":        {1000, 1000000},
		"a: b\nnext-id: upper=900\n": {100, 900},
		"next-id: lower=7000,upper=8000 \nmigration: secure": {7000, 8000},
	} {
		if got, err := parseRange([]byte(text)); err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"next-id: x", "next-id: lower=99", "next-id: lower=200,upper=200", "next-id: upper=1000000001", "next-id: lower=a"} {
		if _, err := parseRange([]byte(text)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
