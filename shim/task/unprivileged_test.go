package task

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/shim/options"
)

func TestUnprivileged(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	ids := mapHost{
		put("uid", "u:1:65536\nroot:5:10\nroot:100000:65536\n"), put("gid", "root:200000:70000\n"),
		put("kernel", "6.12.118+deb13-amd64\n"), put("zfs", "2.3.9-0+deb13u1\n"),
	}
	with := func(change func(*mapHost)) mapHost {
		h := ids
		change(&h)
		return h
	}
	yes := map[string]string{annotationUnprivileged: "true"}
	made := func(annotations map[string]string, namespaces ...specs.LinuxNamespace) *specs.Spec {
		return &specs.Spec{Annotations: annotations, Linux: &specs.Linux{Namespaces: namespaces}, Mounts: []specs.Mount{
			{Type: "proc", Destination: "/proc"},
			{Type: "bind", Destination: "/a", Options: []string{"rbind", "ro"}},
			{Destination: "/b", Options: []string{"bind", "ridmap"}},
		}}
	}
	spec, root := made(yes), []*types.Mount{{Type: "zfs", Source: "tank/1"}}
	if err := unprivilegedToo(spec, root, &options.Options{}, ids); err != nil {
		t.Fatal(err)
	}
	if !unprivileged(spec) || spec.Linux.UIDMappings[0] != (specs.LinuxIDMapping{HostID: 100000, Size: 65536}) || spec.Linux.GIDMappings[0] != (specs.LinuxIDMapping{HostID: 200000, Size: 65536}) {
		t.Errorf("%+v", spec.Linux)
	}
	if got, want := root[0].Options, []string{"uidmap=0:100000:65536", "gidmap=0:200000:65536"}; !reflect.DeepEqual(got, want) {
		t.Errorf("the root's options %v", got)
	}
	for i, want := range [][]string{nil, {"rbind", "ro", "idmap"}, {"bind", "ridmap"}} {
		if got := spec.Mounts[i].Options; !reflect.DeepEqual(got, want) {
			t.Errorf("mount %d has the options %v", i, got)
		}
	}

	userNS := specs.LinuxNamespace{Type: specs.UserNamespace}
	for i, c := range []struct {
		spec *specs.Spec
		o    options.Options
	}{
		{made(nil), options.Options{}},
		{made(map[string]string{annotationUnprivileged: "false"}), options.Options{Unprivileged: true}},
		{made(yes, userNS), options.Options{}},
	} {
		if err := unprivilegedToo(c.spec, nil, &c.o, ids); err != nil || unprivileged(c.spec) {
			t.Errorf("%d: %v, %+v", i, err, c.spec.Linux)
		}
	}
	all := made(nil)
	if err := unprivilegedToo(all, nil, &options.Options{Unprivileged: true}, ids); err != nil || !unprivileged(all) {
		t.Errorf("by configuration: %v", err)
	}
	for i, c := range []struct {
		spec  *specs.Spec
		mount string
		ids   mapHost
		is    func(error) bool
		says  string
	}{
		{made(map[string]string{annotationUnprivileged: "maybe"}), "zfs", ids, errdefs.IsInvalidArgument, "maybe"},
		{made(yes), "overlay", ids, errdefs.IsFailedPrecondition, "pve-zfs"},
		{made(yes), "zfs", with(func(h *mapHost) { h.subUID = put("none", "u:1:65536\n") }), errdefs.IsFailedPrecondition, "root:100000:65536"},
		{made(yes), "zfs", with(func(h *mapHost) { h.subGID = filepath.Join(dir, "missing") }), errdefs.IsFailedPrecondition, "missing"},
		{made(yes), "zfs", with(func(h *mapHost) { h.zfs = put("oldzfs", "2.1.11-1\n") }), errdefs.IsFailedPrecondition, "ZFS 2.2"},
		{made(yes), "bind", with(func(h *mapHost) { h.kernel = put("oldkernel", "5.10.0-30-amd64\n") }), errdefs.IsFailedPrecondition, "Linux 5.12"},
	} {
		err := unprivilegedToo(c.spec, []*types.Mount{{Type: c.mount}}, &options.Options{}, c.ids)
		if !c.is(err) || !strings.Contains(err.Error(), c.says) || unprivileged(c.spec) {
			t.Errorf("%d: %v", i, err)
		}
	}
}
