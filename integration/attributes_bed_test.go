//go:build bed

package integration

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/apparmor"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// lines checks that each line is among those of the output.
func lines(t *testing.T, out string, want ...string) {
	t.Helper()
	var missing []string
	for _, w := range want {
		if !strings.Contains("\n"+out, "\n"+w+"\n") {
			missing = append(missing, w)
		}
	}
	if missing != nil {
		t.Errorf("no lines %q in:\n%s", missing, out)
	}
}

const showCaps = `sed -n 's/^\(Cap[A-Z][a-z]*\):\t/\1 /p' /proc/self/status`

var allRlimits = []specs.POSIXRlimit{
	{Type: "RLIMIT_AS", Soft: 1 << 40, Hard: 1 << 41}, {Type: "RLIMIT_CORE", Soft: 1, Hard: 2}, {Type: "RLIMIT_CPU", Soft: 1000, Hard: 2000},
	{Type: "RLIMIT_DATA", Soft: 1 << 42, Hard: 1 << 43}, {Type: "RLIMIT_FSIZE", Soft: 1 << 44, Hard: 1 << 45}, {Type: "RLIMIT_LOCKS", Soft: 11, Hard: 12},
	{Type: "RLIMIT_MEMLOCK", Soft: 4096, Hard: 8192}, {Type: "RLIMIT_MSGQUEUE", Soft: 13, Hard: 14}, {Type: "RLIMIT_NICE", Soft: 15, Hard: 16},
	{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_NPROC", Soft: 3000, Hard: 4000}, {Type: "RLIMIT_RSS", Soft: 17, Hard: 18},
	{Type: "RLIMIT_RTPRIO", Soft: 19, Hard: 20}, {Type: "RLIMIT_RTTIME", Soft: 21000000, Hard: 22000000},
	{Type: "RLIMIT_SIGPENDING", Soft: 23, Hard: 24}, {Type: "RLIMIT_STACK", Soft: 1 << 23, Hard: 1 << 24},
}

const showLimits = `sed -E 's/  +/|/g; s/processes *$/processes|/' /proc/self/limits`

var limitLines = []string{
	"Max address space|1099511627776|2199023255552|bytes|", "Max core file size|1|2|bytes|", "Max cpu time|1000|2000|seconds|",
	"Max data size|4398046511104|8796093022208|bytes|", "Max file size|17592186044416|35184372088832|bytes|", "Max file locks|11|12|locks|",
	"Max locked memory|4096|8192|bytes|", "Max msgqueue size|13|14|bytes|", "Max nice priority|15|16|",
	"Max open files|100|200|files|", "Max processes|3000|4000|processes|", "Max resident set|17|18|bytes|",
	"Max realtime priority|19|20|", "Max realtime timeout|21000000|22000000|us|",
	"Max pending signals|23|24|signals|", "Max stack size|8388608|16777216|bytes|",
}

// ownCaps are five different sets, for a user who is not root.
func ownCaps(s *oci.Spec) {
	s.Process.Capabilities = &specs.LinuxCapabilities{
		Bounding:    []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_NET_RAW", "CAP_NOT_KNOWN"},
		Permitted:   []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID"},
		Inheritable: []string{"CAP_KILL", "CAP_SETUID", "CAP_NET_RAW"},
		Effective:   []string{"CAP_CHOWN"},
		Ambient:     []string{"CAP_KILL", "CAP_NOT_KNOWN"},
	}
}

// After the execve of a program without capabilities of its own: the ambient set
// is what a user keeps, root keeps the permitted ones (and would get the rest of
// the bounding ones without no_new_privs).
var (
	userCaps = []string{"CapInh 00000000000020a0", "CapPrm 0000000000000020", "CapEff 0000000000000020", "CapBnd 00000000000020a1", "CapAmb 0000000000000020"}
	rootCaps = []string{"CapInh 00000000000020a0", "CapPrm 00000000000000a1", "CapEff 00000000000000a1", "CapBnd 00000000000020a1", "CapAmb 0000000000000020"}
)

// TestAttributes: everything at once that a container's first process can be given.
func TestAttributes(t *testing.T) {
	score, umask := 456, uint32(0o031)
	out, stderr, code := run(t, options{args: sh(strings.Join([]string{showCaps, showLimits,
		"id -u; id -g; id -G; umask; pwd; uname -m; chrt -p $$; ionice; cat /proc/self/oom_score_adj", "head -1 /proc/self/numa_maps | cut -d' ' -f2"}, ";"+"\n")),
		edit: func(s *oci.Spec) {
			ownCaps(s)
			s.Process.Rlimits = allRlimits
			s.Process.User = specs.User{UID: 1234, GID: 2345, AdditionalGids: []uint32{7, 70000}, Umask: &umask}
			s.Process.Cwd = "/var/tmp"
			s.Process.OOMScoreAdj = &score
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 5, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
			s.Process.ConsoleSize = &specs.Box{Height: 1, Width: 1} // no terminal: ignored
			s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{specs.MpolFStaticNodes}}
		}})
	if code != 0 {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	lines(t, out, append(append(userCaps, limitLines...), "1234", "2345", "2345 7 70000", "0031", "/var/tmp", "i686",
		"pid 1's current scheduling policy: SCHED_BATCH|SCHED_RESET_ON_FORK", "best-effort: prio 6", "456", "bind=static:0")...)
}

// TestAttributesBesideRunc: what both runtimes know comes out the same.
func TestAttributesBesideRunc(t *testing.T) {
	score, umask := 456, uint32(0o031)
	spec := []oci.SpecOpts{
		oci.WithProcessArgs(sh(strings.Join([]string{showCaps, showLimits, "id -u; id -g; id -G; umask; pwd; cat /proc/self/oom_score_adj; env | sort",
			"grep -E '^(NoNewPrivs|Seccomp|SigIgn|SigBlk)' /proc/self/status; ls /proc/self/fd | wc -l"}, ";\n"))...),
		edit(func(s *oci.Spec) {
			ownCaps(s)
			s.Process.Rlimits = allRlimits
			s.Process.User = specs.User{UID: 1234, GID: 2345, AdditionalGids: []uint32{7, 70000}, Umask: &umask}
			s.Process.Cwd, s.Process.OOMScoreAdj = "/var/tmp", &score
		}),
	}
	got, stderr, code := run(t, options{spec: spec})
	theirs, _, _ := run(t, options{runtime: runc, spec: spec})
	if code != 0 || got != theirs {
		t.Errorf("code %d, ours:\n%s%s\nrunc:\n%s", code, got, stderr, theirs)
	}
}

// TestExecAttributes: the same for execs, each with its own.
func TestExecAttributes(t *testing.T) {
	profileName, denied := "pve-test-deny", "/etc/debian_version"
	loadProfile(t, profileName, denied)
	b := start(t, options{args: sh("cp /usr/bin/id /var/tmp/id && chmod 4755 /var/tmp/id && echo ready; sleep 1000"), edit: func(s *oci.Spec) {
		s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux}
		s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolInterleave, Nodes: "0"}
	}})
	eventually(t, time.Minute, "the container is ready", func() bool { return strings.Contains(b.out.String(), "ready") })
	user := func(s *oci.Spec) { s.Process.User = specs.User{UID: 1000, GID: 1000} }
	sched := func(p specs.Scheduler) func(*oci.Spec) {
		return func(s *oci.Spec) { s.Process.Scheduler = &p }
	}
	const policy = "chrt -p $$ | sed 's/^pid [0-9]*.s current //'"
	for _, c := range []struct {
		name   string
		script string
		change func(*oci.Spec)
		want   []string
	}{
		{"capabilities of a user", showCaps, func(s *oci.Spec) { user(s); ownCaps(s) }, userCaps},
		{"capabilities of root", showCaps, ownCaps, rootCaps},
		{"no capabilities", showCaps, func(s *oci.Spec) { s.Process.Capabilities = nil }, []string{"CapPrm 0000000000000000", "CapBnd 0000000000000000"}},
		{"rlimits", showLimits, func(s *oci.Spec) { s.Process.Rlimits = allRlimits }, limitLines},
		{"oomScoreAdj", "cat /proc/self/oom_score_adj", func(s *oci.Spec) { v := -500; s.Process.OOMScoreAdj = &v }, []string{"-500"}},
		{"umask and cwd", "umask; pwd", func(s *oci.Spec) { u := uint32(0o077); s.Process.User.Umask = &u; s.Process.Cwd = "/usr/share" }, []string{"0077", "/usr/share"}},
		{"groups", "id -G", func(s *oci.Spec) { s.Process.User = specs.User{UID: 5, GID: 6, AdditionalGids: []uint32{8, 9}} }, []string{"6 8 9"}},
		{"no_new_privs and a setuid program", "/var/tmp/id -u", func(s *oci.Spec) { user(s); s.Process.NoNewPrivileges = true }, []string{"1000"}},
		{"a setuid program", "/var/tmp/id -u", func(s *oci.Spec) { user(s); s.Process.NoNewPrivileges = false }, []string{"0"}},
		{"SCHED_OTHER", policy, sched(specs.Scheduler{Policy: specs.SchedOther, Nice: 7}), []string{"scheduling policy: SCHED_OTHER", "scheduling priority: 0"}},
		{"nice", "nice", sched(specs.Scheduler{Policy: specs.SchedOther, Nice: 7}), []string{"7"}},
		{"SCHED_FIFO", policy, sched(specs.Scheduler{Policy: specs.SchedFIFO, Priority: 3}), []string{"scheduling policy: SCHED_FIFO", "scheduling priority: 3"}},
		{"SCHED_RR", policy, sched(specs.Scheduler{Policy: specs.SchedRR, Priority: 99, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}), []string{"scheduling policy: SCHED_RR|SCHED_RESET_ON_FORK", "scheduling priority: 99"}},
		{"SCHED_BATCH", policy, sched(specs.Scheduler{Policy: specs.SchedBatch}), []string{"scheduling policy: SCHED_BATCH"}},
		{"SCHED_IDLE", policy, sched(specs.Scheduler{Policy: specs.SchedIdle}), []string{"scheduling policy: SCHED_IDLE"}},
		{"SCHED_DEADLINE", policy, sched(specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 10_000_000, Deadline: 50_000_000, Period: 100_000_000,
			Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork, specs.SchedFlagReclaim}}),
			[]string{"scheduling policy: SCHED_DEADLINE|SCHED_RESET_ON_FORK", "runtime/deadline/period parameters: 10000000/50000000/100000000"}},
		{"ioPriority, realtime", "ionice", func(s *oci.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_RT, Priority: 2}
		}, []string{"realtime: prio 2"}},
		{"ioPriority, idle", "ionice", func(s *oci.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_IDLE, Priority: 0}
		}, []string{"idle"}},
		{"execCPUAffinity", "taskset -pc $$ | sed 's/.*: //'", func(s *oci.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "1"} }, []string{"1"}},
		{"execCPUAffinity without a final one", "taskset -pc $$ | sed 's/.*: //'", func(s *oci.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0"} }, []string{"0"}},
		{"the container's personality and memory policy", "uname -m; head -1 /proc/self/numa_maps | cut -d' ' -f2", nil, []string{"x86_64", "interleave:0"}},
		{"AppArmor", "cat /proc/self/attr/current; cat " + denied + " 2>&1 || cat /etc/passwd >/dev/null && echo others can be read",
			func(s *oci.Spec) { s.Process.ApparmorProfile = profileName },
			[]string{profileName + " (enforce)", "cat: " + denied + ": Permission denied", "others can be read"}},
	} {
		out, code, err := b.execIn(sh(c.script), c.change)
		if err != nil || code != 0 {
			t.Errorf("%s: code %d, %v, %q", c.name, code, err, out)
			continue
		}
		t.Run(c.name, func(t *testing.T) { lines(t, out, c.want...) })
	}

	for _, c := range []struct {
		field  string
		change func(*oci.Spec)
		is     func(error) bool
	}{
		{"process.apparmorProfile", func(s *oci.Spec) { s.Process.ApparmorProfile = "not-loaded" }, errdefs.IsInvalidArgument},
		{"process.selinuxLabel", func(s *oci.Spec) { s.Process.SelinuxLabel = "system_u:system_r:container_t:s0" }, errdefs.IsFailedPrecondition},
		{"process.user.uid", func(s *oci.Spec) { s.Process.User.UID = ^uint32(0) }, errdefs.IsInvalidArgument},
		{"process.execCPUAffinity.initial", func(s *oci.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "900"} }, errdefs.IsInvalidArgument},
		{"process.execCPUAffinity.final", func(s *oci.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Final: "900"} }, errdefs.IsInvalidArgument},
		{"process.cwd", func(s *oci.Spec) { s.Process.Cwd = "/not/there" }, errdefs.IsInvalidArgument},
		{"process.scheduler", func(s *oci.Spec) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 1, Deadline: 1, Period: 1}
		}, errdefs.IsInvalidArgument},
	} {
		if _, _, err := b.execIn([]string{"true"}, c.change); err == nil || !c.is(err) || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%s: %v", c.field, err)
		}
	}
}

