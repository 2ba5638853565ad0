package main

import (
	"strconv"
	"syscall"
	"unsafe"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func utoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// capSet is a set of capabilities as a mask. Names nobody knows are left out:
// the runtime spec says that what cannot be granted is no error.
func capSet(names []string) uint64 {
	var set uint64
	for _, name := range names {
		for bit, known := range plan.Capabilities {
			if name == known {
				set |= 1 << bit
			}
		}
	}
	return set
}

// setCredentials gives up root's identity and all capabilities but the planned.
func (p *process) setCredentials() error {
	caps := p.Capabilities
	if caps == nil {
		caps = &specs.LinuxCapabilities{}
	}
	bounding := capSet(caps.Bounding)
	for bit := range 64 {
		have, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_READ, uintptr(bit), 0)
		if errno == unix.EINVAL {
			break // the kernel's last one
		}
		if errno != 0 {
			return failed(plan.ErrorInternal, "process.capabilities.bounding", errno)
		}
		if have == 1 && bounding&(1<<bit) == 0 {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(bit), 0, 0, 0); err != nil {
				return failed(plan.ErrorInternal, "process.capabilities.bounding", err)
			}
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return failed(plan.ErrorInternal, "process.capabilities: keeping them across setuid", err)
	}
	if err := p.becomeUser(); err != nil {
		return err
	}
	if err := setCaps(caps); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 0, 0, 0, 0); err != nil {
		return failed(plan.ErrorInternal, "process.capabilities: not keeping them any longer", err)
	}
	return nil
}

// setCaps sets the four sets of this thread.
func setCaps(caps *specs.LinuxCapabilities) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have, data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &have[0]); err != nil {
		return failed(plan.ErrorInternal, "process.capabilities", err)
	}
	// What is not permitted here cannot be granted, which is no error.
	permitted := uint64(have[0].Permitted) | uint64(have[1].Permitted)<<32
	want := capSet(caps.Permitted) & permitted
	effective, inheritable := capSet(caps.Effective)&want, capSet(caps.Inheritable)&(permitted|inheritableOf(have))
	for i := range data {
		shift := 32 * i
		data[i] = unix.CapUserData{
			Effective:   uint32(effective >> shift),
			Permitted:   uint32(want >> shift),
			Inheritable: uint32(inheritable >> shift),
		}
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return failed(plan.ErrorInvalid, "process.capabilities", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return failed(plan.ErrorInternal, "process.capabilities.ambient", err)
	}
	// Ambient capabilities are permitted and inheritable ones.
	ambient := capSet(caps.Ambient) & want & inheritable
	for bit := range plan.Capabilities {
		if ambient&(1<<bit) == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(bit), 0, 0); err != nil {
			return failed(plan.ErrorInvalid, "process.capabilities.ambient: "+plan.Capabilities[bit], err)
		}
	}
	return nil
}

func inheritableOf(have [2]unix.CapUserData) uint64 {
	return uint64(have[0].Inheritable) | uint64(have[1].Inheritable)<<32
}

func setRlimits(list []specs.POSIXRlimit) error {
	// Go raises the soft limit of open files when it starts. syscall.Exec puts
	// the inherited one back before it looks at the path, and there is no other
	// way to ask for that.
	_ = syscall.Exec("", nil, nil)
	for _, l := range list {
		resource, ok := plan.Rlimits[l.Type]
		if !ok {
			return fail(plan.ErrorInvalid, "process.rlimits: unknown type "+l.Type)
		}
		// Not through x/sys/unix, which would have syscall keep its own books.
		limit := unix.Rlimit{Cur: l.Soft, Max: l.Hard}
		if _, _, errno := unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, uintptr(resource), uintptr(unsafe.Pointer(&limit)), 0, 0, 0); errno != 0 {
			return failed(plan.ErrorInvalid, "process.rlimits: "+l.Type, errno)
		}
	}
	return nil
}

// becomeUser changes the ids of this thread.
func (p *process) becomeUser() error {
	// Raw: the package syscall would change every thread, one after the other.
	var groups *uint32
	if len(p.Groups) > 0 {
		groups = &p.Groups[0]
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(p.Groups)), uintptr(unsafe.Pointer(groups)), 0); errno != 0 {
		return failed(plan.ErrorInvalid, "process.user.additionalGids", errno)
	}
	gid, uid := uintptr(p.GID), uintptr(p.UID)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return failed(plan.ErrorInvalid, "process.user.gid "+utoa(p.GID), errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return failed(plan.ErrorInvalid, "process.user.uid "+utoa(p.UID), errno)
	}
	return nil
}

// ownStdio gives the standard streams to the user, as a program that reopens
// /dev/stdout expects. /dev/null belongs to everybody.
func ownStdio(uid uint32) error {
	for fd := range firstInheritedFD {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			if err == unix.EBADF {
				continue
			}
			return err
		}
		if st.Uid == uid || (st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)) {
			continue
		}
		switch err := unix.Fchown(fd, int(uid), int(st.Gid)); err {
		case nil, unix.EINVAL, unix.EPERM, unix.EROFS: // an owner or a file system beyond this user namespace
		default:
			return err
		}
	}
	return nil
}

