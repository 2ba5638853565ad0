package lxc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
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
	path    string
	manager cgroups.Manager
	// limits are all that were asked for: the kernel's files hold pairs (quota
	// and period) and sums (memory and swap), of which an update may name one.
	limits  *cgroups.Resources
	devices []specs.LinuxDeviceCgroup
	// inner: memory and cpu are limited in the payload alone, where Proxmox changes
	// them (`pct set`): a limit of X would count as well.
	inner  bool
	holder *holder // with systemd, until the container's init is there
}

// createCgroup makes X with its limits and lets its children have all
// controllers. The number of processes is limited later (see limitPids).
func createCgroup(ctx context.Context, path string, unit *unit, program *initProgram, spec *specs.LinuxResources, r *cgroups.Resources, inner bool) (_ *cgroup, retErr error) {
	dir := cgroupDir(path)
	c := &cgroup{path: path, limits: r, inner: inner}
	if spec != nil {
		c.devices = spec.Devices
	}
	if unit != nil {
		if err := c.startScope(ctx, unit, program); err != nil {
			return nil, err
		}
	} else {
		m, err := fs2.NewManager(&cgroups.Cgroup{Path: path, Resources: &cgroups.Resources{}}, dir)
		if err != nil {
			return nil, err
		}
		if err := m.Apply(-1); err != nil {
			return nil, fmt.Errorf("linux.cgroupsPath: make cgroup %s: %w", path, err)
		}
		c.manager = m
	}
	defer func() {
		if retErr != nil {
			c.holder.release()
		}
	}()
	early := *r
	early.PidsLimit = nil
	if err := setAll(c.manager, c.outer(&early)); err != nil {
		return nil, err
	}
	if err := delegate(dir); err != nil {
		return nil, err
	}
	return c, nil
}