func loadProfile(t *testing.T, name, denied string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	text := fmt.Sprintf("profile %s flags=(attach_disconnected) {\n file,\n capability,\n network,\n signal,\n deny %s r,\n}\n", name, denied)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := command("apparmor_parser", "--replace", "--skip-cache", file); code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() { command("apparmor_parser", "--remove", file) })
}

// defaultProfile is containerd's AppArmor profile by that name, until the test ends.
func defaultProfile(t *testing.T, name string) oci.SpecOpts {
	t.Helper()
	t.Cleanup(func() { must(t, os.WriteFile("/sys/kernel/security/apparmor/.remove", []byte(name), 0)) })
	return apparmor.WithDefaultProfile(name)
}

// TestAttributesRefused: the create fails, and names the field.
func TestAttributesRefused(t *testing.T) {
	profileName, denied := "pve-test-init", "/etc/debian_version"
	loadProfile(t, profileName, denied)
	for _, c := range []struct {
		field  string
		change func(*oci.Spec)
		is     func(error) bool
	}{
		{"process.apparmorProfile", func(s *oci.Spec) { s.Process.ApparmorProfile = "not-loaded" }, errdefs.IsInvalidArgument},
		{"linux.memoryPolicy", func(s *oci.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "900"}
		}, errdefs.IsInvalidArgument},
		{"linux.intelRdt", func(s *oci.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"} }, errdefs.IsFailedPrecondition},
		{"process.rlimits[0]", func(s *oci.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 1 << 40}}
		}, errdefs.IsInvalidArgument},
	} {
		if _, err := create(t, options{args: []string{"true"}, edit: c.change}); err == nil || !c.is(err) || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%s: %v", c.field, err)
		}
	}
	out, stderr, _ := run(t, options{args: sh("cat /proc/self/attr/current; cat " + denied), edit: func(s *oci.Spec) { s.Process.ApparmorProfile = profileName }})
	if out != profileName+" (enforce)\n" || !strings.Contains(stderr, "Permission denied") {
		t.Errorf("under AppArmor: %q, %q", out, stderr)
	}
}

