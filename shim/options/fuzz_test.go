package options

import (
	"testing"

	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

// FuzzParse: options come from a configuration file or, as a message, from any
// client. What is not understood is an error that names its kind.
func FuzzParse(f *testing.F) {
	for _, body := range []string{"", "LXCPath = '/x'", "SystemdCgroup = true", "Unknown = 1", "LXCPath = 3", "[a]\nb = 1", "LXCPath = \"\\u0000\"", "= ="} {
		a, err := typeurl.MarshalAny(&runtimeoptions.Options{TypeUrl: "x", ConfigBody: []byte(body)})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(a.GetTypeUrl(), a.GetValue(), []byte(body))
	}
	f.Add("containerd.runc.v1.Options", []byte{0x48, 0x01}, []byte(nil))
	f.Add(`"json"`, []byte("{}"), []byte(nil))
	f.Fuzz(func(t *testing.T, url string, message, body []byte) {
		for _, parse := range []func() (Options, error){
			func() (Options, error) { return Parse(&anypb.Any{TypeUrl: url, Value: message}, "") },
			func() (Options, error) {
				var f file
				if err := f.read("test", body); err != nil {
					return Options{}, err
				}
				return f.options(), nil
			},
		} {
			o, err := parse()
			if err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
				t.Errorf("%v: of no kind", err)
			}
			if err != nil && o != (Options{}) {
				t.Errorf("%+v along with %v", o, err)
			}
		}
	})
}