// resetSignals undoes what liblxc, lxc-start or whoever started this ignored or
// blocked. Handlers go away by themselves at the execve.
func resetSignals() error {
	const numSignals, ignored = 64, 1 // SIG_IGN
	for sig := 1; sig <= numSignals; sig++ {
		// struct sigaction begins with the handler; SIG_DFL and no flags are all zero.
		var action [8]uint64
		if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), 0, uintptr(unsafe.Pointer(&action)), 8, 0, 0); errno != 0 {
			return errno
		}
		if action[0] != ignored {
			continue
		}
		action = [8]uint64{}
		if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0); errno != 0 {
			return errno
		}
	}
	return unix.PthreadSigmask(unix.SIG_SETMASK, &unix.Sigset_t{}, nil)
}

// setLabels has the kernel change the security label at the execve.
func (p *process) setLabels() error {
	if p.OOMScoreAdj != nil {
		if err := p.root.writeProc("self/oom_score_adj", strconv.Itoa(*p.OOMScoreAdj)); err != nil {
			return failed(plan.ErrorInvalid, "process.oomScoreAdj "+strconv.Itoa(*p.OOMScoreAdj), err)
		}
	}
	if p.AppArmorProfile != "" && p.AppArmorProfile != "unconfined" {
		value := "exec " + p.AppArmorProfile
		err := p.root.writeProc("thread-self/attr/apparmor/exec", value)
		if err == unix.ENOENT {
			err = p.root.writeProc("thread-self/attr/exec", value)
		}
		if err != nil {
			return failed(plan.ErrorInvalid, "process.apparmorProfile "+p.AppArmorProfile, err)
		}
	}
	if p.SELinuxLabel != "" {
		if err := p.root.writeProc("thread-self/attr/exec", p.SELinuxLabel); err != nil {
			return failed(plan.ErrorInvalid, "process.selinuxLabel "+p.SELinuxLabel, err)
		}
	}
	return nil
}

var schedPolicies = map[specs.LinuxSchedulerPolicy]uint32{
	specs.SchedOther: 0, specs.SchedFIFO: 1, specs.SchedRR: 2, specs.SchedBatch: 3,
	specs.SchedISO: 4, specs.SchedIdle: 5, specs.SchedDeadline: 6,
}

var schedFlags = map[specs.LinuxSchedulerFlag]uint64{
	specs.SchedFlagResetOnFork: 0x01, specs.SchedFlagReclaim: 0x02, specs.SchedFlagDLOverrun: 0x04,
	specs.SchedFlagKeepPolicy: 0x08, specs.SchedFlagKeepParams: 0x10,
	specs.SchedFlagUtilClampMin: 0x20, specs.SchedFlagUtilClampMax: 0x40,
}

var ioClasses = map[specs.IOPriorityClass]int{
	specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3,
}

var personalities = map[specs.LinuxPersonalityDomain]uintptr{specs.PerLinux: 0, specs.PerLinux32: 8}

// setScheduling is the CPUs, the scheduler, the I/O priority, the personality and
// the memory policy.
func (p *process) setScheduling() error {
	if len(p.CPUs) > 0 {
		var set unix.CPUSet
		for _, cpu := range p.CPUs {
			set.Set(cpu)
		}
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return failed(plan.ErrorInvalid, "process.execCPUAffinity.final", err)
		}
	}
	if s := p.Scheduler; s != nil {
		policy, ok := schedPolicies[s.Policy]
		if !ok {
			return fail(plan.ErrorInvalid, "process.scheduler: unknown policy "+string(s.Policy))
		}
		attr := unix.SchedAttr{
			Size: unix.SizeofSchedAttr, Policy: policy, Nice: s.Nice, Priority: uint32(s.Priority),
			Runtime: s.Runtime, Deadline: s.Deadline, Period: s.Period,
		}
		for _, f := range s.Flags {
			bit, ok := schedFlags[f]
			if !ok {
				return fail(plan.ErrorInvalid, "process.scheduler: unknown flag "+string(f))
			}
			attr.Flags |= bit
		}
		if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
			return failed(plan.ErrorInvalid, "process.scheduler", err)
		}
	}
	if io := p.IOPriority; io != nil {
		const whoProcess, classShift = 1, 13
		class, ok := ioClasses[io.Class]
		if !ok {
			return fail(plan.ErrorInvalid, "process.ioPriority: unknown class "+string(io.Class))
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_IOPRIO_SET, whoProcess, 0, uintptr(class<<classShift|io.Priority)); errno != 0 {
			return failed(plan.ErrorInvalid, "process.ioPriority", errno)
		}
	}
	if l := p.Personality; l != nil {
		domain, ok := personalities[l.Domain]
		if !ok || len(l.Flags) > 0 {
			return fail(plan.ErrorInvalid, "linux.personality: unknown domain or flags: "+string(l.Domain))
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_PERSONALITY, domain, 0, 0); errno != 0 {
			return failed(plan.ErrorInvalid, "linux.personality", errno)
		}
	}
	if m := p.MemoryPolicy; m != nil {
		var nodes *uint64
		bits := 0
		if len(m.Nodes) > 0 {
			nodes, bits = &m.Nodes[0], 64*len(m.Nodes)+1 // the kernel leaves the last one out
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SET_MEMPOLICY, uintptr(m.Mode), uintptr(unsafe.Pointer(nodes)), uintptr(bits)); errno != 0 {
			return failed(plan.ErrorInvalid, "linux.memoryPolicy", errno)
		}
	}
	return nil
}
