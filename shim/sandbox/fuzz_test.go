package sandbox

import (
	"path/filepath"
	"testing"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// FuzzCreate: whatever a request has for options, its translation names a cgroup of its own or none.
func FuzzCreate(f *testing.F) {
	url, err := typeurl.TypeURL(&cri.PodSandboxConfig{})
	if err != nil {
		f.Fatal(err)
	}
	a, err := typeurl.MarshalAny(&cri.PodSandboxConfig{Hostname: "h", Linux: &cri.LinuxPodSandboxConfig{CgroupParent: "/../kubepods/pod1", Sysctls: map[string]string{"a": "b"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(a.GetValue(), "/n")
	f.Fuzz(func(t *testing.T, options []byte, network string) {
		s := New("k8s.io", &fake{}, func() {})
		if _, err := s.CreateSandbox(t.Context(), &api.CreateSandboxRequest{SandboxID: "p", BundlePath: "/b", NetnsPath: network, Options: &anypb.Any{TypeUrl: url, Value: options}}); err != nil {
			return
		}
		o, err := podOptions("k8s.io", s.id, s.bundle, s.network, s.config)
		if err != nil {
			return
		}
		if p := o.CgroupsPath; p != "" && !o.SystemdCgroup && (filepath.Clean(p) != p || filepath.Base(p) != "p") {
			t.Errorf("cgroup %q", p)
		}
	})
}
