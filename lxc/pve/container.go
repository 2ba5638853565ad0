package pve

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/mod/semver"
	"golang.org/x/sys/unix"
)

// Container is what the conf of one of ours says.
type Container struct {
	Namespace, ID     string // containerd's
	Image, Digest     string // empty if containerd did not say
	Pod, PodNamespace string // of a container in a pod
	Arch              string // as GOARCH
	Hostname          string // what the container calls itself; empty: made of the id
	// Rootfs is a volume ("tank:subvol-100-disk-0") or a directory, with the
	// options that follow it in a conf ("size=8G"), if any.
	Rootfs       string
	Unprivileged bool
	// IdmapPassthrough has the conf of an unprivileged one say that its volume is to be mapped by the mount: on the disk
	// the files have the owners that the container sees.
	IdmapPassthrough bool
	Nets             []Net // net0 and on
	Limits           Limits
	// StopSignal is the number that `pct shutdown` sends; SIGTERM if 0.
	StopSignal int
	Args       []string
	Env        []string // "NAME=value"
	// Guard is the program that a start from outside containerd runs first, and
	// which refuses it.
	Guard string
}

// Limits are a container's, as the OCI spec has them.
type Limits struct {
	// Memory and Swap in bytes; swap is what may be swapped out besides. 0 or less: no limit.
	Memory, Swap int64
	// Quota of CPU time in each Period, in microseconds. 0 or less: no limit.
	Quota  int64
	Period uint64
	// Weight is cpu.weight of cgroup v2, 1 to 10000; 0: not said.
	Weight uint64
}

// Parts are kinds of limits, each of which is said as a whole.
type Parts uint

// The parts of Limits.
const (
	PartMemory Parts = 1 << iota // Memory and Swap
	PartCPU                      // Quota and Period
	PartWeight
	AllParts = PartMemory | PartCPU | PartWeight
)

// Tag is what a conf of ours bears, and no other is touched without.
const Tag = "containerd"

// Host is what a node has: the limits of what has none. Proxmox takes 512 MiB
// for memory and swap of a conf that says nothing.
type Host struct {
	Memory, Swap int64 // bytes
	// Env says whether Proxmox knows entrypoint and environment, see KnowsEnv.
	Env bool
	// Idmap says whether it knows a volume's option idmap, see KnowsIdmap.
	Idmap bool
}

// KnowsEnv says whether these versions of Debian's packages pve-container and
// lxc-pve know a container's entrypoint and environment: since 6.0.15 and 6.0.5-3. Older tools
// warn at each use, and older LXC refuses the whole conf. One that is not
// installed is taken for new.
func KnowsEnv(container, lxc string) bool {
	return (container == "" || AtLeast(container, "v6.0.15")) && (lxc == "" || AtLeast(lxc, "v6.0.5-3"))
}

// KnowsIdmap says whether this version of Debian's package pve-container knows a volume's option idmap: since 6.1.6. An
// older one lists no container at all of a node that has a stopped one with it. One that is not installed is taken for new.
func KnowsIdmap(container string) bool {
	return container == "" || AtLeast(container, "v6.1.6")
}

// AtLeast compares a version of Debian's or the kernel's, "6.12.118+deb13-amd64" for
// example, with one as package semver has it. What follows the numbers counts only if
// want has a revision, after a hyphen.
func AtLeast(version, want string) bool {
	revision := strings.Contains(want, "-")
	end := strings.IndexFunc(version, func(r rune) bool { return r != '.' && (r != '-' || !revision) && (r < '0' || r > '9') })
	if end < 0 {
		end = len(version)
	}
	return semver.Compare("v"+version[:end], want) >= 0
}

// ReadHost asks the kernel.
func ReadHost() (Host, error) {
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return Host{}, fmt.Errorf("sysinfo: %w", err)
	}
	unit := int64(i.Unit)
	return Host{Memory: int64(i.Totalram) * unit, Swap: int64(i.Totalswap) * unit}, nil
}

var arches = map[string]string{"amd64": "amd64", "386": "i386", "arm64": "arm64", "arm": "armhf", "riscv64": "riscv64"}

// Arch is what Proxmox calls an architecture of Go's. Errors: InvalidArgument.
func Arch(goarch string) (string, error) {
	if arch, ok := arches[goarch]; ok {
		return arch, nil
	}
	return "", fmt.Errorf("conf: Proxmox knows no architecture %q: %w", goarch, errdefs.ErrInvalidArgument)
}

