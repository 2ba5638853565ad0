package lxc

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/seccomp"
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
}

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

// quote makes one word of it for /bin/sh.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// The names liblxc has for the namespaces of the spec.
var namespaceKeys = map[specs.LinuxNamespaceType]string{
	specs.PIDNamespace:     "pid",
	specs.NetworkNamespace: "net",
	specs.IPCNamespace:     "ipc",
	specs.UTSNamespace:     "uts",
	specs.CgroupNamespace:  "cgroup",
	specs.MountNamespace:   "mnt",
}

// translate turns the spec into what LXC and pve-init get. name is the LXC
// name, hook the host path of pve-init. Errors name the field of the spec.
func translate(o CreateOptions, name, hook string) (*translation, error) {
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
	// liblxc gives it to a shell, after "exec ". The # hides liblxc's arguments,
	// and keeps liblxc from taking the outermost quotes for its own.
	c.set("lxc.hook.mount", quote(hook)+" mount "+quote(filepath.Join(stateDir(o.Bundle), mountsFile))+" #")
	// A container whose init called reboot(2) or died of SIGHUP has ended: the
	// failing hook keeps liblxc from starting it anew.
	c.set("lxc.hook.post-stop", `test "$LXC_TARGET" != reboot #`)
	c.set("lxc.init.cmd", "/proc/self/fd/4 init 3")
	if filter != nil && filter.Notify {
		c.set("lxc.environment", quietInit)
	}

	own := map[specs.LinuxNamespaceType]bool{}
	present := map[specs.LinuxNamespaceType]bool{}
	for i, ns := range spec.Linux.Namespaces {
		key, known := namespaceKeys[ns.Type]
		field := fmt.Sprintf("linux.namespaces[%d]", i)
		switch {
		case ns.Type == specs.UserNamespace || ns.Type == specs.TimeNamespace:
			return nil, unsupported(field + " of type " + string(ns.Type))
		case !known:
			return nil, fmt.Errorf("%s.type %q: %w", field, ns.Type, errdefs.ErrInvalidArgument)
		case present[ns.Type]:
			return nil, fmt.Errorf("%s: %s is there twice: %w", field, ns.Type, errdefs.ErrInvalidArgument)
		}
		present[ns.Type] = true
		if ns.Path == "" {
			own[ns.Type] = true
			continue
		}
		if ns.Type == specs.MountNamespace {
			return nil, unsupported(field + ".path of a mount namespace")
		}
		if !filepath.IsAbs(ns.Path) {
			return nil, fmt.Errorf("%s.path %q is not absolute: %w", field, ns.Path, errdefs.ErrInvalidArgument)
		}
		c.set("lxc.namespace.share."+key, ns.Path)
	}
	if !own[specs.MountNamespace] {
		return nil, fmt.Errorf("linux.namespaces: a container without a mount namespace cannot be: %w", errdefs.ErrInvalidArgument)
	}
	// What is not listed stays the host's; without the list liblxc would choose,
	// and lxc.namespace.keep would bring a user namespace along.
	var clone []string
	for _, ns := range []specs.LinuxNamespaceType{specs.MountNamespace, specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.CgroupNamespace} {
		if own[ns] {
			clone = append(clone, namespaceKeys[ns])
		}
	}
	c.set("lxc.namespace.clone", strings.Join(clone, " "))
	switch {
	case own[specs.NetworkNamespace]:
		c.set("lxc.net.0.type", "empty")
	case !present[specs.NetworkNamespace]:
		c.set("lxc.net.0.type", "none")
	}
	t.sharedPID = !own[specs.PIDNamespace]
	if spec.Hostname != "" {
		if !own[specs.UTSNamespace] && !present[specs.UTSNamespace] {
			return nil, fmt.Errorf("hostname %q needs a uts namespace: %w", spec.Hostname, errdefs.ErrInvalidArgument)
		}
		if own[specs.UTSNamespace] {
			if len(spec.Hostname) > 64 {
				return nil, fmt.Errorf("hostname %q is longer than 64 bytes: %w", spec.Hostname, errdefs.ErrInvalidArgument)
			}
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
		ErrorFile:       filepath.Join(stateDir(o.Bundle), errorFile),
		Devices:         spec.Linux.Devices,
		Sysctl:          spec.Linux.Sysctl,
		Propagation:     spec.Linux.RootfsPropagation,
		Terminal:        spec.Process.Terminal,
		CgroupNamespace: own[specs.CgroupNamespace],
		MaskedPaths:     spec.Linux.MaskedPaths,
		ReadonlyPaths:   spec.Linux.ReadonlyPaths,
		ReadonlyRoot:    spec.Root != nil && spec.Root.Readonly,
		Cwd:             spec.Process.Cwd,
		ProcTemporary:   true,
	}
	for _, m := range spec.Mounts {
		if m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
			if !filepath.IsAbs(m.Source) {
				m.Source = filepath.Join(o.Bundle, m.Source)
			}
		}
		if filepath.Clean("/"+m.Destination) == "/proc" {
			t.mounts.ProcTemporary = false
		}
		t.mounts.Mounts = append(t.mounts.Mounts, m)
	}

	if t.process, err = processPlan(spec.Process, spec); err != nil {
		return nil, err
	}
	t.process.Seccomp = filter
	t.process.Domainname = spec.Domainname
	t.process.UnmountProc = t.mounts.ProcTemporary
	t.process.Finish = &plan.Mounts{
		Mounts:      t.mounts.Mounts,
		Propagation: spec.Linux.RootfsPropagation,
	}
	if spec.Hooks != nil && len(spec.Hooks.StartContainer) > 0 {
		t.process.Hooks = spec.Hooks.StartContainer
		t.process.HookState, err = json.Marshal(specs.State{
			Version: specs.Version, ID: o.ID, Status: specs.StateCreated, Bundle: o.Bundle, Annotations: spec.Annotations,
		})
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

// place finds the container's cgroup.
func (t *translation) place(path, name string, withSystemd bool) (err error) {
	if withSystemd {
		if t.unit, err = parseUnit(path, name); err != nil {
			return err
		}
		t.cgroup, err = t.unit.cgroup()
		return err
	}
	switch {
	case path == "":
		t.cgroup = "/containerd-pve/containers/" + name
	case strings.Count(path, ":") == 2:
		return invalid("linux.cgroupsPath %q is for systemd's cgroup driver: set the runtime option SystemdCgroup", path)
	default:
		t.cgroup = filepath.Clean("/" + path)
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
	l := spec.Linux
	switch {
	case len(l.UIDMappings) > 0 || len(l.GIDMappings) > 0:
		return unsupported("linux.uidMappings")
	case len(l.TimeOffsets) > 0:
		return unsupported("linux.timeOffsets")
	case l.MountLabel != "":
		return unsupported("linux.mountLabel")
	case len(l.NetDevices) > 0:
		return unsupported("linux.netDevices")
	case spec.Hooks != nil && len(spec.Hooks.CreateContainer) > 0:
		return unsupported("hooks.createContainer")
	}
	return checkPersonality(l.Personality)
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
