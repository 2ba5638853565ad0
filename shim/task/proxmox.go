package task

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/lxc/pve/registry"
	"github.com/containerd-pve/containerd-pve/shim/options"
)

// Annotations of a container.
const (
	annotationVMID = "io.containerd.pve.vmid" // asks for this VMID

	// Those of containerd's CRI plugin.
	criType         = "io.kubernetes.cri.container-type"
	criSandbox      = "sandbox"
	criPod          = "io.kubernetes.cri.sandbox-name"
	criPodNamespace = "io.kubernetes.cri.sandbox-namespace"
	criImage        = "io.kubernetes.cri.image-name"
)

// Where things are on a Proxmox node.
const (
	proxmoxPath = "/var/lib/lxc" // the lxcpath at which Proxmox looks for containers
)

// registrar is the registry of the node, which the daemon keeps.
type registrar interface {
	Register(ctx context.Context, want int, c pve.Container, disk registry.Disk) (registry.Registered, error)
	Update(ctx context.Context, namespace, id string, limits pve.Limits, parts pve.Parts) error
}

// proxmox is a container's being known to Proxmox. The zero value is of a
// container that is not.
type proxmox struct {
	registrar registrar
	namespace string
	id        string
	// idmap asks for the conf to say that the volume is mapped by its mount.
	idmap bool
	// stopSignal is what `pct shutdown` sends; 0: not known.
	stopSignal int

	mu     sync.Mutex
	limits pve.Limits
}

// register makes the container one of Proxmox's, if this is a node of it. It
// changes the mounts to where the disk is then, and the spec to the limits that an
// administrator gave the container, and answers its LXC name.
// A pod's sandbox is none: it has no disk and no process of the user's.
func (p *proxmox) register(ctx context.Context, spec *specs.Spec, nets []pve.Net, mounts []*types.Mount, rootfs string) (name string, err error) {
	want := 0
	if v, asked := spec.Annotations[annotationVMID]; asked {
		if want, err = strconv.Atoi(v); err != nil || want == 0 {
			return "", fmt.Errorf("annotation %s: %q is no VMID: %w", annotationVMID, v, errdefs.ErrInvalidArgument)
		}
	}
	disk := registry.Disk{Directory: rootfs}
	if len(mounts) == 1 && mounts[0].Type == "zfs" {
		disk.Dataset = mounts[0].Source
	}
	p.limits = limitsOf(spec)
	c := pve.Container{
		Namespace: p.namespace, ID: p.id, Image: spec.Annotations[criImage],
		Pod: spec.Annotations[criPod], PodNamespace: spec.Annotations[criPodNamespace],
		Arch: runtime.GOARCH, Hostname: spec.Hostname, Unprivileged: unprivileged(spec), Nets: nets, Limits: p.limits,
	}
	c.IdmapPassthrough = p.idmap && c.Unprivileged && mapped(mounts)
	if spec.Process != nil {
		c.Args, c.Env = spec.Process.Args, spec.Process.Env
	}
	a, err := p.registrar.Register(ctx, want, c, disk)
	if err != nil {
		return "", err
	}
	if a.Dataset != "" {
		mounts[0].Source = a.Dataset
	}
	p.stopSignal = a.StopSignal
	limit(spec, a.Limits, a.Changed)
	p.limits = limitsOf(spec)
	return strconv.Itoa(a.VMID), nil
}

// onProxmox registers a task's container, if this is a node of Proxmox and the
// policy says so, and answers its LXC name and where LXC has it; the name is empty for one that
// is none of Proxmox's.
func (t *taskState) onProxmox(ctx context.Context, spec *specs.Spec, nets []pve.Net, r *api.CreateTaskRequest, o *options.Options) (name string, config lxc.Config, err error) {
	if o.Register == options.Off || spec.Annotations[criType] == criSandbox || !pve.Installed(cmp.Or(o.ProxmoxDatabase, pve.Database)) {
		return "", o.LXC, nil
	}
	p := &t.proxmox
	p.registrar, p.namespace, p.id, p.idmap = registry.NewClient(cmp.Or(o.Registry, registry.Address)), t.service.namespace, t.id, o.IdmapPassthrough
	name, err = p.register(ctx, spec, nets, r.Rootfs, filepath.Join(t.bundle, "rootfs"))
	if err != nil {
		p.registrar = nil
		// What the caller has to mend is said under every policy.
		if o.Register != options.BestEffort || errdefs.IsInvalidArgument(err) || errdefs.IsAlreadyExists(err) || errdefs.IsFailedPrecondition(err) {
			return "", lxc.Config{}, err
		}
		log.G(ctx).WithError(err).Warnf("task %s: it runs without a VMID", t.id)
		return "", o.LXC, nil
	}
	config = o.LXC
	config.Path = cmp.Or(config.Path, proxmoxPath)
	return name, config, nil
}

