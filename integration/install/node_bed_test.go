//go:build bed

package install

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd-pve/containerd-pve/deploy"
	"github.com/containerd-pve/containerd-pve/integration/cri"
	"github.com/containerd-pve/containerd-pve/integration/kubeapi"
)

const (
	runtimeLabel = "containerd-pve.github.io/runtime"
	nodeLabel    = "containerd-pve.github.io/node"
)

// daemonSet is what a kubelet takes from a manifest of deploy/kubernetes, as far as ctr can be told it.
type daemonSet struct {
	Spec struct {
		Template struct {
			Spec struct {
				HostPID        bool        `yaml:"hostPID"`
				HostNetwork    bool        `yaml:"hostNetwork"`
				InitContainers []container `yaml:"initContainers"`
				Containers     []container
			}
		}
	}
}

type container struct {
	Name, Image string
	Args        []string
	Env         []struct {
		Name      string
		ValueFrom struct {
			FieldRef struct {
				FieldPath string `yaml:"fieldPath"`
			} `yaml:"fieldRef"`
		} `yaml:"valueFrom"`
	}
	SecurityContext struct {
		Privileged             bool
		ReadOnlyRootFilesystem bool `yaml:"readOnlyRootFilesystem"`
		RunAsUser              int  `yaml:"runAsUser"`
		Capabilities           struct{ Drop []string }
	} `yaml:"securityContext"`
	VolumeMounts []struct {
		MountPath string `yaml:"mountPath"`
		ReadOnly  bool   `yaml:"readOnly"`
	} `yaml:"volumeMounts"`
}

// cluster is the rest of a cluster: an API server's stand-in, and this test as the kubelet of its one node.
type cluster struct {
	*testing.T
	*kubeapi.Server
	account string // directory of the service account
	ctr     string
	n       int
}

func newCluster(t *testing.T, ctr string) *cluster {
	t.Helper()
	c := &cluster{T: t, account: t.TempDir(), ctr: ctr + " -n k8s.io"}
	var err error
	c.Server, err = kubeapi.Start("node-1", c.account)
	must(t, err)
	t.Cleanup(c.Close)
	for _, tag := range []string{"1", "2"} {
		ok(t, c.ctr+" images import made/image"+tag+".tar")
	}
	return c
}

// start starts a container of a manifest as its pod would have it, with the image of that tag, and gives its name.
func (c *cluster) start(manifest, name, tag string) string {
	c.Helper()
	text, err := deploy.Files.ReadFile("kubernetes/" + manifest + ".yaml")
	must(c.T, err)
	var d daemonSet
	must(c.T, yaml.NewDecoder(bytes.NewReader(text)).Decode(&d))
	pod := d.Spec.Template.Spec
	all := slices.Concat(pod.InitContainers, pod.Containers)
	i := slices.IndexFunc(all, func(k container) bool { return k.Name == name })
	if i < 0 {
		c.Fatalf("%s has no container %s", manifest, name)
	}
	k := all[i]
	c.n++
	id := fmt.Sprintf("%s-%d", name, c.n)
	must(c.T, os.RemoveAll("/tmp/"+id+".log")) // another test's
	args := []string{c.ctr, "run", "-d", "--log-uri", "file:///tmp/" + id + ".log"}
	if pod.HostPID {
		args = append(args, "--with-ns", "pid:/proc/1/ns/pid")
	}
	if pod.HostNetwork {
		args = append(args, "--net-host")
	}
	if k.SecurityContext.Privileged {
		args = append(args, "--privileged")
	}
	if k.SecurityContext.ReadOnlyRootFilesystem {
		args = append(args, "--read-only")
	}
	if u := k.SecurityContext.RunAsUser; u != 0 {
		args = append(args, "--user", fmt.Sprint(u))
	}
	for _, e := range k.Env {
		if e.ValueFrom.FieldRef.FieldPath != "spec.nodeName" {
			c.Fatalf("%s: %+v", manifest, e)
		}
		args = append(args, "--env", e.Name+"=node-1")
	}
	for _, m := range k.VolumeMounts {
		if !m.ReadOnly {
			c.Fatalf("%s: %+v", manifest, m)
		}
		args = append(args, "--mount", "type=bind,src="+c.account+",dst="+m.MountPath+",options=rbind:ro")
	}
	args = append(args, "--env", "KUBERNETES_SERVICE_HOST="+c.Host, "--env", "KUBERNETES_SERVICE_PORT="+c.Port,
		regexp.MustCompile(":[^:]*$").ReplaceAllString(k.Image, ":"+tag), id, "/usr/bin/containerd-pve") // the image's entrypoint, which ctr takes args for
	ok(c.T, strings.Join(append(args, k.Args...), " "))
	return id
}

