package lxc

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestParseList(t *testing.T) {
	for text, want := range map[string][]int{
		"0": {0}, "0-3,7": {0, 1, 2, 3, 7}, "5,5,4-5": {5, 4}, "1,2\n": {1, 2}, "1023": {1023},
		"": nil, "1024": nil, "3-1": nil, "a": nil, "1,": nil, "-1": nil, "0-4000000000": nil, "99999999999999999999": nil,
	} {
		got, err := parseList(text)
		if !slices.Equal(got, want) || (err == nil) != (want != nil) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

func FuzzParseList(f *testing.F) {
	f.Add("0-3,7")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseList(text)
		if err == nil && (len(got) == 0 || slices.Max(got) >= maxList || slices.Min(got) < 0) {
			t.Errorf("%q: %v", text, got)
		}
	})
}

func TestProcessRefuses(t *testing.T) {
	score := 1001
	for i, c := range []struct {
		field  string
		change func(*specs.Spec)
	}{
		{"process.user.uid", func(s *specs.Spec) { s.Process.User.UID = ^uint32(0) }},
		{"process.user.gid", func(s *specs.Spec) { s.Process.User.GID = ^uint32(0) }},
		{"process.user.additionalGids", func(s *specs.Spec) { s.Process.User.AdditionalGids = []uint32{1, ^uint32(0)} }},
		{"process.oomScoreAdj", func(s *specs.Spec) { s.Process.OOMScoreAdj = &score }},
		{"process.consoleSize", func(s *specs.Spec) { s.Process.Terminal, s.Process.ConsoleSize = true, &specs.Box{Height: 1 << 20} }},
		{"process.rlimits[0].type", func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} }},
		{"process.rlimits[1].type", func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_AS"}, {Type: "RLIMIT_AS"}}
		}},
		{"process.rlimits[0]", func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_AS", Soft: 2, Hard: 1}}
		}},
		{"process.ioPriority.class", func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "X"} }},
		{"process.ioPriority.priority", func(s *specs.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 8}
		}},
		{"process.execCPUAffinity.initial", func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "x"} }},
		{"process.execCPUAffinity.final", func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Final: "3-1"} }},
		{"process.scheduler.policy", scheduler(specs.Scheduler{Policy: "X"})},
		{"process.scheduler.nice", scheduler(specs.Scheduler{Policy: specs.SchedOther, Nice: 20})},
		{"process.scheduler.flags", scheduler(specs.Scheduler{Policy: specs.SchedOther, Flags: []specs.LinuxSchedulerFlag{"X"}})},
		{"process.scheduler.priority", scheduler(specs.Scheduler{Policy: specs.SchedFIFO})},
		{"process.scheduler.priority", scheduler(specs.Scheduler{Policy: specs.SchedBatch, Priority: 1})},
		{"process.scheduler", scheduler(specs.Scheduler{Policy: specs.SchedRR, Priority: 1, Runtime: 1})},
		{"process.scheduler", scheduler(specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 3, Deadline: 2, Period: 1})},
		{"linux.personality.domain", func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "X"} }},
		{"linux.personality.flags", func(s *specs.Spec) {
			s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux, Flags: []specs.LinuxPersonalityFlag{"X"}}
		}},
		{"linux.memoryPolicy.mode", func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "X"} }},
		{"linux.memoryPolicy.flags", func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{"X"}}
		}},
		{"linux.memoryPolicy.nodes", func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "1024"}
		}},
		{"linux.seccomp.listenerPath", func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActNotify} }},
	} {
		if _, err := translated(t, c.change); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%d: %s: %v", i, c.field, err)
		}
	}
	if _, err := translated(t, scheduler(specs.Scheduler{Policy: specs.SchedISO})); !errdefs.IsNotImplemented(err) {
		t.Errorf("SCHED_ISO: %v", err)
	}
}

func scheduler(p specs.Scheduler) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Process.Scheduler = &p }
}

