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

// errNotReady makes `check` end with status 1 without another message.
var errNotReady = errors.New("this host is not ready")

func main() { os.Exit(run()) }

// run gives the exit status, after its deferred calls.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := root().ExecuteContext(ctx); err != nil {
		if !errors.Is(err, errNotReady) {
			fmt.Fprintln(os.Stderr, "containerd-pve:", err)
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
	c.AddCommand(serveCommand(), checkCommand(), snapshotsCommand(), guardCommand(), containerCommand(), templateCommand(), &cobra.Command{
		Use:   "version",
		Short: "print the version",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(c.OutOrStdout(), "containerd-pve %s %s\n", version(), runtime.Version())
			return err
		},
	})
	return c
}

func version() string {
	b, ok := debug.ReadBuildInfo()
	if !ok || b.Main.Version == "" {
		return "(devel)"
	}
	return b.Main.Version
}