// outer are those limits that are X's own.
func (c *cgroup) outer(r *cgroups.Resources) *cgroups.Resources {
	if !c.inner {
		return r
	}
	o := *r
	o.Memory, o.MemoryReservation, o.MemorySwap = 0, 0, 0
	o.CpuShares, o.CpuWeight, o.CpuQuota, o.CpuPeriod, o.CPUIdle, o.CpuBurst = 0, 0, 0, 0, nil, nil
	return &o
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

// setAll sets the limits, field by field, so that an error can name its own.
func setAll(m cgroups.Manager, r *cgroups.Resources) error {
	dir := m.Path("")
	if len(r.BlkioWeightDevice) > 0 {
		// The library leaves them out then.
		if _, err := os.Stat(filepath.Join(dir, "io.bfq.weight")); err != nil {
			return fmt.Errorf("linux.resources.blockIO.weightDevice: %w, it takes the bfq scheduler: %w", err, errdefs.ErrFailedPrecondition)
		}
	}
	for key := range r.Unified {
		if err := checkUnified(dir, key); err != nil {
			return err
		}
	}
	for _, part := range split(r) {
		if err := m.Set(part.r); err != nil {
			return resourceError("linux.resources."+part.field, err)
		}
	}
	return nil
}

// part are the limits of one field of linux.resources.
type part struct {
	field string
	r     *cgroups.Resources
}

// split takes the limits apart; fields that ask for nothing are left out.
func split(r *cgroups.Resources) []part {
	var out []part
	add := func(field string, wanted bool, r cgroups.Resources) {
		if wanted {
			r.SkipDevices = r.Devices == nil
			out = append(out, part{field, &r})
		}
	}
	add("devices", !r.SkipDevices, cgroups.Resources{Devices: r.Devices})
	add("memory", r.Memory != 0 || r.MemoryReservation != 0 || r.MemorySwap != 0, cgroups.Resources{
		Memory: r.Memory, MemoryReservation: r.MemoryReservation, MemorySwap: r.MemorySwap, MemoryCheckBeforeUpdate: r.MemoryCheckBeforeUpdate})
	add("cpu", r.CpuWeight != 0 || r.CpuQuota != 0 || r.CpuPeriod != 0 || r.CPUIdle != nil || r.CpuBurst != nil, cgroups.Resources{
		CpuShares: r.CpuShares, CpuWeight: r.CpuWeight, CpuQuota: r.CpuQuota, CpuPeriod: r.CpuPeriod, CPUIdle: r.CPUIdle, CpuBurst: r.CpuBurst})
	add("cpu.cpus", r.CpusetCpus != "", cgroups.Resources{CpusetCpus: r.CpusetCpus})
	add("cpu.mems", r.CpusetMems != "", cgroups.Resources{CpusetMems: r.CpusetMems})
	add("pids", r.PidsLimit != nil, cgroups.Resources{PidsLimit: r.PidsLimit})
	add("blockIO", r.BlkioWeight != 0 || len(r.BlkioWeightDevice)+len(r.BlkioThrottleReadBpsDevice)+len(r.BlkioThrottleWriteBpsDevice)+
		len(r.BlkioThrottleReadIOPSDevice)+len(r.BlkioThrottleWriteIOPSDevice) > 0, cgroups.Resources{
		BlkioWeight: r.BlkioWeight, BlkioWeightDevice: r.BlkioWeightDevice,
		BlkioThrottleReadBpsDevice: r.BlkioThrottleReadBpsDevice, BlkioThrottleWriteBpsDevice: r.BlkioThrottleWriteBpsDevice,
		BlkioThrottleReadIOPSDevice: r.BlkioThrottleReadIOPSDevice, BlkioThrottleWriteIOPSDevice: r.BlkioThrottleWriteIOPSDevice})
	add("hugepageLimits", len(r.HugetlbLimit) > 0, cgroups.Resources{HugetlbLimit: r.HugetlbLimit})
	add("rdma", len(r.Rdma) > 0, cgroups.Resources{Rdma: r.Rdma})
	add("unified", len(r.Unified) > 0, cgroups.Resources{Unified: r.Unified})
	return out
}

// checkUnified refuses a file that this cgroup has not.
func checkUnified(dir, key string) error {
	controller, _, ok := strings.Cut(key, ".")
	if !ok || strings.ContainsAny(key, "/\x00") || controller == "" {
		return fmt.Errorf("linux.resources.unified: %q is no file name of the form controller.parameter: %w", key, errdefs.ErrInvalidArgument)
	}
	if controller == "cgroup" {
		return fmt.Errorf("linux.resources.unified: %q is not for a container to set: %w", key, errdefs.ErrInvalidArgument)
	}
	if _, err := os.Stat(filepath.Join(dir, key)); err != nil {
		return fmt.Errorf("linux.resources.unified: this host's cgroups have no %q: %w", key, errdefs.ErrInvalidArgument)
	}
	return nil
}

// resourceError tells what kind of failure it is that the kernel, or the library
// before it, did not take a limit.
func resourceError(field string, err error) error {
	var kind error = errdefs.ErrInvalidArgument
	for _, lacking := range []error{os.ErrNotExist, unix.EBUSY, unix.EPERM, unix.EACCES} {
		if errors.Is(err, lacking) {
			kind = errdefs.ErrFailedPrecondition // a controller, a device or the file system is not as it takes
		}
	}
	return fmt.Errorf("%s: %w: %w", field, err, kind)
}

func (c *cgroup) payloadDir() string { return filepath.Join(cgroupDir(c.path), payload) }

// mirror repeats limits in the payload cgroup, which is the root of the
// container's cgroup namespace: programs that size themselves by
// /sys/fs/cgroup/memory.max or cpu.max must find them there. Device rules stay
// with X, out of the container's reach.
func (c *cgroup) mirror(limits *cgroups.Resources) error {
	r := *limits
	r.Devices, r.SkipDevices = nil, true
	m, err := fs2.NewManager(&cgroups.Cgroup{Path: filepath.Join(c.path, payload), Resources: &cgroups.Resources{}}, c.payloadDir())
	if err != nil {
		return err
	}
	if err := setAll(m, &r); err != nil {
		return fmt.Errorf("in the payload: %w", err)
	}
	return nil
}

// settle is called once the container's init is in the payload cgroup: it sets
// what could not be set before. A low limit of processes would have kept liblxc
// and the threads of pve-init from working; it stops nothing that runs already.
func (c *cgroup) settle() error {
	c.holder.release()
	c.holder = nil
	if c.limits.PidsLimit != nil {
		if err := setAll(c.manager, &cgroups.Resources{PidsLimit: c.limits.PidsLimit, SkipDevices: true}); err != nil {
			return err
		}
	}
	return c.mirror(c.limits)
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

// frozen is what was asked for last, by whomever. Errors: NotFound, the container has ended.
func (c *cgroup) frozen() (bool, error) {
	text, err := os.ReadFile(filepath.Join(c.payloadDir(), "cgroup.freeze"))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return false, fmt.Errorf("freezer of %s: %w", c.path, errdefs.ErrNotFound)
	}
	if err != nil {
		return false, fmt.Errorf("freezer of %s: %w", c.path, err)
	}
	return strings.TrimSpace(string(text)) == "1", nil
}

func (c *cgroup) update(spec *specs.LinuxResources) error {
	r, err := resources(spec)
	if err != nil {
		return err
	}
	// CRI sends the rules the container was made with along.
	if spec == nil || len(spec.Devices) == 0 || reflect.DeepEqual(spec.Devices, c.devices) {
		r.Devices, r.SkipDevices = nil, true
	}
	c.complete(r)
	// Raised limits must be raised outside first, lowered ones may stand for a
	// moment inside: the smaller one always counts.
	if err := setAll(c.manager, c.outer(r)); err != nil {
		return err
	}
	c.remember(r)
	if !r.SkipDevices {
		c.devices = spec.Devices
	}
	return c.mirror(r)
}

// complete adds what the kernel sets together with what is to be changed.
func (c *cgroup) complete(r *cgroups.Resources) {
	switch {
	case r.Memory == 0 && r.MemorySwap != 0:
		r.Memory = c.limits.Memory
	case r.Memory > 0 && r.MemorySwap == 0:
		r.MemorySwap = c.limits.MemorySwap
	}
	switch {
	case r.CpuQuota == 0 && r.CpuPeriod != 0:
		r.CpuQuota = c.limits.CpuQuota
	case r.CpuQuota != 0 && r.CpuPeriod == 0:
		r.CpuPeriod = c.limits.CpuPeriod
	}
}

// remember keeps what complete needs for the next update.
func (c *cgroup) remember(r *cgroups.Resources) {
	if r.Memory != 0 {
		c.limits.Memory, c.limits.MemorySwap = r.Memory, r.MemorySwap
	}
	if r.CpuQuota != 0 || r.CpuPeriod != 0 {
		c.limits.CpuQuota, c.limits.CpuPeriod = r.CpuQuota, r.CpuPeriod
	}
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
		if m.UseHierarchy != nil && !*m.UseHierarchy {
			return nil, unsupported("linux.resources.memory.useHierarchy false")
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
		if b.LeafWeight != nil && *b.LeafWeight != 0 {
			return nil, unsupported("linux.resources.blockIO.leafWeight")
		}
		if err := checkWeight("linux.resources.blockIO.weight", b.Weight); err != nil {
			return nil, err
		}
		set(&r.BlkioWeight, b.Weight)
		for i, d := range b.WeightDevice {
			field := fmt.Sprintf("linux.resources.blockIO.weightDevice[%d]", i)
			if d.LeafWeight != nil && *d.LeafWeight != 0 {
				return nil, unsupported(field + ".leafWeight")
			}
			if err := checkWeight(field+".weight", d.Weight); err != nil {
				return nil, err
			}
			if d.Weight != nil {
				r.BlkioWeightDevice = append(r.BlkioWeightDevice, cgroups.NewWeightDevice(d.Major, d.Minor, *d.Weight, 0))
			}
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

// checkWeight refuses what the runtime spec does not allow; 0 leaves the kernel's.
func checkWeight(field string, weight *uint16) error {
	if weight != nil && *weight != 0 && (*weight < 10 || *weight > 1000) {
		return fmt.Errorf("%s %d is not in 10 to 1000: %w", field, *weight, errdefs.ErrInvalidArgument)
	}
	return nil
}

// set copies a value that is there.
func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}