func TestMemoryPolicy(t *testing.T) {
	got, err := memoryPolicy(&specs.LinuxMemoryPolicy{Mode: specs.MpolWeightedInterleave, Nodes: "0-1,65", Flags: []specs.MemoryPolicyFlagType{specs.MpolFRelativeNodes}})
	if err != nil || got.Mode != 6|1<<14 || !slices.Equal(got.Nodes, []uint64{3, 2}) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := memoryPolicy(&specs.LinuxMemoryPolicy{Mode: specs.MpolLocal}); err != nil || got.Mode != 4 || got.Nodes != nil {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestCapabilityWarnings: what cannot be granted is said, once, and is no error.
func TestCapabilityWarnings(t *testing.T) {
	got := capabilityWarnings(&specs.LinuxCapabilities{
		Bounding: []string{"CAP_CHOWN", "CAP_X"}, Permitted: []string{"CAP_CHOWN", "CAP_KILL"}, Inheritable: []string{"CAP_CHOWN"},
		Effective: []string{"CAP_SYS_ADMIN"}, Ambient: []string{"CAP_KILL", "CAP_Y"},
	})
	want := []string{
		`process.capabilities.bounding: "CAP_X" is no capability this program knows and is left out`,
		`process.capabilities.effective: CAP_SYS_ADMIN is left out, it is not among the permitted ones`,
		`process.capabilities.ambient: "CAP_Y" is no capability this program knows and is left out`,
		`process.capabilities.ambient: CAP_KILL is left out, it is not among the inheritable ones`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got := capabilityWarnings(nil); got != nil {
		t.Errorf("%q", got)
	}
}

func TestUnit(t *testing.T) {
	for _, c := range []struct{ path, cgroup string }{
		{"", "/system.slice/containerd-pve-default--x.scope"},
		{":p:n", "/system.slice/p-n.scope"},
		{"-.slice:p:n", "/p-n.scope"},
		{"kubepods-besteffort-pod1_2.slice:cri-containerd:abc", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice/cri-containerd-abc.scope"},
		{"/default/x", "!"}, {"a.slice:b", "!"}, {"a:b:c", "!"}, {"a.slice::c", "!"}, {"a.slice:b:", "!"}, {"a--b.slice:p:n", "!"},
		{"a.slice:b:c.slice", "!"}, {"a.slice:b:../c", "!"}, {"a.slice:b:c\n", "!"}, {"a.slice:b/c:d", "!"}, {"../a.slice:b:c", "!"},
	} {
		s := minimal()
		s.Linux.CgroupsPath = c.path
		if strings.Count(c.path, ":") == 2 { // the path alone says it as well
			if tr, err := translate(CreateOptions{Namespace: "default", ID: "x", Bundle: "/b", Rootfs: "/b/rootfs", Spec: s}, "default--x"); c.cgroup == "!" && !errdefs.IsInvalidArgument(err) ||
				c.cgroup != "!" && (err != nil || tr.unit == nil || tr.cgroup != c.cgroup) {
				t.Errorf("%q without the option: %+v, %v", c.path, tr, err)
			}
		}
		tr, err := translate(CreateOptions{Namespace: "default", ID: "x", Bundle: "/b", Rootfs: "/b/rootfs", Spec: s, SystemdCgroup: true}, "default--x")
		if c.cgroup == "!" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "linux.cgroupsPath") {
				t.Errorf("%q: %v", c.path, err)
			}
			continue
		}
		if err != nil || tr.cgroup != c.cgroup || tr.unit == nil || !strings.Contains(tr.config, "lxc.cgroup.dir.container = "+c.cgroup[1:]+"/payload\n") {
			t.Errorf("%q: %+v, %v", c.path, tr, err)
		}
	}
}

func ptr[T any](v T) *T { return &v }

func TestResourcesRefuses(t *testing.T) {
	for _, c := range []struct {
		field string
		r     specs.LinuxResources
		is    func(error) bool
	}{
		{"memory.swappiness", specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: ptr(uint64(0))}}, errdefs.IsNotImplemented},
		//nolint:staticcheck // deprecated, and refused
		{"memory.kernel", specs.LinuxResources{Memory: &specs.LinuxMemory{Kernel: ptr(int64(1))}}, errdefs.IsNotImplemented},
		{"memory.kernelTCP", specs.LinuxResources{Memory: &specs.LinuxMemory{KernelTCP: ptr(int64(1))}}, errdefs.IsNotImplemented},
		{"memory.disableOOMKiller", specs.LinuxResources{Memory: &specs.LinuxMemory{DisableOOMKiller: ptr(true)}}, errdefs.IsNotImplemented},
		{"memory.useHierarchy", specs.LinuxResources{Memory: &specs.LinuxMemory{UseHierarchy: ptr(false)}}, errdefs.IsNotImplemented},
		{"cpu.realtimeRuntime", specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimeRuntime: ptr(int64(1))}}, errdefs.IsNotImplemented},
		{"cpu.realtimeRuntime", specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimePeriod: ptr(uint64(1))}}, errdefs.IsNotImplemented},
		{"network", specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(1))}}, errdefs.IsNotImplemented},
		{"network", specs.LinuxResources{Network: &specs.LinuxNetwork{Priorities: []specs.LinuxInterfacePriority{{Name: "lo"}}}}, errdefs.IsNotImplemented},
		{"blockIO.leafWeight", specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{LeafWeight: ptr(uint16(10))}}, errdefs.IsNotImplemented},
		{"blockIO.weight", specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(9))}}, errdefs.IsInvalidArgument},
		{"blockIO.weightDevice[0].weight", specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{WeightDevice: []specs.LinuxWeightDevice{{Weight: ptr(uint16(1001))}}}}, errdefs.IsInvalidArgument},
		{"devices[0].type", specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Type: "x"}}}, errdefs.IsInvalidArgument},
		{"devices[0].access", specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "x"}}}, errdefs.IsInvalidArgument},
	} {
		if _, err := resources(&c.r); err == nil || !c.is(err) || !strings.Contains(err.Error(), "linux.resources."+c.field) {
			t.Errorf("%s: %v", c.field, err)
		}
	}
	// What asks for nothing is no reason to refuse.
	//nolint:staticcheck // deprecated, and looked at all the same
	if _, err := resources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Kernel: ptr(int64(-1)), UseHierarchy: ptr(true), DisableOOMKiller: ptr(false)},
		CPU: &specs.LinuxCPU{RealtimeRuntime: ptr(int64(0))}, Network: &specs.LinuxNetwork{ClassID: ptr(uint32(0))}}); err != nil {
		t.Error(err)
	}
}

