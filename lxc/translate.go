package lxc

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/seccomp"
	"github.com/containerd-pve/containerd-pve/lxc/tree"
)

// translation is what a spec becomes. It is made by a pure function.
type translation struct {
	config    string // the LXC configuration file
	mounts    *plan.Mounts
	process   *plan.Process
	cgroup    string
	unit      *unit // with systemd's cgroup driver
	resources *cgroups.Resources
	sharedPID bool
	// user is set with a user namespace, time with a time namespace.
	user *userNamespace
	time *timeNamespace
	// cgroupNS is the path of a cgroup namespace that pve-init has to enter.
	cgroupNS string
}

// userNamespace is the container's; without a path LXC makes it.
type userNamespace struct {
	path     string
	uid, gid []specs.LinuxIDMapping
}

// timeNamespace is the container's; without a path it is made with the offsets.
type timeNamespace struct {
	path    string
	offsets map[string]specs.LinuxTimeOffset
}

// enter are the namespaces of an exec that only a process of one thread can enter.
func (t *translation) enter() (flags uintptr) {
	if t.user != nil {
		flags |= unix.CLONE_NEWUSER
	}
	if t.time != nil {
		flags |= unix.CLONE_NEWTIME
	}
	return flags
}

// The descriptors that lxc-start and all it starts inherit.
const (
	syncFD = iota + 3
	programFD
	hookFD
	cgroupFD
)

// config writes LXC's key = value lines.
type config struct {
	b   strings.Builder
	err error
}

// set adds a line. liblxc has no escapes, and takes a pair of quotes around a
// value away: what cannot stand on one line as it is would be another
// configuration, so it is refused.
func (c *config) set(key, value string) {
	quoted := len(value) > 1 && (value[0] == '\'' || value[0] == '"') && value[len(value)-1] == value[0]
	if strings.ContainsFunc(value, unicode.IsControl) || strings.TrimSpace(value) != value || value == "" || quoted {
		c.err = errors.Join(c.err, fmt.Errorf("%s cannot be set to %q: %w", key, value, errdefs.ErrInvalidArgument))
		return
	}
	fmt.Fprintf(&c.b, "%s = %s\n", key, value)
}

// veth adds an interface (lxc.container.conf(5), NETWORK).
func (c *config) veth(index int, v Veth) {
	set := func(key, value string) { c.set(fmt.Sprintf("lxc.net.%d.%s", index, key), value) }
	set("type", "veth")
	set("link", v.Bridge)
	set("veth.pair", v.Host)
	set("name", v.Name)
	set("flags", "up")
	if v.HWAddr != "" {
		set("hwaddr", v.HWAddr)
	}
	if v.MTU != 0 {
		set("mtu", strconv.Itoa(v.MTU))
	}
	if v.VLAN != 0 {
		set("veth.vlan.id", strconv.Itoa(v.VLAN))
	}
	for _, a := range v.Addresses {
		set(map[bool]string{true: "ipv4", false: "ipv6"}[a.Addr().Is4()]+".address", a.String())
	}
	if v.GW4.IsValid() {
		set("ipv4.gateway", v.GW4.String())
	}
	if v.GW6.IsValid() {
		set("ipv6.gateway", v.GW6.String())
	}
}

// The names liblxc has for the namespaces of the spec.
var namespaceKeys = map[specs.LinuxNamespaceType]string{
	specs.PIDNamespace:     "pid",
	specs.NetworkNamespace: "net",
	specs.IPCNamespace:     "ipc",
	specs.UTSNamespace:     "uts",
	specs.CgroupNamespace:  "cgroup",
	specs.MountNamespace:   "mnt",
	specs.UserNamespace:    "user",
	specs.TimeNamespace:    "time",
}

