// Command vmagent is the one service of the test guest: it runs the commands the host sends.
// Never start it on a machine that matters: it asks nobody who they are.
package main

import (
	"fmt"
	"os"

	"github.com/containerd-pve/containerd-pve/integration/testbed/agent"
)

func main() {
	if len(os.Args) != 3 || os.Args[1] != "serve" {
		fmt.Fprintln(os.Stderr, "usage: vmagent serve ADDRESS")
		os.Exit(2)
	}
	os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/root")
	os.Setenv("LANG", "C.UTF-8")
	fmt.Fprintln(os.Stderr, "vmagent:", agent.Serve(os.Args[2]))
	os.Exit(1)
}
