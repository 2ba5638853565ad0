package template

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/google/go-cmp/cmp"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// rootOf makes a root file system: what ends in a slash is a directory, what has
// an arrow a symbolic link, what has an exclamation mark executable.
func rootOf(t *testing.T, files map[string]string) *os.File {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		mode := os.FileMode(0o644)
		if n, ok := strings.CutSuffix(name, "!"); ok {
			name, mode = n, 0o755
		}
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, ok := strings.CutPrefix(text, "-> "); ok {
			err = os.Symlink(to, p)
		} else if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(p, 0o755)
		} else {
			err = os.WriteFile(p, []byte(text), mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func imageWith(c ocispec.ImageConfig) Image {
	i := Image{Name: "docker.io/library/web:1.2", Digest: digest.FromString("web")}
	i.Config.Config, i.Config.Platform = c, ocispec.Platform{OS: "linux", Architecture: "amd64"}
	return i
}

func TestProcess(t *testing.T) {
	root := rootOf(t, map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/false\n", "etc/group": "root:x:0:root\nlogs:x:4:web\nweb:x:34:\n", "sbin": "-> usr/sbin", "usr/sbin/init": "-> /lib/systemd/systemd",
		"lib/systemd/systemd!": "ELF",
	})
	bare := rootOf(t, nil)
	hostile := rootOf(t, map[string]string{"etc/passwd": "-> ../../../../etc/passwd", "etc/group": "-> /proc/self/environ", "sbin/init/": ""})
	for name, tc := range map[string]struct {
		root *os.File
		c    ocispec.ImageConfig
		want plan.Process
		is   func(error) bool
	}{
		"all of it": {root, ocispec.ImageConfig{Entrypoint: []string{"/run me", ""}, Cmd: []string{"a\nb"}, Env: []string{"A=1"}, WorkingDir: "/srv/x/", User: "web"}, plan.Process{
			Args: []string{"/run me", "", "a\nb"}, Env: []string{"A=1"}, Cwd: "/srv/x", UID: 33, GID: 34, Groups: []uint32{4},
		}, nil},
		"numbers":       {bare, ocispec.ImageConfig{Cmd: []string{"x"}, User: "1000:7", WorkingDir: "../../x"}, plan.Process{Args: []string{"x"}, Cwd: "/x", UID: 1000, GID: 7}, nil},
		"a system":      {root, ocispec.ImageConfig{}, plan.Process{Args: []string{"/sbin/init"}, Cwd: "/"}, nil},
		"nothing":       {bare, ocispec.ImageConfig{}, plan.Process{}, errdefs.IsFailedPrecondition},
		"no such user":  {root, ocispec.ImageConfig{Cmd: []string{"x"}, User: "nobody"}, plan.Process{}, errdefs.IsInvalidArgument},
		"another's":     {hostile, ocispec.ImageConfig{Cmd: []string{"x"}, User: "daemon"}, plan.Process{}, errdefs.IsInvalidArgument},
		"init is a dir": {hostile, ocispec.ImageConfig{}, plan.Process{}, errdefs.IsFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := imageWith(tc.c).process(tc.root)
			if tc.is != nil {
				if !tc.is(err) {
					t.Errorf("%+v, %v", p, err)
				}
				return
			}
			if d := cmp.Diff(tc.want, p); d != "" || err != nil {
				t.Errorf("%v\n%s", err, d)
			}
		})
	}
}

func TestMissing(t *testing.T) {
	root := rootOf(t, map[string]string{"usr/bin/there!": "", "bin": "-> usr/bin", "opt/plain": "", "opt/rel!": "", "opt/out": "-> ../../../../bin/sh", "opt/dir/": ""})
	for _, tc := range []struct {
		args, env []string
		cwd, want string
	}{
		{[]string{"/bin/there"}, nil, "/", ""},
		{[]string{"there"}, nil, "/", ""},
		{[]string{"there"}, []string{"PATH=/opt:"}, "/", "not in /opt:"},
		{[]string{"./rel"}, nil, "/opt", ""},
		{[]string{"./rel"}, nil, "/", "/rel: file does not exist"},
		{[]string{"/opt/plain"}, nil, "/", "not an executable"},
		{[]string{"/opt/dir"}, nil, "/", "not an executable"},
		{[]string{"/opt/out"}, nil, "/", "/opt/out: file does not exist"}, // /bin/sh is not in this root
	} {
		if got := missing(root, plan.Process{Args: tc.args, Env: tc.env, Cwd: tc.cwd}); (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%v in %s: %q, want %q", tc.args, tc.cwd, got, tc.want)
		}
	}
}

