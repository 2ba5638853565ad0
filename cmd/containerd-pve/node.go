package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/containerd-pve/containerd-pve/cmd/containerd-pve/internal/hostns"
	"github.com/containerd-pve/containerd-pve/cmd/containerd-pve/internal/nodelabel"
)

// Labels of nodes. The domain is the one that the project's name at its host gives it.
const (
	// runtimeLabel is "true" on nodes that run pods of ours: the RuntimeClass asks for it.
	runtimeLabel = "containerd-pve.github.io/runtime"
	// nodeLabel is an operator's: "install" or "remove"; it becomes "removed" when that is done.
	nodeLabel = "containerd-pve.github.io/node"
)

// unlabelLimit is for taking a label away after all else has failed, or was interrupted.
const unlabelLimit = 20 * time.Second

// nodeCommand is what the pods of deploy/kubernetes run.
func nodeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "node",
		Short: "install on a node of Kubernetes, out of a pod (deploy/kubernetes)",
	}
	var name, dataset string
	node := func() (*nodelabel.Node, error) {
		n, err := nodelabel.InCluster(name, nodelabel.ServiceAccount, os.Getenv)
		if err != nil {
			return nil, exitError{statusRefused, err}
		}
		return n, nil
	}
	install := &cobra.Command{
		Use:   "install",
		Short: "copy the programs to the node, set it up, label it " + runtimeLabel + "=true",
		Long: "Copies the programs beside this one to the node, runs `containerd-pve install --pods` of them there, and labels the node\n" +
			runtimeLabel + "=true. It has to run in a privileged pod with hostPID: true. If it fails, the label is taken away: no more pods come.\n" +
			"Called again it brings the node up to date; containers go on.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			n, err := node()
			if err != nil {
				return err
			}
			// Without the node's object nothing is begun.
			if err := n.Check(c.Context()); err != nil {
				return err
			}
			args := []string{"install", "--yes", "--pods"}
			if dataset != "" {
				args = append(args, "--dataset", dataset)
			}
			if err := onHost(c.Context(), true, args...); err != nil {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context()), unlabelLimit)
				defer cancel()
				return errors.Join(err, n.Set(ctx, map[string]*string{runtimeLabel: nil}))
			}
			yes := "true"
			return n.Set(c.Context(), map[string]*string{runtimeLabel: &yes})
		},
	}
	install.Flags().StringVar(&dataset, "dataset", "", "parent `dataset` for images and containers (default POOL/containerd-pve, if the node has but one pool)")
	uninstall := &cobra.Command{
		Use:   "uninstall",
		Short: "take away the label, wait for the last pod, and take back what install did",
		Long: "Takes the label " + runtimeLabel + " away, so that no more pods come, waits until no containers of ours are left on the node, and runs\n" +
			"`containerd-pve uninstall --keep-images` there. At its end it labels the node " + nodeLabel + "=removed. It can be repeated.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			n, err := node()
			if err != nil {
				return err
			}
			if err := n.Set(c.Context(), map[string]*string{runtimeLabel: nil}); err != nil {
				return err
			}
			if err := onHost(c.Context(), false, "uninstall", "--yes", "--keep-images", "--wait"); err != nil {
				return err
			}
			removed := "removed"
			return n.Set(c.Context(), map[string]*string{nodeLabel: &removed})
		},
	}
	for _, s := range []*cobra.Command{install, uninstall} {
		s.Flags().StringVar(&name, "node", os.Getenv("NODE_NAME"), "`name` of the node that this runs on (default $NODE_NAME)")
		s.Flags().Lookup("node").DefValue = "" // the manual is the same everywhere
		c.AddCommand(s)
	}
	c.AddCommand(&cobra.Command{
		Use:   "hold",
		Short: "do nothing until SIGTERM: what is left of a pod whose work is done",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			<-c.Context().Done()
			return nil
		},
	})
	return c
}

// onHost runs this program in the host's namespaces; bring has it bring those beside it along. Errors: as of hostns.Run.
func onHost(ctx context.Context, bring bool, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if bring {
		args = append(args, "--programs", hostns.Path(filepath.Dir(self)))
	}
	err = hostns.Run(ctx, hostns.Path(self), args...)
	var exit *exec.ExitError
	if errors.As(err, &exit) { // it has said why
		return exitError{exit.ExitCode(), fmt.Errorf("containerd-pve %s on the node: %w", args[0], err)}
	}
	if errdefs.IsFailedPrecondition(err) {
		return exitError{statusRefused, err}
	}
	return err
}
