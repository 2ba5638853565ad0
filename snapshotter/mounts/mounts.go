// Package mounts is how the mount of a snapshot's filesystem is written, and read. It mounts nothing.
//
// ZFS refuses to mount read-only what is mounted for writing (EBUSY). So while a container runs, a
// tool that reads its files by a mount that it makes read-only (nerdctl exec --user) gets a bind mount
// of the place where the filesystem is already. What the mount would be otherwise stands among the
// options, with a prefix that says to programs that they are no options of the kernel's; of a bind mount the
// kernel takes none.
package mounts

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
)

const (
	kind    = "zfs"
	prefix  = "x-containerd-pve."
	dataset = prefix + "dataset="
)

// maps are the options that map owners.
var maps = []string{"uidmap", "gidmap"}

// Of is the mount of a dataset, with options of the kernel's and those of containerd (uidmap, gidmap).
func Of(dataset string, options ...string) mount.Mount {
	return mount.Mount{Type: kind, Source: dataset, Options: options}
}

// Bind is one of the place at, where what m mounts is mounted for writing. mapped says
// that owners are mapped there: nothing can be mapped twice.
func Bind(m mount.Mount, at string, mapped bool) mount.Mount {
	options := []string{"bind", dataset + m.Source}
	for _, o := range m.Options {
		options = append(options, prefix+o)
		if !mapped || !slices.Contains(maps, name(o)) {
			options = append(options, o)
		}
	}
	return mount.Mount{Type: "bind", Source: at, Target: m.Target, Options: options}
}

func name(option string) string {
	n, _, _ := strings.Cut(option, "=")
	return n
}

// Dataset is the dataset that is mounted by m, if it is one of Of's or Bind's.
func Dataset(m mount.Mount) (string, bool) {
	m = Anew(m)
	return m.Source, m.Type == kind
}

// Owned is the dataset of a snapshot whose mounts these are, if owns knows it. Errors: NotImplemented, it is
// another snapshotter's, so that containerd asks its next differ.
func Owned(m []mount.Mount, owns func(dataset string) bool) (string, error) {
	if len(m) == 1 {
		if dataset, ours := Dataset(m[0]); ours && owns(dataset) {
			return dataset, nil
		}
	}
	return "", fmt.Errorf("these mounts are no snapshot of pve-zfs: %w", errdefs.ErrNotImplemented)
}

// Mapped says whether the owners of files are mapped by m.
func Mapped(m mount.Mount) bool {
	return slices.ContainsFunc(Anew(m).Options, func(o string) bool { return slices.Contains(maps, name(o)) })
}

// Anew is the mount that Bind had, for a container that is to have its own: the place may be gone by
// then. Any other is answered as it is.
func Anew(m mount.Mount) mount.Mount {
	i := slices.IndexFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, dataset) })
	if i < 0 {
		return m
	}
	own := mount.Mount{Type: kind, Source: strings.TrimPrefix(m.Options[i], dataset), Target: m.Target}
	for _, o := range slices.Delete(slices.Clone(m.Options), i, i+1) {
		if o, ok := strings.CutPrefix(o, prefix); ok {
			own.Options = append(own.Options, o)
		}
	}
	return own
}
