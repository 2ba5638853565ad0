package pve

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

const storageCfg = `# comment
dir: local
	path /var/lib/vz
	content iso,vztmpl,backup

zfspool: local-zfs
	pool rpool/data
	content images,rootdir
	sparse 1

zfspool: fast
	pool fast
	nodes b,c

zfspool: off
	pool rpool/off
	disable

zfspool: images-only
	pool rpool/images
	content images

zfspool: second
	pool rpool/second
	content rootdir images
	disable 0

esxi: odd
	server 10.0.0.1
`

func TestStorages(t *testing.T) {
	for node, want := range map[string][]Storage{
		"a": {{"local-zfs", "rpool/data"}, {"second", "rpool/second"}},
		"b": {{"local-zfs", "rpool/data"}, {"fast", "fast"}, {"second", "rpool/second"}},
	} {
		if got := parseStorages(storageCfg, node); !slices.Equal(got, want) {
			t.Errorf("%s: %v", node, got)
		}
	}
	n := &Node{Root: t.TempDir()}
	if _, err := n.Storage("a", "", "rpool/x"); !errdefs.IsUnavailable(err) {
		t.Errorf("no cluster filesystem: %v", err)
	}
	if err := os.WriteFile(filepath.Join(n.Root, ".vmlist"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Storage("a", "", "rpool/x"); !errdefs.IsNotFound(err) {
		t.Errorf("no storage.cfg: %v", err)
	}
	if err := os.WriteFile(filepath.Join(n.Root, "storage.cfg"), []byte(storageCfg), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		node, name, dataset, want string
		is                        func(error) bool
	}{
		{"a", "", "rpool/containerd-pve", "local-zfs", nil},
		{"a", "second", "rpool/containerd-pve", "second", nil},
		{"b", "", "fast/containerd-pve", "fast", nil},
		{"a", "", "fast/containerd-pve", "", errdefs.IsNotFound},
		{"a", "off", "rpool/containerd-pve", "", errdefs.IsNotFound},
		{"a", "local", "rpool/containerd-pve", "", errdefs.IsNotFound},
		{"b", "fast", "rpool/containerd-pve", "", errdefs.IsFailedPrecondition},
	} {
		s, err := n.Storage(c.node, c.name, c.dataset)
		if s.Name != c.want || (c.is == nil) != (err == nil) || c.is != nil && !c.is(err) {
			t.Errorf("%+v: %v, %v", c, s, err)
		}
	}
}

// FuzzStorages: any text is read.
func FuzzStorages(f *testing.F) {
	f.Add(storageCfg)
	f.Add("zfspool: x\n pool\n\tpool \n\n: \n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range parseStorages(text, "a") {
			if s.Name == "" || s.Pool == "" {
				t.Errorf("%+v of %q", s, text)
			}
		}
	})
}
