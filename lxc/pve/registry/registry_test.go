package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// disks remembers what was moved.
type disks struct {
	moved map[string]string
	fail  error
	there string // a volume that is there

	settled []int // VMIDs
	shown   []string
	gone    []string // datasets that are not there
	others  []string // datasets that are none of ours
	dropped []string // snapshots
}

func (d *disks) Ours(dataset string) bool {
	return strings.HasPrefix(dataset, "tank/") && !slices.Contains(d.others, dataset)
}

func (d *disks) Volume(_ context.Context, vmid int, dataset string) (Volume, error) {
	name := fmt.Sprintf("subvol-%d-disk-0", vmid)
	if d.there == name && dataset != "tank/data/"+name {
		return Volume{}, os.ErrExist
	}
	return Volume{Conf: "tank:" + name + ",size=8G", Dataset: "tank/data/" + name, Size: 8 << 30}, nil
}

func (d *disks) Settle(_ context.Context, vmid int) error {
	d.settled = append(d.settled, vmid)
	return nil
}

func (d *disks) Show(_ context.Context, dataset string) error {
	d.shown = append(d.shown, dataset)
	return nil
}

func (d *disks) Exists(_ context.Context, dataset string) (bool, error) {
	return !slices.Contains(d.gone, dataset), nil
}

func (d *disks) Foreign(_ context.Context, dataset string) (bool, error) {
	return slices.Contains(d.others, dataset) && !slices.Contains(d.gone, dataset), nil
}

func (d *disks) DatasetOf(volume string) (string, error) {
	name, ok := strings.CutPrefix(volume, "tank:")
	if !ok {
		return "", nil
	}
	return "tank/data/" + name, nil
}

func (d *disks) Drop(_ context.Context, dataset string, snapshots []string) error {
	for _, s := range snapshots {
		d.dropped = append(d.dropped, dataset+"@"+s)
	}
	return nil
}

func (d *disks) Move(_ context.Context, dataset string, to Volume) error {
	if d.fail != nil {
		return d.fail
	}
	d.moved[dataset] = to.Dataset
	return nil
}

