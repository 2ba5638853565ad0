package seccomp

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/errdefs"
	"github.com/elastic/go-seccomp-bpf/arch"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const (
	allow = uint32(unix.SECCOMP_RET_ALLOW)
	eperm = uint32(unix.SECCOMP_RET_ERRNO | unix.EPERM)
	nosys = uint32(unix.SECCOMP_RET_ERRNO | unix.ENOSYS)
	kill  = uint32(unix.SECCOMP_RET_KILL_PROCESS)
)

// filter runs a program as the kernel would. The machine of x/net/bpf loads
// big-endian words, so the data is laid out as those.
func filter(t *testing.T, program []bpf.Instruction, audit arch.AuditArch, number uint32, args ...uint64) uint32 {
	t.Helper()
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[offNumber:], number)
	binary.BigEndian.PutUint32(data[offArch:], uint32(audit))
	for i, a := range args {
		binary.BigEndian.PutUint32(data[offArgs+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[offArgs+8*i+4:], uint32(a>>32))
	}
	got, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(got)
}

func num(i *arch.Info, name string) uint32 { return uint32(i.SyscallNames[name]) }

func TestComparisons(t *testing.T) {
	const big = 1 << 40
	for _, c := range []struct {
		op            specs.LinuxSeccompOperator
		value, second uint64
		yes, no       []uint64
	}{
		{specs.OpEqualTo, big + 7, 0, []uint64{big + 7}, []uint64{7, big, big + 8, 2*big + 7}},
		{specs.OpNotEqual, big + 7, 0, []uint64{7, big, 0}, []uint64{big + 7}},
		{specs.OpGreaterThan, big + 7, 0, []uint64{big + 8, 2 * big, ^uint64(0)}, []uint64{big + 7, 8, 0xffffffff, big}},
		{specs.OpGreaterEqual, big + 7, 0, []uint64{big + 7, big + 8, 2 * big}, []uint64{big + 6, 0xffffffff, 0}},
		{specs.OpLessThan, big + 7, 0, []uint64{big + 6, 0, 0xffffffff}, []uint64{big + 7, big + 8, 2 * big}},
		{specs.OpLessEqual, big + 7, 0, []uint64{big + 7, big + 6, 0, 0xffffffff}, []uint64{big + 8, 2 * big}},
		{specs.OpMaskedEqual, big | 0xf0, 0x10, []uint64{0x10, 0x1f, 2*big | 0x1f}, []uint64{0x20, big | 0x10, 0}},
		{specs.OpMaskedEqual, big | 0xf0, big | 0x10, []uint64{big | 0x1f}, []uint64{0x10}},
	} {
		profile := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{
			Names: []string{"personality"}, Action: specs.ActAllow,
			Args: []specs.LinuxSeccompArg{{Index: 2, Op: c.op, Value: c.value, ValueTwo: c.second}},
		}}}
		program, err := assemble(profile, "amd64")
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range c.yes {
			if got := filter(t, program, arch.X86_64.ID, num(arch.X86_64, "personality"), 1, 2, v); got != allow {
				t.Errorf("%s %#x %#x with %#x: %#x, want allow", c.op, c.value, c.second, v, got)
			}
		}
		for _, v := range c.no {
			if got := filter(t, program, arch.X86_64.ID, num(arch.X86_64, "personality"), 1, 2, v); got != eperm {
				t.Errorf("%s %#x %#x with %#x: %#x, want EPERM", c.op, c.value, c.second, v, got)
			}
		}
	}
}

