package template

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// host is ZFS and Proxmox in one.
type host struct {
	datasets map[string]zfs.Entry
	confs    map[int]*pve.Conf
	fail     map[string]error
}

func (h *host) Contents(context.Context, string, []string) ([]zfs.Entry, error) {
	return slices.Collect(maps.Values(h.datasets)), nil
}
func (h *host) Available(context.Context, string) (int64, error)         { return 1 << 40, nil }
func (h *host) Property(context.Context, string, string) (string, error) { return zfs.Unset, nil }
func (h *host) Space(context.Context, string) (zfs.Space, error) {
	return zfs.Space{Referenced: 5 << 30}, nil
}
func (h *host) Close() error { return nil }
func (h *host) Clone(_ context.Context, origin, name string, p zfs.Properties) error {
	if err := h.fail["clone"]; err != nil {
		return err
	}
	h.datasets[name] = zfs.Entry{Name: name, Origin: origin, Own: p}
	return nil
}

func (h *host) Snapshot(_ context.Context, name string, p zfs.Properties) error {
	if err := h.fail["snapshot"]; err != nil {
		return err
	}
	h.datasets[name] = zfs.Entry{Name: name, Own: p, Snapshot: true}
	return nil
}

func (h *host) DestroyAll(_ context.Context, names []string) (map[string]error, error) {
	for _, n := range names {
		delete(h.datasets, n)
	}
	return nil, h.fail["destroy"]
}

func (h *host) Register(_ context.Context, want int, of func(int) (*pve.Conf, error)) (int, error) {
	if want == 0 {
		want = 100 + len(h.confs)
	}
	if h.confs[want] != nil {
		return 0, errdefs.ErrAlreadyExists
	}
	conf, err := of(want)
	if err == nil {
		h.confs[want] = conf
	}
	return want, err
}

func (h *host) Change(_ context.Context, vmid int, change func(*pve.Conf) error) error {
	if err := h.fail["change"]; err != nil {
		return err
	}
	if h.confs[vmid] == nil {
		return errdefs.ErrNotFound
	}
	return change(h.confs[vmid])
}

func (h *host) Remove(_ context.Context, vmid int, mine func(*pve.Conf) bool, before func(*pve.Conf) error) error {
	conf := h.confs[vmid]
	if conf == nil {
		return nil
	}
	if !mine(conf) || conf.Lock() != "" {
		return errdefs.ErrFailedPrecondition
	}
	if err := before(conf); err != nil {
		return err
	}
	delete(h.confs, vmid)
	return nil
}

func (h *host) Exclusive(_ context.Context, _ string, f func() error) error { return f() }

func (h *host) Guests() ([]int, error) { return slices.Sorted(maps.Keys(h.confs)), nil }

func (h *host) Read(vmid int) (*pve.Conf, error) { return h.confs[vmid], nil }

func storeOf() (*host, *Store) {
	h := &host{datasets: map[string]zfs.Entry{}, confs: map[int]*pve.Conf{}, fail: map[string]error{}}
	s := &Store{ZFS: h, Node: h, Host: pve.Host{Env: true}, Storage: pve.Storage{Name: "local-zfs", Pool: "tank/data"}}
	s.look = func(context.Context, Image) (plan.Process, error) {
		return plan.Process{Args: []string{"x"}, Cwd: "/"}, nil
	}
	return h, s
}

