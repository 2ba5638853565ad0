// Package seccomp compiles the runtime spec's seccomp profile into the BPF
// program pve-init loads.
//
// It owns the meaning of linux.seccomp: actions, argument comparisons,
// architectures, flags. It is pure: it loads nothing and never asks the kernel.
//
// Where the runtime spec leaves the meaning of several rules for one syscall
// open, it is runc's with libseccomp, since profiles are written against that:
// a rule with the default action changes nothing, of the others one without
// arguments decides alone, else they are tried in the order of the profile and
// the first that matches decides. All arguments of one rule have to match,
// unless two of them compare the same argument: then one match is enough.
// Syscalls the tables do not know are left out.
package seccomp

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"runtime"
	"slices"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd/errdefs"
	"github.com/elastic/go-seccomp-bpf/arch"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data; all the architectures here are little-endian.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

const (
	// x32Bit marks the syscalls of the x32 ABI, which shares its audit
	// architecture with x86-64.
	x32Bit = 0x40000000
	// maxInstructions is the kernel's BPF_MAXINSNS.
	maxInstructions = 4096
	// filterFlagLog and its like are seccomp(2)'s.
	filterFlagLog          = 2
	filterFlagSpecAllow    = 4
	filterFlagNewListener  = 8
	filterFlagWaitKillable = 32
)

// flagTsync is in the runtime spec, but not in its Go package.
const flagTsync specs.LinuxSeccompFlag = "SECCOMP_FILTER_FLAG_TSYNC"

// abi is one way to call the kernel.
type abi struct {
	info *arch.Info
	// first is the number of the first syscall: x32 begins at x32Bit.
	first uint32
	// wide says that arguments have 64 bits.
	wide bool
}

var abis = map[specs.Arch]abi{
	specs.ArchX86_64:  {info: arch.X86_64, wide: true},
	specs.ArchX32:     {info: arch.X32, first: x32Bit, wide: true},
	specs.ArchX86:     {info: arch.I386},
	specs.ArchAARCH64: {info: arch.AARCH64, wide: true},
	specs.ArchARM:     {info: arch.ARM},
}

var native = map[string]specs.Arch{"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64}

// Compile makes the filter of a profile; nil for no profile. Errors are
// InvalidArgument, or NotImplemented for what cannot be done here.
func Compile(profile *specs.LinuxSeccomp) (*plan.Seccomp, error) {
	if profile == nil {
		return nil, nil
	}
	program, err := assemble(profile, runtime.GOARCH)
	if err != nil {
		return nil, fmt.Errorf("linux.seccomp: %w", err)
	}
	notify := notifies(profile)
	switch {
	case notify && profile.ListenerPath == "":
		return nil, fmt.Errorf("linux.seccomp.listenerPath is empty, but %s needs somebody to notify: %w", specs.ActNotify, errdefs.ErrInvalidArgument)
	case profile.ListenerMetadata != "" && profile.ListenerPath == "":
		return nil, fmt.Errorf("linux.seccomp.listenerMetadata without a listenerPath: %w", errdefs.ErrInvalidArgument)
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, fmt.Errorf("linux.seccomp: assembling the filter: %w", err)
	}
	flags, err := filterFlags(profile.Flags, notify)
	if err != nil {
		return nil, fmt.Errorf("linux.seccomp.flags: %w", err)
	}
	out := make([]byte, 0, 8*len(raw))
	for _, r := range raw {
		out = binary.NativeEndian.AppendUint16(out, r.Op)
		out = append(out, r.Jt, r.Jf)
		out = binary.NativeEndian.AppendUint32(out, r.K)
	}
	return &plan.Seccomp{Filter: out, Flags: flags, Notify: notify}, nil
}

// Actions are all that a profile may name.
func Actions() []specs.LinuxSeccompAction {
	return []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno, specs.ActKill, specs.ActKillProcess, specs.ActKillThread,
		specs.ActLog, specs.ActNotify, specs.ActTrace, specs.ActTrap}
}

// Operators are like Actions.
func Operators() []specs.LinuxSeccompOperator { return slices.Sorted(maps.Keys(comparisons)) }

// Architectures are like Actions.
func Architectures() []specs.Arch { return slices.Sorted(maps.Keys(abis)) }

