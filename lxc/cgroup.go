package lxc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // sets the hook for the device filter
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/cgroups/fs2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	cgroupRoot = "/sys/fs/cgroup"
	// payload is the one liblxc makes below the container's: it deletes it at
	// the end, while statistics and memory.events of its parent stay readable.
	payload = "payload"
)

func cgroupDir(path string) string { return filepath.Join(cgroupRoot, path) }

// cgroup is the container's cgroup X.
type cgroup struct {
	path      string
	manager   *fs2.Manager
	resources *cgroups.Resources
}

// createCgroup makes X with its limits and lets its children have all controllers.
func createCgroup(path string, r *cgroups.Resources) (*cgroup, error) {
	dir := cgroupDir(path)
	m, err := fs2.NewManager(&cgroups.Cgroup{Path: path, Resources: r}, dir)
	if err != nil {
		return nil, err
	}
	if err := m.Apply(-1); err != nil {
		return nil, fmt.Errorf("make cgroup %s: %w", path, err)
	}
	if err := m.Set(r); err != nil {
		return nil, fmt.Errorf("linux.resources: %w", err)
	}
	if err := delegate(dir); err != nil {
		return nil, err
	}
	return &cgroup{path: path, manager: m, resources: r}, nil
}

// delegate gives every controller the cgroup has to its children.
func delegate(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	controllers := strings.Fields(string(data))
	if len(controllers) == 0 {
		return nil
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+strings.Join(controllers, " +")), 0); err != nil {
		return fmt.Errorf("delegate controllers in %s: %w", dir, err)
	}
	return nil
}

func (c *cgroup) payloadDir() string { return filepath.Join(cgroupDir(c.path), payload) }

// mirror repeats the limits in the payload cgroup, which is the root of the
// container's cgroup namespace: programs that size themselves by
// /sys/fs/cgroup/memory.max or cpu.max must find them there.
func (c *cgroup) mirror() error {
	r := *c.resources
	r.Devices, r.SkipDevices = nil, true
	m, err := fs2.NewManager(&cgroups.Cgroup{Path: filepath.Join(c.path, payload), Resources: &r}, c.payloadDir())
	if err != nil {
		return err
	}
	if err := m.Set(&r); err != nil {
		return fmt.Errorf("linux.resources in the payload: %w", err)
	}
	return nil
}

// freeze works on the payload, as liblxc does: asked to stop the container, its
// monitor thaws the payload and waits for that, for ever if the parent is frozen.
func (c *cgroup) freeze(on bool) error {
	m, err := fs2.NewManager(&cgroups.Cgroup{Path: filepath.Join(c.path, payload), Resources: &cgroups.Resources{}}, c.payloadDir())
	if err != nil {
		return err
	}
	to := cgroups.Thawed
	if on {
		to = cgroups.Frozen
	}
	if err := m.Freeze(to); err != nil {
		return fmt.Errorf("freezer of %s: %w", c.path, err)
	}
	return nil
}

func (c *cgroup) update(spec *specs.LinuxResources) error {
	r, err := resources(spec)
	if err != nil {
		return err
	}
	r.Devices, r.SkipDevices = nil, true
	// Raised limits must be raised outside first, lowered ones may stand for a
	// moment inside: the smaller one always counts.
	if err := c.manager.Set(r); err != nil {
		return fmt.Errorf("linux.resources: %w", err)
	}
	c.resources = r
	return c.mirror()
}

func (c *cgroup) pids() ([]int, error) {
	pids, err := cgroups.GetAllPids(cgroupDir(c.path))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return pids, err
}

// killCgroup ends every process in the cgroup and below; none is no error.
func killCgroup(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// populated tells whether there is a process in the cgroup or below.
func populated(dir string) bool {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	return err == nil && strings.Contains(string(data), "populated 1")
}

// removeCgroup kills and removes the cgroup with all below it.
func removeCgroup(ctx context.Context, dir string) error {
	if err := killCgroup(dir); err != nil {
		return fmt.Errorf("kill %s: %w", dir, err)
	}
	for wait := time.Millisecond; populated(dir); wait = min(2*wait, 50*time.Millisecond) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes in %s do not end: %w", dir, ctx.Err())
		case <-time.After(wait):
		}
	}
	if err := cgroups.RemovePath(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// Device rules that every container gets after its own, as runc does: mknod of
// anything (opening is another matter), the standard devices, ptys.
func defaultDevices() []*devices.Rule {
	rules := []*devices.Rule{
		{Type: devices.CharDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: "m", Allow: true},
		{Type: devices.BlockDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: "m", Allow: true},
	}
	for _, d := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {136, devices.Wildcard}} {
		rules = append(rules, &devices.Rule{Type: devices.CharDevice, Major: d[0], Minor: d[1], Permissions: "rwm", Allow: true})
	}
	return rules
}

