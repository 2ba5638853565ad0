// Command containerd-shim-pve-v2 is containerd's runtime io.containerd.pve.v2:
// it runs OCI containers as LXC containers.
package main

import (
	"os"

	"github.com/containerd-pve/containerd-pve/shim/bootstrap"
)

func main() { os.Exit(bootstrap.Main(os.Args)) }
