package registry

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// sweep sweeps; only the containers of these ids are there.
func (r *Registry) sweep(t *testing.T, ids ...string) {
	t.Helper()
	err := r.Sweep(context.Background(), func(_ context.Context, _, id string) (bool, error) { return slices.Contains(ids, id), nil })
	if err != nil {
		t.Error(err)
	}
}

func (r *Registry) register(t *testing.T, id, dataset string) int {
	t.Helper()
	a, err := r.Register(context.Background(), 0, container(id), Disk{Dataset: dataset})
	if err != nil {
		t.Fatal(err)
	}
	return a.VMID
}

func (r *Registry) confFile(vmid string) string {
	return filepath.Join(r.node.Root, "lxc", vmid+".conf")
}

func (r *Registry) has(t *testing.T, want ...int) {
	t.Helper()
	ours, err := r.node.Ours()
	if err != nil || !slices.Equal(ours, want) {
		t.Errorf("confs %v, %v, not %v", ours, err, want)
	}
}

// TestSweep: records, confs and disks come together again, and nothing else is touched.
func TestSweep(t *testing.T) {
	r, d := newRegistry(t)
	for i, id := range []string{"kept", "gone", "edited", "removed", "destroyed"} {
		if vmid := r.register(t, id, "tank/ours/"+id); vmid != 100+i {
			t.Fatal(vmid)
		}
	}
	text := r.text(t, 103)
	for _, vmid := range []string{"103", "104"} {
		if err := os.Remove(r.confFile(vmid)); err != nil {
			t.Fatal(err)
		}
	}
	d.gone = []string{"tank/data/subvol-104-disk-0"}
	if err := r.node.Change(t.Context(), 102, func(c *pve.Conf) error { return c.Set("onboot", "1") }); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r.sweep(t, "kept", "edited", "removed", "destroyed")
		r.has(t, 100, 102, 103)
	}
	if got := r.text(t, 103); got != text {
		t.Errorf("it is written again otherwise:\n%s\nnot\n%s", got, text)
	}
	if _, err := r.Register(t.Context(), 0, container("destroyed"), Disk{Dataset: d.gone[0]}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "remove the container") {
		t.Errorf("without its disk: %v", err)
	}
	r.has(t, 100, 102, 103)
	// What an administrator wrote is kept when it is written again.
	if err := os.Remove(r.confFile("102")); err != nil {
		t.Fatal(err)
	}
	r.sweep(t, "kept", "edited", "removed", "destroyed")
	if got := r.text(t, 102); !strings.Contains(got, "onboot: 1\n") {
		t.Errorf("the administrator's line is lost:\n%s", got)
	}
	r.sweep(t)
	r.has(t)
	if all, err := r.List(); err != nil || len(all) > 0 {
		t.Errorf("records %v, %v", all, err)
	}
}