// unsupported is the error for what the spec asks and cgroup v2 or we cannot do.
func unsupported(field string) error {
	return fmt.Errorf("%s is not supported: %w", field, errdefs.ErrNotImplemented)
}

// resources translates the spec's limits for cgroup v2.
func resources(spec *specs.LinuxResources) (*cgroups.Resources, error) {
	r := &cgroups.Resources{}
	if spec == nil {
		spec = &specs.LinuxResources{}
	}
	for i, d := range spec.Devices {
		rule := &devices.Rule{Type: devices.WildcardDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: devices.Permissions(d.Access), Allow: d.Allow}
		switch d.Type {
		case "", "a":
		case "c", "u":
			rule.Type = devices.CharDevice
		case "b":
			rule.Type = devices.BlockDevice
		default:
			return nil, fmt.Errorf("linux.resources.devices[%d].type %q: %w", i, d.Type, errdefs.ErrInvalidArgument)
		}
		if d.Major != nil {
			rule.Major = *d.Major
		}
		if d.Minor != nil {
			rule.Minor = *d.Minor
		}
		if rule.Permissions == "" {
			rule.Permissions = "rwm"
		}
		if !rule.Permissions.IsValid() {
			return nil, fmt.Errorf("linux.resources.devices[%d].access %q: %w", i, d.Access, errdefs.ErrInvalidArgument)
		}
		r.Devices = append(r.Devices, rule)
	}
	r.Devices = append(r.Devices, defaultDevices()...)

	if m := spec.Memory; m != nil {
		//nolint:staticcheck // the deprecated fields are refused, not used
		if m.Kernel != nil && *m.Kernel > 0 {
			return nil, unsupported("linux.resources.memory.kernel")
		}
		if m.KernelTCP != nil && *m.KernelTCP > 0 {
			return nil, unsupported("linux.resources.memory.kernelTCP")
		}
		if m.Swappiness != nil {
			return nil, unsupported("linux.resources.memory.swappiness")
		}
		if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
			return nil, unsupported("linux.resources.memory.disableOOMKiller")
		}
		set(&r.Memory, m.Limit)
		set(&r.MemoryReservation, m.Reservation)
		set(&r.MemorySwap, m.Swap)
		set(&r.MemoryCheckBeforeUpdate, m.CheckBeforeUpdate)
	}
	if c := spec.CPU; c != nil {
		if c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0 || c.RealtimePeriod != nil && *c.RealtimePeriod != 0 {
			return nil, unsupported("linux.resources.cpu.realtimeRuntime")
		}
		if c.Shares != nil {
			r.CpuShares = *c.Shares
			r.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*c.Shares)
		}
		set(&r.CpuQuota, c.Quota)
		set(&r.CpuPeriod, c.Period)
		r.CpuBurst, r.CPUIdle = c.Burst, c.Idle
		r.CpusetCpus, r.CpusetMems = c.Cpus, c.Mems
	}
	if p := spec.Pids; p != nil {
		r.PidsLimit = p.Limit
	}
	if b := spec.BlockIO; b != nil {
		set(&r.BlkioWeight, b.Weight)
		set(&r.BlkioLeafWeight, b.LeafWeight)
		for _, d := range b.WeightDevice {
			var weight, leaf uint16
			set(&weight, d.Weight)
			set(&leaf, d.LeafWeight)
			r.BlkioWeightDevice = append(r.BlkioWeightDevice, cgroups.NewWeightDevice(d.Major, d.Minor, weight, leaf))
		}
		throttle := func(list []specs.LinuxThrottleDevice) (out []*cgroups.ThrottleDevice) {
			for _, d := range list {
				out = append(out, cgroups.NewThrottleDevice(d.Major, d.Minor, d.Rate))
			}
			return out
		}
		r.BlkioThrottleReadBpsDevice = throttle(b.ThrottleReadBpsDevice)
		r.BlkioThrottleWriteBpsDevice = throttle(b.ThrottleWriteBpsDevice)
		r.BlkioThrottleReadIOPSDevice = throttle(b.ThrottleReadIOPSDevice)
		r.BlkioThrottleWriteIOPSDevice = throttle(b.ThrottleWriteIOPSDevice)
	}
	for _, h := range spec.HugepageLimits {
		r.HugetlbLimit = append(r.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	if len(spec.Rdma) > 0 {
		r.Rdma = make(map[string]cgroups.LinuxRdma, len(spec.Rdma))
		for k, v := range spec.Rdma {
			r.Rdma[k] = cgroups.LinuxRdma{HcaHandles: v.HcaHandles, HcaObjects: v.HcaObjects}
		}
	}
	if n := spec.Network; n != nil && (n.ClassID != nil && *n.ClassID != 0 || len(n.Priorities) > 0) {
		return nil, unsupported("linux.resources.network")
	}
	r.Unified = spec.Unified
	return r, nil
}

// set copies a value that is there.
func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}