// Flags are like Actions.
func Flags() []specs.LinuxSeccompFlag {
	return []specs.LinuxSeccompFlag{flagTsync, specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow, specs.LinuxSeccompFlagWaitKillableRecv}
}

// notifies says whether some syscall is left to the listener to decide.
func notifies(profile *specs.LinuxSeccomp) bool {
	return profile.DefaultAction == specs.ActNotify ||
		slices.ContainsFunc(profile.Syscalls, func(s specs.LinuxSyscall) bool { return s.Action == specs.ActNotify })
}

func filterFlags(flags []specs.LinuxSeccompFlag, notify bool) (uint, error) {
	var out uint
	if notify {
		out = filterFlagNewListener
	}
	if flags == nil {
		return out | filterFlagSpecAllow, nil // runc's default
	}
	for _, f := range flags {
		switch f {
		case flagTsync:
			// The filter is loaded by the thread that executes the entrypoint:
			// there are no others to keep in step with.
		case specs.LinuxSeccompFlagLog:
			out |= filterFlagLog
		case specs.LinuxSeccompFlagSpecAllow:
			out |= filterFlagSpecAllow
		case specs.LinuxSeccompFlagWaitKillableRecv:
			if !notify {
				return 0, fmt.Errorf("%s needs the action %s: %w", f, specs.ActNotify, errdefs.ErrInvalidArgument)
			}
			out |= filterFlagWaitKillable
		default:
			return 0, fmt.Errorf("unknown flag %q: %w", f, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

// returnValue is what the program returns for an action.
func returnValue(action specs.LinuxSeccompAction, errnoRet *uint) (uint32, error) {
	data := uint32(unix.EPERM)
	if errnoRet != nil {
		if *errnoRet > unix.SECCOMP_RET_DATA {
			return 0, fmt.Errorf("errnoRet %d is too large: %w", *errnoRet, errdefs.ErrInvalidArgument)
		}
		if action != specs.ActErrno && action != specs.ActTrace {
			return 0, fmt.Errorf("errnoRet with action %s: %w", action, errdefs.ErrInvalidArgument)
		}
		data = uint32(*errnoRet)
	}
	switch action {
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActErrno:
		return unix.SECCOMP_RET_ERRNO | data, nil
	case specs.ActTrace:
		return unix.SECCOMP_RET_TRACE | data, nil
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP, nil
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG, nil
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActNotify:
		return unix.SECCOMP_RET_USER_NOTIF, nil
	}
	return 0, fmt.Errorf("unknown action %q: %w", action, errdefs.ErrInvalidArgument)
}

// rule is one alternative for a syscall: if all args match, return ret.
type rule struct {
	ret  uint32
	args []specs.LinuxSeccompArg
}

// compiled is a profile with its actions checked and translated.
type compiled struct {
	fallback uint32
	// unknown is for syscalls newer than all the profile names.
	unknown uint32
	rules   map[string][]rule
}

func check(profile *specs.LinuxSeccomp) (*compiled, error) {
	fallback, err := returnValue(profile.DefaultAction, profile.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("defaultAction: %w", err)
	}
	c := &compiled{fallback: fallback, unknown: fallback, rules: map[string][]rule{}}
	switch profile.DefaultAction {
	case specs.ActErrno, specs.ActKill, specs.ActKillThread, specs.ActKillProcess, specs.ActTrap:
		// As runc: a C library tries a new syscall and falls back on ENOSYS only.
		c.unknown = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	}
	for i, s := range profile.Syscalls {
		ret, err := returnValue(s.Action, s.ErrnoRet)
		if err != nil {
			return nil, fmt.Errorf("syscalls[%d]: %w", i, err)
		}
		if len(s.Names) == 0 {
			return nil, fmt.Errorf("syscalls[%d]: names is empty: %w", i, errdefs.ErrInvalidArgument)
		}
		for _, a := range s.Args {
			if _, ok := comparisons[a.Op]; !ok {
				return nil, fmt.Errorf("syscalls[%d]: unknown op %q: %w", i, a.Op, errdefs.ErrInvalidArgument)
			}
			if a.Index > 5 {
				return nil, fmt.Errorf("syscalls[%d]: argument index %d: %w", i, a.Index, errdefs.ErrInvalidArgument)
			}
		}
		for _, name := range s.Names {
			c.rules[name] = append(c.rules[name], rule{ret, s.Args})
		}
	}
	for name, rules := range c.rules {
		c.rules[name] = effective(rules, fallback)
	}
	return c, nil
}

// effective are the rules of a syscall that decide, as the package's comment says.
func effective(rules []rule, fallback uint32) []rule {
	var out []rule
	for _, r := range rules {
		switch {
		case r.ret == fallback:
		case len(r.args) == 0:
			return []rule{r}
		case repeats(r.args):
			for _, a := range r.args {
				out = append(out, rule{r.ret, []specs.LinuxSeccompArg{a}})
			}
		default:
			out = append(out, r)
		}
	}
	return out
}

// repeats says whether two of the comparisons are about the same argument.
func repeats(args []specs.LinuxSeccompArg) bool {
	var seen [6]bool
	for _, a := range args {
		if seen[a.Index] {
			return true
		}
		seen[a.Index] = true
	}
	return false
}

// assemble makes the whole program: one section for each audit architecture.
func assemble(profile *specs.LinuxSeccomp, goarch string) ([]bpf.Instruction, error) { //nolint:unparam // GOARCH is one value on each machine
	c, err := check(profile)
	if err != nil {
		return nil, err
	}
	home, ok := native[goarch]
	if !ok {
		return nil, fmt.Errorf("no syscall table for %s: %w", goarch, errdefs.ErrNotImplemented)
	}
	wanted := []specs.Arch{home}
	for _, a := range profile.Architectures {
		if _, ok := abis[a]; !ok {
			return nil, fmt.Errorf("architectures: %s: %w", a, errdefs.ErrNotImplemented)
		}
		if !slices.Contains(wanted, a) {
			wanted = append(wanted, a)
		}
	}
	// A syscall by a way the profile does not name must not get through.
	bad := []bpf.Instruction{bpf.RetConstant{Val: unix.SECCOMP_RET_KILL_PROCESS}}
	var program []bpf.Instruction
	program = append(program, bpf.LoadAbsolute{Off: offArch, Size: 4})
	for _, a := range wanted {
		way := abis[a]
		if way.first != 0 {
			continue // part of its audit architecture's section
		}
		section := []bpf.Instruction{bpf.LoadAbsolute{Off: offNumber, Size: 4}}
		body := c.tree(way)
		if a == specs.ArchX86_64 {
			high := bad
			if slices.Contains(wanted, specs.ArchX32) {
				high = c.tree(abis[specs.ArchX32])
			}
			section = append(section,
				// -1 is how a tracer skips a syscall, not one of x32.
				bpf.JumpIf{Cond: bpf.JumpEqual, Val: ^uint32(0), SkipTrue: 2},
				bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: x32Bit, SkipFalse: 1},
				bpf.Jump{Skip: uint32(len(body))})
			section = append(section, body...)
			section = append(section, high...)
		} else {
			section = append(section, body...)
		}
		program = append(program,
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(way.info.ID), SkipTrue: 1},
			bpf.Jump{Skip: uint32(len(section))})
		program = append(program, section...)
	}
	program = append(program, bad...)
	if len(program) > maxInstructions {
		return nil, fmt.Errorf("the profile needs %d instructions, the kernel takes %d: %w",
			len(program), maxInstructions, errdefs.ErrInvalidArgument)
	}
	return program, nil
}

// span is a run of syscall numbers that are treated alike, up to the next span.
type span struct {
	from uint32
	code []bpf.Instruction
}

// tree is the program for one way to call the kernel, with the number in A. It
// searches by halving, so that a syscall costs some ten comparisons.
func (c *compiled) tree(way abi) []bpf.Instruction {
	type entry struct {
		number uint32
		rules  []rule
	}
	var entries []entry
	for name, rules := range c.rules {
		if n, ok := way.info.SyscallNames[name]; ok {
			entries = append(entries, entry{way.first | uint32(n), rules})
		}
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.number, b.number) })

	fallback := []bpf.Instruction{bpf.RetConstant{Val: c.fallback}}
	spans := []span{{0, fallback}}
	add := func(from uint32, code []bpf.Instruction) {
		last := &spans[len(spans)-1]
		switch {
		case last.from == from:
			last.code = code
			if len(spans) > 1 && slices.Equal(spans[len(spans)-2].code, code) && len(code) == 1 {
				spans = spans[:len(spans)-1]
			}
		case len(code) == 1 && slices.Equal(last.code, code):
		default:
			spans = append(spans, span{from, code})
		}
	}
	for i, e := range entries {
		add(e.number, c.leaf(e.rules, way.wide))
		if i+1 == len(entries) || entries[i+1].number != e.number+1 {
			add(e.number+1, fallback)
		}
	}
	if len(entries) > 0 {
		add(entries[len(entries)-1].number+1, []bpf.Instruction{bpf.RetConstant{Val: c.unknown}})
		add(^uint32(0), fallback) // -1 is no syscall
	}
	return search(spans)
}