func TestRules(t *testing.T) {
	five, arg := uint(5), func(i uint, v uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: i, Value: v, Op: specs.OpEqualTo}
	}
	profile := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "write", "no_such_call"}, Action: specs.ActAllow},
			{Names: []string{"socket"}, Action: specs.ActErrno, ErrnoRet: &five, Args: []specs.LinuxSeccompArg{arg(0, 1), arg(1, 2)}},
			{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(0, 1)}},
			{Names: []string{"ptrace"}, Action: specs.ActTrap},
			{Names: []string{"kexec_load"}, Action: specs.ActKill},
			{Names: []string{"reboot"}, Action: specs.ActKillProcess},
			{Names: []string{"mount"}, Action: specs.ActLog},
			{Names: []string{"umount2"}, Action: specs.ActTrace, ErrnoRet: &five},
		},
	}
	program, err := assemble(profile, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	x, i := arch.X86_64, arch.I386
	for _, c := range []struct {
		what string
		info *arch.Info
		n    uint32
		args []uint64
		want uint32
	}{
		{"read", x, num(x, "read"), nil, allow},
		{"write", x, num(x, "write"), nil, allow},
		{"open", x, num(x, "open"), nil, eperm},
		{"both arguments", x, num(x, "socket"), []uint64{1, 2}, unix.SECCOMP_RET_ERRNO | 5},
		{"one argument", x, num(x, "socket"), []uint64{1, 3}, allow},
		{"no argument", x, num(x, "socket"), []uint64{2, 2}, eperm},
		{"trap", x, num(x, "ptrace"), nil, unix.SECCOMP_RET_TRAP},
		{"kill", x, num(x, "kexec_load"), nil, unix.SECCOMP_RET_KILL_THREAD},
		{"kill process", x, num(x, "reboot"), nil, kill},
		{"log", x, num(x, "mount"), nil, unix.SECCOMP_RET_LOG},
		{"trace", x, num(x, "umount2"), nil, unix.SECCOMP_RET_TRACE | 5},
		{"newer than the profile", x, 5000, nil, nosys},
		{"minus one", x, ^uint32(0), nil, eperm},
		{"x32 not in the profile", x, x32Bit | num(x, "read"), nil, kill},
		{"i386 read", i, num(i, "read"), nil, allow},
		{"i386 open", i, num(i, "open"), nil, eperm},
		{"i386 looks at low halves", i, num(i, "socket"), []uint64{1, 1<<32 | 3}, allow},
		{"another architecture", arch.AARCH64, 63, nil, kill},
	} {
		if got := filter(t, program, c.info.ID, c.n, c.args...); got != c.want {
			t.Errorf("%s: %#x, want %#x", c.what, got, c.want)
		}
	}
}

// TestEffective: several rules for one syscall, as runc and libseccomp take them.
func TestEffective(t *testing.T) {
	errno := func(n uint) *uint { return &n }
	arg := func(i uint, op specs.LinuxSeccompOperator, v uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: i, Value: v, Op: op}
	}
	program, err := assemble(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{arg(0, specs.OpEqualTo, 1)}}, // the default: nothing
		{Names: []string{"read"}, Action: specs.ActAllow},
		{Names: []string{"write"}, Action: specs.ActErrno, ErrnoRet: errno(5), Args: []specs.LinuxSeccompArg{arg(0, specs.OpEqualTo, 1)}},
		{Names: []string{"write"}, Action: specs.ActAllow}, // alone
		{Names: []string{"write"}, Action: specs.ActKill},
		{Names: []string{"flock"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(1, specs.OpGreaterEqual, 10), arg(1, specs.OpLessEqual, 3)}},
		{Names: []string{"tee"}, Action: specs.ActErrno, ErrnoRet: errno(5), Args: []specs.LinuxSeccompArg{arg(0, specs.OpEqualTo, 1), arg(1, specs.OpEqualTo, 2)}},
		{Names: []string{"tee"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(0, specs.OpEqualTo, 1)}},
	}}, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	x := arch.X86_64
	for _, c := range []struct {
		name string
		args []uint64
		want uint32
	}{
		{"read", []uint64{1}, allow}, {"read", []uint64{2}, allow}, {"write", []uint64{1}, allow},
		{"flock", []uint64{0, 10}, allow}, {"flock", []uint64{0, 3}, allow}, {"flock", []uint64{0, 5}, eperm},
		{"tee", []uint64{1, 2}, unix.SECCOMP_RET_ERRNO | 5}, {"tee", []uint64{1, 3}, allow}, {"tee", []uint64{2, 2}, eperm},
	} {
		if got := filter(t, program, x.ID, num(x, c.name), c.args...); got != c.want {
			t.Errorf("%s %v: %#x, want %#x", c.name, c.args, got, c.want)
		}
	}
}

