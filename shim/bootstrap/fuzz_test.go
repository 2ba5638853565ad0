package bootstrap

import (
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// FuzzDecode: what is on stdin is another containerd's, older or newer. It is
// taken for the new form only if it names the task of the command line.
func FuzzDecode(f *testing.F) {
	for _, m := range []proto.Message{
		&bootapi.BootstrapParams{InstanceID: "a", Namespace: "default", ContainerdGrpcAddress: "/x"},
		&bootapi.BootstrapParams{InstanceID: "b", Namespace: "default"},
		&anypb.Any{TypeUrl: "x", Value: []byte("y")},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	a, err := typeurl.MarshalAny(&runcoptions.Options{ShimCgroup: "/c"})
	if err != nil {
		f.Fatal(err)
	}
	data, err := proto.Marshal(&anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, input []byte) {
		r, err := decode(input, task)
		if err != nil {
			if r != nil {
				t.Errorf("%+v along with %v", r, err)
			}
			return
		}
		var p bootapi.BootstrapParams
		named := proto.Unmarshal(input, &p) == nil && p.InstanceID == task.id && p.Namespace == task.namespace
		if r.legacy == named || r.legacy && (r.address != task.address || r.socketDir != "") {
			t.Errorf("%+v", r)
		}
	})
}
