package task

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"testing"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/lxc/pve/registry"
	"github.com/containerd-pve/containerd-pve/shim/options"
)

// asked is a registrar that remembers what it was asked.
type asked struct {
	want      int
	container pve.Container
	disk      registry.Disk
	limits    pve.Limits
	parts     pve.Parts
	// changed and theirs are what an administrator changed.
	changed pve.Parts
	theirs  pve.Limits
	err     error
}

func (a *asked) Register(_ context.Context, want int, c pve.Container, disk registry.Disk) (registry.Registered, error) {
	a.want, a.container, a.disk = want, c, disk
	r := registry.Registered{VMID: 100, StopSignal: 10, Limits: a.theirs, Changed: a.changed}
	if disk.Dataset != "" {
		r.Dataset = "tank/data/subvol-100-disk-0"
	}
	return r, a.err
}

func (a *asked) Update(_ context.Context, _, _ string, l pve.Limits, parts pve.Parts) error {
	a.limits, a.parts = l, parts
	return a.err
}

func pointer[T any](v T) *T { return &v }

func TestRegister(t *testing.T) {
	ctx := context.Background()
	a := &asked{}
	p := &proxmox{registrar: a, namespace: "k8s.io", id: "c"}
	spec := &specs.Spec{
		Hostname: "h", Process: &specs.Process{Args: []string{"a", "b"}, Env: []string{"A=1"}},
		Annotations: map[string]string{annotationVMID: "500", criPod: "p", criPodNamespace: "n", criImage: "i"},
		Linux: &specs.Linux{
			UIDMappings: []specs.LinuxIDMapping{{Size: 1}},
			Resources: &specs.LinuxResources{
				Memory: &specs.LinuxMemory{Limit: pointer(int64(100)), Swap: pointer(int64(150))}, CPU: &specs.LinuxCPU{Quota: pointer(int64(50_000)), Shares: pointer(uint64(1024))},
			},
		},
	}
	mounts := []*types.Mount{{Type: "zfs", Source: "tank/ours/7"}}
	name, err := p.register(ctx, spec, nil, mounts, "/b/rootfs")
	if err != nil || name != "100" || mounts[0].Source != "tank/data/subvol-100-disk-0" {
		t.Fatalf("%q, %v, %v", name, mounts, err)
	}
	want := pve.Container{
		Namespace: "k8s.io", ID: "c", Image: "i", Pod: "p", PodNamespace: "n", Arch: runtime.GOARCH, Hostname: "h", Unprivileged: true,
		Args: []string{"a", "b"}, Env: []string{"A=1"}, Limits: pve.Limits{Memory: 100, Swap: 50, Quota: 50_000, Period: 100_000, Weight: a.container.Limits.Weight},
	}
	if !reflect.DeepEqual(a.container, want) || a.want != 500 || a.container.Limits.Weight == 0 || a.disk.Dataset != "tank/ours/7" {
		t.Errorf("%+v\nnot\n%+v, VMID %d", a.container, want, a.want)
	}
	p.update(ctx, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: pointer(int64(200))}})
	if l := want.Limits; a.parts != pve.PartMemory || a.limits.Memory != 200 || a.limits.Quota != l.Quota || a.limits.Swap != l.Swap {
		t.Errorf("updated to %+v", a.limits)
	}

	// An administrator's limits are what it gets, and an update goes on from.
	a.changed, a.theirs = pve.AllParts, pve.Limits{Memory: 300, Swap: 10, Quota: 70_000, Period: 100_000, Weight: 55}
	if _, err := p.register(ctx, spec, nil, mounts, "/b/rootfs"); err != nil || limitsOf(spec) != a.theirs {
		t.Errorf("%v, %+v", err, limitsOf(spec))
	}
	p.update(ctx, &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: pointer(uint64(1024))}})
	if a.parts != pve.PartWeight || a.limits.Memory != 300 || a.limits.Weight == 55 {
		t.Errorf("updated %b of %+v", a.parts, a.limits)
	}
	a.parts, a.changed = 0, 0
	p.update(ctx, &specs.LinuxResources{Pids: &specs.LinuxPids{}})
	if a.parts != 0 {
		t.Error("the conf was written for what it does not say")
	}

	// What Proxmox is to map is what the mount maps, of an unprivileged container, if it is asked for.
	uids := spec.Linux.UIDMappings
	for _, c := range []struct {
		idmap, unprivileged, mapped, want bool
	}{{true, true, true, true}, {false, true, true, false}, {true, false, true, false}, {true, true, false, false}} {
		mount := &types.Mount{Type: "zfs", Source: "tank/ours/7", Options: []string{"ro"}}
		if c.mapped {
			mount.Options = append(mount.Options, "uidmap=0:100000:65536", "gidmap=0:100000:65536")
		}
		spec.Linux.UIDMappings = uids
		if !c.unprivileged {
			spec.Linux.UIDMappings = nil
		}
		p.idmap = c.idmap
		if _, err := p.register(ctx, spec, nil, []*types.Mount{mount}, ""); err != nil || a.container.IdmapPassthrough != c.want {
			t.Errorf("%+v: %v, %v", c, a.container.IdmapPassthrough, err)
		}
	}

	overlay := []*types.Mount{{Type: "overlay", Source: "overlay"}}
	delete(spec.Annotations, annotationVMID)
	if name, err := p.register(ctx, spec, nil, overlay, "/b/rootfs"); err != nil || name != "100" || a.want != 0 || a.disk != (registry.Disk{Directory: "/b/rootfs"}) || overlay[0].Source != "overlay" {
		t.Errorf("overlay: %q, %v, %+v", name, err, a.disk)
	}
	for _, v := range []string{"", "0", "x", "1e3"} {
		spec.Annotations[annotationVMID] = v
		if _, err := p.register(ctx, spec, nil, overlay, ""); !errdefs.IsInvalidArgument(err) {
			t.Errorf("VMID %q: %v", v, err)
		}
	}
	spec.Annotations = nil
	a.err = errors.New("no")
	if _, err := p.register(ctx, spec, nil, mounts, ""); !errors.Is(err, a.err) {
		t.Error(err)
	}
	new(proxmox).update(ctx, nil) // of a container that is none of Proxmox's
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		r    *specs.LinuxResources
		want pve.Limits
	}{
		{nil, pve.Limits{}},
		{&specs.LinuxResources{}, pve.Limits{}},
		{&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: pointer(int64(-1)), Swap: pointer(int64(-1))}}, pve.Limits{Memory: -1, Swap: -1}},
		{&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: pointer(int64(10)), Swap: pointer(int64(5))}}, pve.Limits{Memory: 10}},
		{&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: pointer(int64(5)), Period: pointer(uint64(10)), Shares: pointer(uint64(0))}}, pve.Limits{Quota: 5, Period: 10}},
	} {
		if got := limitsOf(&specs.Spec{Linux: &specs.Linux{Resources: c.r}}); got != c.want && (c.r == nil || c.r.CPU == nil || got.Quota != c.want.Quota) {
			t.Errorf("%+v: %+v, not %+v", c.r, got, c.want)
		}
	}
}

