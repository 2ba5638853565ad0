package setup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/containerd-pve/containerd-pve/deploy"
)

// fake is a host below a directory, whose systemd and containerd are told here.
type fake struct {
	*Host
	t        *testing.T
	states   map[string]string // of a unit: "enabled", "active", or both
	argv     string            // of containerd.service
	unit     bool              // there is one
	dump     string            // what containerd answers, but for our part once it is there
	datasets map[string]bool   // with something in it
	pools    []string
	proxmox  bool
	fail     string            // a command that fails
	began    map[string]string // of a unit
	hides    string            // a word of our CRI configuration that containerd does not see
	calls    []string
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const dump24 = "version = 4\n[plugins.'io.containerd.service.v1.diff-service']\n  default = ['walking']\n"

func newFake(t *testing.T) *fake {
	f := &fake{t: t, states: map[string]string{containerdUnit: "enabled active"}, argv: "/usr/bin/containerd", unit: true, dump: dump24,
		datasets: map[string]bool{}, pools: []string{"tank"}}
	f.Host = &Host{
		Root: t.TempDir(), Program: "/opt/containerd-pve", Run: f.run,
		Pools:    func(context.Context) ([]string, error) { return slices.Clone(f.pools), nil },
		Storages: func() ([]string, bool, error) { return slices.Clone(f.pools), f.proxmox, nil },
		Exists:   func(_ context.Context, name string) (bool, error) { _, there := f.datasets[name]; return there, nil },
		Destroy: func(_ context.Context, name string) error {
			if f.datasets[name] {
				return errors.New("it has children")
			}
			delete(f.datasets, name)
			return nil
		},
	}
	must(t, os.MkdirAll(f.at("/var/lib"), 0o755))
	f.put("/run/systemd/system/x", "")
	f.put("/usr/lib/systemd/system/containerd-pve.service", "package's")
	f.put("/usr/lib/tmpfiles.d/containerd-pve.conf", "package's")
	f.put("/etc/containerd/config.toml", "version = 2\n\n[plugins]\n")
	return f
}

func (f *fake) put(path, text string) {
	f.t.Helper()
	must(f.t, os.MkdirAll(filepath.Dir(f.at(path)), 0o755))
	must(f.t, os.WriteFile(f.at(path), []byte(text), 0o640))
}

func (f *fake) run(_ context.Context, name string, args ...string) (string, error) {
	call := strings.Join(append([]string{name}, args...), " ")
	f.calls = append(f.calls, call)
	if f.fail != "" && strings.HasPrefix(call, f.fail) {
		f.fail = ""
		return "", errors.New("it fails")
	}
	unit := args[len(args)-1]
	switch {
	case name != "systemctl": // containerd
		text, _, _ := f.read("/etc/containerd/config.toml")
		if more, there, _ := f.read(dropIn); there && strings.Contains(text, imports) {
			pods, _, _ := f.read(podsDropIn)
			if f.hides != "" {
				pods = strings.ReplaceAll(pods, f.hides, "hidden")
			}
			version := f.dump[:strings.Index(f.dump, "\n")+1]
			return version + versionLine.ReplaceAllString(more+pods, ""), nil
		}
		return f.dump, nil
	case args[0] == "show" && args[1] == "--property=ActiveEnterTimestamp":
		return f.began[unit], nil
	case args[0] == "show" && !f.unit:
		return "LoadState=not-found\n", nil
	case args[0] == "show":
		return fmt.Sprintf("LoadState=loaded\nExecStart={ path=%s ; argv[]=%s ; ignore_errors=no ; start_time=[n/a] }\n", strings.Fields(f.argv)[0], f.argv), nil
	case strings.HasPrefix(args[0], "is-"):
		state := strings.TrimPrefix(args[0], "is-")
		if strings.Contains(f.states[unit], state) {
			return state + "\n", nil
		}
		return "no\n", errors.New("exit status 3")
	case args[0] == "enable":
		f.states[unit] += " enabled"
	case args[0] == "disable":
		f.states[unit] = ""
	case args[0] == "stop":
		f.states[unit] = strings.ReplaceAll(f.states[unit], "active", "")
	case args[0] == "restart":
		f.states[unit] += " active"
		if unit == ourUnit {
			f.datasets["tank/containerd-pve"] = false
		}
	}
	return "", nil
}

// tree is all that is below /etc and /var.
func (f *fake) tree() map[string]string {
	f.t.Helper()
	all := map[string]string{}
	must(f.t, filepath.WalkDir(f.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			all[strings.TrimPrefix(path, f.Root)] = "directory"
			return err
		}
		b, err := os.ReadFile(path)
		all[strings.TrimPrefix(path, f.Root)] = string(b)
		return err
	}))
	return all
}

