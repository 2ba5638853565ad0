package record

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

const name = "a:b"

func TestRecord(t *testing.T) {
	noise := make([]byte, 90_000)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	for _, document := range [][]byte{nil, []byte("x"), noise, bytes.Repeat([]byte("spec "), 100_000)} {
		p, err := Encode(name, document)
		if err != nil {
			t.Fatal(err)
		}
		for n, v := range p {
			if len(v) > partSize || !slices.Contains(Properties(name), n) {
				t.Errorf("%s has %d bytes", n, len(v))
			}
		}
		got, err := Decode(name, p)
		if err != nil || !bytes.Equal(got, document) {
			t.Errorf("%d bytes: %v", len(document), err)
		}
	}
	if _, err := Encode(name, make([]byte, MaxSize+1)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("too long: %v", err)
	}
	if _, err := Decode(name, nil); !errdefs.IsNotFound(err) {
		t.Errorf("none: %v", err)
	}
	for _, rubbish := range []string{"rubbish", "H4sI", "%%%%"} {
		if _, err := Decode(name, zfs.Properties{name: rubbish}); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", rubbish, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	p, err := Encode(name, []byte("some"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p[name], "")
	f.Add("H4sI", "AAAA")
	f.Fuzz(func(t *testing.T, a, b string) {
		if d, err := Decode(name, zfs.Properties{name: a, part(name, 1): b}); err == nil && len(d) > MaxSize {
			t.Errorf("%d bytes", len(d))
		}
	})
}
