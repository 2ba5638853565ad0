// Command containerd-pve is the administrator's tool: it serves the snapshotter,
// says whether this host is ready, and lists the snapshots.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// more are commands of a build with other tags.
var more []func() *cobra.Command

// errNotReady makes `check` end with status 1 without another message.
var errNotReady = errors.New("this host is not ready")

// exitError ends the program with another status than 1.
type exitError struct {
	status int
	error
}

func (e exitError) Unwrap() error { return e.error }

func main() { os.Exit(run()) }

// run gives the exit status, after its deferred calls.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := root().ExecuteContext(ctx); err != nil {
		if !errors.Is(err, errNotReady) {
			fmt.Fprintln(os.Stderr, "containerd-pve:", err)
		}
		var e exitError
		if errors.As(err, &e) {
			return e.status
		}
		return 1
	}
	return 0
}

func root() *cobra.Command {
	c := &cobra.Command{
		Use:           "containerd-pve",
		Short:         "OCI containers as Proxmox LXC containers: snapshotter and host checks",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	c.AddCommand(serveCommand(), checkCommand(), snapshotsCommand(), guardCommand(), containerCommand(), templateCommand(), installCommand(), uninstallCommand(), nodeCommand(), &cobra.Command{
		Use:   "version",
		Short: "print the version",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(c.OutOrStdout(), "containerd-pve %s %s\n", version(), runtime.Version())
			return err
		},
	})
	for _, f := range more {
		c.AddCommand(f())
	}
	return c
}

// release is the commit, of which `make build` tells the linker.
var release string

func version() string {
	if release != "" {
		return release
	}
	b, ok := debug.ReadBuildInfo()
	if !ok || b.Main.Version == "" {
		return "(devel)"
	}
	return b.Main.Version
}
