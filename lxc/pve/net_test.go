package pve

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseNet(t *testing.T) {
	for text, want := range map[string]string{
		"bridge=vmbr0":         "name=eth0,bridge=vmbr0,type=veth",
		"bridge=vmbr0,ip=dhcp": "name=eth0,bridge=vmbr0,ip=dhcp,type=veth",
		"name=wan,bridge=vmbr1,hwaddr=bc:24:11:00:00:01,ip=10.0.0.5/24,gw=10.0.0.1,ip6=fd00::5/64,gw6=fd00::1,mtu=1400,tag=7,type=veth,firewall=0,host-managed=1": "name=wan,bridge=vmbr1,gw=10.0.0.1,gw6=fd00::1,hwaddr=BC:24:11:00:00:01,ip=10.0.0.5/24,ip6=fd00::5/64,mtu=1400,tag=7,type=veth",
		"bridge=vmbr0,ip=manual,ip6=auto": "name=eth0,bridge=vmbr0,type=veth",
	} {
		n, err := ParseNet(text, 0)
		if err != nil || n.String() != want {
			t.Errorf("%s: %s, %v", text, n, err)
		}
		if again, err := ParseNet(n.String(), 0); err != nil || again != n {
			t.Errorf("%s: read again %v, %v", text, again, err)
		}
	}
	if n, err := ParseNet("bridge=b", 3); err != nil || n.Name != "eth3" {
		t.Errorf("%v, %v", n, err)
	}
	for text, is := range map[string]func(error) bool{
		"": errdefs.IsInvalidArgument, "vmbr0": errdefs.IsInvalidArgument, "ip=dhcp": errdefs.IsInvalidArgument, "bridge=": errdefs.IsInvalidArgument,
		"bridge=a b": errdefs.IsInvalidArgument, "bridge=../x": errdefs.IsInvalidArgument, "bridge=..": errdefs.IsInvalidArgument, "bridge=abcdefghijklmnop": errdefs.IsInvalidArgument,
		"bridge=b,bridge=c": errdefs.IsInvalidArgument, "bridge=b,name=lo": errdefs.IsInvalidArgument, "bridge=b,ip=10.0.0.5": errdefs.IsInvalidArgument,
		"bridge=b,ip=fd00::1/64": errdefs.IsInvalidArgument, "bridge=b,ip6=10.0.0.1/8": errdefs.IsInvalidArgument, "bridge=b,gw=10.0.0.1": errdefs.IsInvalidArgument,
		"bridge=b,ip=10.0.0.5/24,gw=x": errdefs.IsInvalidArgument, "bridge=b,mtu=63": errdefs.IsInvalidArgument, "bridge=b,mtu=+64": errdefs.IsInvalidArgument,
		"bridge=b,tag=4095": errdefs.IsInvalidArgument, "bridge=b,hwaddr=01:00:00:00:00:00": errdefs.IsInvalidArgument, "bridge=b,type=phys": errdefs.IsInvalidArgument,
		"bridge=b,color=red": errdefs.IsInvalidArgument, "bridge=b\nlock=x": errdefs.IsInvalidArgument,
		"bridge=b,firewall=1": errdefs.IsNotImplemented, "bridge=b,rate=5": errdefs.IsNotImplemented, "bridge=b,ip6=dhcp": errdefs.IsNotImplemented, "bridge=b,link_down=1": errdefs.IsNotImplemented,
	} {
		if n, err := ParseNet(text, 0); !is(err) || !strings.Contains(err.Error(), "net0") {
			t.Errorf("%q: %v, %v", text, n, err)
		}
	}
}

func TestHWAddrOf(t *testing.T) {
	a, b := HWAddrOf("default", "web", 0), HWAddrOf("default", "web", 1)
	if a == b || a != HWAddrOf("default", "web", 0) || !strings.HasPrefix(a, "BC:24:11:") || !hwAddr.MatchString(a) {
		t.Errorf("%s, %s", a, b)
	}
}

// FuzzNet: what is taken has one meaning, and stands in a conf.
func FuzzNet(f *testing.F) {
	f.Add("bridge=vmbr0,ip=10.0.0.5/24,gw=10.0.0.1,tag=7")
	f.Add("name=eth0,bridge=vmbr0,ip6=fd00::5/64,hwaddr=BC:24:11:00:00:01")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := ParseNet(text, 0)
		if err != nil {
			return
		}
		if again, err := ParseNet(n.String(), 0); err != nil || again != n {
			t.Errorf("%q: %q is read as %+v, %v", text, n, again, err)
		}
		if err := new(Conf).Set("net0", n.String()); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	})
}
