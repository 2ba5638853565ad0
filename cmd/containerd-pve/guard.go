package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/containerd-pve/containerd-pve/lxc/pve/registry"
)

// guardCommand is what a container's conf has LXC run before a start by Proxmox's
// tools. containerd would know nothing of such a start, and its own start
// would fail.
func guardCommand() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:    "guard NAMESPACE CONTAINER",
		Short:  "refuse the start of a container of containerd's by Proxmox (a hook in its configuration)",
		Hidden: true,
		// LXC adds the container's name, "lxc" and the hook's type.
		Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			conf, err := readConfig(path, c.Flags().Changed("config"))
			if err != nil {
				return err
			}
			name := os.Getenv("LXC_NAME")
			err = guard(recordsOf(conf), args[0], args[1], name)
			if err != nil {
				warn(proxmoxRun, name, err)
			}
			return err
		},
	}
	c.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration `file`")
	return c
}

// proxmoxRun is where Proxmox's tools look for warnings of a container that they
// started (lxc-pve-prestart-hook; PVE::LXC, vm_start).
const proxmoxRun = "/run/pve"

// warn has Proxmox show why: what a hook writes otherwise is in LXC's debugging
// log only.
func warn(dir, name string, why error) {
	f, err := os.OpenFile(filepath.Join(dir, "ct-"+name+".warnings"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return // it is refused all the same
	}
	fmt.Fprintf(f, "containerd-pve: %v\n", why)
	_ = f.Close()
}

// recordsOf is where the registry's records are.
func recordsOf(conf config) string {
	return filepath.Join(filepath.Dir(cmp.Or(conf.Root, defaultRoot)), "proxmox")
}

// guard lets everything start that is not this VMID of a container that is
// there: a backup restored under another number, or on another node.
func guard(records, namespace, id, name string) error {
	vmid, err := registry.Lookup(records, namespace, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if strconv.Itoa(vmid) != name {
		return nil
	}
	return fmt.Errorf("container %d belongs to containerd, which has to start it: `nerdctl -n %s start %s` (or ctr -n %s task start -d %s): %w",
		vmid, namespace, id, namespace, id, errdefs.ErrFailedPrecondition)
}
