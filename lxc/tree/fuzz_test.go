package tree

import (
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// FuzzOptions: an option is a flag that is known, or the file system's own, word
// for word; none is lost.
func FuzzOptions(f *testing.F) {
	for _, text := range []string{"ro,nosuid,mode=755", "rbind,rprivate,rro", "bind,tmpcopyup,idmap", "a\nb,\x00,=,r", "sync,defaults", "rr,rbind,rrbind,private"} {
		f.Add("tmpfs", text)
	}
	f.Fuzz(func(t *testing.T, kind, text string) {
		list := strings.Split(text, ",")
		o := Parse(&specs.Mount{Type: kind, Options: list})
		for _, d := range append(slices.Clone(o.Data), o.super...) {
			if !slices.Contains(list, d) {
				t.Errorf("%q comes from nowhere in %q", d, list)
			}
		}
		for _, option := range list {
			_, known := attrFlags[option]
			if strings.ContainsAny(option, "\n\x00=") && (known || !slices.Contains(o.Data, option)) {
				t.Errorf("%q was taken for a flag", option)
			}
		}
		if o.attrs.set&o.attrs.clear != 0 || o.below.set&o.below.clear != 0 {
			t.Errorf("set and cleared at once: %+v", o)
		}
	})
}