func TestCreate(t *testing.T) {
	ctx := t.Context()
	h, s := storeOf()
	i := imageWith(ocispec.ImageConfig{})
	i.Layer, i.Chain, i.Blob = "tank/c/7@snapshot", "default/sha256:1", []byte(`{"config":{}}`)
	made, is, err := s.Create(ctx, i, Options{})
	if err != nil || !is || made.VMID != 100 || made.Image != i.Name || made.Digest != i.Digest.String() || made.Dataset != "tank/data/basevol-100-disk-0" || made.Layer != i.Chain || made.Unfinished {
		t.Fatalf("%+v, %v, %v", made, is, err)
	}
	if e := h.datasets[made.Dataset]; e.Origin != i.Layer || e.Own["refquota"] != fmt.Sprint(9<<30) || e.Own[propConfig] == "" {
		t.Errorf("%+v", e)
	}
	if h.confs[100].Lock() != "" {
		t.Error("it is locked")
	}
	if again, is, err := s.Create(ctx, i, Options{}); err != nil || is || again.VMID != 100 {
		t.Errorf("again: %+v, %v, %v", again, is, err)
	}
	// The image moved on.
	next := i
	next.Digest = "sha256:" + i.Digest[7:17] + i.Digest[7:61]
	if made, is, err := s.Create(ctx, next, Options{}); err != nil || !is || made.VMID != 101 {
		t.Errorf("a new digest: %+v, %v, %v", made, is, err)
	}
	if _, _, err := s.Create(ctx, i, Options{VMID: 101}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a VMID that is taken: %v", err)
	}
	if _, _, err := s.Create(ctx, i, Options{VMID: 200, Size: 1 << 30}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("too small: %v", err)
	}
	// What is cloned of it is in the way.
	h.datasets["tank/data/subvol-7-disk-0"] = zfs.Entry{Name: "tank/data/subvol-7-disk-0", Origin: made.Dataset + "@__base__"}
	if err := s.Remove(ctx, 100); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "subvol-7-disk-0") {
		t.Errorf("in use: %v", err)
	}
	delete(h.datasets, "tank/data/subvol-7-disk-0")
	h.confs[300] = pve.Parse([]byte("template: 1\n"))
	if err := s.Remove(ctx, 300); !errdefs.IsNotFound(err) {
		t.Errorf("somebody else's: %v", err)
	}
	if err := errors.Join(s.Remove(ctx, 100), s.Remove(ctx, 101)); err != nil || len(h.datasets) > 0 || len(h.confs) != 1 {
		t.Errorf("%v, %v, %v", err, h.datasets, h.confs)
	}
}

// TestInterrupted: what fails leaves nothing, and what a crash left is seen and can be removed.
func TestInterrupted(t *testing.T) {
	ctx, no := t.Context(), errors.New("no")
	i := imageWith(ocispec.ImageConfig{})
	i.Layer = "tank/c/7@snapshot"
	for _, at := range []string{"clone", "snapshot"} {
		h, s := storeOf()
		h.fail[at] = no
		if _, _, err := s.Create(ctx, i, Options{}); !errors.Is(err, no) || len(h.datasets) > 0 || len(h.confs) > 0 {
			t.Errorf("%s: %v, %v, %v", at, err, h.datasets, h.confs)
		}
	}
	h, s := storeOf()
	h.fail["change"] = no
	if _, _, err := s.Create(ctx, i, Options{}); !errors.Is(err, no) {
		t.Error(err)
	}
	h.fail = map[string]error{}
	all, err := s.List(ctx)
	if err != nil || len(all) != 1 || !all[0].Unfinished {
		t.Fatalf("%+v, %v", all, err)
	}
	if made, is, err := s.Create(ctx, i, Options{}); err != nil || !is || made.VMID != 101 {
		t.Errorf("beside it: %+v, %v, %v", made, is, err)
	}
	if err := errors.Join(s.Remove(ctx, 100), s.Remove(ctx, 101)); err != nil || len(h.datasets) > 0 || len(h.confs) > 0 {
		t.Errorf("%v, %v, %v", err, h.datasets, h.confs)
	}
}