func search(spans []span) []bpf.Instruction {
	if len(spans) == 1 {
		return spans[0].code
	}
	mid := len(spans) / 2
	low, high := search(spans[:mid]), search(spans[mid:])
	out := []bpf.Instruction{
		// A jump over more than 255 needs an instruction of its own.
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: spans[mid].from, SkipFalse: 1},
		bpf.Jump{Skip: uint32(len(low))},
	}
	return append(append(out, low...), high...)
}

// leaf is the program for one syscall.
func (c *compiled) leaf(rules []rule, wide bool) []bpf.Instruction {
	var out []bpf.Instruction
	for _, r := range rules {
		if len(r.args) == 0 {
			return append(out, bpf.RetConstant{Val: r.ret})
		}
		// Backwards: each comparison has to know how far the next rule is.
		body := []bpf.Instruction{bpf.RetConstant{Val: r.ret}}
		for _, a := range slices.Backward(r.args) {
			body = append(compare(a, wide, len(body)), body...)
		}
		out = append(out, body...)
	}
	return append(out, bpf.RetConstant{Val: c.fallback})
}

// comparisons are the operators, as what decides in the high half, and in the low.
var comparisons = map[specs.LinuxSeccompOperator]struct {
	negate  bool
	low     bpf.JumpTest
	ordered bool
}{
	specs.OpEqualTo:      {low: bpf.JumpEqual},
	specs.OpMaskedEqual:  {low: bpf.JumpEqual},
	specs.OpNotEqual:     {low: bpf.JumpEqual, negate: true},
	specs.OpGreaterThan:  {low: bpf.JumpGreaterThan, ordered: true},
	specs.OpGreaterEqual: {low: bpf.JumpGreaterOrEqual, ordered: true},
	specs.OpLessEqual:    {low: bpf.JumpGreaterThan, ordered: true, negate: true},
	specs.OpLessThan:     {low: bpf.JumpGreaterOrEqual, ordered: true, negate: true},
}

