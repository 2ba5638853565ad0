package task

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestNets(t *testing.T) {
	asking := func(nets ...string) *specs.Spec {
		s := &specs.Spec{Annotations: map[string]string{}}
		for i, n := range nets {
			s.Annotations["io.containerd.pve.net"+string(rune('0'+i))] = n
		}
		return s
	}
	host := t.TempDir()
	for _, bridge := range []string{"vmbr0", "vmbr1"} {
		if err := os.Mkdir(filepath.Join(host, bridge), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	nets, err := netsOf(asking("bridge=vmbr0,ip=10.0.0.5/24,gw=10.0.0.1", "bridge=vmbr1,ip6=fd00::5/64,hwaddr=BC:24:11:0A:0B:0C,tag=7"), "default", "web", host)
	if err != nil || len(nets) != 2 || nets[0].HWAddr == "" || nets[1].HWAddr != "BC:24:11:0A:0B:0C" {
		t.Fatalf("%+v, %v", nets, err)
	}
	if v := veths(nets, "100"); len(v) != 2 || v[0].Host != "veth100i0" || v[1].Host != "veth100i1" || len(v[0].Addresses) != 1 || v[1].VLAN != 7 || v[1].Name != "eth1" || v[0].GW4 != nets[0].GW4 {
		t.Errorf("%+v", v)
	}
	if v := veths(nets, ""); v[1].Host != "veth0A0B0C" {
		t.Errorf("%+v", v)
	}
	if nets, err := netsOf(asking(), "default", "web", host); err != nil || len(nets) != 0 || veths(nets, "") != nil {
		t.Errorf("none: %v, %v", nets, err)
	}
	for text, is := range map[string]func(error) bool{"x": errdefs.IsInvalidArgument, "bridge=vmbr0,ip6=dhcp": errdefs.IsNotImplemented, "bridge=b": errdefs.IsFailedPrecondition} {
		if _, err := netsOf(asking(text), "default", "web", host); !is(err) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestResolv(t *testing.T) {
	bundle, host := t.TempDir(), filepath.Join(t.TempDir(), "resolv.conf")
	spec := &specs.Spec{}
	if err := resolv(spec, bundle, host); err == nil {
		t.Error("no file of the host's")
	}
	if err := os.WriteFile(host, []byte("nameserver 10.0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it has one
		if err := resolv(spec, bundle, host); err != nil || len(spec.Mounts) != 1 {
			t.Fatalf("%v, %v", spec.Mounts, err)
		}
	}
	if text, err := os.ReadFile(spec.Mounts[0].Source); err != nil || string(text) != "nameserver 10.0.0.1\n" {
		t.Errorf("%q, %v", text, err)
	}
}