// TestConf: what is written for Proxmox, old and new.
func TestConf(t *testing.T) {
	made := time.Date(2026, 11, 27, 0, 0, 0, 0, time.UTC)
	i := imageWith(ocispec.ImageConfig{StopSignal: "SIGQUIT", ExposedPorts: map[string]struct{}{"80/tcp": {}, "443/tcp": {}}, Volumes: map[string]struct{}{"/data": {}}})
	i.Config.Created = &made
	p := plan.Process{Args: []string{"nginx", "-g", "daemon off;"}, Env: []string{"PATH=/bin"}, Cwd: "/"}
	net, err := pve.ParseNet("name=eth0,bridge=vmbr0,ip=dhcp", 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &Store{Host: pve.Host{Env: true}, Storage: pve.Storage{Name: "local-zfs", Pool: "tank/data"}}
	conf, all, err := s.conf(i, Options{Memory: 512 << 20, Nets: []pve.Net{net}}, p, 900, 8)
	if err != nil || !all {
		t.Fatal(all, err)
	}
	got := string(conf.Bytes())
	for _, want := range []string{
		"#image%3A docker.io/library/web%3A1.2\n", "#ports%3A 443/tcp, 80/tcp\n", "arch: amd64\n", "entrypoint: nginx -g \"daemon off;\"\n", "hostname: web-1-2\n", "lock: create\n", "memory: 512\n",
		"net0: name=eth0,bridge=vmbr0,", "ostype: unmanaged\n", "rootfs: local-zfs:basevol-900-disk-0,size=8G\n", "swap: 512\n", "tags: containerd-template\n", "template: 1\n",
		"lxc.signal.halt: 3\n", "lxc.environment.runtime: PATH=/bin\n",
	} {
		if !strings.Contains(got, want) && !strings.Contains(got, strings.ReplaceAll(want, "%3A", ":")) {
			t.Errorf("it lacks %q:\n%s", want, got)
		}
	}
	if conf.Tagged(pve.Tag) || !isOurs(conf) {
		t.Error("it is taken for a container of containerd's")
	}
	if strings.Contains(got, "nesting") || !strings.Contains(got, ",host-managed=1\n") {
		t.Errorf("a server's:\n%s", got)
	}
	never := i
	never.Config.Created = &time.Time{}
	if conf, _, err := s.conf(never, Options{}, plan.Process{Args: []string{systemInit}, Cwd: "/"}, 900, 8); err != nil || !strings.Contains(string(conf.Bytes()), "features: nesting=1\n") || strings.Contains(conf.Description(), "0001") {
		t.Errorf("a whole system's: %v\n%s", err, conf.Bytes())
	}
	s.Host.Env = false
	if conf, all, err = s.conf(i, Options{Nets: []pve.Net{net}}, p, 900, 8); err != nil || all || strings.Contains(string(conf.Bytes()), "host-managed") || !strings.Contains(string(conf.Bytes()), "lxc.init.cmd: /.containerd-pve/init boot\n") || strings.Contains(string(conf.Bytes()), "entrypoint") {
		t.Errorf("older Proxmox: %v, %v\n%s", all, err, conf.Bytes())
	}
	if want := "\nnot in effect: the addresses of net0,"; !strings.Contains(conf.Description(), want) || strings.Contains(pve.Parse([]byte(got)).Description(), want) {
		t.Errorf("addresses of older Proxmox:\n%s", conf.Description())
	}
	s.Host.Env = true
	for _, tc := range []plan.Process{
		{Args: []string{"it's"}, Cwd: "/"},
		{Args: []string{"a\nb"}, Cwd: "/"},
		{Args: []string{"x"}, Cwd: "/srv"},
		{Args: []string{"x"}, Cwd: "/", UID: 1},
		{Args: []string{"x"}, Cwd: "/", GID: 1},
		{Args: []string{"x"}, Cwd: "/", Groups: []uint32{4}},
		{Args: []string{"x"}, Cwd: "/", Env: []string{"A=1\n2"}},
		{Args: []string{"x"}, Cwd: "/", Env: []string{"A= "}},
		{Args: []string{"x"}, Cwd: "/", Env: []string{"A.B=1"}},
	} {
		conf, all, err := s.conf(i, Options{}, tc, 900, 8)
		if err != nil || all {
			t.Errorf("%+v: %v, %v", tc, all, err)
			continue
		}
		if line, _ := conf.Get("entrypoint"); line != plan.BootInit+" boot" || len(conf.LXC()) != 1 {
			t.Errorf("%+v:\n%s", tc, conf.Bytes())
		}
	}
	i.Config.Config.StopSignal = "SIGNONE"
	if _, _, err := s.conf(i, Options{}, p, 900, 8); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a signal that is none: %v", err)
	}
	i.Config.Config.StopSignal, i.Config.Architecture = "", "s390x"
	if _, _, err := s.conf(i, Options{}, p, 900, 8); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an architecture that Proxmox has not: %v", err)
	}
}