// TestLimit: an administrator's limits in the place of the spec's.
func TestLimit(t *testing.T) {
	for _, parts := range []pve.Parts{0, pve.PartMemory, pve.PartCPU, pve.PartWeight, pve.AllParts} {
		for _, l := range []pve.Limits{{Swap: -1}, {Memory: 10, Swap: -1}, {Memory: 10, Swap: 5, Quota: 20_000, Period: 100_000, Weight: 7}} {
			for _, spec := range []*specs.Spec{
				{},
				{Linux: &specs.Linux{Resources: &specs.LinuxResources{
					Memory: &specs.LinuxMemory{Limit: pointer(int64(100)), Swap: pointer(int64(150)), Reservation: pointer(int64(50))},
					CPU:    &specs.LinuxCPU{Quota: pointer(int64(5)), Period: pointer(uint64(10)), Shares: pointer(uint64(1024))},
				}}},
			} {
				before := limitsOf(spec)
				limit(spec, l, parts)
				got := limitsOf(spec)
				if memory := (parts&pve.PartMemory != 0); memory && (max(got.Memory, 0) != l.Memory || got.Swap != l.Swap) || !memory && (got.Memory != before.Memory || got.Swap != before.Swap) {
					t.Errorf("%b of %+v: %+v", parts, l, got)
				}
				if cpu := (parts&pve.PartCPU != 0); cpu && (max(got.Quota, 0) != l.Quota || l.Quota > 0 && got.Period != l.Period) || !cpu && got.Quota != before.Quota {
					t.Errorf("%b of %+v: %+v", parts, l, got)
				}
				if weight := (parts&pve.PartWeight != 0); weight && got.Weight != l.Weight || !weight && got.Weight != before.Weight {
					t.Errorf("%b of %+v: %+v", parts, l, got)
				}
				if r := spec.Linux; r != nil && r.Resources != nil && r.Resources.Memory != nil {
					if m := r.Resources.Memory; m.Reservation != nil && *m.Limit > 0 && *m.Reservation > *m.Limit {
						t.Errorf("%b of %+v: a reservation of %d", parts, l, *m.Reservation)
					}
				}
			}
		}
	}
}

// TestPolicy: without a daemon a container of a node of Proxmox is refused, or runs as any other.
func TestPolicy(t *testing.T) {
	db, none := filepath.Join(t.TempDir(), "config.db"), filepath.Join(t.TempDir(), "socket")
	if err := os.WriteFile(db, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sandbox := &specs.Spec{Annotations: map[string]string{criType: criSandbox}}
	for i, c := range []struct {
		spec *specs.Spec
		o    options.Options
		is   func(error) bool
	}{
		{&specs.Spec{}, options.Options{ProxmoxDatabase: none}, nil},
		{&specs.Spec{}, options.Options{ProxmoxDatabase: db, Registry: none}, errdefs.IsUnavailable},
		{&specs.Spec{}, options.Options{ProxmoxDatabase: db, Registry: none, Register: options.Required}, errdefs.IsUnavailable},
		{&specs.Spec{}, options.Options{ProxmoxDatabase: db, Registry: none, Register: options.BestEffort}, nil},
		{&specs.Spec{}, options.Options{ProxmoxDatabase: db, Registry: none, Register: options.Off}, nil},
		{&specs.Spec{Annotations: map[string]string{annotationVMID: "x"}}, options.Options{ProxmoxDatabase: db, Registry: none, Register: options.BestEffort}, errdefs.IsInvalidArgument},
		{sandbox, options.Options{ProxmoxDatabase: db, Registry: none}, nil},
	} {
		c.o.LXC.Path = "/own"
		s := &taskState{service: &Service{namespace: "default"}, id: "x", bundle: "/b"}
		name, config, err := s.onProxmox(t.Context(), c.spec, nil, &api.CreateTaskRequest{}, &c.o)
		if c.is != nil {
			if !c.is(err) {
				t.Errorf("%d: %v", i, err)
			}
			continue
		}
		if err != nil || name != "" || config.Path != "/own" {
			t.Errorf("%d: %q, %+v, %v", i, name, config, err)
		}
		s.proxmox.update(t.Context(), nil) // nobody is asked
	}
}
