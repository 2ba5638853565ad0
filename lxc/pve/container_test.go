package pve

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write testdata/*.conf anew")

const gib = 1 << 30

var host = Host{Memory: 16 * gib, Swap: 2 * gib, Env: true, Idmap: true}

// TestGolden: whole confs.
func TestGolden(t *testing.T) {
	for name, c := range map[string]Container{
		"plain": {
			Namespace: "default", ID: "web_1", Image: "docker.io/library/nginx:latest", Digest: "sha256:0123", Arch: "amd64",
			Rootfs: "tank:subvol-100-disk-0,size=8G", StopSignal: 3, Args: []string{"/docker-entrypoint.sh", "nginx", "-g", "daemon off;"},
			Env: []string{"PATH=/usr/bin:/bin", "EMPTY=", "NGINX_VERSION=1.29"}, Guard: "/usr/local/bin/containerd-pve guard",
		},
		"pod": {
			Namespace: "k8s.io", ID: strings.Repeat("0123456789abcdef", 4), Image: "registry.k8s.io/pause:3.10", Pod: "web-7d9c", PodNamespace: "Prod_EU",
			Arch: "arm64", Hostname: "web-7d9c", Rootfs: "tank:subvol-101-disk-0,size=8G", Unprivileged: true, Args: []string{"/pause"},
			Limits: Limits{Memory: 300*mib + 1, Swap: 0, Quota: 150_000, Period: 100_000, Weight: 39},
		},
		"idmap":            {Namespace: "default", ID: "web", Arch: "amd64", Rootfs: "tank:subvol-101-disk-0,size=8G", Unprivileged: true, IdmapPassthrough: true, Args: []string{"true"}},
		"idmap-old":        {Namespace: "default", ID: "web", Arch: "amd64", Rootfs: "tank:subvol-101-disk-0,size=8G", Unprivileged: true, IdmapPassthrough: true, Args: []string{"true"}},
		"idmap-directory":  {Namespace: "default", ID: "web", Arch: "amd64", Rootfs: "/run/web/rootfs", Unprivileged: true, IdmapPassthrough: true, Args: []string{"true"}},
		"idmap-privileged": {Namespace: "default", ID: "web", Arch: "amd64", Rootfs: "tank:subvol-101-disk-0,size=8G", IdmapPassthrough: true, Args: []string{"true"}},
		"old":              {Namespace: "default", ID: "db", Arch: "amd64", Rootfs: "tank:subvol-101-disk-0,size=8G", Args: []string{"true"}, Env: []string{"A=1"}},
		"hostile": {
			Namespace: "a b;c", ID: "../\nlock: backup", Image: "x\nmemory: 16\n[snap]", Digest: "é%41:", Arch: "amd64", Hostname: "a\nb",
			Rootfs: "/var/lib/x", Args: []string{"sh", "-c", "echo 'it'"}, Limits: Limits{Memory: 1, Swap: -1, Quota: 1, Period: 1_000_000, Weight: 10000},
			Env: []string{"A=1\nlxc.hook.mount: /x", "lxc.x=1", "B= 2 ", "=x", "C"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := host
			h.Env = name != "old" // as a node of Proxmox VE 8
			h.Idmap = name != "idmap-old"
			conf, err := c.Conf(h)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".conf")
			if *update {
				if err := os.WriteFile(file, conf.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(conf.Bytes())); d != "" {
				t.Error(d)
			}
			if len(Parse(conf.Bytes()).sections) > 0 {
				t.Error("it has a section")
			}
		})
	}
}

func TestKnowsEnv(t *testing.T) {
	for versions, want := range map[[2]string]bool{
		{"6.1.10", "6.0.5-3"}: true, {"6.0.15", "6.0.5-10"}: true, {"6.0.15~bpo1", "6.0.5-3~1"}: true, {"7.0", "7.0.0-1"}: true, {"", ""}: true,
		{"6.0.14", "6.0.5-3"}: false, {"5.3.0", "6.0.0-1"}: false, {"6.1.10", "6.0.5-2"}: false, {"6.1.10", "6.0.4-2"}: false, {"x", ""}: false,
	} {
		if KnowsEnv(versions[0], versions[1]) != want {
			t.Errorf("%q: %v", versions, !want)
		}
	}
}

func TestKnowsIdmap(t *testing.T) {
	for version, want := range map[string]bool{"": true, "6.1.6": true, "6.1.10": true, "6.2.0~1": true, "7.0.1": true, "6.1.5": false, "5.3.5": false, "x": false} {
		if KnowsIdmap(version) != want {
			t.Errorf("%q: %v", version, !want)
		}
	}
}

// TestIdmapStays: what is changed of a conf leaves the volume's options alone.
func TestIdmapStays(t *testing.T) {
	c := Container{Namespace: "default", ID: "web", Arch: "amd64", Rootfs: "tank:subvol-101-disk-0,size=8G", Unprivileged: true, IdmapPassthrough: true}
	conf, err := c.Conf(host)
	if err != nil {
		t.Fatal(err)
	}
	conf = Parse(conf.Bytes())
	if err := (Limits{Memory: 64 * mib, Quota: 1000, Period: 100_000, Weight: 3}).Update(conf, host, AllParts); err != nil {
		t.Fatal(err)
	}
	if rootfs, _ := conf.Get("rootfs"); rootfs != "tank:subvol-101-disk-0,size=8G,idmap=passthrough" || strings.Count(string(conf.Bytes()), "rootfs:") != 1 {
		t.Errorf("%s", conf.Bytes())
	}
}

func TestAtLeast(t *testing.T) {
	for _, c := range []struct {
		version, want string
		is            bool
	}{
		{"6.12.118+deb13-amd64", "v5.12", true}, {"6.17.2-1-pve", "v5.12", true}, {"5.10.0-30-amd64", "v5.12", false}, {"5.12.0-rc1", "v5.12", true},
		{"2.3.9-0+deb13u1", "v2.2", true}, {"2.2.0-1", "v2.2", true}, {"2.1.11-1+deb12u1", "v2.2", false}, {"", "v1.0", false}, {"x", "v1.0", false},
	} {
		if AtLeast(c.version, c.want) != c.is {
			t.Errorf("%s, %s: %v", c.version, c.want, !c.is)
		}
	}
}

func TestConfRefused(t *testing.T) {
	for _, c := range []Container{{Arch: "mips", Rootfs: "/x"}, {Arch: "amd64"}, {Arch: "amd64", Rootfs: "/x\nlock: backup"}} {
		if _, err := c.Conf(host); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// TestUpdate: limits that went are gone.
func TestUpdate(t *testing.T) {
	conf := Parse([]byte("cores: 2\ncpulimit: 1.5\ncpuunits: 7\nmemory: 64\nonboot: 1\nswap: 0\n"))
	if err := (Limits{Memory: 128 * mib, Swap: 64 * mib}).Update(conf, host, AllParts); err != nil {
		t.Fatal(err)
	}
	if got := string(conf.Bytes()); got != "memory: 128\nonboot: 1\nswap: 64\n" {
		t.Error(got)
	}
	if err := (Limits{Quota: 50_000, Period: 100_000, Weight: 9}).Update(conf, host, PartCPU); err != nil {
		t.Fatal(err)
	}
	if got := string(conf.Bytes()); got != "cores: 1\ncpulimit: 0.5\nmemory: 128\nonboot: 1\nswap: 64\n" {
		t.Error(got)
	}
}

// TestConfLimits: what an administrator changed is told from what was written.
func TestConfLimits(t *testing.T) {
	spec := Limits{Memory: 100*mib + 1, Swap: 1, Quota: 33_333, Period: 50_000, Weight: 39}
	for _, c := range []struct {
		name    string
		spec    Limits
		host    Host
		set     string // key=value, of which an empty one takes the key away
		want    Limits
		changed Parts
	}{
		{"nothing", spec, host, "", spec, 0},
		{"a host with more memory", Limits{}, Host{Memory: 4 * gib}, "", Limits{}, 0},
		{"memory", spec, host, "memory=200", Limits{Memory: 200 * mib, Swap: mib}, PartMemory},
		{"swap", spec, host, "swap=0", Limits{Memory: 101 * mib}, PartMemory},
		{"memory where there was no limit", Limits{}, host, "memory=512", Limits{Memory: 512 * mib, Swap: -1}, PartMemory},
		{"as much as the host has", spec, host, "memory=16384", Limits{Swap: -1}, PartMemory},
		{"more than that", spec, host, "memory=99999999", Limits{Swap: -1}, PartMemory},
		{"all of the swap", spec, host, "swap=2048", Limits{Memory: 101 * mib, Swap: -1}, PartMemory},
		{"cpulimit", spec, host, "cpulimit=0.25", Limits{Quota: 25_000, Period: 100_000}, PartCPU},
		{"cores below it", Limits{Quota: 400_000, Period: 100_000}, host, "cores=2", Limits{Quota: 200_000, Period: 100_000}, PartCPU},
		{"cores above it", Limits{Quota: 400_000, Period: 100_000}, host, "cores=8", Limits{}, 0},
		{"cores alone", Limits{}, host, "cores=2", Limits{Quota: 200_000, Period: 100_000}, PartCPU},
		{"no limit of cpu", spec, host, "cpulimit= cores=", Limits{}, PartCPU},
		{"too little", spec, host, "cpulimit=0.0001", Limits{Quota: 1000, Period: 100_000}, PartCPU},
		{"cpuunits", spec, host, "cpuunits=100", Limits{Weight: 100}, PartWeight},
		{"no cpuunits", spec, host, "cpuunits=", Limits{}, PartWeight},
		{"all", spec, host, "cpuunits=1 memory=64 cpulimit=2 cores=", Limits{Memory: 64 * mib, Swap: mib, Quota: 200_000, Period: 100_000, Weight: 1}, AllParts},
		{"tiny", Limits{Memory: 1, Quota: 1, Period: 1_000_000, Weight: 10000}, host, "", Limits{}, 0},
	} {
		conf := &Conf{}
		if err := c.spec.Update(conf, c.host, AllParts); err != nil {
			t.Fatal(err)
		}
		for _, s := range strings.Fields(c.set) {
			key, value, _ := strings.Cut(s, "=")
			if value == "" {
				conf.Delete(key)
			} else if err := conf.Set(key, value); err != nil {
				t.Fatal(err)
			}
		}
		l, changed, err := conf.Limits(c.spec, c.host)
		if err != nil || changed != c.changed {
			t.Errorf("%s: changed %b, %v", c.name, changed, err)
		}
		if changed&PartMemory != 0 && (l.Memory != c.want.Memory || l.Swap != c.want.Swap) ||
			changed&PartCPU != 0 && (l.Quota != c.want.Quota || l.Quota > 0 && l.Period != c.want.Period) || changed&PartWeight != 0 && l.Weight != c.want.Weight {
			t.Errorf("%s: %+v", c.name, l)
		}
	}
	for _, text := range []string{"", "memory: x\n", "memory: -1\nswap: -5\ncores: 0\ncpulimit: -1\ncpuunits: -2\n", "memory: NaN\ncpulimit: Inf\n", "memory: 99999999999999999999999\n"} {
		l, _, err := Parse([]byte(text)).Limits(spec, host)
		if err != nil || l != (Limits{Swap: -1}) {
			t.Errorf("%q: %+v, %v", text, l, err)
		}
	}
}

func TestHostnameOf(t *testing.T) {
	seen := map[string]string{}
	for _, id := range []string{
		"web", "web_1", "web-1", "web.1", "-web", "web-", "_", ".", "ä", strings.Repeat("a", 63), strings.Repeat("a", 64), strings.Repeat("a", 76), strings.Repeat("-", 70),
	} {
		name := HostnameOf(id)
		if why := hostname(name); why != "" || len(name) > maxLabel {
			t.Errorf("%q: %q %s", id, name, why)
		}
		if other, there := seen[name]; there {
			t.Errorf("%q and %q are both %q", id, other, name)
		}
		seen[name] = id
	}
	if got := HostnameOf("web-1"); got != "web-1" {
		t.Error(got)
	}
}

// split is lxc_string_split_quoted (lxc, src/lxc/string_utils.c) after parse_line
// (confile.c) took the marks around the value away.
func split(value string) []string {
	if n := len(value); n > 1 && (value[0] == '\'' || value[0] == '"') && value[n-1] == value[0] {
		value = value[1 : n-1]
	}
	var words []string
	state, begin := byte(' '), 0
	space := func(b byte) bool { return strings.IndexByte(" \t\n\v\f\r", b) >= 0 }
	for i := range len(value) {
		b := value[i]
		switch state {
		case ' ':
			if !space(b) {
				begin, state = i, 'a'
				if b == '"' || b == '\'' {
					state = b
				}
			}
		case 'a':
			if space(b) {
				words, state = append(words, value[begin:i]), ' '
			}
		default:
			if b == state {
				words, state = append(words, value[begin+1:i]), ' '
			}
		}
	}
	if state == 'a' {
		words = append(words, value[begin:])
	}
	return words
}

// TestEntrypoint: what is said liblxc reads as it was meant.
func TestEntrypoint(t *testing.T) {
	for _, c := range []struct {
		args []string
		ok   bool
	}{
		{[]string{"/bin/sh"}, true},
		{[]string{"nginx", "-g", "daemon off;"}, true},
		{[]string{"a", "", " ", "\t", "b"}, true},
		{[]string{"a", "ends with\""}, false},
		{[]string{"a", "it's"}, false},
		{[]string{"a", "x\ny"}, false},
		{[]string{"/with space", "b c"}, false},
		{[]string{"", "b"}, false},
		{nil, false},
	} {
		line, ok := Entrypoint(c.args)
		if ok != c.ok || ok && !slices.Equal(split(line), c.args) {
			t.Errorf("%q: %q, %v, read as %q", c.args, line, ok, split(line))
		}
	}
}

// FuzzContainer: whatever an image, a pod or a client say, the conf has the lines
// that were meant and no other.
func FuzzContainer(f *testing.F) {
	f.Add("id", "image", "pod", "arg", "A=1")
	f.Add("a\nb", "[x]\n", "%0a", "\"x y\"", "A=1\nlxc.hook.mount: x")
	line := regexp.MustCompile(`^(#.*|(arch|cmode|hostname|memory|ostype|rootfs|swap|tags|unprivileged|entrypoint): .+|lxc\.environment\.runtime: \w+=.*|lxc\.signal\.halt: 15)$`)
	f.Fuzz(func(t *testing.T, id, image, pod, arg, env string) {
		c := Container{Namespace: pod, ID: id, Image: image, Digest: image, Pod: pod, PodNamespace: id, Arch: "amd64", Hostname: pod, Rootfs: "tank:subvol-1-disk-0", Args: []string{"x", arg}, Env: []string{env}}
		conf, err := c.Conf(host)
		if err != nil {
			t.Fatal(err)
		}
		text := string(conf.Bytes())
		for l := range strings.SplitSeq(strings.TrimSuffix(text, "\n"), "\n") {
			if !line.MatchString(l) {
				t.Errorf("the line %q of %q", l, text)
			}
		}
		if line, ok := conf.Get("entrypoint"); ok && !slices.Equal(split(line), c.Args) {
			t.Errorf("%q: %q", c.Args, line)
		}
	})
}
