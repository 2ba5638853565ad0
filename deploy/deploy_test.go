package deploy

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// object is any of Kubernetes's.
type object map[string]any

// get gives what is below these keys or indices, nil if there is nothing.
func (o object) get(path ...any) any {
	var at any = map[string]any(o)
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := at.(map[string]any)
			at = m[p]
		case int:
			l, _ := at.([]any)
			if p >= len(l) {
				return nil
			}
			at = l[p]
		}
	}
	return at
}

// objects are those of a file; yaml refuses keys that are there twice.
func objects(t *testing.T, text []byte) (list []object) {
	t.Helper()
	for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var o map[string]any // of which those below are too
		err := d.Decode(&o)
		if errors.Is(err, io.EOF) {
			return list
		}
		must(t, err)
		list = append(list, o)
	}
}

// base are the objects that kustomization.yaml lists, which are all there are, by kind and name.
func base(t *testing.T) map[string]object {
	t.Helper()
	var k struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string
		Resources  []string
	}
	text, err := Files.ReadFile("kubernetes/kustomization.yaml")
	must(t, err)
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	must(t, d.Decode(&k))
	all := map[string]object{}
	for _, file := range k.Resources {
		text, err := Files.ReadFile("kubernetes/" + file)
		must(t, err)
		for _, o := range objects(t, text) {
			all[o.get("kind").(string)+" "+o.get("metadata", "name").(string)] = o
		}
	}
	files, err := Files.ReadDir("kubernetes")
	must(t, err)
	if len(files) != len(k.Resources)+1 {
		t.Errorf("%d files, of which %q are listed", len(files), k.Resources)
	}
	return all
}

// TestKustomization: the objects of deploy/kubernetes agree on names, labels, account and image.
func TestKustomization(t *testing.T) {
	all := base(t)
	var names []string
	for name, o := range all {
		names = append(names, name)
		if ns := o.get("metadata", "namespace"); ns != nil && all["Namespace "+ns.(string)] == nil {
			t.Errorf("%s is in namespace %s, which is not there", name, ns)
		}
	}
	slices.Sort(names)
	if want := []string{"ClusterRole containerd-pve", "ClusterRoleBinding containerd-pve", "DaemonSet containerd-pve-install", "DaemonSet containerd-pve-remove",
		"Namespace containerd-pve", "RuntimeClass pve", "ServiceAccount containerd-pve"}; !slices.Equal(names, want) {
		t.Errorf("%q", names)
	}
	binding := all["ClusterRoleBinding containerd-pve"]
	if all["ClusterRole "+binding.get("roleRef", "name").(string)] == nil || all["ServiceAccount "+binding.get("subjects", 0, "name").(string)] == nil {
		t.Errorf("%v", binding)
	}
	if d := cmp.Diff([]any{map[string]any{"apiGroups": []any{""}, "resources": []any{"nodes"}, "verbs": []any{"get", "patch"}}}, all["ClusterRole containerd-pve"].get("rules")); d != "" {
		t.Errorf("more rights than labels take: %s", d)
	}
	for _, name := range []string{"install", "remove"} {
		ds := all["DaemonSet containerd-pve-"+name]
		pod := object(ds.get("spec", "template", "spec").(map[string]any))
		labels := ds.get("spec", "selector", "matchLabels")
		if d := cmp.Diff(labels, ds.get("spec", "template", "metadata", "labels")); d != "" || labels.(map[string]any)["app.kubernetes.io/component"] != name {
			t.Errorf("%s: %v, %s", name, labels, d)
		}
		if all["ServiceAccount "+pod.get("serviceAccountName").(string)].get("metadata", "namespace") != ds.get("metadata", "namespace") {
			t.Errorf("%s: no such account", name)
		}
		if got := pod.get("nodeSelector", "containerd-pve.github.io/node"); got != name {
			t.Errorf("%s is for nodes with %v", name, got)
		}
		for _, kind := range []string{"initContainers", "containers"} { // an image of that tag would be asked of a registry each time
			if got := pod.get(kind, 0, "imagePullPolicy"); got != "IfNotPresent" {
				t.Errorf("%s: %s: imagePullPolicy: %v", name, kind, got)
			}
		}
		if pod.get("initContainers", 0, "image") != pod.get("containers", 0, "image") {
			t.Errorf("%s: two images", name)
		}
		// Only what works has the token and the rights.
		if pod.get("automountServiceAccountToken") != false || pod.get("containers", 0, "volumeMounts") != nil || pod.get("containers", 0, "securityContext", "privileged") != nil {
			t.Errorf("%s: what holds has rights: %v", name, pod)
		}
		if pod.get("initContainers", 0, "volumeMounts", 0, "name") != pod.get("volumes", 0, "name") {
			t.Errorf("%s: no such volume", name)
		}
	}
	// They differ in nothing else.
	text := func(name string) string {
		b, err := Files.ReadFile("kubernetes/" + name + ".yaml")
		must(t, err)
		_, manifest, _ := strings.Cut(string(b), "apiVersion:")
		return manifest
	}
	if d := cmp.Diff(strings.NewReplacer("[node, install]", "[node, uninstall]", "install", "remove").Replace(text("install")), text("remove")); d != "" {
		t.Error(d)
	}
}

// TestExample: the overlay means what is there.
func TestExample(t *testing.T) {
	text, err := os.ReadFile("kubernetes-example/kustomization.yaml")
	must(t, err)
	o := objects(t, text)[0]
	all := base(t)
	target := all[o.get("patches", 0, "target", "kind").(string)+" "+o.get("patches", 0, "target", "name").(string)]
	if target == nil {
		t.Fatal("its patch is for nothing")
	}
	image, _, _ := strings.Cut(target.get("spec", "template", "spec", "initContainers", 0, "image").(string), ":")
	if image != o.get("images", 0, "name") {
		t.Errorf("%s", image)
	}
	var patch []struct{ Op, Path, Value string }
	must(t, yaml.Unmarshal([]byte(o.get("patches", 0, "patch").(string)), &patch))
	if len(patch) != 1 || patch[0].Op != "add" || patch[0].Path != "/spec/template/spec/initContainers/0/args/-" || !strings.HasPrefix(patch[0].Value, "--dataset=") {
		t.Errorf("%+v", patch)
	}
}
