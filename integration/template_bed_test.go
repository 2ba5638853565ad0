//go:build bed

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// derived is an image with another's layers, and more, and a configuration of its own, until the test ends.
func derived(t *testing.T, from, name string, edit func(*ocispec.Image), more ...ocispec.Descriptor) {
	t.Helper()
	ctx, c := background(t), connect(t)
	image, err := c.GetImage(ctx, from)
	must(t, err)
	store := c.ContentStore()
	manifest, err := images.Manifest(ctx, store, image.Target(), image.Platform())
	must(t, err)
	var config ocispec.Image
	blob, err := content.ReadBlob(ctx, store, manifest.Config)
	must(t, err)
	must(t, json.Unmarshal(blob, &config))
	edit(&config)
	write := func(media string, v any, labels map[string]string) ocispec.Descriptor {
		blob, err := json.Marshal(v)
		must(t, err)
		d := ocispec.Descriptor{MediaType: media, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
		must(t, content.WriteBlob(ctx, store, d.Digest.String(), strings.NewReader(string(blob)), d, content.WithLabels(labels)))
		return d
	}
	ctx, done, err := c.WithLease(ctx)
	must(t, err)
	defer func() { _ = done(ctx) }()
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: append(manifest.Layers, more...),
		Config: write(ocispec.MediaTypeImageConfig, config, nil),
	}
	labels := map[string]string{"containerd.io/gc.ref.content.config": m.Config.Digest.String()}
	for i, l := range m.Layers {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	of := images.Image{Name: name, Target: write(ocispec.MediaTypeImageManifest, m, labels)}
	if _, err = c.ImageService().Create(ctx, of); errdefs.IsAlreadyExists(err) {
		_, err = c.ImageService().Update(ctx, of, "target")
		must(t, err)
		return
	}
	must(t, err)
	t.Cleanup(func() { _ = c.ImageService().Delete(background(t), name, images.SynchronousDelete()) })
}

const nginx = "localhost:5000/nginx:latest"

// templateRun runs `containerd-pve template` and wants its status.
func templateRun(t *testing.T, status int, args ...string) string {
	t.Helper()
	out, code := command(append([]string{"containerd-pve", "template"}, args...)...)
	if code != status {
		t.Fatalf("template %v: %d, %s", args, code, out)
	}
	return out
}

type templateOf struct {
	VMID                         int
	Name, Image, Digest, Dataset string
	Clones                       []string
	Used, Referenced             int64
	Unfinished                   bool
	Created                      time.Time
}

func makeTemplate(t *testing.T, args ...string) (made templateOf) {
	t.Helper()
	must(t, json.Unmarshal([]byte(templateRun(t, 0, append([]string{"create", "--format", "json"}, args...)...)), &made))
	t.Cleanup(func() {
		var left []templateOf
		must(t, json.Unmarshal([]byte(templateRun(t, 0, "ls", "--format", "json")), &left))
		if slices.ContainsFunc(left, func(l templateOf) bool { return l.VMID == made.VMID }) {
			templateRun(t, 0, "rm", strconv.Itoa(made.VMID))
		}
	})
	return made
}

// clone makes a container of a template as `pct clone` does, and starts it with what
// Proxmox would tell LXC (PVE::LXC::update_lxc_config). It is the pid of its init.
func (made templateOf) clone(t *testing.T, vmid int) int {
	t.Helper()
	dataset := fmt.Sprintf("%s/subvol-%d-disk-0", volumes(), vmid)
	if out, code := command("zfs", "clone", made.Dataset+"@__base__", dataset); code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() {
		eventually(t, time.Minute, "the clone is destroyed", func() bool {
			_, code := command("zfs", "destroy", "-r", dataset)
			return code == 0
		})
	})
	return made.boot(t, vmid, "/"+dataset)
}

