package main

import (
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

func TestAnnouncedMountOptions(t *testing.T) {
	announced := plan.MountOptions()
	for _, option := range announced {
		if o := parseOptions(specs.Mount{Type: "tmpfs", Options: []string{option}}); o.unsupported != "" || len(o.data) > 0 {
			t.Errorf("%s is announced and not understood: %+v", option, o)
		}
	}
	for option := range attrFlags {
		if !slices.Contains(announced, option) || !slices.Contains(announced, "r"+option) {
			t.Errorf("%s or r%s is understood and not announced", option, option)
		}
	}
}
