package setup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
)

// config17 is a node's with containerd 1.7, as kubeadm's documentation has it.
const config17 = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.example/pause:3.9"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
`

// TestPodsDropIn: our part of the CRI plugin's configuration, for each containerd.
func TestPodsDropIn(t *testing.T) {
	for _, c := range []struct{ golden, dump, config string }{
		{"pods-1.7.toml", "version = 2\n", config17},
		{"pods-1.7-alone.toml", "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n  runtime_type = 'io.containerd.runc.v2'\n", "version = 2\n"},
		{"pods-2.2.toml", "version = 3\n", "version = 3\n"},
		{"pods-2.2-version2.toml", "version = 3\n", config17},
		{"pods-2.4.toml", dump24, "version = 4\n"},
		{"pods-2.4-version2.toml", dump24, config17},
	} {
		f := newFake(t)
		f.dump = c.dump
		f.put("/etc/containerd/config.toml", c.config)
		_, err := f.install(Options{Pods: true})
		must(t, err)
		text, _, _ := f.read(podsDropIn)
		golden, err := os.ReadFile(filepath.Join("testdata", c.golden))
		if d := cmp.Diff(string(golden), text); err != nil || d != "" {
			t.Errorf("%s: %v\n%s", c.golden, err, d)
		}
		if p, err := f.install(Options{Pods: true, Configured: "tank/containerd-pve"}); err != nil || len(p.Steps) > 0 {
			t.Errorf("%s: again: %v, %v", c.golden, p, err)
		}
		// Without being asked it stays.
		if p, err := f.install(Options{Configured: "tank/containerd-pve"}); err != nil || len(p.Steps) > 0 {
			t.Errorf("%s: again: %v, %v", c.golden, p, err)
		}
		f.uninstall(false, false)
		if text, _, _ := f.read("/etc/containerd/config.toml"); text != c.config {
			t.Errorf("%s: left %s", c.golden, text)
		}
		if _, there, _ := f.read(podsDropIn); there {
			t.Errorf("%s is left", podsDropIn)
		}
	}
}

// TestAllPods: a file of its own, so that it stays when the next call does not ask for it, as an installer's pod on a node.
func TestAllPods(t *testing.T) {
	f := newFake(t)
	f.dump = dump24
	_, err := f.install(Options{AllPods: true})
	must(t, err)
	for _, name := range []string{podsDropIn, allPodsDropIn} {
		if text, there, _ := f.read(name); !there || !strings.Contains(text, "\n  snapshotter = \"pve-zfs\"\n") {
			t.Errorf("%s: %v, %s", name, there, text)
		}
	}
	if p, err := f.install(Options{Pods: true, Configured: "tank/containerd-pve"}); err != nil || len(p.Steps) > 0 {
		t.Errorf("%v, %v", p, err)
	}
	f.uninstall(false, false)
	if _, there, _ := f.read(allPodsDropIn); there {
		t.Errorf("%s is left", allPodsDropIn)
	}

	// It can be taken back alone, but for what somebody changed.
	_, err = f.install(Options{AllPods: true})
	must(t, err)
	text, _, _ := f.read(allPodsDropIn)
	f.put(allPodsDropIn, text+"# mine\n")
	if _, err := f.install(Options{NotAllPods: true, Configured: "tank/containerd-pve"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), allPodsDropIn) {
		t.Errorf("one that was changed: %v", err)
	}
	f.put(allPodsDropIn, text)
	p, err := f.install(Options{NotAllPods: true, Configured: "tank/containerd-pve"})
	must(t, err)
	if got := actions(p); got != "remove "+allPodsDropIn+"\nrestart "+containerdUnit {
		t.Errorf("%s", got)
	}
	if p, err := f.install(Options{NotAllPods: true, Pods: true, Configured: "tank/containerd-pve"}); err != nil || len(p.Steps) > 0 {
		t.Errorf("again: %v, %v", p, err)
	}
	f.uninstall(false, false)

	f.dump = "version = 2\n" // containerd 1.7's
	before := f.tree()
	if _, err := f.install(Options{AllPods: true}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/etc/containerd/config.toml") {
		t.Errorf("with 1.7: %v", err)
	}
	if d := cmp.Diff(before, f.tree()); d != "" {
		t.Errorf("changed: %s", d)
	}
}

// TestPods17: the CRI plugin's table is the last file's that has one, as for containerd 1.7, and an administrator's change
// comes in with the next call.
func TestPods17(t *testing.T) {
	f := newFake(t)
	f.dump = "version = 2\n"
	f.put("/etc/containerd/config.toml", "imports = ['more/*.toml', '/etc/containerd/none.toml']\n"+config17)
	f.put("/etc/containerd/more/a.toml", "[plugins.'io.containerd.grpc.v1.cri']\n  sandbox_image = 'a'\n")
	f.put("/etc/containerd/more/b.toml", "imports = ['/etc/containerd/config.toml']\n[plugins.other]\n  x = 1\n")
	image := func() string {
		t.Helper()
		_, err := f.install(Options{Pods: true})
		must(t, err)
		text, _, _ := f.read(podsDropIn)
		var m struct {
			Plugins map[string]struct {
				Image string `toml:"sandbox_image"`
			}
		}
		must(t, toml.Unmarshal([]byte(text), &m))
		return m.Plugins[criPlugin].Image
	}
	if got := image(); got != "a" {
		t.Errorf("%q", got)
	}
	f.put("/etc/containerd/more/a.toml", "[plugins.'io.containerd.grpc.v1.cri']\n  sandbox_image = 'c'\n")
	if got := image(); got != "c" {
		t.Errorf("%q", got)
	}
}

// TestPodsRefused: where there can be no pods it is said, and nothing is changed.
func TestPodsRefused(t *testing.T) {
	for _, c := range []struct{ name, dump, config, says string }{
		{"switched off", "version = 2\ndisabled_plugins = ['cri']\n", "", `"cri"`},
		{"images switched off", "version = 3\ndisabled_plugins = ['io.containerd.cri.v1.images']\n", "", "disabled_plugins"},
		{"version 1", "version = 1\n", "", "config migrate"},
		{"no table", "version = 2\n", "[plugins.'io.containerd.grpc.v1.cri']\n  containerd = 1\n", "no table"},
		{"no tables", "version = 2\n", "[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  runtimes = ['a']\n", "no table"},
		{"no TOML", "version = 2\n", "imports = ['/etc/bad.toml']\n", "/etc/bad.toml"},
	} {
		f := newFake(t)
		f.dump = c.dump
		f.put("/etc/containerd/config.toml", c.config)
		f.put("/etc/bad.toml", "x =\n")
		before := f.tree()
		if _, err := f.install(Options{Pods: true}); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
		if d := cmp.Diff(before, f.tree()); d != "" {
			t.Errorf("%s: changed: %s", c.name, d)
		}
	}
	// A file of others that goes before ours: containerd does not know the runtime, and all is undone.
	f := newFake(t)
	f.hides = "runtimes"
	before := f.tree()
	if _, err := f.install(Options{Pods: true}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), Handler) {
		t.Errorf("%v", err)
	}
	if d := cmp.Diff(before, f.tree()); d != "" {
		t.Errorf("changed: %s", d)
	}
}

// programs are some of a version, in a directory.
func programs(t *testing.T, version string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range Programs {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(name+" "+version), 0o755))
	}
	return dir
}

// bare is a host without a package.
func bare(t *testing.T) *fake {
	f := newFake(t)
	must(t, os.RemoveAll(f.at("/usr")))
	must(t, os.MkdirAll(f.at("/usr/local"), 0o755))
	return f
}

// TestPrograms: they come, are replaced by others, and go; a step that fails brings the old ones back.
func TestPrograms(t *testing.T) {
	f := bare(t)
	before := f.tree()
	o := Options{Programs: programs(t, "1")}
	p, err := f.install(o)
	must(t, err)
	if got := actions(p); !strings.HasPrefix(got, "copy /usr/local/bin/containerd-pve\ncopy /usr/local/bin/containerd-shim-pve-v2\ncopy /usr/local/bin/pve-init\ndataset") {
		t.Errorf("%s", got)
	}
	shim := ProgramsDir + "/containerd-shim-pve-v2"
	if info, err := os.Stat(f.at(shim)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
	o.Configured = "tank/containerd-pve"
	if p, err := f.install(o); err != nil || len(p.Steps) > 0 {
		t.Errorf("again: %v, %v", p, err)
	}
	// A running program goes on as what it was: its file is another one.
	running, err := os.Open(f.at(shim))
	must(t, err)
	defer running.Close()
	o.Programs = programs(t, "2")
	one := f.tree()
	f.fail = "systemctl restart " + ourUnit
	if _, err := f.install(o); err == nil {
		t.Error("no error")
	}
	if d := cmp.Diff(one, f.tree()); d != "" {
		t.Errorf("not undone: %s", d)
	}
	p, err = f.install(o)
	must(t, err)
	if got := actions(p); !strings.HasSuffix(got, "copy /usr/local/bin/pve-init\nstart "+ourUnit) { // containerd is not restarted
		t.Errorf("%s", got)
	}
	text, _, _ := f.read(shim)
	b := make([]byte, len(text))
	if _, err := running.Read(b); err != nil || text != "containerd-shim-pve-v2 2" || string(b) != "containerd-shim-pve-v2 1" {
		t.Errorf("%q, %q, %v", text, b, err)
	}

	// Containers need them; later they go.
	left := Left{Dataset: true, Programs: true}
	for range 2 {
		p, err := f.PlanUninstall(context.Background(), left)
		must(t, err)
		must(t, f.Uninstall(context.Background(), p, left, func(Step) {}))
		if got := actions(p); !strings.Contains(got, "keep "+shim) || strings.Contains(got, "remove "+shim) {
			t.Errorf("%s", got)
		}
	}
	f.uninstall(false, false)
	if d := cmp.Diff(before, f.tree()); d != "" {
		t.Errorf("left: %s", d)
	}
}

// TestProgramsRefused: the programs of others stay.
func TestProgramsRefused(t *testing.T) {
	for _, c := range []struct{ path, says string }{{"/usr/bin/containerd-pve", "package"}, {ProgramsDir + "/pve-init", "pve-init"}} {
		f := bare(t)
		f.put(c.path, "another's")
		before := f.tree()
		if _, err := f.install(Options{Programs: programs(t, "1")}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.path, err)
		}
		if d := cmp.Diff(before, f.tree()); d != "" {
			t.Errorf("%s: changed: %s", c.path, d)
		}
	}
	if _, err := bare(t).install(Options{Programs: "/none"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	// They were changed between the plan and the copy.
	f, o := bare(t), Options{Programs: programs(t, "1")}
	before := f.tree()
	p, err := f.PlanInstall(context.Background(), o)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(o.Programs, "pve-init"), []byte("x"), 0o755))
	if err := f.Install(context.Background(), p, func(Step) {}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
	if d := cmp.Diff(before, f.tree()); d != "" {
		t.Errorf("changed: %s", d)
	}
}

// TestLock: one at a time; who waits is told, and can be ended.
func TestLock(t *testing.T) {
	f := newFake(t)
	unlock, err := f.Lock(context.Background(), func() { t.Error("it waits") })
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	if _, err := f.Lock(ctx, cancel); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	unlock()
	unlock, err = f.Lock(context.Background(), func() { t.Error("it waits") })
	must(t, err)
	unlock()
	must(t, os.RemoveAll(f.at("/run")))
	if _, err := f.Lock(context.Background(), nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
}
