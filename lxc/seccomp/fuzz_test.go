package seccomp

import (
	"encoding/binary"
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
)

// FuzzCompile: of any profile comes an error of a kind, or a program that the
// kernel's rules for filters allow and that ends with an answer for every call.
func FuzzCompile(f *testing.F) {
	for _, p := range []specs.LinuxSeccomp{
		{DefaultAction: specs.ActAllow},
		{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32}, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "write", "openat"}, Action: specs.ActAllow},
			{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 8, Op: specs.OpEqualTo}, {Index: 5, Value: 1 << 40, ValueTwo: 3, Op: specs.OpMaskedEqual}}},
			{Names: []string{"clone"}, Action: specs.ActKill, Args: []specs.LinuxSeccompArg{{Index: 1, Value: ^uint64(0), Op: specs.OpGreaterThan}}},
		}},
		{DefaultAction: specs.ActKillProcess, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog}},
		{DefaultAction: "?", Architectures: []specs.Arch{"?"}},
	} {
		data, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, uint32(0), uint64(8))
	}
	f.Fuzz(func(t *testing.T, data []byte, number uint32, argument uint64) {
		var p specs.LinuxSeccomp
		if json.Unmarshal(data, &p) != nil {
			t.Skip()
		}
		out, err := Compile(&p)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
				t.Errorf("%v: of no kind", err)
			}
			return
		}
		const size = 8
		n := len(out.Filter) / size
		if n == 0 || n > maxInstructions || len(out.Filter)%size != 0 {
			t.Fatalf("a filter of %d bytes", len(out.Filter))
		}
		raw := make([]bpf.RawInstruction, n)
		for i := range raw {
			b := out.Filter[size*i:]
			raw[i] = bpf.RawInstruction{Op: binary.NativeEndian.Uint16(b), Jt: b[2], Jf: b[3], K: binary.NativeEndian.Uint32(b[4:])}
		}
		program, ok := bpf.Disassemble(raw)
		if !ok {
			t.Fatal("an instruction that is none")
		}
		vm, err := bpf.NewVM(program)
		if err != nil {
			t.Fatal(err)
		}
		call := make([]byte, 64)
		for _, a := range abis {
			binary.BigEndian.PutUint32(call[offNumber:], number)
			binary.BigEndian.PutUint32(call[offArch:], uint32(a.info.ID))
			for i := range 6 {
				binary.BigEndian.PutUint32(call[offArgs+8*i:], uint32(argument))
				binary.BigEndian.PutUint32(call[offArgs+8*i+4:], uint32(argument>>32))
			}
			if _, err := vm.Run(call); err != nil {
				t.Fatal(err)
			}
		}
	})
}
