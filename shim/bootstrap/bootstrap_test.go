package bootstrap

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

var task = &invocation{id: "a", namespace: "default", address: "/flag"}

func TestDecode(t *testing.T) {
	dir := "/run/x/s"
	params, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "a", Namespace: "default", SocketDir: &dir, ContainerdGrpcAddress: "/grpc", LogLevel: bootapi.LogLevel_LOG_LEVEL_DEBUG})
	if err != nil {
		t.Fatal(err)
	}
	r, err := decode(params, task)
	if err != nil || r.legacy || r.socketDir != dir || r.address != "/grpc" || !r.debug {
		t.Errorf("params: %+v, %v", r, err)
	}
	a, err := typeurl.MarshalAny(&runcoptions.Options{ShimCgroup: "/c"})
	if err != nil {
		t.Fatal(err)
	}
	options, err := proto.Marshal(&anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()})
	if err != nil {
		t.Fatal(err)
	}
	r, err = decode(options, task)
	if err != nil || !r.legacy || r.shimCgroup != "/c" || r.address != "/flag" {
		t.Errorf("options: %+v, %v", r, err)
	}
	if r, err = decode(nil, task); err != nil || !r.legacy {
		t.Errorf("nothing: %+v, %v", r, err)
	}
	if _, err = decode([]byte("\xff\xff\xff"), task); err == nil {
		t.Error("rubbish was taken")
	}
}

func TestGroup(t *testing.T) {
	dir := t.TempDir()
	if g := group(dir, "a"); g != "a" {
		t.Errorf("without a config.json: %q", g)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"annotations":{"`+GroupAnnotation+`":"pod"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if g := group(dir, "a"); g != "pod" {
		t.Errorf("in a pod: %q", g)
	}
}

// TestInfo: CRI asks for these before it uses user namespaces or recursive
// read-only mounts.
func TestInfo(t *testing.T) {
	info, err := manager{}.Info(context.Background(), strings.NewReader(""))
	if err != nil {
		t.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(info.Features)
	if err != nil {
		t.Fatal(err)
	}
	f := v.(*features.Features)
	for _, ns := range []string{"user", "time", "cgroup", "pid"} {
		if !slices.Contains(f.Linux.Namespaces, ns) {
			t.Errorf("no %s namespace in %v", ns, f.Linux.Namespaces)
		}
	}
	for _, option := range []string{"rro", "idmap", "tmpcopyup", "rshared"} {
		if !slices.Contains(f.MountOptions, option) {
			t.Errorf("no option %s in %v", option, f.MountOptions)
		}
	}
	if len(f.Hooks) != 6 || !*f.Linux.MountExtensions.IDMap.Enabled || !*f.Linux.NetDevices.Enabled {
		t.Errorf("%+v", f)
	}
}
