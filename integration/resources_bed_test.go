//go:build bed

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

// cgroupFile is a file of the container's cgroup X, or with a directory below it.
func cgroupFile(t *testing.T, id string, name ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(append([]string{"/sys/fs/cgroup/default", id}, name...)...))
	if err != nil {
		t.Error(err)
	}
	return strings.TrimSpace(string(text))
}

// limits checks the files in X and in the payload cgroup, which must agree.
func limits(t *testing.T, id string, want map[string]string) {
	t.Helper()
	for name, value := range want {
		for _, dir := range []string{".", "payload"} {
			if got := cgroupFile(t, id, dir, name); got != value {
				t.Errorf("%s/%s is %q, want %q", dir, name, got, value)
			}
		}
	}
}

// disk is a block device of the guest.
func disk(t *testing.T) (major, minor int64) {
	t.Helper()
	text, err := os.ReadFile("/sys/block/vda/dev")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major, minor
}

func throttled(major, minor int64, rate uint64) []specs.LinuxThrottleDevice {
	d := specs.LinuxThrottleDevice{Rate: rate}
	d.Major, d.Minor = major, minor
	return []specs.LinuxThrottleDevice{d}
}

// TestResources: every limit, in the files outside and inside, at the create and
// by updates, also of a paused container.
func TestResources(t *testing.T) {
	major, minor := disk(t)
	dev := fmt.Sprintf("%d:%d", major, minor)
	_, noHuge := os.Stat("/sys/fs/cgroup/init.scope/hugetlb.2MB.max")
	const mb = 1 << 20
	all := specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(256 * mb)), Reservation: ptr(int64(64 * mb)), Swap: ptr(int64(256 * mb))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(40000)), Period: ptr(uint64(80000)), Burst: ptr(uint64(10000)), Cpus: "0", Mems: "0"},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(50))},
		BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(500)),
			ThrottleReadBpsDevice: throttled(major, minor, mb), ThrottleWriteBpsDevice: throttled(major, minor, 2*mb),
			ThrottleReadIOPSDevice: throttled(major, minor, 100), ThrottleWriteIOPSDevice: throttled(major, minor, 200)},
		Unified: map[string]string{"memory.high": strconv.Itoa(200 * mb), "memory.min": "4096"},
	}
	want := map[string]string{
		"memory.max": strconv.Itoa(256 * mb), "memory.low": strconv.Itoa(64 * mb), "memory.swap.max": "0",
		"cpu.weight": fmt.Sprint(cgroups.ConvertCPUSharesToCgroupV2Value(512)), "cpu.max": "40000 80000", "cpu.max.burst": "10000",
		"cpuset.cpus": "0", "cpuset.mems": "0", "pids.max": "50",
		"io.weight": fmt.Sprint("default ", cgroups.ConvertBlkIOToIOWeightValue(500)), "io.max": dev + " rbps=1048576 wbps=2097152 riops=100 wiops=200",
		"memory.high": strconv.Itoa(200 * mb), "memory.min": "4096",
	}
	if noHuge == nil {
		all.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 * mb}}
		want["hugetlb.2MB.max"], want["hugetlb.2MB.rsvd.max"] = strconv.Itoa(4*mb), strconv.Itoa(4*mb)
	}
	b := start(t, options{id: "resources", args: sh("grep ^Cpus_allowed_list /proc/self/status | cut -f2; exec sleep 1000"), edit: func(s *oci.Spec) {
		ownCgroup(s)
		all.Devices = s.Linux.Resources.Devices
		s.Linux.Resources = &all
	}})
	limits(t, "resources", want)
	inside, _, err := b.execIn(sh("cd /sys/fs/cgroup; grep . memory.max memory.low memory.swap.max memory.high cpu.max cpu.weight pids.max io.max cpuset.cpus"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(inside) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if want[name] != value {
			t.Errorf("inside: %s is %q, want %q", name, value, want[name])
		}
	}
	if n := strings.Count(inside, "\n"); n != 9 {
		t.Errorf("inside:\n%s", inside)
	}
	if b.out.String() != "0\n" {
		t.Errorf("the process may run on CPUs %q", b.out)
	}

	// runc, whose older version here has another formula for cpu.weight and no burst.
	beside := start(t, options{id: "resources-runc", runtime: "io.containerd.runc.v2", args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) {
		all.Devices = s.Linux.Resources.Devices
		s.Linux.Resources = &all
	}})
	for name, value := range want {
		if got := cgroupFile(t, "resources-runc", name); got != value && name != "cpu.weight" && name != "cpu.max.burst" {
			t.Errorf("%s is %q with runc, %q with us", name, got, value)
		}
	}
	if err := beside.task.Kill(b.ctx, 9); err != nil {
		t.Error(err)
	}

	update := func(r specs.LinuxResources) error { return b.task.Update(b.ctx, client.WithResources(&r)) }
	memory := func(m specs.LinuxMemory) specs.LinuxResources { return specs.LinuxResources{Memory: &m} }
	cpu := func(c specs.LinuxCPU) specs.LinuxResources { return specs.LinuxResources{CPU: &c} }
	pids := func(n int64) specs.LinuxResources { return specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &n}} }
	for _, c := range []struct {
		name string
		r    specs.LinuxResources
		want map[string]string
	}{
		{"memory lowered, within the same sum", memory(specs.LinuxMemory{Limit: ptr(int64(128 * mb))}), map[string]string{"memory.max": strconv.Itoa(128 * mb), "memory.swap.max": strconv.Itoa(128 * mb), "cpu.max": "40000 80000"}},
		{"swap alone", memory(specs.LinuxMemory{Swap: ptr(int64(512 * mb))}), map[string]string{"memory.max": strconv.Itoa(128 * mb), "memory.swap.max": strconv.Itoa(384 * mb)}},
		{"swap without limit", memory(specs.LinuxMemory{Swap: ptr(int64(-1))}), map[string]string{"memory.max": strconv.Itoa(128 * mb), "memory.swap.max": "max"}},
		{"memory raised", memory(specs.LinuxMemory{Limit: ptr(int64(300 * mb))}), map[string]string{"memory.max": strconv.Itoa(300 * mb), "memory.swap.max": "max"}},
		{"memory lowered again", memory(specs.LinuxMemory{Limit: ptr(int64(100 * mb)), Swap: ptr(int64(100 * mb)), CheckBeforeUpdate: ptr(true)}), map[string]string{"memory.max": strconv.Itoa(100 * mb), "memory.swap.max": "0"}},
		{"memory without limit", memory(specs.LinuxMemory{Limit: ptr(int64(-1)), Reservation: ptr(int64(-1))}), map[string]string{"memory.max": "max", "memory.swap.max": "max", "memory.low": "max"}},
		{"quota alone", cpu(specs.LinuxCPU{Quota: ptr(int64(60000))}), map[string]string{"cpu.max": "60000 80000"}},
		{"period alone", cpu(specs.LinuxCPU{Period: ptr(uint64(200000))}), map[string]string{"cpu.max": "60000 200000"}},
		{"no quota", cpu(specs.LinuxCPU{Quota: ptr(int64(-1)), Burst: ptr(uint64(0))}), map[string]string{"cpu.max": "max 200000", "cpu.max.burst": "0"}},
		{"shares", cpu(specs.LinuxCPU{Shares: ptr(uint64(2048))}), map[string]string{"cpu.weight": fmt.Sprint(cgroups.ConvertCPUSharesToCgroupV2Value(2048))}},
		{"idle", cpu(specs.LinuxCPU{Idle: ptr(int64(1))}), map[string]string{"cpu.idle": "1"}},
		{"not idle", cpu(specs.LinuxCPU{Idle: ptr(int64(0))}), map[string]string{"cpu.idle": "0"}},
		{"cpus", cpu(specs.LinuxCPU{Cpus: "0-1"}), map[string]string{"cpuset.cpus": "0-1"}},
		{"pids 0", pids(0), map[string]string{"pids.max": "1"}},
		{"pids -1", pids(-1), map[string]string{"pids.max": "max"}},
		{"pids 77", pids(77), map[string]string{"pids.max": "77"}},
		{"io", specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(100)), ThrottleReadBpsDevice: throttled(major, minor, 3*mb)}},
			map[string]string{"io.weight": fmt.Sprint("default ", cgroups.ConvertBlkIOToIOWeightValue(100)), "io.max": dev + " rbps=3145728 wbps=2097152 riops=100 wiops=200"}},
		{"unified", specs.LinuxResources{Unified: map[string]string{"memory.high": "max", "cpu.weight": "42"}}, map[string]string{"memory.high": "max", "cpu.weight": "42"}},
	} {
		if c.name == "pids 77" {
			if err := b.task.Pause(b.ctx); err != nil {
				t.Fatal(err)
			}
		}
		if err := update(c.r); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		t.Run(c.name, func(t *testing.T) { limits(t, "resources", c.want) })
	}
	if err := b.task.Resume(b.ctx); err != nil {
		t.Fatal(err)
	}

	wd := specs.LinuxWeightDevice{Weight: ptr(uint16(100))}
	wd.Major, wd.Minor = major, minor
	for _, c := range []struct {
		field string
		r     specs.LinuxResources
		is    func(error) bool
	}{
		{"memory", memory(specs.LinuxMemory{Limit: ptr(int64(4096)), CheckBeforeUpdate: ptr(true)}), errdefs.IsInvalidArgument},
		{"memory", memory(specs.LinuxMemory{Limit: ptr(int64(64 * mb)), Swap: ptr(int64(32 * mb))}), errdefs.IsInvalidArgument},
		{"memory.swappiness", memory(specs.LinuxMemory{Swappiness: ptr(uint64(10))}), errdefs.IsNotImplemented},
		{"cpu", cpu(specs.LinuxCPU{Idle: ptr(int64(2))}), errdefs.IsInvalidArgument},
		{"cpu.cpus", cpu(specs.LinuxCPU{Cpus: "x"}), errdefs.IsInvalidArgument},
		{"blockIO", specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{ThrottleReadBpsDevice: throttled(4000, 1, 1)}}, errdefs.IsInvalidArgument},
		{"blockIO.weightDevice", specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{WeightDevice: []specs.LinuxWeightDevice{wd}}}, errdefs.IsFailedPrecondition},
		{"hugepageLimits", specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "3MB", Limit: 1}}}, errdefs.IsFailedPrecondition},
		{"rdma", specs.LinuxResources{Rdma: map[string]specs.LinuxRdma{"no-such-device": {HcaHandles: ptr(uint32(1))}}}, nil},
		{"unified", specs.LinuxResources{Unified: map[string]string{"memory.no_such_file": "1"}}, errdefs.IsInvalidArgument},
		{"unified", specs.LinuxResources{Unified: map[string]string{"../resources/memory.max": "1"}}, errdefs.IsInvalidArgument},
		{"unified", specs.LinuxResources{Unified: map[string]string{"cgroup.procs": "1"}}, errdefs.IsInvalidArgument},
		{"unified", specs.LinuxResources{Unified: map[string]string{"memory.max": "x"}}, errdefs.IsInvalidArgument},
	} {
		err := update(c.r)
		if err == nil || c.is != nil && !c.is(err) || !strings.Contains(err.Error(), "linux.resources."+c.field) {
			t.Errorf("%s: %v", c.field, err)
		}
	}
	limits(t, "resources", map[string]string{"memory.max": "max", "cpu.idle": "0"})
	if _, err := create(t, options{args: []string{"true"}, edit: func(s *oci.Spec) { s.Linux.Resources.Unified = map[string]string{"no.such": "1"} }}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unified at the create: %v", err)
	}
}