// TestFlags: what seccomp(2) is told.
func TestFlags(t *testing.T) {
	notify := []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}}
	for _, c := range []struct {
		flags  []specs.LinuxSeccompFlag
		calls  []specs.LinuxSyscall
		want   uint
		notify bool
	}{
		{nil, nil, filterFlagSpecAllow, false},
		{[]specs.LinuxSeccompFlag{}, nil, 0, false},
		{[]specs.LinuxSeccompFlag{flagTsync, specs.LinuxSeccompFlagLog}, nil, filterFlagLog, false},
		{nil, notify, filterFlagSpecAllow | filterFlagNewListener, true},
		{[]specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}, notify, filterFlagNewListener | filterFlagWaitKillable, true},
	} {
		out, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: c.flags, Syscalls: c.calls, ListenerPath: "/x"})
		if err != nil || out.Flags != c.want || out.Notify != c.notify {
			t.Errorf("%v: %+v, %v", c.flags, out, err)
		}
	}
}

// TestDefaultProfile looks at every syscall of every ABI of containerd's profile.
func TestDefaultProfile(t *testing.T) {
	spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}}
	profile := seccomp.DefaultProfile(spec)
	program, err := assemble(profile, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d instructions", len(program))
	plain, conditional := map[string]bool{}, map[string]bool{}
	for _, s := range profile.Syscalls {
		for _, n := range s.Names {
			if len(s.Args) > 0 || s.Action != specs.ActAllow {
				conditional[n] = true
			} else {
				plain[n] = true
			}
		}
	}
	for _, a := range profile.Architectures {
		way := abis[a]
		highest := uint32(0)
		for name, n := range way.info.SyscallNames {
			if plain[name] || conditional[name] {
				highest = max(highest, uint32(n))
			}
		}
		for name, n := range way.info.SyscallNames {
			want := eperm
			switch {
			case conditional[name]:
				continue
			case plain[name]:
				want = allow
			case uint32(n) > highest:
				want = nosys
			}
			if got := filter(t, program, way.info.ID, way.first|uint32(n)); got != want {
				t.Errorf("%s %s: %#x, want %#x", a, name, got, want)
			}
		}
	}
	x := arch.X86_64
	for _, c := range []struct {
		name string
		arg  uint64
		want uint32
	}{
		{"personality", 0, allow}, {"personality", 0xffffffff, allow}, {"personality", 1, eperm},
		{"clone", unix.CLONE_NEWNS, eperm}, {"clone", unix.CLONE_VM, allow}, {"clone3", 0, nosys},
	} {
		if got := filter(t, program, x.ID, num(x, c.name), c.arg); got != c.want {
			t.Errorf("%s(%#x): %#x, want %#x", c.name, c.arg, got, c.want)
		}
	}
	if out, err := Compile(profile); err != nil || len(out.Filter) != 8*len(program) || out.Flags != filterFlagSpecAllow {
		t.Errorf("Compile: %v", err)
	}
}

func TestErrors(t *testing.T) {
	one := uint(1)
	rule := func(s specs.LinuxSyscall) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{s}}
	}
	for name, c := range map[string]struct {
		profile *specs.LinuxSeccomp
		want    error
	}{
		"notify nobody": {rule(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActNotify}), errdefs.ErrInvalidArgument},
		"metadata":      {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerMetadata: "x"}, errdefs.ErrInvalidArgument},
		"wait killable": {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}}, errdefs.ErrInvalidArgument},
		"action":        {rule(specs.LinuxSyscall{Names: []string{"read"}, Action: "SCMP_ACT_X"}), errdefs.ErrInvalidArgument},
		"names":         {rule(specs.LinuxSyscall{Action: specs.ActErrno}), errdefs.ErrInvalidArgument},
		"errno":         {rule(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActKill, ErrnoRet: &one}), errdefs.ErrInvalidArgument},
		"op":            {rule(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "X"}}}), errdefs.ErrInvalidArgument},
		"index":         {rule(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}}), errdefs.ErrInvalidArgument},
		"architecture":  {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchS390}}, errdefs.ErrNotImplemented},
		"flag":          {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"X"}}, errdefs.ErrInvalidArgument},
		"no default":    {&specs.LinuxSeccomp{}, errdefs.ErrInvalidArgument},
		"default errno": {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, DefaultErrnoRet: &one}, errdefs.ErrInvalidArgument},
	} {
		if _, err := Compile(c.profile); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if out, err := Compile(nil); out != nil || err != nil {
		t.Errorf("no profile: %v, %v", out, err)
	}
}