// translate turns the spec into what LXC and pve-init get. name is the LXC
// name. Errors name the field of the spec.
func translate(o CreateOptions, name string) (*translation, error) {
	spec := o.Spec
	if err := check(spec); err != nil {
		return nil, err
	}
	t := &translation{}
	if err := t.place(spec.Linux.CgroupsPath, name, o.SystemdCgroup); err != nil {
		return nil, err
	}
	var err error
	if t.resources, err = resources(spec.Linux.Resources); err != nil {
		return nil, err
	}

	filter, err := seccomp.Compile(spec.Linux.Seccomp)
	if err != nil {
		return nil, err
	}
	var c config
	c.set("lxc.rootfs.path", "dir:"+o.Rootfs)
	c.set("lxc.autodev", "0")
	c.set("lxc.console.path", "none")
	c.set("lxc.tty.max", "0")
	c.set("lxc.pty.max", "0")
	// pve-init enters the spec's profile when it executes the entrypoint.
	c.set("lxc.apparmor.profile", "unconfined")
	c.set("lxc.signal.halt", strconv.Itoa(cmp.Or(o.StopSignal, int(unix.SIGTERM))))
	// A container whose init called reboot(2) or died of SIGHUP has ended: the
	// failing hook keeps liblxc from starting it anew. liblxc puts "exec" before
	// it, so it is no builtin of the shell's.
	c.set("lxc.hook.post-stop", `/usr/bin/test "$LXC_TARGET" != reboot #`)
	if filter != nil && filter.Notify {
		c.set("lxc.environment", quietInit)
	}

	own := map[specs.LinuxNamespaceType]bool{}
	present := map[specs.LinuxNamespaceType]bool{}
	shares := false
	for i, ns := range spec.Linux.Namespaces {
		key, known := namespaceKeys[ns.Type]
		field := fmt.Sprintf("linux.namespaces[%d]", i)
		switch {
		case !known:
			return nil, fmt.Errorf("%s.type %q: %w", field, ns.Type, errdefs.ErrInvalidArgument)
		case present[ns.Type]:
			return nil, fmt.Errorf("%s: %s is there twice: %w", field, ns.Type, errdefs.ErrInvalidArgument)
		case ns.Path != "" && !filepath.IsAbs(ns.Path):
			return nil, fmt.Errorf("%s.path %q is not absolute: %w", field, ns.Path, errdefs.ErrInvalidArgument)
		case ns.Path != "" && ns.Type == specs.MountNamespace:
			return nil, unsupported(field + ".path of a mount namespace")
		}
		present[ns.Type] = true
		own[ns.Type] = ns.Path == ""
		switch ns.Type {
		case specs.UserNamespace:
			t.user = &userNamespace{path: ns.Path, uid: spec.Linux.UIDMappings, gid: spec.Linux.GIDMappings}
		case specs.TimeNamespace:
			// liblxc knows seconds or nanoseconds, and cannot join one: lxc-start
			// runs in it.
			t.time = &timeNamespace{path: ns.Path, offsets: spec.Linux.TimeOffsets}
			continue
		case specs.CgroupNamespace:
			// liblxc makes a new one when it joins any other namespace.
			t.cgroupNS = ns.Path
			continue
		}
		if ns.Path != "" {
			shares = true
			c.set("lxc.namespace.share."+key, ns.Path)
		}
	}
	if !own[specs.MountNamespace] {
		return nil, fmt.Errorf("linux.namespaces: a container without a mount namespace cannot be: %w", errdefs.ErrInvalidArgument)
	}
	if shares && !present[specs.CgroupNamespace] && t.user == nil {
		t.cgroupNS = "/proc/self/ns/cgroup"
	}
	if err := t.mapIDs(&c, spec.Linux); err != nil {
		return nil, err
	}
	if err := t.checkTime(spec.Linux); err != nil {
		return nil, err
	}
	if err := checkNetDevices(spec.Linux.NetDevices, present[specs.NetworkNamespace]); err != nil {
		return nil, err
	}
	inherited := ""
	if t.cgroupNS != "" {
		inherited = fmt.Sprintf(" %d", cgroupFD)
	}
	// liblxc gives it to a shell, after "exec ". The # hides liblxc's arguments.
	c.set("lxc.hook.mount", fmt.Sprintf("/proc/self/fd/%d mount %d%s #", programFD, hookFD, inherited))
	c.set("lxc.init.cmd", fmt.Sprintf("/proc/self/fd/%d init %d%s", programFD, syncFD, inherited))
	// What is not listed stays the host's; without the list liblxc would choose,
	// and lxc.namespace.keep would bring a user namespace along.
	var clone []string
	for _, ns := range []specs.LinuxNamespaceType{specs.UserNamespace, specs.MountNamespace, specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.CgroupNamespace} {
		if own[ns] {
			clone = append(clone, namespaceKeys[ns])
		}
	}
	c.set("lxc.namespace.clone", strings.Join(clone, " "))
	switch {
	case own[specs.NetworkNamespace]:
		c.set("lxc.net.0.type", "empty")
		c.set("lxc.net.0.flags", "up") // of lo, as runc has it
		for i, v := range o.Interfaces {
			c.veth(i+1, v)
		}
	case !present[specs.NetworkNamespace]:
		c.set("lxc.net.0.type", "none")
	}
	if len(o.Interfaces) > 0 && !own[specs.NetworkNamespace] {
		return nil, fmt.Errorf("network interfaces need a network namespace of the container's own: %w", errdefs.ErrInvalidArgument)
	}
	t.sharedPID = !own[specs.PIDNamespace]
	if spec.Hostname != "" {
		if !own[specs.UTSNamespace] && !present[specs.UTSNamespace] {
			return nil, fmt.Errorf("hostname %q needs a uts namespace: %w", spec.Hostname, errdefs.ErrInvalidArgument)
		}
		if len(spec.Hostname) > 64 {
			return nil, fmt.Errorf("hostname %q is longer than 64 bytes: %w", spec.Hostname, errdefs.ErrInvalidArgument)
		}
		if own[specs.UTSNamespace] {
			c.set("lxc.uts.name", spec.Hostname)
		}
	}
	if spec.Domainname != "" && !present[specs.UTSNamespace] {
		return nil, fmt.Errorf("domainname %q needs a uts namespace: %w", spec.Domainname, errdefs.ErrInvalidArgument)
	}
	c.set("lxc.cgroup.dir.container", strings.TrimPrefix(t.cgroup, "/")+"/"+payload)
	c.set("lxc.cgroup.dir.monitor", strings.TrimPrefix(monitorCgroup(name), "/"))
	c.set("lxc.cgroup.dir.monitor.pivot", "containerd-pve/pivot")
	if c.err != nil {
		return nil, c.err
	}
	t.config = c.b.String()

	if err := checkSysctl(spec.Linux.Sysctl, present); err != nil {
		return nil, err
	}
	t.mounts = &plan.Mounts{
		Sysctl:        spec.Linux.Sysctl,
		Terminal:      spec.Process.Terminal,
		MaskedPaths:   spec.Linux.MaskedPaths,
		ReadonlyPaths: spec.Linux.ReadonlyPaths,
		ReadonlyRoot:  spec.Root != nil && spec.Root.Readonly,
		Cwd:           spec.Process.Cwd,
		ProcTemporary: true,
	}
	for _, d := range spec.Linux.Devices {
		t.mounts.Devices = append(t.mounts.Devices, plan.Device{LinuxDevice: d})
	}
	finish := &plan.Finish{Propagation: spec.Linux.RootfsPropagation}
	for i, m := range spec.Mounts {
		options := tree.Parse(&m)
		if options.Bind && !filepath.IsAbs(m.Source) {
			m.Source = filepath.Join(o.Bundle, m.Source)
		}
		if m.Type == "cgroup" && !present[specs.CgroupNamespace] && !options.Bind {
			// A second mount of cgroup2 from the host's cgroup namespace would
			// change the options of the host's own.
			m.Type, m.Source = "bind", cgroupRoot
		}
		if options.IDMap {
			if err := t.checkMapping(&m); err != nil {
				return nil, fmt.Errorf("mounts[%d] (%s): %w", i, m.Destination, err)
			}
		}
		if spec.Linux.MountLabel != "" && !options.Bind && m.Type != "proc" && m.Type != "sysfs" && !strings.HasPrefix(m.Type, "cgroup") {
			m.Options = append(slices.Clone(m.Options), "context="+spec.Linux.MountLabel)
		}
		if filepath.Clean("/"+m.Destination) == "/proc" {
			t.mounts.ProcTemporary = false
		}
		t.mounts.Mounts = append(t.mounts.Mounts, plan.Mount{Mount: m})
		if len(options.Propagation) > 0 {
			finish.Mounts = append(finish.Mounts, m)
		}
	}

	if t.process, err = processPlan(spec.Process, spec); err != nil {
		return nil, err
	}
	t.process.Seccomp = filter
	t.process.Domainname = spec.Domainname
	t.process.UnmountProc = t.mounts.ProcTemporary
	t.process.Finish = finish
	if present[specs.UTSNamespace] && !own[specs.UTSNamespace] {
		t.process.Hostname = spec.Hostname
	}
	if spec.Hooks != nil {
		if err := checkHooks(spec.Hooks); err != nil {
			return nil, err
		}
		// The process has another pid in its own namespace: it fills that in.
		creating := ociState(&o, specs.StateCreating)
		created := ociState(&o, specs.StateCreated)
		t.mounts.Hooks, t.mounts.State = spec.Hooks.CreateContainer, creating
		t.process.Hooks, t.process.State = spec.Hooks.StartContainer, created
	}
	return t, nil
}