func newRegistry(t *testing.T) (*Registry, *disks) {
	t.Helper()
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, ".vmlist"), []byte(`{"ids": {}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, "nodes/self/lxc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"local": "nodes/self", "lxc": "nodes/self/lxc"} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	d := &disks{moved: map[string]string{}}
	node := &pve.Node{Root: root, Locks: filepath.Join(t.TempDir(), "locks")}
	r, err := New(node, filepath.Join(t.TempDir(), "records"), "/usr/local/bin/containerd-pve", pve.Host{Memory: 1 << 30, Swap: 0, Idmap: true}, d)
	if err != nil {
		t.Fatal(err)
	}
	return r, d
}

func container(id string) pve.Container {
	return pve.Container{Namespace: "default", ID: id, Arch: "amd64"}
}

func (r *Registry) text(t *testing.T, vmid int) string {
	t.Helper()
	c, err := r.node.Read(vmid)
	if err != nil {
		t.Fatal(err)
	}
	return string(c.Bytes())
}

// TestSettle: the disk of a removed container is waited for where its VMID is asked
// for, and nobody else's.
func TestSettle(t *testing.T) {
	ctx := context.Background()
	r, d := newRegistry(t)
	for _, want := range []int{500, 0, 500} {
		id := fmt.Sprintf("c%d", len(d.moved))
		_, err := r.Register(ctx, want, container(id), Disk{Dataset: "tank/ours/" + id})
		if taken := errdefs.IsAlreadyExists(err); taken != (id == "c2") || err != nil && !taken {
			t.Errorf("%s: %v", id, err)
		}
	}
	if !slices.Equal(d.settled, []int{500}) {
		t.Errorf("waited for %v", d.settled)
	}
}

// TestLife: a container keeps its VMID over its tasks, with its limits as they
// are; removed, it leaves nothing.
func TestLife(t *testing.T) {
	ctx := context.Background()
	r, d := newRegistry(t)
	a, err := r.Register(ctx, 0, container("web"), Disk{Dataset: "tank/ours/7"})
	if err != nil || a.VMID != 100 || a.Dataset != "tank/data/subvol-100-disk-0" || d.moved["tank/ours/7"] != a.Dataset || a.Changed != 0 {
		t.Fatalf("%+v, %v, moved %v", a, err, d.moved)
	}
	if text := r.text(t, 100); !strings.Contains(text, "rootfs: tank:subvol-100-disk-0,size=8G\n") || !strings.Contains(text, "memory: 1024\n") ||
		!strings.Contains(text, "lxc.hook.pre-start: /bin/sh -c 'test ! -x /usr/local/bin/containerd-pve || exec /usr/local/bin/containerd-pve guard default web 100' sh\n") {
		t.Error(text)
	}
	// Somebody's note stays.
	if err := r.node.Change(ctx, 100, func(c *pve.Conf) error { return c.SetDescription("mine\n") }); err != nil {
		t.Fatal(err)
	}
	d.moved = map[string]string{}
	again := container("web")
	again.Limits.Memory = 64 << 20
	a, err = r.Register(ctx, 0, again, Disk{Dataset: a.Dataset})
	if err != nil || a.VMID != 100 || a.Dataset != "tank/data/subvol-100-disk-0" || len(d.moved) > 0 || a.Changed != 0 {
		t.Errorf("again: %+v, %v, moved %v", a, err, d.moved)
	}
	if text := r.text(t, 100); !strings.HasPrefix(text, "#mine\n") || !strings.Contains(text, "memory: 64\n") {
		t.Error(text)
	}
	if err := r.Update(ctx, "default", "web", pve.Limits{Memory: 128 << 20}, pve.PartMemory); err != nil || !strings.Contains(r.text(t, 100), "memory: 128\n") {
		t.Errorf("update: %v, %s", err, r.text(t, 100))
	}
	// An administrator's limits hold for the next task, until the container asks for others.
	if err := r.node.Change(ctx, 100, func(c *pve.Conf) error { return c.Set("memory", "256") }); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		a, err = r.Register(ctx, 0, again, Disk{Dataset: a.Dataset})
		if err != nil || a.Changed != pve.PartMemory || a.Limits.Memory != 256<<20 || !strings.Contains(r.text(t, 100), "memory: 256\n") {
			t.Errorf("an administrator's limit: %+v, %v", a, err)
		}
	}
	again.Limits.Memory = 32 << 20
	a, err = r.Register(ctx, 0, again, Disk{Dataset: a.Dataset})
	if err != nil || a.Changed != 0 || !strings.Contains(r.text(t, 100), "memory: 32\n") {
		t.Errorf("another limit of the spec: %+v, %v", a, err)
	}
	// Its conf was removed between.
	if err := r.node.Change(ctx, 100, func(c *pve.Conf) error { return c.Set("cores", "1") }); err != nil {
		t.Fatal(err)
	}
	if a, err = r.Register(ctx, 0, again, Disk{Dataset: a.Dataset}); err != nil || a.Changed != pve.PartCPU {
		t.Errorf("cores: %+v, %v", a, err)
	}
	for i, limit := range []int64{32, 48} {
		changed := []pve.Parts{pve.PartCPU, 0}[i]
		again.Limits.Memory = limit << 20
		if err := os.Remove(filepath.Join(r.node.Root, "lxc", "100.conf")); err != nil {
			t.Fatal(err)
		}
		a, err = r.Register(ctx, 0, again, Disk{Dataset: a.Dataset})
		if err != nil || a.VMID != 100 || a.Changed != changed || !strings.Contains(r.text(t, 100), fmt.Sprintf("memory: %d\n", limit)) {
			t.Errorf("without its conf, %d MiB: %+v, %v", limit, a, err)
		}
	}
	if _, err := r.Register(ctx, 200, container("web"), Disk{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another VMID: %v", err)
	}
	if a, err := r.Register(ctx, 0, container("db"), Disk{Dataset: "other/7", Directory: "/run/db/rootfs"}); err != nil || a.VMID != 101 || !strings.Contains(r.text(t, 101), "rootfs: /run/db/rootfs\n") {
		t.Errorf("a directory: %d, %v", a.VMID, err)
	}
	if shown := slices.Compact(d.shown); !slices.Equal(shown, []string{"tank/data/subvol-100-disk-0"}) {
		t.Errorf("shown %v", d.shown)
	}
	if all, err := r.List(); err != nil || len(all) != 2 || all[0].ID != "web" || all[0].VMID != 100 || all[0].Node != "self" || all[0].Conf != r.text(t, 100) || all[1].ID != "db" || all[1].VMID != 101 {
		t.Errorf("%v, %v", all, err)
	}
	if vmid, err := Lookup(r.dir, "default", "web"); err != nil || vmid != 100 {
		t.Errorf("lookup: %d, %v", vmid, err)
	}
	if _, err := Lookup(r.dir, "default", "none"); !errdefs.IsNotFound(err) {
		t.Errorf("lookup of none: %v", err)
	}
	for range 2 {
		if err := r.Remove(ctx, "default", "web"); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.node.Read(100); !errdefs.IsNotFound(err) {
		t.Errorf("the conf: %v", err)
	}
	if err := r.Update(ctx, "default", "web", pve.Limits{}, pve.AllParts); !errdefs.IsNotFound(err) {
		t.Errorf("update of none: %v", err)
	}
}

// TestFailures: what fails leaves neither record nor conf, or what the next call goes on with.
func TestFailures(t *testing.T) {
	ctx := context.Background()
	r, d := newRegistry(t)
	for _, bad := range []pve.Container{container("a/b"), container(""), container("a'b"), container("a b"), container("$x"), {Namespace: "..", ID: "x", Arch: "amd64"}, {Namespace: "default", ID: "mips", Arch: "mips"}} {
		if _, err := r.Register(ctx, 0, bad, Disk{Directory: "/x"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := r.Register(ctx, 99, container("x"), Disk{Directory: "/x"}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if all, _ := r.List(); len(all) > 0 {
		t.Errorf("records %v", all)
	}
	if ours, _ := r.node.Ours(); len(ours) > 0 {
		t.Errorf("confs %v", ours)
	}

	// The disk could not be moved: the number is kept for the next try.
	d.fail = errors.New("no space")
	if _, err := r.Register(ctx, 300, container("x"), Disk{Dataset: "tank/ours/1"}); !errors.Is(err, d.fail) {
		t.Error(err)
	}
	d.fail = nil
	if a, err := r.Register(ctx, 0, container("x"), Disk{Dataset: "tank/ours/1"}); err != nil || a.VMID != 300 || len(d.moved) != 1 {
		t.Errorf("the next try: %d, %v, %v", a.VMID, err, d.moved)
	}

	// A removed container's volume is not destroyed yet: its number is not given again.
	d.there = "subvol-100-disk-0"
	if a, err := r.Register(ctx, 0, container("y"), Disk{Dataset: "tank/ours/2"}); err != nil || a.VMID != 101 {
		t.Errorf("beside another's volume: %d, %v", a.VMID, err)
	}
	if _, err := r.Register(ctx, 100, container("z"), Disk{Dataset: "tank/ours/3"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another's volume: %v", err)
	}
	d.there = ""

	// A crash came between record and conf, or an administrator removed the conf: the same number.
	if err := os.Remove(filepath.Join(r.node.Root, "lxc", "300.conf")); err != nil {
		t.Fatal(err)
	}
	if a, err := r.Register(ctx, 0, container("x"), Disk{Dataset: "tank/data/subvol-300-disk-0"}); err != nil || a.VMID != 300 {
		t.Errorf("%d, %v", a.VMID, err)
	}

	// Another guest has it meanwhile: that stays, and the container gets another.
	const foreign = "memory: 512\ntags: containerd\n"
	if err := os.WriteFile(filepath.Join(r.node.Root, "lxc", "300.conf"), []byte(foreign), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Update(ctx, "default", "x", pve.Limits{}, pve.AllParts); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if a, err := r.Register(ctx, 0, container("x"), Disk{Dataset: "tank/data/subvol-300-disk-0"}); err != nil || a.VMID != 100 {
		t.Errorf("%d, %v", a.VMID, err)
	}
	if got := r.text(t, 300); got != foreign {
		t.Errorf("the other's conf: %s", got)
	}
	if err := r.Remove(ctx, "default", "x"); err != nil {
		t.Error(err)
	}
	if got := r.text(t, 300); got != foreign {
		t.Errorf("the other's conf: %s", got)
	}
}