// Conf writes the conf of a new container. What Proxmox has no words for (an
// entrypoint with an apostrophe, a variable with a line feed) is left out and named in
// the description: the container runs as its image says all the same, because containerd
// starts it. Errors: InvalidArgument, a rootfs that is none.
func (c *Container) Conf(host Host) (*Conf, error) {
	conf := &Conf{}
	arch, err := Arch(c.Arch)
	if err != nil {
		return nil, err
	}
	var left []string
	rootfs := c.Rootfs
	if c.IdmapPassthrough && c.Unprivileged && !path.IsAbs(rootfs) { // a directory is mapped where it is
		if host.Idmap {
			rootfs += ",idmap=passthrough"
		} else {
			left = append(left, "idmap=passthrough, which this version of Proxmox does not know")
		}
	}
	hostname := c.Hostname
	if check("hostname", hostname) != nil {
		hostname = HostnameOf(c.ID)
	}
	for _, p := range [][2]string{
		{"arch", arch}, {"cmode", "shell"}, {"hostname", hostname}, {"ostype", "unmanaged"}, {"rootfs", rootfs},
		{"tags", strings.Join(c.tags(), ";")}, {"unprivileged", map[bool]string{false: "0", true: "1"}[c.Unprivileged]},
	} {
		if err := conf.Set(p[0], p[1]); err != nil {
			return nil, err
		}
	}
	for i, n := range c.Nets {
		if err := conf.Set(fmt.Sprintf("net%d", i), n.String()); err != nil {
			return nil, err
		}
	}
	if err := c.Limits.Update(conf, host, AllParts); err != nil {
		return nil, err
	}
	env := c.Env
	if line, ok := Entrypoint(c.Args); !host.Env {
		left, env = append(left, "entrypoint and environment, which this version of Proxmox does not know"), nil
	} else if !ok || conf.Set("entrypoint", line) != nil {
		left = append(left, "the entrypoint")
	}
	entries := []Entry{{haltKey, strconv.Itoa(cmp.Or(c.StopSignal, int(unix.SIGTERM)))}}
	if c.Guard != "" {
		entries = append(entries, Entry{"lxc.hook.pre-start", c.Guard})
	}
	for _, v := range env {
		e, ok := Variable(v)
		if !ok {
			name, _, _ := strings.Cut(v, "=")
			left = append(left, fmt.Sprintf("the variable %q", name))
			continue
		}
		entries = append(entries, e)
	}
	if err := conf.SetLXC(entries); err != nil {
		return nil, err
	}
	return conf, conf.SetDescription(c.describe(left))
}

// haltKey is LXC's key for the signal that asks a container's init to end.
const haltKey = "lxc.signal.halt"

// StopSignal is the number of the signal that `pct shutdown` sends; 0 if the conf
// does not say it as a number.
func (c *Conf) StopSignal() int {
	n := 0
	for _, e := range c.LXC() {
		if e.Key == haltKey {
			n, _ = strconv.Atoi(e.Value)
		}
	}
	return n
}

// variable is what Proxmox takes for one of its property env.
var variable = regexp.MustCompile(`^\w+=[^\x00-\x08\x0a-\x1f\x7f]*$`)

// Variable is the line for one of the environment, "NAME=value"; ok is false for
// what cannot be said so.
func Variable(v string) (e Entry, ok bool) {
	e = Entry{"lxc.environment.runtime", v}
	return e, variable.MatchString(v) && checkLXC(e) == nil
}

const mib = 1 << 20

// Update writes those parts of limits into a conf, each explicitly, in the place of those it has.
func (l Limits) Update(conf *Conf, host Host, parts Parts) error {
	var set [][2]string
	if parts&PartMemory != 0 {
		memory, swap := l.Memory, l.Swap
		if memory <= 0 || memory > host.Memory {
			memory = host.Memory
		}
		if swap < 0 || l.Memory <= 0 {
			swap = host.Swap
		}
		set = append(set,
			[2]string{"memory", strconv.FormatInt(max((memory+mib-1)/mib, 16), 10)},
			[2]string{"swap", strconv.FormatInt((swap+mib-1)/mib, 10)})
	}
	if parts&PartCPU != 0 {
		conf.Delete("cores")
		conf.Delete("cpulimit")
		if l.Quota > 0 && l.Period > 0 {
			limit := min(float64(l.Quota)/float64(l.Period), 8192)
			set = append(set, [2]string{"cores", strconv.Itoa(max(int(math.Ceil(limit)), 1))}, [2]string{"cpulimit", strconv.FormatFloat(limit, 'f', -1, 64)})
		}
	}
	if parts&PartWeight != 0 {
		conf.Delete("cpuunits")
		if l.Weight > 0 {
			set = append(set, [2]string{"cpuunits", strconv.FormatUint(min(l.Weight, 10000), 10)})
		}
	}
	for _, p := range set {
		if err := conf.Set(p[0], p[1]); err != nil {
			return err
		}
	}
	return nil
}