// compare goes on behind itself if the argument matches and skips rest
// instructions more if not. Arguments have 64 bits, the machine 32: the high
// half decides unless it is equal.
func compare(a specs.LinuxSeccompArg, wide bool, rest int) []bpf.Instruction {
	op := comparisons[a.Op]
	value, mask := a.Value, ^uint64(0)
	if a.Op == specs.OpMaskedEqual {
		mask, value = a.Value, a.ValueTwo
	}
	off := uint32(offArgs + 8*a.Index)

	// The last two instructions are where all comparisons lead: to the first of
	// them if the (not negated) test holds, over it if not.
	//	jump over the second       (holds)
	//	jump over rest             (does not)
	end := []bpf.Instruction{bpf.Jump{Skip: 1}, bpf.Jump{Skip: uint32(rest)}}
	if op.negate {
		end = []bpf.Instruction{bpf.Jump{Skip: uint32(rest) + 1}, bpf.Jump{Skip: 0}}
	}
	load := func(off uint32, mask uint32) []bpf.Instruction {
		out := []bpf.Instruction{bpf.LoadAbsolute{Off: off, Size: 4}}
		if mask != ^uint32(0) {
			out = append(out, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: mask})
		}
		return out
	}
	out := append(load(off, uint32(mask)),
		bpf.JumpIf{Cond: op.low, Val: uint32(value), SkipTrue: 0, SkipFalse: 1})
	out = append(out, end...)
	if !wide {
		return out
	}
	// In front: the high half. n is how far the two ends are behind a jump there.
	n := uint8(len(out) - len(end))
	high := load(off+4, uint32(mask>>32))
	if op.ordered {
		high = append(high,
			bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: uint32(value >> 32), SkipTrue: n + 1},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(value >> 32), SkipFalse: n + 1})
	} else {
		high = append(high, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(value >> 32), SkipFalse: n + 1})
	}
	return append(high, out...)
}