// TestDeviceRules: in order, by type, with parts of the access; and changed by an update.
func TestDeviceRules(t *testing.T) {
	major, minor := disk(t)
	rule := func(allow bool, kind string, major, minor int64, access string) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Major: &major, Minor: &minor, Access: access}
	}
	rules := []specs.LinuxDeviceCgroup{
		rule(true, "c", 10, 237, "rw"), // forgotten by the next
		{Allow: false, Access: "rwm"},
		rule(true, "c", 10, 237, "rw"), rule(false, "c", 10, 237, "w"),
		rule(true, "b", major, minor, "r"),
	}
	const try = `for d in lc vda; do for m in '<' '>>'; do eval ": $m /tmp/$d" 2>/dev/null && echo "$d $m yes" || echo "$d $m no"; done; done`
	// 10:237 is loop-control.
	b := start(t, options{id: "devices", args: sh(fmt.Sprintf("mknod /tmp/lc c 10 237; mknod /tmp/vda b %d %d; echo ready; exec sleep 1000", major, minor)),
		edit: func(s *oci.Spec) { s.Linux.Resources.Devices = rules }})
	eventually(t, time.Minute, "the devices are there", func() bool { return strings.Contains(b.out.String(), "ready") })
	check := func(want ...string) {
		t.Helper()
		out, _, err := b.execIn([]string{"bash", "-c", try}, nil)
		if err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		lines(t, out, want...)
	}
	check("lc < yes", "lc >> no", "vda < yes", "vda >> no")
	if err := b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"}, rule(true, "c", 10, 237, "rw"),
	}})); err != nil {
		t.Fatal(err)
	}
	check("lc < yes", "lc >> yes", "vda < no", "vda >> no")
	// An update of something else leaves them alone.
	if err := b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(100))}})); err != nil {
		t.Fatal(err)
	}
	check("lc >> yes", "vda < no")
}

