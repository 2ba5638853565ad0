package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

type property struct {
	value string
	err   error
}

func (p property) Property(_ context.Context, _, name string) (string, error) {
	if name != propStore {
		return zfs.Unset, nil
	}
	return p.value, p.err
}

func TestBelongs(t *testing.T) {
	mine, fresh := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(mine, "store"), []byte("me\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	none := func(err error) bool { return err == nil }
	for _, c := range []struct {
		name string
		z    property
		root string
		is   func(error) bool
	}{
		{"ours", property{value: "me"}, mine, none},
		{"nobody's", property{value: zfs.Unset}, mine, none},
		{"nobody's, a new root", property{value: zfs.Unset}, fresh, none},
		{"another's", property{value: "you"}, mine, errdefs.IsFailedPrecondition},
		{"another's, a new root", property{value: "you"}, fresh, errdefs.IsFailedPrecondition},
		{"none", property{err: errdefs.ErrNotFound}, mine, errdefs.IsNotFound},
	} {
		if err := Belongs(t.Context(), c.z, c.root, "tank/c"); !c.is(err) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
