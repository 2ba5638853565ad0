package clone

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// kept is a record with that spec.
func kept(id, spec string, labels map[string]string) *containersapi.Container {
	return &containersapi.Container{
		ID: id, SnapshotKey: id, Snapshotter: "pve-zfs", Image: "img", Labels: labels, CreatedAt: timestamppb.Now(),
		Runtime:    &containersapi.Container_Runtime{Name: "io.containerd.pve.v2"},
		Extensions: map[string]*anypb.Any{"x": {TypeUrl: "y"}},
		Spec:       &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(spec)},
	}
}

// plainJSON is a text with its keys in order.
func plainJSON(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestSpec(t *testing.T) {
	long := strings.Repeat("abcdef0123456789", 4)
	for _, c := range []struct {
		name, old, spec, want string
		vmid                  int
		labels, wantLabels    map[string]string
		notes                 []string // what each has in it
	}{
		{
			name: "of ctr", old: "web",
			spec:   `{"ociVersion":"1.2.0","hostname":"other","process":{"args":["web"],"env":["HOSTNAME=web"]},"linux":{"cgroupsPath":"/default/web","resources":{"memory":{"limit":9007199254740993}}},"future":{"a":[1]}}`,
			want:   `{"ociVersion":"1.2.0","hostname":"other","process":{"args":["web"],"env":["HOSTNAME=web"]},"linux":{"cgroupsPath":"/default/new","resources":{"memory":{"limit":9007199254740993}}},"future":{"a":[1]}}`,
			labels: map[string]string{"a": "b"}, wantLabels: map[string]string{"a": "b"},
		},
		{
			name: "its own name", old: "web", spec: `{"hostname":"web","process":{"env":["A=web","HOSTNAME=web"]}}`,
			want: `{"hostname":"new","process":{"env":["A=web","HOSTNAME=new"]}}`,
		},
		{name: "systemd's cgroup", old: "web", spec: `{"linux":{"cgroupsPath":"system.slice:x:web"}}`, want: `{"linux":{"cgroupsPath":"system.slice:x:new"}}`},
		{name: "a cgroup of somebody's choice", old: "web", spec: `{"linux":{"cgroupsPath":"/limited/one"}}`, want: `{"linux":{"cgroupsPath":"/limited/new"}}`},
		{
			name: "a VMID", old: "web", spec: `{"annotations":{"io.containerd.pve.vmid":"200","a":"b"}}`, want: `{"annotations":{"a":"b"}}`,
		},
		{name: "another VMID", old: "web", vmid: 300, spec: `{"annotations":{"io.containerd.pve.vmid":"200"}}`, want: `{"annotations":{"io.containerd.pve.vmid":"300"}}`},
		{name: "a VMID where there are no annotations", old: "web", vmid: 300, spec: `{}`, want: `{"annotations":{"io.containerd.pve.vmid":"300"}}`},
		{
			name: "networks", old: "web",
			spec:  `{"annotations":{"io.containerd.pve.net0":"bridge=vmbr0,hwaddr=BC:24:11:00:00:01,ip=10.0.0.5/24","io.containerd.pve.net1":"bridge=vmbr1,ip=dhcp"},"linux":{"namespaces":[{"type":"network","path":"/run/netns/x"},{"type":"pid"}]}}`,
			want:  `{"annotations":{"io.containerd.pve.net0":"bridge=vmbr0,ip=10.0.0.5/24","io.containerd.pve.net1":"bridge=vmbr1,ip=dhcp"},"linux":{"namespaces":[{"type":"network","path":"/run/netns/x"},{"type":"pid"}]}}`,
			notes: []string{"10.0.0.5/24", "/run/netns/x"},
		},
		{
			name: "volumes, and a restart policy", old: "web",
			spec:   `{"mounts":[{"type":"proc","source":"proc","destination":"/proc"},{"type":"bind","source":"/srv/web/data","destination":"/data","options":["rbind","rw"]},{"source":"/etc/hosts","destination":"/etc/hosts","options":["bind","ro"]}]}`,
			want:   `{"mounts":[{"type":"proc","source":"proc","destination":"/proc"},{"type":"bind","source":"/srv/web/data","destination":"/data","options":["rbind","rw"]},{"source":"/etc/hosts","destination":"/etc/hosts","options":["bind","ro"]}]}`,
			labels: map[string]string{"containerd.io/restart.status": "running", "containerd.io/restart.policy": "always"}, wantLabels: map[string]string{},
			notes: []string{"restart", "/srv/web/data"},
		},
		{
			name: "of nerdctl", old: long,
			spec: fmt.Sprintf(`{"hostname":%q,"annotations":{"nerdctl/name":"web","a":"b"},"hooks":{"createRuntime":[{"path":"/bin/nerdctl","args":["nerdctl","internal","oci-hook","createRuntime"]},{"path":"/mine"}]},
				"mounts":[{"type":"bind","source":"/var/lib/nerdctl/1/etchosts/default/%s/hosts","destination":"/etc/hosts","options":["bind"]}]}`, long[:12], long),
			want:   `{"hostname":"new","annotations":{"a":"b"},"hooks":{"createRuntime":[{"path":"/mine"}]},"mounts":[]}`,
			labels: map[string]string{"nerdctl/name": "web", "a": "b"}, wantLabels: map[string]string{"a": "b"},
			notes: []string{"nerdctl"},
		},
	} {
		of := kept(c.old, c.spec, c.labels)
		before := proto.CloneOf(of)
		got, notes, err := Of(of, "new", c.vmid)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if text := string(got.Spec.Value); plainJSON(t, text) != plainJSON(t, c.want) || strings.Contains(c.want, "9007199254740993") != strings.Contains(text, "9007199254740993") {
			t.Errorf("%s: %s\nnot %s", c.name, text, c.want)
		}
		if got.ID != "new" || got.SnapshotKey != "new" || got.Image != "img" || got.CreatedAt != nil || got.Spec.TypeUrl != of.Spec.TypeUrl || got.Extensions["x"] == nil || !maps.Equal(got.Labels, c.wantLabels) {
			t.Errorf("%s: %v", c.name, got)
		}
		if !proto.Equal(of, before) {
			t.Errorf("%s: the record was changed", c.name)
		}
		if len(notes) != len(c.notes) || !slices.EqualFunc(notes, c.notes, strings.Contains) {
			t.Errorf("%s: notes %q, not of %q", c.name, notes, c.notes)
		}
	}
}

func TestRefused(t *testing.T) {
	pod := kept("web", `{}`, nil)
	pod.Sandbox = "pod"
	for _, c := range []*containersapi.Container{pod, kept("web", `{}`, map[string]string{"io.cri-containerd.kind": "container"})} {
		if _, _, err := Of(c, "new", 0); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a pod's: %v", err)
		}
	}
	for _, spec := range []string{"", "null", "[]", `{"hostname":`} {
		if _, _, err := Of(kept("web", spec, nil), "new", 0); !errdefs.IsDataLoss(err) {
			t.Errorf("%q: %v", spec, err)
		}
	}
	empty := kept("web", "", nil)
	empty.Spec = nil
	if _, _, err := Of(empty, "new", 0); !errdefs.IsDataLoss(err) {
		t.Errorf("no spec: %v", err)
	}
}

// FuzzOf: whatever was kept, the new container is another one, or there is none.
func FuzzOf(f *testing.F) {
	f.Add(`{"hostname":"web","annotations":{"io.containerd.pve.net0":1},"linux":{"cgroupsPath":"a:b:c","namespaces":[1,{"type":"network"}]},"hooks":{"x":[{"args":1}]},"mounts":[{"options":3}]}`, "web", "nerdctl/x")
	f.Add(`{"mounts":1,"hooks":2,"linux":3,"process":{"env":{}},"annotations":[]}`, "", "")
	f.Fuzz(func(t *testing.T, spec, old, label string) {
		got, _, err := Of(kept(old, spec, map[string]string{label: ""}), "new", 300)
		if err != nil {
			return
		}
		var o struct{ Annotations map[string]any }
		if err := json.Unmarshal(got.Spec.Value, &o); err != nil || o.Annotations[annotationVMID] != "300" || got.ID != "new" {
			t.Errorf("%s: %v", got.Spec.Value, err)
		}
	})
}