// end waits until the container has ended, and gives its output and whether it succeeded.
func (c *cluster) end(id string) (string, bool) {
	c.Helper()
	for range 600 {
		if out, _ := try(c.T, c.ctr+" task ls | grep '^"+id+" '"); strings.Contains(out, "STOPPED") {
			said, err := os.ReadFile("/tmp/" + id + ".log")
			must(c.T, err)
			gone := ok(c.T, c.ctr+" task delete "+id+" 2>&1; "+c.ctr+" containers delete "+id)
			c.Logf("%s: %s", id, said)
			return string(said), !strings.Contains(gone, "exit code")
		}
		time.Sleep(500 * time.Millisecond)
	}
	c.Fatalf("%s does not end", id)
	return "", false
}

// run runs one to its end, and wants it to succeed.
func (c *cluster) run(manifest, name, tag string) string {
	c.Helper()
	out, good := c.end(c.start(manifest, name, tag))
	if !good {
		c.Fatalf("%s failed: %s", name, out)
	}
	return out
}

func (c *cluster) label(key, want string) {
	c.Helper()
	if got := c.Labels()[key]; got != want {
		c.Errorf("label %s: %q, want %q", key, got, want)
	}
}

// pod has a pod with our RuntimeClass's handler run on the host's network, as there is no CNI plugin.
func (c *cluster) pod(ctx context.Context, n *cri.Node) (*cri.Pod, *cri.Container) {
	c.Helper()
	var err error
	for range 60 { // the plugin begins after containerd
		if _, err = n.Version(ctx, &api.VersionRequest{}); err == nil {
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	must(c.T, err)
	// As a kubelet does it, without saying for which runtime.
	_, err = n.Images.PullImage(ctx, &api.PullImageRequest{Image: &api.ImageSpec{Image: image}})
	must(c.T, err)
	p, err := n.RunPod(ctx, "first", func(p *api.PodSandboxConfig) {
		p.Linux.SecurityContext.NamespaceOptions.Network = api.NamespaceMode_NODE
		p.Hostname = ""
	})
	must(c.T, err)
	k, err := p.Start(ctx, "sleep", image, []string{"sleep", "1000"}, nil)
	must(c.T, err)
	return p, k
}

func (c *cluster) says(ctx context.Context, k *cri.Container) {
	c.Helper()
	if out, code, err := k.Exec(ctx, "echo", "hello"); err != nil || code != 0 || out != "hello\n" {
		c.Errorf("exec: %q, %d, %v", out, code, err)
	}
}

// node is the installer's life on a node: its manifests' containers, run as their pods would.
func node(t *testing.T, containerd, bin, text string) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	host(t, containerd, text)
	c := newCluster(t, bin+"ctr")
	c.Label(nodeLabel, "install")
	const sums = "find /etc /usr/local /var/lib/containerd-pve -type f 2>/dev/null | grep -v snapshotter/ | sort | xargs md5sum | md5sum"
	before := ok(t, sums)

	// Who may not label the node does not change it.
	c.Expire("another")
	if out, good := c.end(c.start("install", "install", "1")); good || !strings.Contains(out, "401 Unauthorized") {
		t.Errorf("with a wrong token: %v, %s", good, out)
	}
	is(t, before, sums)
	c.Expire("secret")

	// A host that cannot be set up is named, left as it was, and gets no pods.
	ok(t, "mkdir -p "+filepath.Dir(dropIn)+" && echo '# mine' >"+dropIn)
	c.Label(runtimeLabel, "true")
	if out, good := c.end(c.start("install", "install", "1")); good || !strings.Contains(out, dropIn) {
		t.Errorf("with a file in the way: %v, %s", good, out)
	}
	c.label(runtimeLabel, "")
	ok(t, "rm -r "+filepath.Dir(dropIn))
	is(t, before, sums)

	c.run("install", "install", "1")
	c.label(runtimeLabel, "true")
	ok(t, "containerd-pve check")
	is(t, "enabled active active", "echo $(systemctl is-enabled containerd-pve; systemctl is-active containerd-pve containerd)")
	if out := c.run("install", "install", "1"); !strings.Contains(out, "set up already") {
		t.Errorf("again: %s", out)
	}
	n, err := cri.Attach(cri.Options{Systemd: true})
	must(t, err)
	defer n.Close()
	p, k := c.pod(ctx, n)
	c.says(ctx, k)
	fails(t, 0, image, "containerd-pve container ls --pods")

	// What stays of the installer's pod has no rights, and its end changes nothing.
	hold := c.start("install", "hold", "1")
	after := ok(t, sums)
	pid := ok(t, c.ctr+" task ls | awk '$1 == \""+hold+"\" { print $2 }'")
	is(t, "65534", "stat -c %u /proc/"+pid)
	ok(t, c.ctr+" task kill "+hold)
	if out, good := c.end(hold); !good {
		t.Errorf("hold: %s", out)
	}
	is(t, after, sums)

	// Another image: containers go on, what is started then is the new one's.
	daemon, old := ok(t, "systemctl show -P MainPID containerd-pve"), ok(t, "pgrep -f '^[^ ]*containerd-shim-pve-v2 ' | sort | tr '\\n' ' '")
	c.run("install", "install", "2")
	if now := ok(t, "systemctl show -P MainPID containerd-pve"); now == daemon {
		t.Error("the daemon is still the old one")
	}
	is(t, old, "pgrep -f '^[^ ]*containerd-shim-pve-v2 ' | sort | tr '\\n' ' '")
	c.says(ctx, k)
	k2, err := p.Start(ctx, "second", image, []string{"sleep", "1000"}, nil)
	must(t, err)
	c.says(ctx, k2)

	// Removal waits for the last pod; meanwhile all is as it was, but no more pods come.
	after = ok(t, sums)
	c.Label(nodeLabel, "remove")
	waiting := c.start("remove", "remove", "2")
	c.until("the removal waits", func() bool {
		out, _ := os.ReadFile("/tmp/" + waiting + ".log")
		return strings.Contains(string(out), "waiting until they are removed")
	})
	c.label(runtimeLabel, "")
	ok(t, c.ctr+" task kill "+waiting) // its pod is evicted
	if out, good := c.end(waiting); good {
		t.Errorf("evicted: %s", out)
	}
	is(t, after, sums)
	waiting = c.start("remove", "remove", "2")
	c.says(ctx, k)
	c.label(nodeLabel, "remove")
	must(t, p.Remove(ctx))
	if out, good := c.end(waiting); !good {
		t.Fatalf("removal: %s", out)
	}
	c.label(nodeLabel, "removed")
	is(t, before, sums)
	is(t, "active", "systemctl is-active containerd")
	if files := slices.DeleteFunc(left(t), func(f string) bool { return f == "/run/containerd-pve" }); len(files) > 0 && !slices.Equal(files, []string{"/var/lib/containerd-pve"}) {
		t.Errorf("left: %q", files)
	}
	ok(t, "zfs list -r "+dataset) // the image is data
	c.run("remove", "remove", "2")
}

func (c *cluster) until(what string, f func() bool) {
	c.Helper()
	for range 120 {
		if f() {
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
	c.Fatalf("not within a minute: %s", what)
}

// TestLongNode: the installer of deploy/kubernetes on a node with containerd 2.4.
func TestLongNode(t *testing.T) {
	node(t, "/usr/local/bin/containerd", "", "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '"+cri.PauseImage+"'\n")
}

// TestLongNode17: with Debian's containerd 1.7, whose configuration of the CRI plugin has to be ours and its administrator's.
func TestLongNode17(t *testing.T) {
	text, err := os.ReadFile("/opt/containerd-1.7" + config)
	must(t, err)
	const section = "[plugins.\"io.containerd.grpc.v1.cri\"]\n"
	if !bytes.Contains(text, []byte(section)) {
		t.Fatalf("no section: %s", text)
	}
	with := strings.Replace(string(text), section, section+"    sandbox_image = \""+cri.PauseImage+"\"\n", 1)
	node(t, "/opt/containerd-1.7/usr/bin/containerd", "/opt/containerd-1.7/usr/bin/", with)
}