// TestSplit: every limit comes in one part, so that its error names its field.
func TestSplit(t *testing.T) {
	r, err := resources(&specs.LinuxResources{
		Devices:        []specs.LinuxDeviceCgroup{{Access: "rwm"}},
		Memory:         &specs.LinuxMemory{Limit: ptr(int64(1)), Swap: ptr(int64(2)), Reservation: ptr(int64(3)), CheckBeforeUpdate: ptr(true)},
		CPU:            &specs.LinuxCPU{Shares: ptr(uint64(4)), Quota: ptr(int64(5)), Period: ptr(uint64(6)), Burst: ptr(uint64(7)), Idle: ptr(int64(1)), Cpus: "0", Mems: "0"},
		Pids:           &specs.LinuxPids{Limit: ptr(int64(8))},
		BlockIO:        &specs.LinuxBlockIO{Weight: ptr(uint16(10)), ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{{Rate: 9}}},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 10}},
		Rdma:           map[string]specs.LinuxRdma{"x": {}},
		Unified:        map[string]string{"memory.high": "1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	var fields []string
	whole := cgroups.Resources{}
	for _, p := range split(r) {
		fields = append(fields, p.field)
		if p.r.SkipDevices != (p.field != "devices") {
			t.Errorf("%s: SkipDevices %v", p.field, p.r.SkipDevices)
		}
		from, to := reflect.ValueOf(*p.r), reflect.ValueOf(&whole).Elem()
		for i := range from.NumField() {
			if !from.Field(i).IsZero() && from.Type().Field(i).Name != "SkipDevices" {
				to.Field(i).Set(from.Field(i))
			}
		}
	}
	if got, want := fmt.Sprint(fields), "[devices memory cpu cpu.cpus cpu.mems pids blockIO hugepageLimits rdma unified]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if !reflect.DeepEqual(whole, *r) {
		t.Errorf("together:\n%+v\nwant\n%+v", whole, *r)
	}
	if got := split(&cgroups.Resources{SkipDevices: true}); got != nil {
		t.Errorf("nothing asked for: %v", got)
	}
}

// TestComplete: an update of half a pair keeps the other half.
func TestComplete(t *testing.T) {
	c := &cgroup{limits: &cgroups.Resources{Memory: 100, MemorySwap: 300, CpuQuota: 5, CpuPeriod: 7}}
	for _, s := range []struct{ in, want cgroups.Resources }{
		{cgroups.Resources{Memory: 50}, cgroups.Resources{Memory: 50, MemorySwap: 300}},
		{cgroups.Resources{MemorySwap: 400}, cgroups.Resources{Memory: 50, MemorySwap: 400}},
		{cgroups.Resources{Memory: -1}, cgroups.Resources{Memory: -1}},
		{cgroups.Resources{CpuQuota: 6}, cgroups.Resources{CpuQuota: 6, CpuPeriod: 7}},
		{cgroups.Resources{CpuPeriod: 9}, cgroups.Resources{CpuQuota: 6, CpuPeriod: 9}},
		{cgroups.Resources{CpuQuota: -1}, cgroups.Resources{CpuQuota: -1, CpuPeriod: 9}},
	} {
		got := s.in
		c.complete(&got)
		if !reflect.DeepEqual(got, s.want) {
			t.Errorf("%+v: %+v, want %+v", s.in, got, s.want)
		}
		c.remember(&got)
	}
}
