package template

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

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
	i.Layer, i.Blob = "tank/c/7@snapshot", []byte(`{"config":{}}`)
	made, is, err := s.Create(ctx, i, Options{})
	if err != nil || !is || made.VMID != 100 || made.Image != i.Name || made.Digest != i.Digest.String() || made.Dataset != "tank/data/basevol-100-disk-0" || made.Unfinished {
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