// boot starts a container with the root in dir.
func (made templateOf) boot(t *testing.T, vmid int, root string) int {
	t.Helper()
	conf := pve.Parse([]byte(confOf(t, made.VMID)))
	lines := []string{
		"lxc.rootfs.path = dir:" + root, fmt.Sprintf("lxc.uts.name = ct%d", vmid), "lxc.mount.auto = proc:mixed sys:mixed cgroup:mixed", "lxc.autodev = 1", "lxc.net.0.type = empty",
		"lxc.apparmor.profile = unconfined", "lxc.tty.max = 1", "lxc.console.logfile = /tmp/console-" + strconv.Itoa(vmid),
	}
	if line, ok := conf.Get("entrypoint"); ok {
		lines = append(lines, "lxc.init.cmd = "+line)
	}
	for _, e := range conf.LXC() {
		// Debian's LXC knows the older name only.
		lines = append(lines, strings.Replace(e.Key, "lxc.environment.runtime", "lxc.environment", 1)+" = "+e.Value)
	}
	dir := filepath.Join("/var/lib/lxc", strconv.Itoa(vmid))
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "config"), []byte(strings.Join(lines, "\n")+"\n"), 0o644))
	name := strconv.Itoa(vmid)
	t.Cleanup(func() {
		command("lxc-stop", "-k", "-n", name)
		must(t, os.RemoveAll(dir))
	})
	if out, code := command("lxc-start", "-n", name); code != 0 {
		t.Fatalf("lxc-start: %s", out)
	}
	out, _ := command("lxc-info", "-n", name, "-p", "-H")
	pid, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		text, _ := os.ReadFile("/tmp/console-" + name)
		t.Fatalf("it has ended: %s", text)
	}
	t.Cleanup(func() {
		if text, err := os.ReadFile("/tmp/console-" + name); t.Failed() && err == nil {
			t.Logf("console of %s: %s", name, text)
		}
	})
	return pid
}

func procList(t *testing.T, pid int, name string) []string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	must(t, err)
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
}

// written are the bytes that the pool's disks were given.
func written(t *testing.T) (most int64) {
	t.Helper()
	if out, code := command("zpool", "sync", pool()); code != 0 {
		t.Fatal(out)
	}
	out, code := command("zpool", "get", "-H", "-p", "-o", "value", "write_bytes", pool(), "all-vdevs")
	if code != 0 {
		t.Fatal(out)
	}
	for text := range strings.FieldsSeq(out) {
		n, err := strconv.ParseInt(text, 10, 64)
		must(t, err)
		most = max(most, n) // the root's are those of all below it
	}
	return most
}

// TestTemplate: a template is made of an image without copying it, and what is
// cloned of it boots as the image says.
func TestTemplate(t *testing.T) {
	proxmox(t)
	before := written(t)
	made := makeTemplate(t, nginx, "--memory", "256M")
	if n := written(t) - before; n <= 0 || n > 4<<20 {
		t.Errorf("%d bytes were written for an image of %d", n, made.Referenced)
	} else {
		t.Logf("%d bytes written for an image of %d", n, made.Referenced)
	}
	if made.VMID != 100 || made.Image != nginx || !strings.HasPrefix(made.Digest, "sha256:") || made.Dataset != volumes()+"/basevol-100-disk-0" || made.Unfinished {
		t.Errorf("%+v", made)
	}
	if made.Used > 1<<20 || made.Referenced < 10<<20 {
		t.Errorf("of %d bytes it has %d of its own", made.Referenced, made.Used)
	}
	conf := confOf(t, 100)
	for _, want := range []string{"\ntemplate: 1\n", "\nentrypoint: nginx -g \"daemon off;\"\n", "\nmemory: 256\n", "\nlxc.signal.halt: 3\n", "local-zfs:basevol-100-disk-0,size="} {
		if !strings.Contains(conf, want) {
			t.Errorf("the conf lacks %q:\n%s", want, conf)
		}
	}
	if strings.Contains(conf, "lock:") {
		t.Errorf("it is locked:\n%s", conf)
	}
	// Asked for again, by several at once as well, it is the same.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if out, code := command("containerd-pve", "template", "create", nginx); code != 0 || !strings.Contains(out, "VMID 100 is the template of") {
				t.Errorf("again: %d, %s", code, out)
			}
		})
	}
	wg.Wait()
	pid := made.clone(t, 200)
	eventually(t, time.Minute, "nginx runs", func() bool {
		return strings.HasPrefix(procList(t, pid, "cmdline")[0], "nginx: master process nginx -g daemon off;")
	})
	if out := templateRun(t, 1, "rm", "100"); !strings.Contains(out, volumes()+"/subvol-200-disk-0") {
		t.Errorf("one that is in use: %s", out)
	}
	var list []templateOf
	must(t, json.Unmarshal([]byte(templateRun(t, 0, "ls", "--format", "json")), &list))
	if len(list) != 1 || !slices.Equal(list[0].Clones, []string{volumes() + "/subvol-200-disk-0"}) {
		t.Errorf("%+v", list)
	}
	t.Log(templateRun(t, 0, "ls"))
	// As Proxmox does with what it clones.
	if out, code := command("zfs", "mount", made.Dataset); code != 0 {
		t.Error(out)
	}
	// Without the daemon's doing anything to it.
	restartDaemon(t)
	if noConf(100) {
		t.Error("the sweep took the template for one of its own")
	}
	for _, refused := range [][]string{{"create", "none:1"}, {"create", nginx, "--vmid", "5"}, {"create", debian, "--vmid", "100"}, {"create", nginx, "--memory", "x"}, {"create", debian, "--size", "1M"}, {"rm", "999"}, {"rm", "x"}, {"ls", "--format", "xml"}} {
		t.Log(refused, templateRun(t, 1, refused...))
	}
}

