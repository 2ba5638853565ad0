package mounts

import (
	"reflect"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
)

func TestBindRemembersTheMount(t *testing.T) {
	const uid, gid = "uidmap=0:100000:65536", "gidmap=0:200000:65536"
	for _, c := range []struct {
		name   string
		m      mount.Mount
		mapped bool
		want   []string
	}{
		{"plain", Of("tank/ct/7"), false, []string{"bind", "x-containerd-pve.dataset=tank/ct/7"}},
		{"mapped by whoever mounts", Of("tank/ct/7", uid, gid), false, []string{"bind", "x-containerd-pve.dataset=tank/ct/7", "x-containerd-pve." + uid, uid, "x-containerd-pve." + gid, gid}},
		{"mapped where it is mounted", Of("tank/ct/7", uid, gid), true, []string{"bind", "x-containerd-pve.dataset=tank/ct/7", "x-containerd-pve." + uid, "x-containerd-pve." + gid}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := Bind(c.m, "/run/rootfs", c.mapped)
			if want := (mount.Mount{Type: "bind", Source: "/run/rootfs", Options: c.want}); !reflect.DeepEqual(b, want) {
				t.Errorf("%+v, want %+v", b, want)
			}
			if d, ok := Dataset(b); !ok || d != "tank/ct/7" {
				t.Errorf("its dataset: %q, %v", d, ok)
			}
			if own := Anew(b); !reflect.DeepEqual(own, c.m) {
				t.Errorf("anew %+v, want %+v", own, c.m)
			}
		})
	}
}

func TestOthersAreLeftAlone(t *testing.T) {
	for _, m := range []mount.Mount{
		{Type: "bind", Source: "/tank/ct/7", Options: []string{"rbind", "ro"}},
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b"}},
	} {
		if d, ok := Dataset(m); ok {
			t.Errorf("%+v has dataset %q", m, d)
		}
		if own := Anew(m); !reflect.DeepEqual(own, m) {
			t.Errorf("%+v became %+v", m, own)
		}
	}
	if d, ok := Dataset(Of("tank/ct/7", "ro")); !ok || d != "tank/ct/7" {
		t.Errorf("%q, %v", d, ok)
	}
}