// TestAddInit: below the root, whatever the image has there.
func TestAddInit(t *testing.T) {
	init := filepath.Join(t.TempDir(), "pve-init")
	if err := os.WriteFile(init, []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	p := plan.Process{Args: []string{"a b", ""}, Cwd: "/srv/new"}
	for _, files := range []map[string]string{nil, {".containerd-pve/init": "old", ".containerd-pve/more": ""}, {".containerd-pve": "-> " + outside}, {"srv": "-> /var/srv", "var/srv/": ""}} {
		dir := rootOf(t, files).Name()
		if err := (&Store{Init: init}).addInit(dir, p); err != nil {
			t.Error(err)
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, plan.BootFile))
		var got plan.Process
		if err != nil || json.Unmarshal(text, &got) != nil || !slices.Equal(got.Args, p.Args) {
			t.Errorf("%s, %v", text, err)
		}
		if f, err := pathrs.OpenInRoot(dir, p.Cwd); err != nil {
			t.Errorf("its working directory: %v", err)
		} else {
			f.Close()
		}
		if info, err := os.Stat(filepath.Join(dir, plan.BootInit)); err != nil || info.Mode() != 0o755 || info.Size() != 7 {
			t.Errorf("%v, %v", info, err)
		}
	}
	if err := (&Store{Init: init}).addInit(rootOf(t, map[string]string{"srv": "-> " + outside}).Name(), p); err == nil {
		t.Error("a working directory that is none was made")
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("it left the root: %v, %v", left, err)
	}
}

func TestNameOf(t *testing.T) {
	for reference, want := range map[string]string{
		"docker.io/library/nginx:latest": "nginx-latest", "localhost:5000/a_b:1.2.3": "a-b-1-2-3", "ghcr.io/x/y@sha256:" + strings.Repeat("0", 64): "y",
	} {
		if got := nameOf(reference); got != want {
			t.Errorf("%s: %s, want %s", reference, got, want)
		}
	}
}

// TestDescribe: Proxmox takes the notes, whatever an image has in its history.
func TestDescribe(t *testing.T) {
	i := imageWith(ocispec.ImageConfig{ExposedPorts: map[string]struct{}{"80/tcp": {}, "443/tcp": {}}})
	i.Config.History = []ocispec.History{{CreatedBy: "RUN /bin/sh -c a\n\tb"}, {EmptyLayer: true}, {CreatedBy: strings.Repeat("ü%:", 100)}}
	text := i.describe()
	for _, want := range []string{"ports: 443/tcp, 80/tcp\n", "step 1: RUN /bin/sh -c a b\n", "step 3: " + strings.Repeat("ü%:", 66) + "ü% …\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in %q", want, text)
		}
	}
	i.Config.History = slices.Repeat(i.Config.History, 100)
	var c pve.Conf
	if err := c.SetDescription(i.describe()); err != nil {
		t.Error(err)
	}
	if got := pve.Parse(c.Bytes()).Description(); got != i.describe()+"\n" && got != i.describe() {
		t.Errorf("%q", got)
	}
}