// TestTemplateProcess: what Proxmox has no words for is said by pve-init.
func TestTemplateProcess(t *testing.T) {
	proxmox(t)
	args := []string{"sh", "-c", "trap 'exit 0' QUIT; while :; do sleep 1 & wait; done", "it's", "", "a\nb", `"quoted" \ $HOME`}
	derived(t, busybox, "localhost:5000/hostile:1", func(c *ocispec.Image) {
		c.Config.Entrypoint, c.Config.Cmd = args[:3], args[3:]
		c.Config.Env = append(c.Config.Env, "LINES=1\n2", "EMPTY=")
		c.Config.User, c.Config.WorkingDir, c.Config.StopSignal = "www-data:operator", "/var/run", "SIGQUIT"
	})
	made := makeTemplate(t, "localhost:5000/hostile:1", "--vmid", "300", "--name", "hostile")
	if made.VMID != 300 || made.Name != "hostile" {
		t.Errorf("%+v", made)
	}
	pid := made.clone(t, 301)
	status := func() string {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		must(t, err)
		return string(text)
	}
	// Once its trap is set it can be asked to end.
	eventually(t, time.Minute, "the image's process is its init", func() bool {
		_, caught, _ := strings.Cut(status(), "\nSigCgt:\t")
		caught, _, _ = strings.Cut(caught, "\n")
		mask, err := strconv.ParseUint(caught, 16, 64)
		must(t, err)
		return procList(t, pid, "cmdline")[0] == "sh" && mask>>(unix.SIGQUIT-1)&1 == 1
	})
	if got := procList(t, pid, "cmdline"); !slices.Equal(got, args) {
		t.Errorf("%q, not %q", got, args)
	}
	env := procList(t, pid, "environ")
	for _, want := range []string{"LINES=1\n2", "EMPTY="} {
		if !slices.Contains(env, want) {
			t.Errorf("the environment lacks %q: %q", want, env)
		}
	}
	for _, want := range []string{"\nUid:\t33\t33\t33\t33\n", "\nGid:\t37\t37\t37\t37\n", "\nCapEff:\t0000000000000000\n"} {
		if !strings.Contains(status(), want) {
			t.Errorf("the status lacks %q:\n%s", want, status())
		}
	}
	if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil || cwd != "/var/run" {
		t.Errorf("it is in %q, %v", cwd, err)
	}
	// As `pct shutdown` does.
	if out, code := command("lxc-stop", "-n", "301", "-t", "60", "--nokill"); code != 0 {
		t.Errorf("the stop signal: %d, %s", code, out)
	}
	// What would not boot is said before it is tried, and leaves nothing.
	for name, edit := range map[string]func(*ocispec.Image){
		"none":   func(c *ocispec.Image) { c.Config.Entrypoint, c.Config.Cmd = nil, nil },
		"absent": func(c *ocispec.Image) { c.Config.Cmd = []string{"/absent"} },
		"user":   func(c *ocispec.Image) { c.Config.User = "absent" },
	} {
		derived(t, busybox, "localhost:5000/"+name+":1", edit)
		t.Log(templateRun(t, 1, "create", "localhost:5000/"+name+":1", "--vmid", "400"))
		if !noConf(400) {
			t.Errorf("%s: a conf is left", name)
		}
	}
}