func (f *fake) install(o Options) (*Plan, error) {
	f.t.Helper()
	p, err := f.PlanInstall(context.Background(), o)
	if err != nil {
		return nil, err
	}
	return p, f.Install(context.Background(), p, func(Step) {})
}

func (f *fake) uninstall(onlyContainerd, used bool) *Plan {
	f.t.Helper()
	left := Left{OurPart: onlyContainerd, Dataset: used}
	p, err := f.PlanUninstall(context.Background(), left)
	must(f.t, err)
	must(f.t, f.Uninstall(context.Background(), p, left, func(Step) {}))
	return p
}

func actions(p *Plan) string {
	var all []string
	for _, s := range p.Steps {
		all = append(all, s.Action+" "+s.Target)
	}
	return strings.Join(all, "\n")
}

// TestPlan: what is shown and in which order it is done, and that it is taken back.
func TestPlan(t *testing.T) {
	f := newFake(t)
	before := f.tree()
	p, err := f.PlanInstall(context.Background(), Options{})
	must(t, err)
	var shown bytes.Buffer
	must(t, p.Print(&shown))
	golden, err := os.ReadFile("testdata/plan.txt")
	if d := cmp.Diff(string(golden), shown.String()); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	if d := cmp.Diff(before, f.tree()); d != "" {
		t.Errorf("a plan changes something: %s", d)
	}
	if b, err := json.Marshal(p); err != nil || !strings.Contains(string(b), `"dataset":"tank/containerd-pve","steps":[{"action":"dataset"`) {
		t.Errorf("%s, %v", b, err)
	}
	must(t, f.Install(context.Background(), p, func(Step) {}))
	if text, _, _ := f.read("/etc/containerd/config.toml"); text != "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n\n[plugins]\n" {
		t.Errorf("%s", text)
	}
	if info, err := os.Stat(f.at("/etc/containerd/config.toml")); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", info, err)
	}
	if again, err := f.install(Options{Configured: "tank/containerd-pve"}); err != nil || len(again.Steps) > 0 {
		t.Errorf("%v, %v", again, err)
	}
	if got := actions(f.uninstall(false, false)); got != "edit /etc/containerd/config.toml\nremove "+dropIn+"\nrestart "+containerdUnit+"\ndisable "+ourUnit+"\nremove "+ourConfig+"\ndestroy tank/containerd-pve" {
		t.Errorf("%s", got)
	}
	if d := cmp.Diff(before, f.tree()); d != "" {
		t.Errorf("left: %s", d)
	}
	if len(f.datasets) > 0 || f.states[ourUnit] != "" {
		t.Errorf("%v, %v", f.datasets, f.states)
	}
	if p := f.uninstall(false, false); len(p.Steps) > 0 {
		t.Errorf("%v", p.Steps)
	}
}

