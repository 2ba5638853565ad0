// Package tree makes detached mount trees: what a mount of the spec asks for,
// attached nowhere yet, so that no path is resolved twice.
//
// It owns the mount options of the runtime spec and the kernel's mount API, and
// nothing else: where a tree is attached, and with whose rights it is made, is
// its callers' business. The shim makes on the host what takes the host's rights
// or the host's mounts, pve-init makes in the container what belongs to the
// container's namespaces. pve-init links it, so it imports next to nothing.
package tree

import (
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// attrs are per-mount attributes as mount_setattr(2) takes them.
type attrs struct {
	set, clear uint64
	// atime is one of the exclusive access time modes when hasAtime.
	atime    uint64
	hasAtime bool
}

func (a attrs) empty() bool { return a.set == 0 && a.clear == 0 && !a.hasAtime }

// mountAttr is a as the kernel wants it.
func (a attrs) mountAttr() unix.MountAttr {
	m := unix.MountAttr{Attr_set: a.set, Attr_clr: a.clear}
	if a.hasAtime {
		m.Attr_set |= a.atime
		m.Attr_clr |= unix.MOUNT_ATTR__ATIME
	}
	return m
}

func (a *attrs) add(flag attrFlag) {
	switch {
	case flag.atime && flag.clear:
		if a.hasAtime && a.atime == flag.bit {
			a.hasAtime, a.atime = false, 0
		}
	case flag.atime:
		a.hasAtime, a.atime = true, flag.bit
	case flag.clear:
		a.set &^= flag.bit
		a.clear |= flag.bit
	default:
		a.set |= flag.bit
		a.clear &^= flag.bit
	}
}

type attrFlag struct {
	bit          uint64
	clear, atime bool
}

// attrFlags are the options that are an attribute of the mount; each has a
// recursive variant with an r in front.
var attrFlags = map[string]attrFlag{
	"ro":            {bit: unix.MOUNT_ATTR_RDONLY},
	"rw":            {bit: unix.MOUNT_ATTR_RDONLY, clear: true},
	"nosuid":        {bit: unix.MOUNT_ATTR_NOSUID},
	"suid":          {bit: unix.MOUNT_ATTR_NOSUID, clear: true},
	"nodev":         {bit: unix.MOUNT_ATTR_NODEV},
	"dev":           {bit: unix.MOUNT_ATTR_NODEV, clear: true},
	"noexec":        {bit: unix.MOUNT_ATTR_NOEXEC},
	"exec":          {bit: unix.MOUNT_ATTR_NOEXEC, clear: true},
	"nodiratime":    {bit: unix.MOUNT_ATTR_NODIRATIME},
	"diratime":      {bit: unix.MOUNT_ATTR_NODIRATIME, clear: true},
	"nosymfollow":   {bit: unix.MOUNT_ATTR_NOSYMFOLLOW},
	"symfollow":     {bit: unix.MOUNT_ATTR_NOSYMFOLLOW, clear: true},
	"relatime":      {bit: unix.MOUNT_ATTR_RELATIME, atime: true},
	"norelatime":    {bit: unix.MOUNT_ATTR_RELATIME, atime: true, clear: true},
	"noatime":       {bit: unix.MOUNT_ATTR_NOATIME, atime: true},
	"atime":         {bit: unix.MOUNT_ATTR_NOATIME, atime: true, clear: true},
	"strictatime":   {bit: unix.MOUNT_ATTR_STRICTATIME, atime: true},
	"nostrictatime": {bit: unix.MOUNT_ATTR_STRICTATIME, atime: true, clear: true},
}

// propagations are the options that are a propagation type.
var propagations = map[string]uint64{
	"private":    unix.MS_PRIVATE,
	"slave":      unix.MS_SLAVE,
	"shared":     unix.MS_SHARED,
	"unbindable": unix.MS_UNBINDABLE,
}

// superFlags are the options that belong to the superblock and to no file system's own options.
var superFlags = map[string]bool{
	"sync": true, "async": true, "dirsync": true, "lazytime": true, "nolazytime": true, "mand": true, "nomand": true,
}

// noEffect are options of mount(8) that change nothing here: defaults, and
// flags modern kernels do not have as an option.
var noEffect = map[string]bool{
	"": true, "defaults": true, "loud": true, "silent": true, "acl": true, "noacl": true, "iversion": true, "noiversion": true,
}

// Propagation is one change of a mount's propagation type.
type Propagation struct {
	flag      uint64
	recursive bool
}

// ParsePropagation knows the propagation types and their recursive variants.
func ParsePropagation(option string) (Propagation, bool) {
	if flag, ok := propagations[option]; ok {
		return Propagation{flag: flag}, true
	}
	if rest, ok := strings.CutPrefix(option, "r"); ok {
		if flag, ok := propagations[rest]; ok {
			return Propagation{flag: flag, recursive: true}, true
		}
	}
	return Propagation{}, false
}

// Options is a spec mount's options, sorted by who they are for.
type Options struct {
	// Bind makes it a bind mount; Recursive takes the mounts below the source along.
	Bind, Recursive bool
	// Remount changes the mount that is there already.
	Remount bool
	// IDMap asks for an id-mapped mount, IDMapBelow for all below it as well.
	IDMap, IDMapBelow bool
	// CopyUp fills a tmpfs with what it covers.
	CopyUp bool
	// Propagation is what the mount is to be, in the spec's order.
	Propagation []Propagation
	// Data is for the file system.
	Data []string

	// attrs are for the mount, below for it and all below it.
	attrs, below attrs
	super        []string
}

// ReadOnly says that the mount itself is to be read-only.
func (o *Options) ReadOnly() bool { return o.attrs.set&unix.MOUNT_ATTR_RDONLY != 0 }

// Shared says that the mount is to stay in the peer group of its source.
func (o *Options) Shared() (shared, below bool) {
	for _, p := range o.Propagation {
		shared, below = p.flag == unix.MS_SHARED, p.flag == unix.MS_SHARED && p.recursive
	}
	return shared, below
}

// Parse sorts the options of a mount of the spec.
func Parse(m *specs.Mount) Options {
	o := Options{Bind: m.Type == "bind", IDMap: len(m.UIDMappings)+len(m.GIDMappings) > 0}
	for _, option := range m.Options {
		if flag, ok := attrFlags[option]; ok {
			o.attrs.add(flag)
			continue
		}
		if p, ok := ParsePropagation(option); ok {
			o.Propagation = append(o.Propagation, p)
			continue
		}
		if rest, ok := strings.CutPrefix(option, "r"); ok {
			if flag, ok := attrFlags[rest]; ok {
				o.below.add(flag)
				continue
			}
		}
		switch {
		case option == "bind":
			o.Bind = true
		case option == "rbind":
			o.Bind, o.Recursive = true, true
		case option == "tmpcopyup":
			o.CopyUp = true
		case option == "remount":
			o.Remount = true
		case option == "idmap":
			o.IDMap = true
		case option == "ridmap":
			o.IDMap, o.IDMapBelow = true, true
		case superFlags[option]:
			o.super = append(o.super, option)
		case noEffect[option]:
		default:
			o.Data = append(o.Data, option)
		}
	}
	return o
}

// Known are the options that mean the same for every mount, for those who ask
// what a runtime can do.
func Known() []string {
	known := []string{"bind", "rbind", "remount", "idmap", "ridmap", "tmpcopyup"}
	for name := range attrFlags {
		known = append(known, name, "r"+name)
	}
	for name := range propagations {
		known = append(known, name, "r"+name)
	}
	for name := range superFlags {
		known = append(known, name)
	}
	for name := range noEffect {
		if name != "" {
			known = append(known, name)
		}
	}
	slices.Sort(known)
	return known
}