// Limits are those of a conf, and the parts of them that say something else than
// spec, which was written into it: an administrator's. What the host has as a whole is no limit.
func (c *Conf) Limits(spec Limits, host Host) (l Limits, changed Parts, err error) {
	unchanged := Parse(c.Bytes())
	if err := spec.Update(unchanged, host, AllParts); err != nil {
		return Limits{}, 0, err
	}
	l, before := c.limits(host), unchanged.limits(host)
	if l.Memory != before.Memory || l.Swap != before.Swap {
		changed |= PartMemory
	}
	if l.Quota != before.Quota {
		changed |= PartCPU
	}
	if l.Weight != before.Weight {
		changed |= PartWeight
	}
	return l, changed, nil
}

func (c *Conf) limits(host Host) (l Limits) {
	number := func(key string) float64 {
		text, _ := c.Get(key)
		n, err := strconv.ParseFloat(text, 64)
		if err != nil || !(n > 0) || n > 1<<40 {
			return 0 // Proxmox's tools refuse it, or it says that there is no limit
		}
		return n
	}
	l.Memory, l.Swap = int64(number("memory"))*mib, int64(number("swap"))*mib
	if l.Memory >= host.Memory {
		l.Memory = 0
	}
	if l.Memory == 0 || l.Swap > 0 && l.Swap >= host.Swap {
		l.Swap = -1
	}
	// Proxmox gives a container that many of the host's cores, and of their time not more than the limit.
	cpus := number("cpulimit")
	if cores := number("cores"); cores > 0 && (cpus == 0 || cores < cpus) {
		cpus = cores
	}
	if cpus > 0 {
		l.Period = 100_000
		l.Quota = max(int64(math.Round(cpus*float64(l.Period))), 1000) // the kernel's least
	}
	l.Weight = uint64(number("cpuunits"))
	return l
}

// notTag is what a tag may not hold.
var notTag = regexp.MustCompile(`[^a-z0-9_+.-]+`)

func (c *Container) tags() []string {
	all := []string{Tag}
	for _, t := range []struct{ kind, name string }{{"ns", c.Namespace}, {"pod", c.Pod}} {
		if name := strings.Trim(notTag.ReplaceAllString(strings.ToLower(t.name), "-"), "-"); name != "" {
			all = append(all, t.kind+"-"+name)
		}
	}
	return all
}

// describe is the text of the GUI's notes.
func (c *Container) describe(left []string) string {
	var b strings.Builder
	line := func(name, value string) {
		if value != "" {
			// A value with line feeds is no text that could be told from the next line.
			fmt.Fprintf(&b, "%s: %s\n\n", name, strings.Join(strings.Fields(value), " "))
		}
	}
	b.WriteString("Managed by containerd: start, stop and remove it there.\n\n")
	line("container", c.Namespace+"/"+c.ID)
	line("pod", strings.TrimPrefix(path.Join(c.PodNamespace, c.Pod), "."))
	line("image", c.Image)
	line("digest", c.Digest)
	line("not in this configuration", strings.Join(left, ", "))
	text := b.String()
	if len(text) > maxDescription {
		text = strings.ToValidUTF8(text[:maxDescription], "")
	}
	return text
}

// HostnameOf makes a DNS name of any container id. Two ids do not share one: what
// had to be changed bears a part of its hash.
func HostnameOf(id string) string {
	name := strings.Trim(notHost.ReplaceAllString(id, "-"), "-")
	if name == id && len(name) <= maxLabel {
		return name
	}
	sum := sha256.Sum256([]byte(id))
	hash := hex.EncodeToString(sum[:4])
	if len(name) > maxLabel-len(hash)-1 {
		name = name[:maxLabel-len(hash)-1]
	}
	if name = strings.Trim(name, "-"); name == "" {
		return "ct-" + hash
	}
	return name + "-" + hash
}

var notHost = regexp.MustCompile(`[^a-zA-Z0-9-]+`)

// Entrypoint writes an argv as Proxmox's property entrypoint, which goes to
// liblxc as it is: words between spaces, or between quotation marks, of which none is
// escaped (lxc_string_split_quoted); marks around the whole value are taken away first
// (confile.c, parse_line). ok is false for what cannot be said so.
func Entrypoint(args []string) (line string, ok bool) {
	var words []string
	for _, a := range args {
		switch {
		case strings.ContainsAny(a, "'\n\r\v\f"):
			return "", false
		case a != "" && !strings.ContainsAny(a, " \t\""):
			words = append(words, a)
		case !strings.Contains(a, `"`):
			words = append(words, `"`+a+`"`)
		default:
			return "", false
		}
	}
	line = strings.Join(words, " ")
	if len(words) == 0 || strings.HasPrefix(line, `"`) {
		return "", false
	}
	return line, true
}