// place finds the container's cgroup. A path of systemd's form asks for its driver
// by itself: nerdctl gives the option to runc only.
func (t *translation) place(path, name string, withSystemd bool) (err error) {
	if withSystemd || strings.Count(path, ":") == 2 {
		if t.unit, err = parseUnit(path, name); err != nil {
			return err
		}
		t.cgroup, err = t.unit.cgroup()
		return err
	}
	t.cgroup = filepath.Clean("/" + path)
	if path == "" {
		t.cgroup = "/containerd-pve/containers/" + name
	}
	if t.cgroup == "/" {
		return invalid("linux.cgroupsPath %q is the root", path)
	}
	return nil
}

// check refuses what no part of us can apply.
func check(spec *specs.Spec) error {
	switch {
	case spec == nil:
		return fmt.Errorf("no spec: %w", errdefs.ErrInvalidArgument)
	case spec.Process == nil:
		return fmt.Errorf("process is missing: %w", errdefs.ErrInvalidArgument)
	case spec.Linux == nil:
		return fmt.Errorf("linux is missing: %w", errdefs.ErrInvalidArgument)
	}
	return checkPersonality(spec.Linux.Personality)
}

// maxMappings is the kernel's limit for each of the two.
const maxMappings = 340

// mapIDs writes the user namespace's mappings.
func (t *translation) mapIDs(c *config, l *specs.Linux) error {
	if t.user == nil {
		if len(l.UIDMappings)+len(l.GIDMappings) > 0 {
			return fmt.Errorf("linux.uidMappings: they need a user namespace: %w", errdefs.ErrInvalidArgument)
		}
		return nil
	}
	for _, m := range []struct {
		field, key string
		list       []specs.LinuxIDMapping
	}{{"linux.uidMappings", "u", t.user.uid}, {"linux.gidMappings", "g", t.user.gid}} {
		if len(m.list) > maxMappings {
			return fmt.Errorf("%s: more than %d: %w", m.field, maxMappings, errdefs.ErrInvalidArgument)
		}
		if _, ok := hostID(m.list, 0); !ok {
			// The container is made by its own root.
			return fmt.Errorf("%s: id 0 of the container is not mapped: %w", m.field, errdefs.ErrInvalidArgument)
		}
		for i, r := range m.list {
			if r.Size == 0 {
				return fmt.Errorf("%s[%d].size is 0: %w", m.field, i, errdefs.ErrInvalidArgument)
			}
			c.set("lxc.idmap", fmt.Sprintf("%s %d %d %d", m.key, r.ContainerID, r.HostID, r.Size))
		}
	}
	return nil
}