// TestCrash: the daemon ended at each step of making a conf. It is made by the next task or the sweep, under its
// number and as a whole, and what is left of the first try goes; nobody else's file does.
func TestCrash(t *testing.T) {
	const unfinished, others = "100.conf.tmp.containerd-pve", "100.conf.tmp.4711"
	for name, left := range map[string]func(text string) map[string]string{
		"before the conf":        func(string) map[string]string { return nil },
		"its file is made":       func(string) map[string]string { return map[string]string{unfinished: ""} },
		"half of it is written":  func(text string) map[string]string { return map[string]string{unfinished: text[:len(text)/2]} },
		"all of it is written":   func(text string) map[string]string { return map[string]string{unfinished: text} },
		"it is in place":         func(text string) map[string]string { return map[string]string{"100.conf": text} },
		"it was being changed":   func(text string) map[string]string { return map[string]string{"100.conf": text, unfinished: text[:9]} },
		"and by an older daemon": func(string) map[string]string { return map[string]string{"100.conf": ""} },
	} {
		for _, by := range []string{"task", "sweep", "removed"} {
			t.Run(name+", "+by, func(t *testing.T) {
				r, _ := newRegistry(t)
				r.register(t, "web", "tank/ours/web")
				text := r.text(t, 100)
				if err := os.Remove(r.confFile("100")); err != nil {
					t.Fatal(err)
				}
				dir := filepath.Dir(r.confFile("100"))
				files := left(text)
				if files == nil {
					files = map[string]string{}
				}
				files[others] = "x"
				for file, text := range files {
					if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				want := []string{"100.conf", others}
				switch by {
				case "task":
					if vmid := r.register(t, "web", "tank/data/subvol-100-disk-0"); vmid != 100 {
						t.Errorf("VMID %d", vmid)
					}
					r.sweep(t, "web")
				case "sweep":
					r.sweep(t, "web")
				default:
					r.sweep(t)
					want = want[1:]
				}
				entries, err := os.ReadDir(dir)
				if err != nil {
					t.Fatal(err)
				}
				var names []string
				for _, e := range entries {
					names = append(names, e.Name())
				}
				if !slices.Equal(names, want) {
					t.Errorf("%v, not %v", names, want)
				}
				if by != "removed" && r.text(t, 100) != text {
					t.Errorf("the conf:\n%s", r.text(t, 100))
				}
			})
		}
	}
}

// TestHalfMade: a daemon that made a conf before it wrote it ended between the two: that of an older release.
func TestHalfMade(t *testing.T) {
	r, _ := newRegistry(t)
	texts := map[string]string{}
	for i, id := range []string{"swept", "started", "gone"} {
		if vmid := r.register(t, id, "tank/ours/"+id); vmid != 100+i {
			t.Fatal(vmid)
		}
		texts[id] = r.text(t, 100+i)
		if err := os.Truncate(r.confFile(strconv.Itoa(100+i)), 0); err != nil {
			t.Fatal(err)
		}
	}
	// Of nobody's record.
	if err := os.WriteFile(r.confFile("200"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if vmid := r.register(t, "started", "tank/data/subvol-101-disk-0"); vmid != 101 || r.text(t, 101) != texts["started"] {
		t.Errorf("started: VMID %d with\n%s", vmid, r.text(t, 101))
	}
	r.sweep(t, "swept", "started")
	r.has(t, 100, 101)
	if got := r.text(t, 100); got != texts["swept"] {
		t.Errorf("swept:\n%s", got)
	}
	if guests, err := r.node.Guests(); err != nil || !slices.Equal(guests, []int{100, 101, 200}) {
		t.Errorf("confs of %v, %v", guests, err)
	}
}

// TestOrphans: after the loss of the records.
func TestOrphans(t *testing.T) {
	r, d := newRegistry(t)
	for _, id := range []string{"alive", "dead", "restored", "directory"} {
		if id == "directory" {
			if _, err := r.Register(t.Context(), 0, container(id), Disk{Directory: "/nowhere/rootfs"}); err != nil {
				t.Fatal(err)
			}
			continue
		}
		r.register(t, id, "tank/ours/"+id)
	}
	// A clone of the first, and its backup restored under another number.
	if err := os.WriteFile(r.confFile("200"), []byte(r.text(t, 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	// The third was restored from a backup, on a disk that is none of ours.
	if err := r.node.Change(t.Context(), 102, func(c *pve.Conf) error { return c.Set("rootfs", "tank:other/102,size=8G") }); err != nil {
		t.Fatal(err)
	}
	d.others = []string{"tank/data/other/102"}
	lose := func() {
		t.Helper()
		if err := os.RemoveAll(r.dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(r.dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	lose()
	r.sweep(t, "alive")
	r.has(t, 100, 102, 200)
	if vmid, err := Lookup(r.dir, "default", "alive"); err != nil || vmid != 100 {
		t.Errorf("the one that is alive: %d, %v", vmid, err)
	}
	if all, err := r.List(); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
	if a, err := r.Register(t.Context(), 0, container("alive"), Disk{Dataset: "tank/data/subvol-100-disk-0"}); err != nil || a.VMID != 100 {
		t.Errorf("%d, %v", a.VMID, err)
	}
	r.sweep(t)
	r.has(t, 102, 200)
}

// TestRenamed: after the node got another name the confs are fetched; one that
// went to another node is left there.
func TestRenamed(t *testing.T) {
	r, _ := newRegistry(t)
	r.register(t, "web", "tank/ours/1")
	r.register(t, "db", "tank/ours/2")
	root := r.node.Root
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := func(name, target string) {
		t.Helper()
		if err := os.Remove(filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, node := range []string{"new", "other"} {
		if err := os.MkdirAll(filepath.Join(root, "nodes", node, "lxc"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	link("local", "nodes/new")
	link("lxc", "nodes/new/lxc")
	put(".members", `{"nodename": "new", "nodelist": {"new": {"id": 1}, "other": {"id": 2}}}`)
	put(".vmlist", `{"ids": {"100": {"node": "self", "type": "lxc"}, "101": {"node": "self", "type": "lxc"}}}`)
	if a, err := r.Register(t.Context(), 0, container("web"), Disk{Dataset: "tank/data/subvol-100-disk-0"}); err != nil || a.VMID != 100 {
		t.Errorf("%d, %v", a.VMID, err)
	}
	put(".vmlist", `{"ids": {"100": {"node": "new", "type": "lxc"}, "101": {"node": "self", "type": "lxc"}}}`)
	r.sweep(t, "web", "db")
	r.has(t, 100, 101)
	if all, err := r.List(); err != nil || len(all) != 2 || all[0].Node != "new" || all[1].Node != "new" {
		t.Errorf("%+v, %v", all, err)
	}

	// Migrated by an administrator.
	if err := os.Rename(r.confFile("100"), filepath.Join(root, "nodes/other/lxc/100.conf")); err != nil {
		t.Fatal(err)
	}
	put(".vmlist", `{"ids": {"100": {"node": "other", "type": "lxc"}, "101": {"node": "new", "type": "lxc"}}}`)
	if _, err := r.Register(t.Context(), 0, container("web"), Disk{Dataset: "tank/data/subvol-100-disk-0"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "node other") {
		t.Error(err)
	}
	r.sweep(t, "db")
	if _, err := r.node.ReadAt("other", 100); err != nil {
		t.Errorf("the other node's conf: %v", err)
	}
	r.has(t, 101)
}

// TestJobs: what one of Proxmox's jobs has is neither started nor removed.
func TestJobs(t *testing.T) {
	r, d := newRegistry(t)
	r.register(t, "web", "tank/ours/1")
	lock := func(job string) {
		t.Helper()
		if err := r.node.Change(t.Context(), 100, func(c *pve.Conf) error {
			if job == "" {
				c.Delete("lock")
				return nil
			}
			return c.Set("lock", job)
		}); err != nil {
			t.Fatal(err)
		}
	}
	lock("rollback")
	if _, err := r.Register(t.Context(), 0, container("web"), Disk{Dataset: "tank/data/subvol-100-disk-0"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pct unlock 100") {
		t.Error(err)
	}
	if err := r.Remove(t.Context(), "default", "web"); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	r.sweep(t)
	r.has(t, 100)
	lock("")
	if err := os.WriteFile(r.confFile("100"), []byte(r.text(t, 100)+"\n[before]\nmemory: 64\n\n[after]\nmemory: 64\nparent: before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.sweep(t)
	r.has(t)
	if want := []string{"tank/data/subvol-100-disk-0@before", "tank/data/subvol-100-disk-0@after"}; !slices.Equal(d.dropped, want) {
		t.Errorf("snapshots destroyed: %v", d.dropped)
	}
}

// TestTooLate: who asked has gone on without a VMID, so there is none.
func TestTooLate(t *testing.T) {
	r, d := newRegistry(t)
	ctx, cancel := context.WithCancel(t.Context())
	r.Describe = func(context.Context, *pve.Container) error {
		cancel()
		return nil
	}
	if _, err := r.Register(ctx, 100, container("web"), Disk{Dataset: "tank/ours/1"}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	r.has(t)
	if all, err := r.List(); err != nil || len(all)+len(d.moved) > 0 {
		t.Errorf("%v, %v, moved %v", all, err, d.moved)
	}
}

// TestDown: without the cluster's filesystem nothing is believed to be gone.
func TestDown(t *testing.T) {
	r, _ := newRegistry(t)
	r.register(t, "web", "tank/ours/1")
	root := r.node.Root
	if err := os.Rename(root, root+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Register(t.Context(), 0, container("web"), Disk{Dataset: "tank/data/subvol-100-disk-0"}); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "pve-cluster") {
		t.Error(err)
	}
	if _, err := r.Register(t.Context(), 0, container("db"), Disk{Dataset: "tank/ours/2"}); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	if err := r.Remove(t.Context(), "default", "web"); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	if err := r.Sweep(t.Context(), func(context.Context, string, string) (bool, error) { return false, nil }); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	if err := os.Remove(root); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(root+".away", root); err != nil {
		t.Fatal(err)
	}
	r.has(t, 100)
	r.sweep(t)
	r.has(t)
}

// TestAnswer: a call that hangs is given up.
func TestAnswer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	hang := make(chan struct{})
	defer close(hang)
	if _, err := answer(ctx, func() (int, error) {
		<-hang
		return 0, nil
	}); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
}

// TestRestoredOver: `pct restore --force` put a backup in a container's place, or
// `pct destroy` and `pct restore`, after which the disk has the name of ours. It outlives that.
func TestRestoredOver(t *testing.T) {
	for _, disk := range []string{"subvol-100-disk-1", "subvol-100-disk-0"} {
		r, d := newRegistry(t)
		r.register(t, "web", "tank/ours/web")
		d.others = []string{"tank/data/" + disk}
		if disk != "subvol-100-disk-0" {
			d.gone = []string{"tank/data/subvol-100-disk-0"}
		}
		if err := r.node.Change(t.Context(), 100, func(c *pve.Conf) error { return c.Set("rootfs", "tank:"+disk+",size=8G") }); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			r.sweep(t, "web")
			r.has(t, 100)
		}
		if err := r.Remove(t.Context(), "default", "web"); err != nil {
			t.Error(err)
		}
		r.sweep(t)
		r.has(t, 100)
		if all, err := r.List(); err != nil || len(all) > 0 || len(d.dropped) > 0 {
			t.Errorf("%s: records %v, %v, snapshots %v", disk, all, err, d.dropped)
		}
	}
}
