package main

import (
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

// propagation is one change of a mount's propagation type.
type propagation struct {
	flag      uint64
	recursive bool
}

func parsePropagation(option string) (propagation, bool) {
	if flag, ok := propagations[option]; ok {
		return propagation{flag: flag}, true
	}
	if rest, ok := strings.CutPrefix(option, "r"); ok {
		if flag, ok := propagations[rest]; ok {
			return propagation{flag: flag, recursive: true}, true
		}
	}
	return propagation{}, false
}

// mountOptions is a spec mount's options, sorted by who they are for.
type mountOptions struct {
	// bind makes it a bind mount; recursive takes the mounts below the source along.
	bind, recursive bool
	// attrs are for the mount, below for it and all below it.
	attrs, below attrs
	propagation  []propagation
	super        []string
	copyUp       bool
	// unsupported is the first option that is understood and cannot be done.
	unsupported string
	// data is for the file system.
	data []string
}

func parseOptions(m specs.Mount) mountOptions {
	o := mountOptions{bind: m.Type == "bind"}
	for _, option := range m.Options {
		if flag, ok := attrFlags[option]; ok {
			o.attrs.add(flag)
			continue
		}
		if p, ok := parsePropagation(option); ok {
			o.propagation = append(o.propagation, p)
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
			o.bind = true
		case option == "rbind":
			o.bind, o.recursive = true, true
		case option == "tmpcopyup":
			o.copyUp = true
		case option == "remount" || option == "idmap" || option == "ridmap":
			if o.unsupported == "" {
				o.unsupported = option
			}
		case superFlags[option]:
			o.super = append(o.super, option)
		case noEffect[option]:
		default:
			o.data = append(o.data, option)
		}
	}
	if o.unsupported == "" && len(m.UIDMappings)+len(m.GIDMappings) > 0 {
		o.unsupported = "uidMappings"
	}
	return o
}
