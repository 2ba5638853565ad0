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

// Options of a task.
type Options struct {
	// LXC says where LXC's things are.
	LXC lxc.Config
	// SystemdCgroup asks for systemd's cgroup driver.
	SystemdCgroup bool
	// ProxmoxRoot is where the cluster's filesystem of Proxmox is; /etc/pve if empty.
	ProxmoxRoot string
	// Registry is the daemon's socket for it; /run/containerd-pve/registry.sock if empty.
	Registry string
	// IOUID and IOGID own the container's stdio pipes.
	IOUID, IOGID int
}

// file is the TOML of [plugins.….runtimes.pve.options] or of the file that
// ConfigPath names.
type file struct {
	// LXCPath is the lxcpath.
	LXCPath string
	// LXCStart is the lxc-start program.
	LXCStart string
	// Init is the pve-init program.
	Init string
	// SystemdCgroup asks for systemd's cgroup driver.
	SystemdCgroup bool
	// ProxmoxRoot is where the cluster's filesystem of Proxmox is.
	ProxmoxRoot string
	// Registry is the daemon's socket for it.
	Registry string
}

// Parse takes nil, runc.v1.Options or runtimeoptions.v1.Options.
// InvalidArgument names an unknown key; NotImplemented one that cannot be had.
func Parse(a typeurl.Any) (Options, error) {
	if a == nil || a.GetTypeUrl() == "" {
		return Options{}, nil
	}
	v, err := typeurl.UnmarshalAny(a)
	if err != nil {
		return Options{}, fmt.Errorf("runtime options of type %q: %w: %w", a.GetTypeUrl(), err, errdefs.ErrInvalidArgument)
	}
	switch o := v.(type) {
	case *runcoptions.Options:
		return fromRunc(o)
	case *runtimeoptions.Options:
		body, name := o.ConfigBody, "runtime options"
		if o.ConfigPath != "" {
			name = o.ConfigPath
			if body, err = os.ReadFile(o.ConfigPath); err != nil {
				return Options{}, fmt.Errorf("runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
			}
		}
		return fromTOML(name, body)
	}
	return Options{}, fmt.Errorf("runtime options of type %q are not for this runtime: %w", a.GetTypeUrl(), errdefs.ErrInvalidArgument)
}

func fromRunc(o *runcoptions.Options) (Options, error) {
	for name, set := range map[string]bool{
		"no_pivot_root": o.NoPivotRoot, "binary_name": o.BinaryName != "", "root": o.Root != "",
	} {
		if set {
			return Options{}, fmt.Errorf("runtime option %s is runc's own: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	return Options{SystemdCgroup: o.SystemdCgroup, IOUID: int(o.IoUid), IOGID: int(o.IoGid)}, nil
}

func fromTOML(name string, body []byte) (Options, error) {
	var f file
	d := toml.NewDecoder(strings.NewReader(string(body)))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			var keys []string
			for _, e := range strict.Errors {
				keys = append(keys, strings.Join(e.Key(), "."))
			}
			return Options{}, fmt.Errorf("%s: unknown key %s (known: LXCPath, LXCStart, Init, SystemdCgroup, ProxmoxRoot, Registry): %w", name, strings.Join(keys, ", "), errdefs.ErrInvalidArgument)
		}
		return Options{}, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return Options{SystemdCgroup: f.SystemdCgroup, ProxmoxRoot: f.ProxmoxRoot, Registry: f.Registry, LXC: lxc.Config{Path: f.LXCPath, Start: f.LXCStart, Init: f.Init}}, nil
}