// unprivileged says whether the container has a user namespace of its own.
func unprivileged(spec *specs.Spec) bool {
	return spec.Linux != nil && len(spec.Linux.UIDMappings) > 0
}

// mapped says whether a root file system is mapped by its mount: on the disk its files have the owners
// that the container sees.
func mapped(mounts []*types.Mount) bool {
	return len(mounts) == 1 && slices.ContainsFunc(mounts[0].Options, func(o string) bool { return strings.HasPrefix(o, "uidmap=") })
}

// limitsOf are the limits of a spec.
func limitsOf(spec *specs.Spec) pve.Limits {
	var l pve.Limits
	if spec.Linux != nil {
		change(&l, spec.Linux.Resources)
	}
	return l
}

// limit puts parts of limits into a spec, in the place of its own.
func limit(spec *specs.Spec, l pve.Limits, parts pve.Parts) {
	if parts == 0 {
		return
	}
	if spec.Linux == nil {
		spec.Linux = &specs.Linux{}
	}
	if spec.Linux.Resources == nil {
		spec.Linux.Resources = &specs.LinuxResources{}
	}
	r := spec.Linux.Resources
	if parts&pve.PartMemory != 0 {
		if r.Memory == nil {
			r.Memory = &specs.LinuxMemory{}
		}
		memory, both := int64(-1), int64(-1)
		if l.Memory > 0 {
			if memory = l.Memory; l.Swap >= 0 {
				both = memory + l.Swap
			}
		}
		r.Memory.Limit, r.Memory.Swap = &memory, &both
		// A reservation above the limit is the spec's of a larger container.
		if r.Memory.Reservation != nil && memory > 0 && *r.Memory.Reservation > memory {
			r.Memory.Reservation = &memory
		}
	}
	if parts&(pve.PartCPU|pve.PartWeight) != 0 && r.CPU == nil {
		r.CPU = &specs.LinuxCPU{}
	}
	if parts&pve.PartCPU != 0 {
		quota, period := int64(-1), l.Period
		if l.Quota > 0 {
			quota = l.Quota
		}
		r.CPU.Quota, r.CPU.Period = &quota, nil
		if period > 0 {
			r.CPU.Period = &period
		}
	}
	if parts&pve.PartWeight != 0 {
		// Its shares would be another weight.
		r.CPU.Shares = nil
		if l.Weight > 0 {
			r.Unified = maps.Clone(r.Unified)
			if r.Unified == nil {
				r.Unified = map[string]string{}
			}
			r.Unified["cpu.weight"] = strconv.FormatUint(l.Weight, 10)
		}
	}
}

// change takes over what resources say; what they leave out stays. It answers of
// which parts they say something.
func change(l *pve.Limits, r *specs.LinuxResources) (parts pve.Parts) {
	if r == nil {
		return 0
	}
	if m := r.Memory; m != nil {
		if m.Limit != nil || m.Swap != nil {
			parts |= pve.PartMemory
		}
		if m.Limit != nil {
			l.Memory = *m.Limit
		}
		switch {
		case m.Swap == nil:
		case *m.Swap < 0:
			l.Swap = -1
		default: // the spec's is the sum of both
			l.Swap = max(*m.Swap-max(l.Memory, 0), 0)
		}
	}
	if c := r.CPU; c != nil {
		if c.Quota != nil || c.Period != nil {
			parts |= pve.PartCPU
		}
		if c.Quota != nil {
			l.Quota = *c.Quota
		}
		if c.Period != nil {
			l.Period = *c.Period
		} else if l.Period == 0 {
			l.Period = 100_000 // the kernel's (cgroup-v2.rst, cpu.max)
		}
		if c.Shares != nil && *c.Shares > 0 {
			l.Weight = cgroups.ConvertCPUSharesToCgroupV2Value(*c.Shares)
			parts |= pve.PartWeight
		}
	}
	// It is what the kernel is told last (runtime spec, config-linux.md, unified).
	if w, err := strconv.ParseUint(r.Unified["cpu.weight"], 10, 64); err == nil {
		l.Weight = w
		parts |= pve.PartWeight
	}
	return parts
}

// update writes changed limits into the conf. The container has them already, so
// that Proxmox was not told is logged.
func (p *proxmox) update(ctx context.Context, r *specs.LinuxResources) {
	if p.registrar == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	parts := change(&p.limits, r)
	if parts == 0 {
		return
	}
	if err := p.registrar.Update(ctx, p.namespace, p.id, p.limits, parts); err != nil {
		log.G(ctx).WithError(err).Warnf("task %s: Proxmox shows other limits than the container has", p.id)
	}
}