// TestExecLife: several execs at once, signals, and ends.
func TestExecLife(t *testing.T) {
	b := start(t, options{args: []string{"sleep", "1000"}})
	spec, err := b.container.Spec(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	add := func(id string, args []string, out *bytes.Buffer, change func(*specs.Process), opts ...cio.Opt) (client.Process, <-chan client.ExitStatus) {
		t.Helper()
		p := *spec.Process
		p.Args, p.Terminal = args, false
		if change != nil {
			change(&p)
		}
		proc, err := b.task.Exec(b.ctx, id, &p, cio.NewCreator(append([]cio.Opt{cio.WithStreams(nil, out, io.Discard)}, opts...)...))
		if err != nil {
			t.Fatal(err)
		}
		exit, err := proc.Wait(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := proc.Start(b.ctx); err != nil {
			t.Fatal(err)
		}
		return proc, exit
	}
	t.Run("at once", func(t *testing.T) {
		var wait sync.WaitGroup
		for i := range 10 {
			wait.Add(1)
			go func() {
				defer wait.Done()
				if out, code, err := b.execIn(sh(fmt.Sprintf("echo %d; exit %d", i, i)), nil); err != nil || code != uint32(i) || out != fmt.Sprintln(i) {
					t.Errorf("%d: %q, %d, %v", i, out, code, err)
				}
			}()
		}
		wait.Wait()
	})
	t.Run("terminal", func(t *testing.T) {
		var out bytes.Buffer
		proc, exit := add("tty", sh("test -t 0 && test -t 2 && stty size; exit 3"), &out, func(p *specs.Process) {
			p.Terminal, p.ConsoleSize = true, &specs.Box{Height: 33, Width: 91}
		}, cio.WithTerminal)
		st := <-exit
		proc.IO().Wait()
		if st.ExitCode() != 3 || !strings.Contains(out.String(), "33 91") {
			t.Errorf("code %d, %q", st.ExitCode(), out.String())
		}
		if _, err := proc.Delete(b.ctx); err != nil {
			t.Error(err)
		}
	})
	t.Run("killed, with its id in Pids", func(t *testing.T) {
		var out bytes.Buffer
		proc, exit := add("victim", []string{"sleep", "1000"}, &out, nil)
		pids, err := b.task.Pids(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		found := map[uint32]bool{}
		for _, p := range pids {
			found[p.Pid] = p.Info != nil && bytes.Contains(p.Info.GetValue(), []byte("victim"))
		}
		if named, ok := found[b.task.Pid()]; !ok || named {
			t.Errorf("init %d in %v", b.task.Pid(), found)
		}
		if !found[proc.Pid()] {
			t.Errorf("exec %d in %v", proc.Pid(), found)
		}
		if err := proc.Kill(b.ctx, syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		if st := <-exit; st.ExitCode() != 128+uint32(syscall.SIGUSR1) {
			t.Errorf("code %d", st.ExitCode())
		}
		if _, err := proc.Delete(b.ctx); err != nil {
			t.Error(err)
		}
	})
	t.Run("a grandchild holds its output", func(t *testing.T) {
		var out bytes.Buffer
		proc, exit := add("parent", sh("sleep 1000 & echo out; exit 4"), &out, nil)
		if st := <-exit; st.ExitCode() != 4 {
			t.Errorf("code %d", st.ExitCode())
		}
		if _, err := proc.Delete(b.ctx); err != nil {
			t.Error(err)
		}
		if out.String() != "out\n" {
			t.Errorf("%q", out.String())
		}
	})
	t.Run("dies with init", func(t *testing.T) {
		var out bytes.Buffer
		_, exit := add("heir", sh("trap '' TERM HUP; sleep 1000"), &out, nil)
		if err := b.task.Kill(b.ctx, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		select {
		case st := <-exit:
			if st.ExitCode() != 137 {
				t.Errorf("code %d", st.ExitCode())
			}
		case <-time.After(time.Minute):
			t.Fatal("the exec outlives init")
		}
		<-b.exit // init is the last of its pid namespace to go
		// Init's is told until the task is deleted: containerd takes a shim without one for leaked.
		if pids, err := b.task.Pids(b.ctx); err != nil || len(pids) != 1 || pids[0].Pid != b.task.Pid() {
			t.Errorf("processes after init's end: %v, %v", pids, err)
		}
	})
}

// TestSystemdMissing: this guest is not booted by systemd, so its cgroup driver
// is refused.
func TestSystemdMissing(t *testing.T) {
	ctx, c := background(t), connect(t)
	image, err := c.GetImage(ctx, debian)
	if err != nil {
		t.Fatal(err)
	}
	container, err := c.NewContainer(ctx, "nosystemd", client.WithImage(image), client.WithSnapshotter(zfs), client.WithNewSnapshot("nosystemd", image),
		client.WithNewSpec(oci.WithImageConfig(image), oci.WithCgroup("a.slice:b:c")), client.WithRuntime(ours, &runcoptions.Options{SystemdCgroup: true}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = container.Delete(ctx, client.WithSnapshotCleanup) }()
	if _, err := container.NewTask(ctx, cio.NullIO); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "SystemdCgroup") {
		t.Errorf("%v", err)
	}
}