// hostID is what an id of the container is on the host.
func hostID(mappings []specs.LinuxIDMapping, id uint32) (uint32, bool) {
	for _, m := range mappings {
		if id >= m.ContainerID && id-m.ContainerID < m.Size {
			return m.HostID + (id - m.ContainerID), true
		}
	}
	return 0, false
}

// checkMapping refuses an id-mapped mount without a mapping.
func (t *translation) checkMapping(m *specs.Mount) error {
	switch {
	case len(m.UIDMappings) > 0 && len(m.GIDMappings) > 0:
		return nil
	case len(m.UIDMappings)+len(m.GIDMappings) > 0:
		return fmt.Errorf("uidMappings and gidMappings must be given both: %w", errdefs.ErrInvalidArgument)
	case t.user == nil:
		return fmt.Errorf("option idmap needs uidMappings, or a user namespace: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func (t *translation) checkTime(l *specs.Linux) error {
	if len(l.TimeOffsets) > 0 && (t.time == nil || t.time.path != "") {
		return fmt.Errorf("linux.timeOffsets: they need a time namespace of the container's own: %w", errdefs.ErrInvalidArgument)
	}
	for clock, o := range l.TimeOffsets {
		if clock != "monotonic" && clock != "boottime" {
			return fmt.Errorf("linux.timeOffsets %q is not a clock, monotonic or boottime is: %w", clock, errdefs.ErrInvalidArgument)
		}
		if o.Nanosecs >= 1e9 {
			return fmt.Errorf("linux.timeOffsets %s.nanosecs is a second or more: %w", clock, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// checkHooks refuses what the runtime spec forbids of a hook.
func checkHooks(h *specs.Hooks) error {
	for kind, list := range map[string][]specs.Hook{
		//nolint:staticcheck // prestart is deprecated and still used
		"prestart": h.Prestart, "createRuntime": h.CreateRuntime, "createContainer": h.CreateContainer,
		"startContainer": h.StartContainer, "poststart": h.Poststart, "poststop": h.Poststop,
	} {
		for i := range list {
			if !filepath.IsAbs(list[i].Path) {
				return fmt.Errorf("hooks.%s[%d].path %q is not absolute: %w", kind, i, list[i].Path, errdefs.ErrInvalidArgument)
			}
			if t := list[i].Timeout; t != nil && *t <= 0 {
				return fmt.Errorf("hooks.%s[%d].timeout %d is not greater than zero: %w", kind, i, *t, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// ociState is the container's state as hooks get it, without a pid.
func ociState(o *CreateOptions, status specs.ContainerState) *specs.State {
	return &specs.State{Version: specs.Version, ID: o.ID, Status: status, Bundle: o.Bundle, Annotations: o.Spec.Annotations}
}

// Sysctls of the ipc namespace besides fs.mqueue.* (man 7 ipc_namespaces).
var ipcSysctls = []string{"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced"}

// checkSysctl refuses keys that are not the container's own: they would change the host.
func checkSysctl(sysctl map[string]string, has map[specs.LinuxNamespaceType]bool) error {
	for key := range sysctl {
		dotted := strings.ReplaceAll(key, "/", ".")
		ns := specs.LinuxNamespaceType("")
		switch {
		case strings.Contains(dotted, ".."), strings.ContainsAny(key, "\x00\n"):
		case slices.Contains(ipcSysctls, dotted), strings.HasPrefix(dotted, "fs.mqueue."):
			ns = specs.IPCNamespace
		case strings.HasPrefix(dotted, "net."):
			ns = specs.NetworkNamespace
		case dotted == "kernel.domainname":
			ns = specs.UTSNamespace
		}
		if ns == "" {
			return fmt.Errorf("linux.sysctl %q is not in a namespace and would change the host: %w", key, errdefs.ErrInvalidArgument)
		}
		if !has[ns] {
			return fmt.Errorf("linux.sysctl %q needs a %s namespace: %w", key, ns, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// processPlan is the part that init and exec have in common.
func processPlan(p *specs.Process, spec *specs.Spec) (*plan.Process, error) {
	if p == nil || len(p.Args) == 0 {
		return nil, fmt.Errorf("process.args is empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkProcess(p); err != nil {
		return nil, err
	}
	for i, s := range p.Args {
		if strings.Contains(s, "\x00") {
			return nil, fmt.Errorf("process.args[%d] holds a NUL: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	for i, s := range p.Env {
		if strings.Contains(s, "\x00") {
			return nil, fmt.Errorf("process.env[%d] holds a NUL: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	cwd := p.Cwd
	if cwd == "" {
		cwd = "/"
	}
	if !filepath.IsAbs(cwd) {
		return nil, fmt.Errorf("process.cwd %q is not absolute: %w", cwd, errdefs.ErrInvalidArgument)
	}
	out := &plan.Process{
		Args: p.Args, Env: p.Env, Cwd: cwd,
		UID: p.User.UID, GID: p.User.GID, Groups: p.User.AdditionalGids, Umask: p.User.Umask,
		Terminal:        p.Terminal,
		Capabilities:    p.Capabilities,
		Rlimits:         p.Rlimits,
		NoNewPrivileges: p.NoNewPrivileges,
		OOMScoreAdj:     p.OOMScoreAdj,
		AppArmorProfile: p.ApparmorProfile,
		SELinuxLabel:    p.SelinuxLabel,
		Scheduler:       p.Scheduler,
		IOPriority:      p.IOPriority,
		Personality:     spec.Linux.Personality,
	}
	var err error
	if out.MemoryPolicy, err = memoryPolicy(spec.Linux.MemoryPolicy); err != nil {
		return nil, err
	}
	if p.ConsoleSize != nil {
		out.Rows, out.Columns = uint16(p.ConsoleSize.Height), uint16(p.ConsoleSize.Width)
	}
	return out, nil
}