// TestNoPackage: without a unit one is written, for the program that runs;
// without a configuration of containerd's too.
func TestNoPackage(t *testing.T) {
	f := newFake(t)
	must(t, os.Remove(f.at("/usr/lib/systemd/system/containerd-pve.service")))
	must(t, os.Remove(f.at("/usr/lib/tmpfiles.d/containerd-pve.conf")))
	must(t, os.RemoveAll(f.at("/etc")))
	f.dump = "version = 2\n" // 1.7
	before := f.tree()
	_, err := f.install(Options{})
	must(t, err)
	if text, _, _ := f.read(ourUnitFile); !strings.Contains(text, "\nExecStart=/opt/containerd-pve serve\n") {
		t.Errorf("%s", text)
	}
	if text, _, _ := f.read(ourTmpfiles); !strings.Contains(text, "\nR! ") {
		t.Errorf("%s", text)
	}
	if text, _, _ := f.read("/etc/containerd/config.toml"); text != "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n" {
		t.Errorf("%s", text)
	}
	if text, _, _ := f.read(dropIn); strings.Contains(text, "version =") {
		t.Errorf("%s", text)
	}
	// Another release of ours writes another unit: it is ours to replace.
	f.Program = "/usr/bin/containerd-pve"
	p, err := f.install(Options{Configured: "tank/containerd-pve"})
	if err != nil || actions(p) != "write "+ourUnitFile+"\nstart "+ourUnit {
		t.Errorf("%v, %v", p, err)
	}
	f.uninstall(false, false)
	if d := cmp.Diff(before, f.tree()); d != "" {
		t.Errorf("left: %s", d)
	}
}

