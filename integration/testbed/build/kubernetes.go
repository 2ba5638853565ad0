package build

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// What Kubernetes' own go.mod says of modules that are directories of its repository, and not of its module.
var (
	staging    = regexp.MustCompile(`(?m)=> \./staging/src/(\S+)$`)
	moduleLine = regexp.MustCompile(`(?m)^module .*$`)
)

// kubernetesModule is a go.mod from which Kubernetes' programs, and etcd, can be built: Kubernetes' own with the
// published versions of what it has beside it.
func kubernetesModule(own []byte) []byte {
	text := moduleLine.ReplaceAll(own, []byte("module kubernetes"))
	text = staging.ReplaceAll(text, []byte("=> ${1} v0"+strings.TrimPrefix(kubernetesVersion, "v1")))
	return fmt.Appendf(text, "\nrequire (\n\tk8s.io/kubernetes %s\n\tgo.etcd.io/etcd/server/v3 %s\n)\n", kubernetesVersion, etcdVersion)
}

// writeKubernetes builds what a cluster of one node runs.
func writeKubernetes(ctx context.Context, out string) error {
	own, err := source(ctx, "k8s.io/kubernetes", kubernetesVersion)
	if err != nil {
		return err
	}
	module, err := os.MkdirTemp("", "kubernetes-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(module)
	text, err := os.ReadFile(filepath.Join(own, "go.mod"))
	if err != nil {
		return err
	}
	sums, err := os.ReadFile(filepath.Join(own, "go.sum"))
	if err != nil {
		return err
	}
	for name, b := range map[string][]byte{"go.mod": kubernetesModule(text), "go.sum": sums} {
		if err := os.WriteFile(filepath.Join(module, name), b, 0o644); err != nil {
			return err
		}
	}
	minor := strings.Split(kubernetesVersion, ".")[1]
	const v = "k8s.io/component-base/version."
	build := func(flags, to string, packages ...string) error {
		_, err := goIn(ctx, module, append([]string{"build", "-mod=mod", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w" + flags, "-o", to}, packages...)...)
		return err
	}
	// The programs ask one another for it.
	version := " -X " + v + "gitVersion=" + kubernetesVersion + " -X " + v + "gitMajor=1 -X " + v + "gitMinor=" + minor
	const cmd = "k8s.io/kubernetes/cmd/"
	if err := build(version, out+"/", cmd+"kube-apiserver", cmd+"kube-controller-manager", cmd+"kube-scheduler", cmd+"kubelet", cmd+"kubectl"); err != nil {
		return err
	}
	return build("", filepath.Join(out, "etcd"), "go.etcd.io/etcd/server/v3")
}
