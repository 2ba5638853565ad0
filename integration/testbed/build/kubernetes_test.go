package build

import (
	"strings"
	"testing"
)

func TestKubernetesModuleNamesWhatIsPublished(t *testing.T) {
	got := string(kubernetesModule([]byte("module k8s.io/kubernetes\n\nrequire k8s.io/api v0.0.0\n\nreplace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n)\n")))
	for _, want := range []string{"module kubernetes\n", "\tk8s.io/api => k8s.io/api v0.", "\tk8s.io/kubernetes " + kubernetesVersion + "\n", "etcd/server/v3 " + etcdVersion} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "./") {
		t.Errorf("a directory is left in\n%s", got)
	}
}
