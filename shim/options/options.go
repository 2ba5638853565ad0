// Package options reads the runtime options of a task. It owns what they may
// say and refuses by name what it does not know.
package options

import (
	"errors"
	"fmt"
	"os"
	"strings"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/pelletier/go-toml/v2"

	"github.com/containerd-pve/containerd-pve/lxc"
)

// File is read for every task, if it is there: clients as nerdctl and CRI have no
// words for what is ours.
const File = "/etc/containerd-pve/runtime.toml"

// Policy is what happens on a node of Proxmox if a container cannot be made one of Proxmox's.
type Policy string

// The policies.
const (
	Required   Policy = "required"    // it is not made; the default
	BestEffort Policy = "best-effort" // it runs without a VMID, and a warning says why
	Off        Policy = "off"         // no container is one of Proxmox's
)

// Options of a task.
type Options struct {
	// LXC says where LXC's things are.
	LXC lxc.Config
	// SystemdCgroup asks for systemd's cgroup driver.
	SystemdCgroup bool
	// Unprivileged gives every container a user namespace that does not say otherwise.
	Unprivileged bool
	// IdmapPassthrough has Proxmox's conf of an unprivileged container say that Proxmox is to map its volume by the mount, too.
	IdmapPassthrough bool
	// Register is Required if empty.
	Register Policy
	// ProxmoxDatabase is what makes a host a node of Proxmox; pve.Database if empty.
	ProxmoxDatabase string
	// Registry is the daemon's socket for it; registry.Address if empty.
	Registry string
	// IOUID and IOGID own the container's stdio pipes.
	IOUID, IOGID int
}

// file is the TOML of File, of [plugins.….runtimes.pve.options], or of the file
// that ConfigPath names.
type file struct {
	// LXCPath is the lxcpath.
	LXCPath string
	// LXCStart is the lxc-start program.
	LXCStart string
	// Init is the pve-init program.
	Init string
	// SystemdCgroup asks for systemd's cgroup driver.
	SystemdCgroup bool
	// Unprivileged gives every container a user namespace.
	Unprivileged bool
	// IdmapPassthrough writes idmap=passthrough into Proxmox's confs of unprivileged containers.
	IdmapPassthrough bool
	// Register is required, best-effort or off.
	Register Policy
	// ProxmoxDatabase is the file of Proxmox's cluster filesystem; a host with it is a node.
	ProxmoxDatabase string
	// Registry is the daemon's socket for it.
	Registry string
}

// Parse takes nil, runc.v1.Options or runtimeoptions.v1.Options, which go before
// what is in the file defaults, if there is one. InvalidArgument names an
// unknown key; NotImplemented one that cannot be had.
func Parse(a typeurl.Any, defaults string) (Options, error) {
	var f file
	body, err := os.ReadFile(defaults)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return Options{}, fmt.Errorf("runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := f.read(defaults, body); err != nil {
		return Options{}, err
	}
	if a == nil || a.GetTypeUrl() == "" {
		return f.options(), nil
	}
	v, err := typeurl.UnmarshalAny(a)
	if err != nil {
		return Options{}, fmt.Errorf("runtime options of type %q: %w: %w", a.GetTypeUrl(), err, errdefs.ErrInvalidArgument)
	}
	switch o := v.(type) {
	case *runcoptions.Options:
		return fromRunc(o, f.options())
	case *runtimeoptions.Options:
		body, name := o.ConfigBody, "runtime options"
		if o.ConfigPath != "" {
			name = o.ConfigPath
			if body, err = os.ReadFile(o.ConfigPath); err != nil {
				return Options{}, fmt.Errorf("runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
			}
		}
		if err := f.read(name, body); err != nil {
			return Options{}, err
		}
		return f.options(), nil
	}
	return Options{}, fmt.Errorf("runtime options of type %q are not for this runtime: %w", a.GetTypeUrl(), errdefs.ErrInvalidArgument)
}

// fromRunc takes over what is set: its messages do not tell false from unset.
func fromRunc(o *runcoptions.Options, defaults Options) (Options, error) {
	for name, set := range map[string]bool{
		"no_pivot_root": o.NoPivotRoot, "binary_name": o.BinaryName != "", "root": o.Root != "",
	} {
		if set {
			return Options{}, fmt.Errorf("runtime option %s is runc's own: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	defaults.SystemdCgroup = defaults.SystemdCgroup || o.SystemdCgroup
	defaults.IOUID, defaults.IOGID = int(o.IoUid), int(o.IoGid)
	return defaults, nil
}

// read adds the TOML of body, from what is called name.
func (f *file) read(name string, body []byte) error {
	d := toml.NewDecoder(strings.NewReader(string(body)))
	d.DisallowUnknownFields()
	if err := d.Decode(f); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			var keys []string
			for _, e := range strict.Errors {
				keys = append(keys, strings.Join(e.Key(), "."))
			}
			return fmt.Errorf("%s: unknown key %s (known: LXCPath, LXCStart, Init, SystemdCgroup, Unprivileged, IdmapPassthrough, Register, ProxmoxDatabase, Registry): %w", name, strings.Join(keys, ", "), errdefs.ErrInvalidArgument)
		}
		return fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	switch f.Register {
	case "", Required, BestEffort, Off:
		return nil
	}
	return fmt.Errorf("%s: Register %q is none of %s, %s, %s: %w", name, f.Register, Required, BestEffort, Off, errdefs.ErrInvalidArgument)
}

func (f *file) options() Options {
	return Options{
		SystemdCgroup: f.SystemdCgroup, Unprivileged: f.Unprivileged, IdmapPassthrough: f.IdmapPassthrough, Register: f.Register,
		ProxmoxDatabase: f.ProxmoxDatabase, Registry: f.Registry,
		LXC: lxc.Config{Path: f.LXCPath, Start: f.LXCStart, Init: f.Init},
	}
}