// TestUndo: whichever command fails, everything is as it was.
func TestUndo(t *testing.T) {
	for _, fail := range []string{"systemctl daemon-reload", "systemctl enable", "systemctl restart " + ourUnit, "/usr/bin/containerd --config /etc/containerd/config.toml config dump", "systemctl restart " + containerdUnit} {
		f := newFake(t)
		before := f.tree()
		p, err := f.PlanInstall(context.Background(), Options{})
		must(t, err)
		f.calls, f.fail = nil, fail
		err = f.Install(context.Background(), p, func(Step) {})
		if err == nil || !strings.Contains(err.Error(), "is undone") {
			t.Errorf("%s: %v", fail, err)
		}
		if d := cmp.Diff(before, f.tree()); d != "" {
			t.Errorf("%s: left: %s", fail, d)
		}
		if len(f.datasets) > 0 || strings.Contains(f.states[ourUnit], "enabled") || strings.Contains(f.states[ourUnit], "active") {
			t.Errorf("%s: %v, %v", fail, f.datasets, f.states)
		}
		// containerd has begun with what is undone only if it was restarted.
		last := f.calls[len(f.calls)-1]
		if (last == "systemctl restart "+containerdUnit) != (fail == "systemctl restart "+containerdUnit) {
			t.Errorf("%s: last was %s", fail, last)
		}
	}
	// Interrupted: what was done is undone all the same.
	f := newFake(t)
	before := f.tree()
	p, err := f.PlanInstall(context.Background(), Options{})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	err = f.Install(ctx, p, func(s Step) {
		if s.Target == dropIn {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if d := cmp.Diff(before, f.tree()); d != "" {
		t.Errorf("left: %s", d)
	}
}

// TestRefused: what is in the way is named, with the way out, and nothing is changed.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*fake)
		o      Options
		says   string
	}{
		{"no systemd", func(f *fake) { must(t, os.RemoveAll(f.at("/run"))) }, Options{}, "systemd"},
		{"no containerd", func(f *fake) { f.unit = false }, Options{}, "apt-get install containerd"},
		{"containerd's configuration is wrong", func(f *fake) { f.fail = "/usr/bin/containerd" }, Options{}, "config dump"},
		{"it is a link", func(f *fake) {
			must(t, os.Rename(f.at("/etc/containerd/config.toml"), f.at("/etc/containerd/real")))
			must(t, os.Symlink("real", f.at("/etc/containerd/config.toml")))
		}, Options{}, "no regular file"},
		{"no pool", func(f *fake) { f.pools = nil }, Options{}, "zpool create"},
		{"pools", func(f *fake) { f.pools = []string{"tank", "fast"} }, Options{}, "--dataset fast/containerd-pve or --dataset tank/containerd-pve"},
		{"no storage", func(f *fake) { f.pools, f.proxmox = nil, true }, Options{}, "Datacenter, Storage"},
		{"not on a storage", func(f *fake) { f.proxmox = true }, Options{Dataset: "other/x"}, "other/x"},
		{"a pool", func(*fake) {}, Options{Dataset: "tank"}, "tank/containerd-pve"},
		{"another dataset", func(*fake) {}, Options{Dataset: "tank/x", Configured: "tank/y"}, "tank/y"},
		{"a file of others", func(f *fake) { f.put(dropIn, "# mine\n") }, Options{}, dropIn},
		{"a configuration of others", func(f *fake) { f.put(ourConfig, "dataset = 'x'\n") }, Options{}, ourConfig},
		{"imports that are no line", func(f *fake) { f.put("/etc/containerd/config.toml", "imports = [\n 'a',\n]\n") }, Options{}, "imports"},
		{"a record of another version", func(f *fake) { f.put(Record, `{"version": 9}`) }, Options{}, Record},
	} {
		f := newFake(t)
		c.change(f)
		before := f.tree()
		_, err := f.install(c.o)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
		if d := cmp.Diff(before, f.tree()); d != "" {
			t.Errorf("%s: changed: %s", c.name, d)
		}
	}
}

// TestChosen: the dataset that is taken without a question.
func TestChosen(t *testing.T) {
	f := newFake(t)
	f.pools = []string{"tank", "fast"}
	for _, o := range []Options{{Dataset: "fast/a/b"}, {Configured: "fast/a/b"}} {
		if p, err := f.PlanInstall(context.Background(), o); err != nil || p.Dataset != "fast/a/b" {
			t.Errorf("%v: %v, %v", o, p, err)
		}
	}
	f.pools, f.proxmox = []string{"rpool", "rpool"}, true // two storages on a pool
	if p, err := f.PlanInstall(context.Background(), Options{}); err != nil || p.Dataset != "rpool/containerd-pve" {
		t.Errorf("%v, %v", p, err)
	}
}

// TestKept: what was changed since, and what has something in it, stays.
func TestKept(t *testing.T) {
	f := newFake(t)
	_, err := f.install(Options{})
	must(t, err)
	f.put(ourConfig, "dataset = \"tank/containerd-pve\"\nlog_level = \"debug\"\n")
	f.put("/etc/containerd/config.toml", "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\", \"x\"]\n")
	f.datasets["tank/containerd-pve"] = true
	p := f.uninstall(false, true)
	if got := actions(p); got != "keep /etc/containerd/config.toml\nremove "+dropIn+"\nrestart "+containerdUnit+"\ndisable "+ourUnit+"\nkeep "+ourConfig+"\nkeep tank/containerd-pve" {
		t.Errorf("%s", got)
	}
	if text, _, _ := f.read(ourConfig); !strings.Contains(text, "debug") || !f.datasets["tank/containerd-pve"] {
		t.Errorf("%s, %v", text, f.datasets)
	}

	// A line of ours in a file that was changed elsewhere goes.
	f = newFake(t)
	_, err = f.install(Options{})
	must(t, err)
	text, _, _ := f.read("/etc/containerd/config.toml")
	f.put("/etc/containerd/config.toml", text+"# more\n")
	f.uninstall(false, false)
	if text, _, _ := f.read("/etc/containerd/config.toml"); text != "version = 2\n\n[plugins]\n# more\n" {
		t.Errorf("%s", text)
	}
}

// TestKilled: files that a call wrote which was killed before it restarted what reads them are read.
func TestKilled(t *testing.T) {
	f := bare(t)
	o := Options{Pods: true, Programs: programs(t, "1")}
	_, err := f.install(o)
	must(t, err)
	o.Configured = "tank/containerd-pve"
	for _, c := range []struct{ ours, containerds, want string }{
		{"", "", ""}, {"n/a", "@x", ""}, {"@99999999999\n", "@99999999999\n", ""},
		{"@1000\n", "@99999999999\n", "start " + ourUnit}, {"@99999999999\n", "@1000\n", "restart " + containerdUnit},
	} {
		f.began = map[string]string{ourUnit: c.ours, containerdUnit: c.containerds}
		p, err := f.PlanInstall(context.Background(), o)
		if err != nil || actions(p) != c.want {
			t.Errorf("%+v: %v, %v", c, p, err)
		}
	}
}

// TestUninstallInterrupted: wherever it is, another call does the rest, and containerd begins anew.
func TestUninstallInterrupted(t *testing.T) {
	f := newFake(t)
	before := f.tree()
	_, err := f.install(Options{Pods: true})
	must(t, err)
	for n := 0; ; n++ {
		_, err := f.install(Options{Pods: true})
		must(t, err)
		p, err := f.PlanUninstall(context.Background(), Left{})
		must(t, err)
		if n == len(p.Steps) {
			break
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := 0
		err = f.Uninstall(ctx, p, Left{}, func(Step) {
			if done == n {
				cancel()
			}
			done++
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%d: %v", n, err)
		}
		f.calls = nil
		restarted := slices.IndexFunc(p.Steps, func(s Step) bool { return s.Action == Restart }) < n
		f.uninstall(false, false)
		if !restarted && !slices.Contains(f.calls, "systemctl restart "+containerdUnit) {
			t.Errorf("%d: containerd goes on with what it had", n)
		}
		if d := cmp.Diff(before, f.tree()); d != "" {
			t.Errorf("%d: left: %s", n, d)
		}
	}
}

// TestOnlyContainerd: as when the package is removed; installed again it is whole.
func TestOnlyContainerd(t *testing.T) {
	f := newFake(t)
	_, err := f.install(Options{})
	must(t, err)
	whole := f.tree()
	if got := actions(f.uninstall(true, false)); got != "edit /etc/containerd/config.toml\nremove "+dropIn+"\nrestart "+containerdUnit {
		t.Errorf("%s", got)
	}
	if _, there, _ := f.read(ourConfig); !there || !f.is(context.Background(), "enabled", ourUnit) {
		t.Error("our part is gone")
	}
	_, err = f.install(Options{Configured: "tank/containerd-pve"})
	must(t, err)
	delete(whole, Record)
	got := f.tree()
	delete(got, Record)
	if d := cmp.Diff(whole, got); d != "" {
		t.Errorf("%s", d)
	}
	f.uninstall(false, false)
	if _, there, _ := f.read(Record); there {
		t.Error("the record is left")
	}
}

// TestFindContainerd: the configuration that its unit names.
func TestFindContainerd(t *testing.T) {
	for argv, want := range map[string]string{
		"/usr/bin/containerd":                            "/etc/containerd/config.toml",
		"/usr/bin/containerd --config /etc/c.toml -l x":  "/etc/c.toml",
		"/usr/bin/containerd -c=/etc/c.toml":             "/etc/c.toml",
		"/usr/local/bin/containerd --log-level=debug -c": "",
	} {
		f := newFake(t)
		f.argv = argv
		c, err := f.findContainerd(context.Background())
		if want == "" {
			if err == nil {
				t.Errorf("%s: %+v", argv, c)
			}
			continue
		}
		if err != nil || c.config != want || c.program != strings.Fields(argv)[0] {
			t.Errorf("%s: %+v, %v", argv, c, err)
		}
	}
}

// TestDropIn: by itself it is what is in deploy/config, and it keeps the lists of an administrator.
func TestDropIn(t *testing.T) {
	mean := func(text string) map[string]any {
		t.Helper()
		var m map[string]any
		must(t, toml.Unmarshal([]byte(strings.ReplaceAll(text, "linux/amd64", platform())), &m))
		delete(m, "version")
		return m
	}
	deployed, err := deploy.Files.ReadFile("config/containerd-pve.toml")
	must(t, err)
	of := func(dump string) string {
		t.Helper()
		var c containerd
		must(t, toml.Unmarshal([]byte(dump), &c.dump))
		text, err := c.dropIn()
		must(t, err)
		return text
	}
	if d := cmp.Diff(mean(string(deployed)), mean(of(dump24))); d != "" {
		t.Errorf("%s", d)
	}
	const mine = `version = 3
[plugins.'io.containerd.service.v1.diff-service']
  default = ["erofs", "walking"]
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "native"
  differ = ""
  layer_types = ["a"]
  optional = true
`
	text := of(mine)
	golden, err := os.ReadFile("testdata/dropin.toml")
	if d := cmp.Diff(string(golden), strings.ReplaceAll(text, platform(), "linux/amd64")); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	if again := of(text); again != text {
		t.Errorf("not the same from its own: %s", again)
	}
}

// FuzzDropIn: whatever containerd's configuration is, ours is one that it can read, and names us.
func FuzzDropIn(f *testing.F) {
	f.Add(dump24)
	f.Add("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nsnapshotter = \"\\u0001\"\nlayer_types = ['a']\n")
	f.Fuzz(func(t *testing.T, dump string) {
		var c containerd
		if toml.Unmarshal([]byte(dump), &c.dump) != nil {
			return
		}
		text, err := c.dropIn()
		var again effective
		if err == nil {
			err = toml.Unmarshal([]byte(text), &again)
		}
		if err != nil || again.Proxies[snapshotterName] == nil || again.Plugins.Diff.Default[0] != differName {
			t.Errorf("%s: %v", text, err)
		}
	})
}

func TestAddImport(t *testing.T) {
	const with = `imports = ["/etc/containerd/conf.d/*.toml"]` + "\n"
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", with},
		{"below the version", "# c\nversion = 2\nroot = '/x'\n[a]\n", "# c\nversion = 2\n" + with + "root = '/x'\n[a]\n"},
		{"version of a table", "[a]\nversion = 2\n", with + "[a]\nversion = 2\n"},
		{"an empty list", "imports = [] # none\n", with},
		{"one more", "imports = ['a.toml']\n", `imports = ["a.toml", "/etc/containerd/conf.d/*.toml"]` + "\n"},
		{"no line end", "root = '/x'", with + "root = '/x'"},
		{"there", "imports = ['/etc/containerd/conf.d/*.toml']\n", "imports = ['/etc/containerd/conf.d/*.toml']\n"},
		{"there, relative", "imports = ['conf.d/*.toml']\n", "imports = ['conf.d/*.toml']\n"},
		{"there, by name", "imports = ['/etc/containerd/conf.d/containerd-pve.toml']\n", "imports = ['/etc/containerd/conf.d/containerd-pve.toml']\n"},
		{"lines", "imports = [\n'a'\n]\n", ""},
		{"in a string", "x = '''\nimports = 1\n'''\n", ""},
		{"no TOML", "x = \n", ""},
	} {
		out, was, line, err := addImport(c.text, "/etc/containerd")
		if c.want == "" {
			if !errdefs.IsFailedPrecondition(err) && !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: %q, %v", c.name, out, err)
			}
			continue
		}
		if err != nil || out != c.want {
			t.Errorf("%s: %q, %v", c.name, out, err)
		}
		if back, ok := dropImport(out, was, line); line != "" && (!ok || back != c.text) {
			t.Errorf("%s: back: %q", c.name, back)
		}
	}
	if text, ok := dropImport("a\nl\nl\n", "", "l"); ok {
		t.Errorf("which of two: %q", text)
	}
}

// FuzzAddImport: any text stays what it was but for the imports, and comes back.
func FuzzAddImport(f *testing.F) {
	f.Add("version = 2\n[plugins]\n")
	f.Add("imports = ['a'] # x\n")
	f.Fuzz(func(t *testing.T, text string) {
		out, was, line, err := addImport(text, "/etc/containerd")
		if err != nil || line == "" {
			return
		}
		if again, _, more, err := addImport(out, "/etc/containerd"); err != nil || more != "" || again != out {
			t.Errorf("%q: once more: %q, %v", text, again, err)
		}
		if back, ok := dropImport(out, was, line); ok && back != text {
			t.Errorf("%q came back as %q", text, back)
		}
	})
}
