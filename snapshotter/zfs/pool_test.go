package zfs

import (
	"testing"

	"github.com/containerd/errdefs"
)

func TestParsePool(t *testing.T) {
	p, err := parsePool(Pool{Name: "tank"}, "health\tDEGRADED\nreadonly\ton\ncapacity\t97\nfree\t1234\n")
	if want := (Pool{Name: "tank", Health: "DEGRADED", ReadOnly: true, Capacity: 97, Free: 1234}); err != nil || p != want {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := parsePool(Pool{}, "capacity\t-\n"); !errdefs.IsInternal(err) {
		t.Errorf("%v", err)
	}
}
