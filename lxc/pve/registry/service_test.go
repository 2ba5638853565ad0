package registry

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// TestService: what a shim asks arrives whole, and so does the answer.
func TestService(t *testing.T) {
	ctx := context.Background()
	r, d := newRegistry(t)
	address := filepath.Join(t.TempDir(), "socket")
	client := NewClient(address)
	if _, err := client.Register(ctx, 0, container("x"), Disk{}); !errdefs.IsUnavailable(err) {
		t.Errorf("without a daemon: %v", err)
	}
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	Serve(server, r)
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	c := pve.Container{
		Namespace: "k8s.io", ID: "x", Image: "i", Digest: "sha256:1", Pod: "p", PodNamespace: "pn", Arch: "amd64", Hostname: "h", Unprivileged: true, IdmapPassthrough: true,
		Nets: []pve.Net{{
			Name: "eth0", Bridge: "vmbr0", HWAddr: "BC:24:11:00:00:01", MTU: 1400, Tag: 7,
			IP4: netip.MustParsePrefix("10.0.0.5/24"), GW4: netip.MustParseAddr("10.0.0.1"), IP6: netip.MustParsePrefix("fd00::5/64"), GW6: netip.MustParseAddr("fd00::1"),
		}},
		Limits: pve.Limits{Memory: 64 << 20, Swap: 1, Quota: 2, Period: 3, Weight: 4}, StopSignal: 3, Args: []string{"a", "b c"}, Env: []string{"A=1"},
	}
	// A field that is added has to be in the list above.
	for v, i := reflect.ValueOf(c), 0; i < v.NumField(); i++ {
		if name := v.Type().Field(i).Name; v.Field(i).IsZero() && name != "Rootfs" && name != "Guard" {
			t.Errorf("%s is not tried", name)
		}
	}
	a, err := client.Register(ctx, 500, c, Disk{Dataset: "tank/ours/1"})
	if err != nil || a.VMID != 500 || a.Dataset != "tank/data/subvol-500-disk-0" || a.StopSignal != 3 || len(d.moved) != 1 {
		t.Errorf("%+v, %v", a, err)
	}
	c.Rootfs, c.Guard = "tank:subvol-500-disk-0,size=8G", r.guardLine(c.Namespace, c.ID, 500)
	want, err := c.Conf(r.host)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.text(t, 500); got != string(want.Bytes()) {
		t.Errorf("%s\nnot\n%s", got, want.Bytes())
	}
	if err := client.Update(ctx, "k8s.io", "x", pve.Limits{Memory: 128 << 20}, pve.PartMemory); err != nil || !strings.Contains(r.text(t, 500), "memory: 128\n") {
		t.Errorf("update: %v", err)
	}
	if err := client.Update(ctx, "k8s.io", "none", pve.Limits{}, pve.AllParts); !errdefs.IsNotFound(err) {
		t.Errorf("update of none: %v", err)
	}
}