// TestPidsLimit: a limit that leaves room for the entrypoint alone.
func TestPidsLimit(t *testing.T) {
	for _, limit := range []int64{0, 1} {
		out, stderr, code := run(t, options{args: sh("echo alone; (:) || echo no; echo end"), edit: func(s *oci.Spec) {
			s.Linux.Resources.Pids = &specs.LinuxPids{Limit: &limit}
		}})
		if !strings.HasPrefix(out, "alone\n") || strings.Contains(out, "end") || !strings.Contains(strings.ToLower(stderr), "fork") {
			t.Errorf("limit %d: code %d, %q, %q", limit, code, out, stderr)
		}
	}
}

// number reads one counter of a cgroup's file.
func number(t *testing.T, text, key string) uint64 {
	t.Helper()
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
			n, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Errorf("no %s in %q", key, text)
	return 0
}

// TestMetrics: what containerd is told is what the files say. The container is
// paused, so that it stands still.
func TestMetrics(t *testing.T) {
	const limit = 128 << 20
	b := start(t, options{id: "metrics", args: sh("head -c 8000000 /dev/zero >/var/tmp/x; cat /var/tmp/x | wc -c; exec sleep 1000"), spec: []oci.SpecOpts{oci.WithMemoryLimit(limit), oci.WithPidsLimit(60)}})
	eventually(t, time.Minute, "its work is done", func() bool { return strings.Contains(b.out.String(), "8000000") })
	if err := b.task.Pause(b.ctx); err != nil {
		t.Fatal(err)
	}
	file := func(name string) string { return cgroupFile(t, "metrics", name) }
	one := func(name string) uint64 { return number(t, "x "+file(name), "x") }
	var m *stats.Metrics
	var differ []string
	// The kernel settles accounts of a frozen container, too: a page given back
	// between two looks is no error of ours, one that is always told wrong is.
	for range 20 {
		metric, err := b.task.Metrics(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		v, err := typeurl.UnmarshalAny(metric.Data)
		if err != nil {
			t.Fatal(err)
		}
		m, differ = v.(*stats.Metrics), nil
		for _, c := range []struct {
			name      string
			got, want uint64
		}{
			{"memory.current", m.Memory.Usage, one("memory.current")},
			{"memory.max", m.Memory.UsageLimit, limit},
			{"memory.peak", m.Memory.MaxUsage, one("memory.peak")},
			{"memory.swap.current", m.Memory.SwapUsage, one("memory.swap.current")},
			{"memory.stat anon", m.Memory.Anon, number(t, file("memory.stat"), "anon")},
			{"memory.stat file", m.Memory.File, number(t, file("memory.stat"), "file")},
			{"memory.stat slab", m.Memory.Slab, number(t, file("memory.stat"), "slab")},
			{"memory.stat pgfault", m.Memory.Pgfault, number(t, file("memory.stat"), "pgfault")},
			{"memory.events max", m.MemoryEvents.Max, number(t, file("memory.events"), "max")},
			{"memory.events oom_kill", m.MemoryEvents.OomKill, number(t, file("memory.events"), "oom_kill")},
			{"cpu.stat usage_usec", m.CPU.UsageUsec, number(t, file("cpu.stat"), "usage_usec")},
			{"cpu.stat user_usec", m.CPU.UserUsec, number(t, file("cpu.stat"), "user_usec")},
			{"cpu.stat nr_throttled", m.CPU.NrThrottled, number(t, file("cpu.stat"), "nr_throttled")},
			{"pids.current", m.Pids.Current, one("pids.current")},
			{"pids.max", m.Pids.Limit, 60},
		} {
			if c.got != c.want {
				differ = append(differ, fmt.Sprintf("%s: %d, the file says %d", c.name, c.got, c.want))
			}
		}
		if differ == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if differ != nil {
		t.Error(strings.Join(differ, "; "))
	}
	if m.Memory.Usage == 0 || m.CPU.UsageUsec == 0 || m.Pids.Current != 1 {
		t.Errorf("nothing was counted: %v", m)
	}
	var io []string
	for _, e := range m.Io.Usage {
		io = append(io, fmt.Sprintf("%d:%d rbytes=%d wbytes=%d rios=%d wios=%d", e.Major, e.Minor, e.Rbytes, e.Wbytes, e.Rios, e.Wios))
	}
	for line := range strings.Lines(file("io.stat")) {
		found := false
		for _, i := range io {
			found = found || strings.HasPrefix(strings.TrimSpace(line), i)
		}
		if fields := strings.Fields(line); len(fields) > 1 && !found {
			t.Errorf("io.stat %q is not in %q", line, io)
		}
	}
	for _, h := range m.Hugetlb {
		if got := file("hugetlb." + h.Pagesize + ".max"); got != fmt.Sprint(h.Max) && (got != "max" || h.Max != ^uint64(0)) {
			t.Errorf("hugetlb %s: %d, the file says %s", h.Pagesize, h.Max, got)
		}
	}
	if _, err := os.Stat("/sys/fs/cgroup/default/metrics/hugetlb.2MB.max"); err == nil && len(m.Hugetlb) == 0 {
		t.Error("no hugetlb metrics")
	}
}

// TestOOMOfExecs: each process that the OOM killer takes is told, and the
// container goes on; with memory.oom.group it ends as a whole.
func TestOOMOfExecs(t *testing.T) {
	b := start(t, options{id: "oomexec", args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{oci.WithMemoryLimit(48 << 20)}})
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	found, failed := b.client.Subscribe(ctx, `topic=="/tasks/oom"`, `topic=="/test/subscribed"`)
	subscribed(t, b, found)
	oom := func(id string) {
		t.Helper()
		for {
			select {
			case e := <-found:
				if e.Topic == "/tasks/oom" && containerOf(t, e.Event) == id {
					return
				}
			case err := <-failed:
				t.Fatal(err)
			case <-time.After(time.Minute):
				t.Fatal("no OOM event")
			}
		}
	}
	for range 2 {
		if _, code, err := b.execIn([]string{"tail", "/dev/zero"}, nil); err != nil || code != 137 {
			t.Errorf("exec: code %d, %v", code, err)
		}
		oom("oomexec")
	}
	if st, err := b.task.Status(b.ctx); err != nil || st.Status != client.Running {
		t.Errorf("%v, %v", st, err)
	}
	if n := number(t, cgroupFile(t, "oomexec", "memory.events"), "oom_kill"); n != 2 {
		t.Errorf("%d kills", n)
	}
	g := start(t, options{id: "oomgroup", args: sh("trap '' TERM; tail /dev/zero; sleep 1000"), spec: []oci.SpecOpts{oci.WithMemoryLimit(48 << 20)}, edit: func(s *oci.Spec) {
		s.Linux.Resources.Unified = map[string]string{"memory.oom.group": "1"}
	}})
	if code := g.wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	oom("oomgroup")
}

// TestBFQ: with the bfq scheduler the weights are its own, by device too.
func TestBFQ(t *testing.T) {
	const scheduler = "/sys/block/vda/queue/scheduler"
	if out, code := command("modprobe", "bfq"); code != 0 {
		t.Skipf("this kernel has no bfq: %s", out)
	}
	set := func(name string) error { return os.WriteFile(scheduler, []byte(name), 0) }
	if err := set("bfq"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := set("none"); err != nil {
			t.Error(err)
		}
		command("rmmod", "bfq")
	})
	major, minor := disk(t)
	device := func(weight uint16) []specs.LinuxWeightDevice {
		d := specs.LinuxWeightDevice{Weight: &weight}
		d.Major, d.Minor = major, minor
		return []specs.LinuxWeightDevice{d}
	}
	b := start(t, options{id: "bfq", args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) {
		s.Linux.Resources.BlockIO = &specs.LinuxBlockIO{Weight: ptr(uint16(500)), WeightDevice: device(200)}
	}})
	limits(t, "bfq", map[string]string{"io.bfq.weight": fmt.Sprintf("default 500\n%d:%d 200", major, minor)})
	if err := b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{WeightDevice: device(300)}})); err != nil {
		t.Fatal(err)
	}
	limits(t, "bfq", map[string]string{"io.bfq.weight": fmt.Sprintf("default 500\n%d:%d 300", major, minor)})
}
