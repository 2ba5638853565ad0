package lxc

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// maxList is how many processors unix.CPUSet, and so an affinity, can name, and
// the kernel's largest number of memory nodes (1 << CONFIG_NODES_SHIFT).
const maxList = 1024

// invalid is the error for a field that makes no sense.
func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// parseList reads "0-3,7".
func parseList(text string) ([]int, error) {
	var out []int
	for part := range strings.SplitSeq(strings.TrimSpace(text), ",") {
		low, high, ranged := strings.Cut(part, "-")
		if !ranged {
			high = low
		}
		from, err := strconv.ParseUint(low, 10, 31)
		if err != nil {
			return nil, invalid("%q is no list of numbers and ranges", text)
		}
		to, err := strconv.ParseUint(high, 10, 31)
		if err != nil || to < from {
			return nil, invalid("%q is no list of numbers and ranges", text)
		}
		if to >= maxList {
			return nil, invalid("%q: there is no number %d, the largest is %d", text, to, maxList-1)
		}
		for n := int(from); n <= int(to); n++ {
			if !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	return out, nil
}

var schedFlags = []specs.LinuxSchedulerFlag{
	specs.SchedFlagResetOnFork, specs.SchedFlagReclaim, specs.SchedFlagDLOverrun, specs.SchedFlagKeepPolicy,
	specs.SchedFlagKeepParams, specs.SchedFlagUtilClampMin, specs.SchedFlagUtilClampMax,
}

// checkScheduler refuses what sched_setattr(2) would refuse on any kernel.
func checkScheduler(s *specs.Scheduler) error {
	const field = "process.scheduler"
	if s.Nice < -20 || s.Nice > 19 {
		return invalid("%s.nice %d is not in -20 to 19", field, s.Nice)
	}
	for _, f := range s.Flags {
		if !slices.Contains(schedFlags, f) {
			return invalid("%s.flags: unknown flag %q", field, f)
		}
	}
	deadline := false
	switch s.Policy {
	case specs.SchedFIFO, specs.SchedRR:
		if s.Priority < 1 || s.Priority > 99 {
			return invalid("%s.priority %d is not in 1 to 99, which %s needs", field, s.Priority, s.Policy)
		}
	case specs.SchedDeadline:
		deadline = true
		if s.Runtime > s.Deadline || s.Period != 0 && s.Deadline > s.Period {
			return invalid("%s: runtime %d, deadline %d and period %d do not follow one another", field, s.Runtime, s.Deadline, s.Period)
		}
	case specs.SchedOther, specs.SchedBatch, specs.SchedIdle:
	case specs.SchedISO:
		return unsupported(field + ".policy SCHED_ISO: no kernel has it, it")
	default:
		return invalid("%s.policy: unknown policy %q", field, s.Policy)
	}
	if s.Policy != specs.SchedFIFO && s.Policy != specs.SchedRR && s.Priority != 0 {
		return invalid("%s.priority %d: %s has none", field, s.Priority, s.Policy)
	}
	if !deadline && (s.Runtime != 0 || s.Deadline != 0 || s.Period != 0) {
		return invalid("%s: runtime, deadline and period belong to SCHED_DEADLINE, not to %s", field, s.Policy)
	}
	return nil
}

var rlimitTypes = []string{
	"RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_LOCKS", "RLIMIT_MEMLOCK",
	"RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_RSS", "RLIMIT_RTPRIO",
	"RLIMIT_RTTIME", "RLIMIT_SIGPENDING", "RLIMIT_STACK",
}

func checkRlimits(list []specs.POSIXRlimit) error {
	seen := map[string]bool{}
	for i, l := range list {
		field := fmt.Sprintf("process.rlimits[%d]", i)
		switch {
		case !slices.Contains(rlimitTypes, l.Type):
			return invalid("%s.type: unknown type %q", field, l.Type)
		case seen[l.Type]:
			return invalid("%s.type: %s is there twice", field, l.Type)
		case l.Soft > l.Hard:
			return invalid("%s: the soft limit %d of %s is above the hard limit %d", field, l.Soft, l.Type, l.Hard)
		}
		seen[l.Type] = true
	}
	return nil
}

// nobodyID is the id that system calls read as "leave it as it is".
const nobodyID = ^uint32(0)

// checkProcess refuses what no host can apply. It is pure.
func checkProcess(p *specs.Process) error {
	switch {
	case p.User.UID == nobodyID:
		return invalid("process.user.uid %d is no user", p.User.UID)
	case p.User.GID == nobodyID:
		return invalid("process.user.gid %d is no group", p.User.GID)
	case slices.Contains(p.User.AdditionalGids, nobodyID):
		return invalid("process.user.additionalGids: %d is no group", nobodyID)
	case p.OOMScoreAdj != nil && (*p.OOMScoreAdj < -1000 || *p.OOMScoreAdj > 1000):
		return invalid("process.oomScoreAdj %d is not in -1000 to 1000", *p.OOMScoreAdj)
	case p.Terminal && p.ConsoleSize != nil && (p.ConsoleSize.Height > 0xffff || p.ConsoleSize.Width > 0xffff):
		return invalid("process.consoleSize %dx%d: a terminal has at most %d rows and columns", p.ConsoleSize.Height, p.ConsoleSize.Width, 0xffff)
	}
	if err := checkRlimits(p.Rlimits); err != nil {
		return err
	}
	if p.Scheduler != nil {
		if err := checkScheduler(p.Scheduler); err != nil {
			return err
		}
	}
	if io := p.IOPriority; io != nil {
		switch io.Class {
		case specs.IOPRIO_CLASS_RT, specs.IOPRIO_CLASS_BE, specs.IOPRIO_CLASS_IDLE:
		default:
			return invalid("process.ioPriority.class: unknown class %q", io.Class)
		}
		if io.Priority < 0 || io.Priority > 7 {
			return invalid("process.ioPriority.priority %d is not in 0 to 7", io.Priority)
		}
	}
	if a := p.ExecCPUAffinity; a != nil {
		for _, f := range []struct{ field, list string }{{"initial", a.Initial}, {"final", a.Final}} {
			if f.list == "" {
				continue
			}
			if _, err := parseList(f.list); err != nil {
				return fmt.Errorf("process.execCPUAffinity.%s: %w", f.field, err)
			}
		}
	}
	return nil
}

func checkPersonality(p *specs.LinuxPersonality) error {
	switch {
	case p == nil:
	case p.Domain != specs.PerLinux && p.Domain != specs.PerLinux32:
		return invalid("linux.personality.domain: unknown domain %q", p.Domain)
	case len(p.Flags) > 0:
		return invalid("linux.personality.flags: the runtime spec defines none, so %q is unknown", p.Flags[0])
	}
	return nil
}

// Numbers of set_mempolicy(2).
var (
	memoryModes = map[specs.MemoryPolicyModeType]uint32{
		specs.MpolDefault: 0, specs.MpolPreferred: 1, specs.MpolBind: 2, specs.MpolInterleave: 3,
		specs.MpolLocal: 4, specs.MpolPreferredMany: 5, specs.MpolWeightedInterleave: 6,
	}
	memoryFlags = map[specs.MemoryPolicyFlagType]uint32{
		specs.MpolFNumaBalancing: 1 << 13, specs.MpolFRelativeNodes: 1 << 14, specs.MpolFStaticNodes: 1 << 15,
	}
)

// MemoryPolicyModes are the modes linux.memoryPolicy may name.
func MemoryPolicyModes() []specs.MemoryPolicyModeType { return slices.Sorted(maps.Keys(memoryModes)) }

// MemoryPolicyFlags are the flags linux.memoryPolicy may name.
func MemoryPolicyFlags() []specs.MemoryPolicyFlagType { return slices.Sorted(maps.Keys(memoryFlags)) }

// memoryPolicy translates linux.memoryPolicy; nil for none.
func memoryPolicy(p *specs.LinuxMemoryPolicy) (*plan.MemoryPolicy, error) {
	if p == nil {
		return nil, nil
	}
	mode, ok := memoryModes[p.Mode]
	if !ok {
		return nil, invalid("linux.memoryPolicy.mode: unknown mode %q", p.Mode)
	}
	for _, f := range p.Flags {
		bit, ok := memoryFlags[f]
		if !ok {
			return nil, invalid("linux.memoryPolicy.flags: unknown flag %q", f)
		}
		mode |= bit
	}
	out := &plan.MemoryPolicy{Mode: mode}
	if p.Nodes != "" {
		nodes, err := parseList(p.Nodes)
		if err != nil {
			return nil, fmt.Errorf("linux.memoryPolicy.nodes: %w", err)
		}
		out.Nodes = make([]uint64, slices.Max(nodes)/64+1)
		for _, n := range nodes {
			out.Nodes[n/64] |= 1 << (n % 64)
		}
	}
	return out, nil
}

// capabilityWarnings says what of the capabilities will not be granted: the
// runtime spec wants a warning and no failure.
func capabilityWarnings(c *specs.LinuxCapabilities) []string {
	if c == nil {
		return nil
	}
	var out []string
	for _, set := range []struct {
		name        string
		caps, needs []string
		why         string
	}{
		{"bounding", c.Bounding, nil, ""},
		{"permitted", c.Permitted, nil, ""},
		{"inheritable", c.Inheritable, nil, ""},
		{"effective", c.Effective, c.Permitted, "permitted"},
		{"ambient", c.Ambient, c.Permitted, "permitted"},
		{"ambient", c.Ambient, c.Inheritable, "inheritable"},
	} {
		for _, name := range set.caps {
			switch {
			case !slices.Contains(plan.Capabilities, name):
				if set.why != "inheritable" { // said once for ambient
					out = append(out, fmt.Sprintf("process.capabilities.%s: %q is no capability this program knows and is left out", set.name, name))
				}
			case set.why != "" && !slices.Contains(set.needs, name):
				out = append(out, fmt.Sprintf("process.capabilities.%s: %s is left out, it is not among the %s ones", set.name, name, set.why))
			}
		}
	}
	return out
}

// warn logs what of the process will not be granted.
func warn(ctx context.Context, p *specs.Process) {
	for _, w := range capabilityWarnings(p.Capabilities) {
		log.G(ctx).Warn(w)
	}
}

// checkHost refuses what this host, as it is now, cannot apply.
func checkHost(p *specs.Process) error {
	if p.SelinuxLabel != "" {
		if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
			return fmt.Errorf("process.selinuxLabel %q: SELinux is off on this host: %w", p.SelinuxLabel, errdefs.ErrFailedPrecondition)
		}
	}
	if p.ApparmorProfile != "" && p.ApparmorProfile != "unconfined" {
		if on, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || len(on) == 0 || on[0] != 'Y' {
			return fmt.Errorf("process.apparmorProfile %q: AppArmor is off on this host: %w", p.ApparmorProfile, errdefs.ErrFailedPrecondition)
		}
	}
	for i, l := range p.Rlimits {
		if l.Type != "RLIMIT_NOFILE" {
			continue
		}
		text, err := os.ReadFile("/proc/sys/fs/nr_open")
		if err != nil {
			return err
		}
		most, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		if err == nil && l.Hard > most {
			return invalid("process.rlimits[%d]: RLIMIT_NOFILE %d is above the host's fs.nr_open %d", i, l.Hard, most)
		}
	}
	return nil
}

// checkIntelRdt refuses linux.intelRdt with the reason.
func checkIntelRdt(r *specs.LinuxIntelRdt) error {
	if r == nil {
		return nil
	}
	if known, err := os.ReadFile("/proc/filesystems"); err == nil && !strings.Contains(string(known), "\tresctrl\n") {
		return fmt.Errorf("linux.intelRdt: this host's processor or kernel has no resource director technology (no resctrl file system): %w", errdefs.ErrFailedPrecondition)
	}
	return unsupported("linux.intelRdt")
}