// TestValidate: each part that can be missing or another.
func TestValidate(t *testing.T) {
	ctx := t.Context()
	i := imageWith(ocispec.ImageConfig{})
	i.Layer, i.Blob = "tank/c/7@snapshot", []byte(`{"config":{"Cmd":["x"]}}`)
	const dataset = "tank/data/basevol-100-disk-0"
	for want, breakIt := range map[string]func(h *host, s *Store){
		"":         func(*host, *Store) {},
		"conf":     func(h *host, _ *Store) { _ = h.confs[100].SetLock("create") },
		"dataset":  func(h *host, _ *Store) { delete(h.datasets, dataset) },
		"rootfs":   func(h *host, _ *Store) { _ = h.confs[100].Set("rootfs", "local-zfs:basevol-100-disk-01,size=9G") },
		"snapshot": func(h *host, _ *Store) { delete(h.datasets, dataset+"@__base__") },
		"digest":   func(h *host, _ *Store) { _ = h.confs[100].SetDescription("none") },
		"layer":    func(h *host, _ *Store) { e := h.datasets[dataset]; e.Origin = ""; h.datasets[dataset] = e },
		"config":   func(h *host, _ *Store) { h.datasets[dataset].Own[propConfigDigest] = "sha256:1" },
		"process": func(_ *host, s *Store) {
			s.look = func(context.Context, Image) (plan.Process, error) {
				return plan.Process{}, errdefs.ErrFailedPrecondition
			}
		},
	} {
		h, s := storeOf()
		if _, _, err := s.Create(ctx, i, Options{Memory: 64 << 20}); err != nil {
			t.Fatal(err)
		}
		breakIt(h, s)
		found, err := s.Validate(ctx, 100)
		if err != nil {
			t.Fatal(err)
		}
		var bad []string
		for _, f := range found {
			if !f.OK {
				bad = append(bad, f.Name)
			}
			if f.Detail == "" {
				t.Errorf("%s: nothing is said of %s", want, f.Name)
			}
		}
		if got := strings.Join(bad, " "); got != want {
			t.Errorf("broken is %q, found %q", want, got)
		}
	}
	h, s := storeOf()
	if _, _, err := s.Create(ctx, i, Options{Memory: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	d, err := s.Inspect(ctx, 100)
	if err != nil || string(d.Config) != string(i.Blob) || d.Origin != i.Layer || d.Conf != string(h.confs[100].Bytes()) {
		t.Errorf("%+v, %v", d, err)
	}
	if o, err := s.OptionsOf(100); err != nil || o.Memory != 64<<20 || o.Name != "web-1-2" {
		t.Errorf("%+v, %v", o, err)
	}
	for _, err := range []error{errOf(s.Inspect(ctx, 7)), errOf(s.Validate(ctx, 7))} {
		if !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
}

func errOf[T any](_ T, err error) error { return err }

func TestPrune(t *testing.T) {
	ctx := t.Context()
	h, s := storeOf()
	day := func(n int) time.Time { return time.Date(2026, 11, n, 0, 0, 0, 0, time.UTC) }
	add := func(vmid int, image string, made time.Time, clones int, lock string) {
		name := s.dataset(vmid)
		h.confs[vmid] = pve.Parse([]byte("tags: containerd-template\ntemplate: 1\n"))
		_ = h.confs[vmid].SetLock(lock)
		h.datasets[name] = zfs.Entry{Name: name, Created: made, Own: zfs.Properties{propImage: image, propDigest: fmt.Sprint(vmid)}}
		for n := range clones {
			c := fmt.Sprintf("tank/data/subvol-%d%d-disk-0", vmid, n)
			h.datasets[c] = zfs.Entry{Name: c, Origin: name + "@__base__"}
		}
	}
	add(1, "a", day(1), 0, "")
	add(2, "a", day(2), 1, "")
	add(3, "a", day(3), 0, "")
	add(4, "a", day(4), 0, "")
	add(5, "b", day(1), 0, "")
	add(6, "b", day(9), 0, "create")
	h.confs[7] = pve.Parse([]byte("template: 1\n"))
	for _, tc := range []struct {
		keep   int
		before time.Time
		want   string
	}{
		{1, day(30), "[1 3 6]"}, {0, day(30), "[1 3 4 5 6]"}, {2, day(30), "[1 6]"}, {1, day(2), "[1 6]"}, {9, day(30), "[6]"},
	} {
		all, err := s.Prune(ctx, tc.keep, tc.before, true)
		var got []int
		for _, v := range all {
			got = append(got, v.VMID)
		}
		if fmt.Sprint(got) != tc.want || err != nil || len(h.confs) != 7 {
			t.Errorf("keep %d, before %s: %v, %v, want %s", tc.keep, tc.before, got, err, tc.want)
		}
	}
	if _, err := s.Prune(ctx, 1, day(30), false); err != nil || fmt.Sprint(slices.Sorted(maps.Keys(h.confs))) != "[2 4 5 7]" {
		t.Errorf("left are %v, %v", slices.Sorted(maps.Keys(h.confs)), err)
	}
}
