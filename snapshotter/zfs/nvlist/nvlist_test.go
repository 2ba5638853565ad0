package nvlist

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

var everything = List{
	"present": Present{}, "yes": true, "no": false, "byte": Byte(7), "time": Time(-5),
	"i8": int8(-8), "u8": uint8(8), "i16": int16(-16), "u16": uint16(16), "i32": int32(-32), "u32": uint32(32), "i64": int64(-64), "u64": uint64(1 << 63),
	"string": "text", "empty": "", "": "no name",
	"bytes": Bytes{1, 2, 3}, "i8s": []int8{-1}, "u8s": []uint8{1, 2}, "i16s": []int16{-1, 2, 3}, "u16s": []uint16{1}, "i32s": []int32{-1, 2, 3},
	"u32s": []uint32{}, "i64s": []int64{-1, 1}, "u64s": []uint64{1, 2, 3}, "bools": []bool{true, false}, "strings": []string{"a", "", "ccc"},
	"list": List{"in": List{"in": List{"deep": uint64(3)}}, "x": "y"}, "lists": []List{{"a": "b"}, {}, {"c": Present{}}},
}

func TestRoundTrip(t *testing.T) {
	b, err := Encode(everything)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(append(b, 0xff, 0xff, 0xff)) // what follows in the kernel's buffer
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, everything) {
		t.Errorf("%v, want %v", got, everything)
	}
}

func TestDecodeNames(t *testing.T) {
	b, err := Encode(everything)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range everything {
		got, err := Decode(b, name, "not there", "lis")
		if err != nil || !reflect.DeepEqual(got, List{name: want}) {
			t.Errorf("%q: %v, %v; want %v", name, got, err, want)
		}
	}
	if got, err := Decode(b, "list", "u64"); err != nil || len(got) != 2 {
		t.Errorf("two names: %v, %v", got, err)
	}
	for n := range b {
		if l, err := Decode(b[:n], "not there"); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("the first %d of %d bytes: %v, %v", n, len(b), l, err)
		}
	}
}

// BenchmarkDecode is of a list as long as a filesystem's properties.
func BenchmarkDecode(b *testing.B) {
	all := List{}
	for i := range 70 {
		all["property"+strconv.Itoa(i)] = List{"value": uint64(i), "source": "tank/containerd-pve"}
	}
	packed, err := Encode(all)
	if err != nil {
		b.Fatal(err)
	}
	for name, names := range map[string][]string{"all": nil, "three": {"property1", "property30", "property69"}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Decode(packed, names...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestGolden is the form libnvpair packs (nvlist_pack, NV_ENCODE_NATIVE, amd64):
// {"a": uint64 1, "l": {"s": "x"}}.
func TestGolden(t *testing.T) {
	want := strings.Join([]string{
		"00010000", "00000000", "01000000",
		"20000000", "0200", "0000", "01000000", "08000000", "6100000000000000", "0100000000000000",
		"30000000", "0200", "0000", "01000000", "13000000", "6c00000000000000",
		"00000000", "01000000", "0000000000000000", "00000000", "00000000",
		"20000000", "0200", "0000", "01000000", "09000000", "7300000000000000", "7800000000000000", "00000000",
		"00000000",
	}, "")
	if littleEndian() != 1 {
		t.Skip("the golden bytes are a little-endian machine's")
	}
	b, err := Encode(List{"a": uint64(1), "l": List{"s": "x"}})
	if err != nil || hex.EncodeToString(b) != want {
		t.Errorf("%x, %v; want %s", b, err, want)
	}
}

func TestEncodeRefuses(t *testing.T) {
	deep := List{}
	for range maxDepth + 1 {
		deep = List{"l": deep}
	}
	for what, l := range map[string]List{
		"type": {"a": 1}, "NUL in a name": {"a\x00b": true}, "NUL in a string": {"a": "\x00"}, "NUL in strings": {"a": []string{"", "\x00"}},
		"depth": deep, "long name": {strings.Repeat("n", 1<<15): true}, "in a list": {"a": List{"b": struct{}{}}}, "in lists": {"a": []List{{"b": nil}}},
	} {
		if b, err := Encode(l); err == nil {
			t.Errorf("%s: %x", what, b)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	good, err := Encode(everything)
	if err != nil {
		t.Fatal(err)
	}
	for n := range good {
		if l, err := Decode(good[:n]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("the first %d of %d bytes: %v, %v", n, len(good), l, err)
		}
	}
	for what, at := range map[string]int{"encoding": 0, "byte order": 1, "version": 4} {
		bad := bytes.Clone(good)
		bad[at] ^= 1
		if _, err := Decode(bad); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	good, err := Encode(everything)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	small, err := Encode(List{"snaps": List{"tank/a@b": Present{}}, "props": List{"readonly": uint64(1)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(small)
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		for name, value := range l {
			if some, err := Decode(b, name); err != nil || !reflect.DeepEqual(some, List{name: value}) {
				t.Fatalf("%q alone is %v, %v; with the others %v", name, some, err, value)
			}
		}
		again, err := Encode(l)
		if err != nil {
			t.Fatalf("%v cannot be packed again: %v", l, err)
		}
		if got, err := Decode(again); err != nil || !reflect.DeepEqual(got, l) {
			t.Fatalf("%v became %v, %v", l, got, err)
		}
	})
}