// TestTemplateLifecycle: what is known of a template, whether it is whole, and what
// becomes of it when its image moves on.
func TestTemplateLifecycle(t *testing.T) {
	proxmox(t)
	const name = "localhost:5000/moving:1"
	derived(t, busybox, name, func(c *ocispec.Image) { c.Config.Cmd = []string{"sleep", "1"} })
	old := makeTemplate(t, name, "--memory", "64M", "--net", "name=eth0,ip=dhcp,bridge=vmbr0")
	if conf := confOf(t, 100); !strings.Contains(conf, "\nnet0: name=eth0,bridge=vmbr0,ip=dhcp,type=veth,host-managed=1\n") {
		t.Errorf("the network:\n%s", conf)
	}
	var details struct {
		Origin, Conf string
		Config       ocispec.Image
	}
	must(t, json.Unmarshal([]byte(templateRun(t, 0, "inspect", "100")), &details))
	if !slices.Equal(details.Config.Config.Cmd, []string{"sleep", "1"}) || !strings.HasSuffix(details.Origin, "@snapshot") || !strings.Contains(details.Conf, "template: 1") {
		t.Errorf("%+v", details)
	}
	if out := templateRun(t, 0, "validate", "100"); strings.Contains(out, "FAIL") || !strings.Contains(out, `["sleep" "1"]`) {
		t.Errorf("a whole one: %s", out)
	}
	if out := templateRun(t, 0, "refresh"); !strings.Contains(out, "already") {
		t.Errorf("nothing moved: %s", out)
	}
	derived(t, busybox, name, func(c *ocispec.Image) { c.Config.Cmd = []string{"sleep", "2"} })
	var news []struct {
		VMID, Old int
		Digest    string
		Made      bool
	}
	must(t, json.Unmarshal([]byte(templateRun(t, 0, "refresh", name, "--format", "json")), &news))
	if len(news) != 1 || news[0].VMID != 101 || news[0].Old != 100 || !news[0].Made || news[0].Digest == old.Digest {
		t.Fatalf("%+v", news)
	}
	t.Cleanup(func() {
		if !noConf(101) {
			templateRun(t, 0, "rm", "101")
		}
	})
	if conf := confOf(t, 101); !strings.Contains(conf, "\nmemory: 64\n") || !strings.Contains(conf, "\nnet0: ") || !strings.Contains(conf, "\nentrypoint: sleep 2\n") {
		t.Errorf("the new one:\n%s", conf)
	}
	if out := templateRun(t, 0, "prune"); !strings.Contains(out, "1 would be removed") || noConf(100) {
		t.Errorf("prune: %s", out)
	}
	if out := templateRun(t, 0, "prune", "--older-than", "1h", "--force"); !strings.Contains(out, "0 removed") {
		t.Errorf("prune of what is older: %s", out)
	}
	templateRun(t, 0, "prune", "--force")
	if !noConf(100) || noConf(101) {
		t.Error("another one was removed")
	}
	// What is broken, and what to do.
	dataset := volumes() + "/basevol-101-disk-0"
	if out, code := command("zfs", "destroy", dataset+"@__base__"); code != 0 {
		t.Fatal(out)
	}
	if out := templateRun(t, 1, "validate", "101"); !strings.Contains(out, "nothing to clone") {
		t.Errorf("without its snapshot: %s", out)
	}
	if out, code := command("zfs", "destroy", dataset); code != 0 {
		t.Fatal(out)
	}
	if out := templateRun(t, 1, "validate", "101"); !strings.Contains(out, "does not exist") {
		t.Errorf("without its dataset: %s", out)
	}
	for _, refused := range [][]string{{"inspect", "100"}, {"validate", "x"}, {"refresh", "none:1"}, {"prune", "--keep", "-1"}} {
		t.Log(refused, templateRun(t, 1, refused...))
	}
	templateRun(t, 0, "rm", "101")
}

// TestTemplateOutlivesImage: a layer is kept as long as a template is made of it, and not longer.
func TestTemplateOutlivesImage(t *testing.T) {
	proxmox(t)
	const name = "localhost:5000/containerd/volume-ownership:2.1"
	ctr := func(args ...string) string {
		t.Helper()
		out, code := command(append([]string{"ctr"}, args...)...)
		if code != 0 {
			t.Fatalf("ctr %v: %s", args, out)
		}
		return out
	}
	snapshots := func() int { return strings.Count(ctr("snapshots", "--snapshotter", zfs, "ls"), "Committed") }
	before := snapshots()
	ctr("images", "pull", "--plain-http", "--snapshotter", zfs, name)
	with := snapshots()
	if with <= before {
		t.Fatalf("the image has no layer of its own: %d, %d", before, with)
	}
	made := makeTemplate(t, name)
	ctr("images", "rm", "--sync", name)
	collect(t)
	if got := snapshots(); got != with {
		t.Errorf("%d snapshots, not %d: containerd dropped what the template is made of", got, with)
	}
	if out := templateRun(t, 0, "validate", strconv.Itoa(made.VMID)); strings.Contains(out, "FAIL") {
		t.Error(out)
	}
	templateRun(t, 0, "rm", strconv.Itoa(made.VMID))
	dropped := func() {
		t.Helper()
		eventually(t, time.Minute, "the layer is dropped", func() bool {
			collect(t)
			return snapshots() == before
		})
	}
	dropped()
	// Nobody of us hears of `pct destroy`, which first destroys the volume.
	ctr("images", "pull", "--plain-http", "--snapshotter", zfs, name)
	made = makeTemplate(t, name)
	ctr("images", "rm", "--sync", name)
	if out, code := command("zfs", "destroy", "-r", made.Dataset); code != 0 {
		t.Fatal(out)
	}
	must(t, os.Remove(fmt.Sprintf("/etc/pve/lxc/%d.conf", made.VMID)))
	restartDaemon(t) // it looks then, and every minute
	dropped()
	if out := ctr("leases", "ls"); strings.Contains(out, "containerd-pve-template-") {
		t.Errorf("leases are left: %s", out)
	}
}
