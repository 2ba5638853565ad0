package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/containerd-pve/containerd-pve/cmd/containerd-pve/internal/setup"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// What the exit status of install and uninstall says, besides 0 and 1.
const (
	statusRefused   = 2 // nothing was changed: the host is not as it has to be
	statusUnwitting = 3 // nothing was changed: nobody said yes
)

const statusHelp = "\n\nExit status: 0 it is done, or was before; 1 a step failed; 2 refused, nothing was changed; 3 nobody said yes, nothing was changed."

// installFlags are those of both commands.
type installFlags struct {
	dryRun, yes bool
	format      string
}

func (f *installFlags) add(c *cobra.Command) {
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "only show what would be changed")
	c.Flags().BoolVarP(&f.yes, "yes", "y", false, "do not ask")
	c.Flags().StringVar(&f.format, "format", "text", "text, or json: the plan on standard output, all else on standard error")
}

func installCommand() *cobra.Command {
	var flags installFlags
	var o setup.Options
	c := &cobra.Command{
		Use:   "install",
		Short: "set up this host: the dataset, the service, containerd's configuration",
		Long: "Sets up a Debian host or a node of Proxmox VE, with systemd: the dataset for images and containers, our service, and our part of\n" +
			"containerd's configuration, which is restarted (containers go on). It shows what it will change and asks. A file that is there and is\n" +
			"not what it writes is never changed, but for one line that has containerd read /etc/containerd/conf.d. If a step fails, those before it\n" +
			"are undone. What it made is in " + setup.Record + ", by which `containerd-pve uninstall` takes it back." + statusHelp,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			conf, err := readConfig(defaultConfig, false)
			if err != nil {
				return exitError{statusRefused, err}
			}
			if err := lacks(c.Context(), o.Programs != ""); err != nil {
				return exitError{statusRefused, err}
			}
			h, err := newHost(conf)
			if err != nil {
				return err
			}
			o.Configured = conf.Dataset
			o.NotAllPods = c.Flags().Changed("default-snapshotter") && !o.AllPods
			if o.Dataset != "" {
				conf.Dataset = o.Dataset
				if err := conf.complete(); err != nil {
					return exitError{statusRefused, err}
				}
			}
			if o.Programs != "" {
				h.Program = filepath.Join(setup.ProgramsDir, filepath.Base(h.Program))
			}
			unlock, err := flags.lock(c, h)
			if err != nil {
				return exitError{statusRefused, err}
			}
			defer unlock()
			p, err := h.PlanInstall(c.Context(), o)
			if err != nil {
				return exitError{statusRefused, err}
			}
			if ok, err := flags.agreed(c, p, "This host is set up already."); !ok {
				return err
			}
			if err := h.Install(c.Context(), p, flags.say(c)); err != nil {
				return err
			}
			return installed(c)
		},
	}
	flags.add(c)
	c.Flags().StringVar(&o.Dataset, "dataset", "", "parent `dataset` for images and containers (default POOL/containerd-pve, if there is but one pool)")
	c.Flags().BoolVar(&o.Pods, "pods", false, "have containerd's CRI plugin know the runtime, by the handler "+setup.Handler+"; without it, what was so before stays")
	c.Flags().BoolVar(&o.AllPods, "default-snapshotter", false, "--pods, and our snapshotter keeps the images and containers of all pods, those of other runtimes too; =false takes that back")
	c.Flags().StringVar(&o.Programs, "programs", "", "copy the programs from this `directory` to "+setup.ProgramsDir+" first")
	return c
}

// installed says what is not as it should be all the same.
func installed(c *cobra.Command) error {
	conf, err := readConfig(defaultConfig, false)
	var bad []finding
	for _, f := range check(c.Context(), conf, err) {
		if !f.OK || f.Warning {
			bad = append(bad, f)
		}
	}
	if err := report(c.ErrOrStderr(), "text", bad); err != nil {
		return err
	}
	for _, f := range bad {
		if !f.OK {
			return fmt.Errorf("installed, and `containerd-pve check` is not content: %w", errdefs.ErrFailedPrecondition)
		}
	}
	fmt.Fprintln(c.ErrOrStderr(), "This host is ready.")
	return nil
}

func uninstallCommand() *cobra.Command {
	var flags installFlags
	var force, keepImages, wait, onlyContainerd bool
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "take back what install did",
		Long: "Takes back what `containerd-pve install` did, by " + setup.Record + ". Files that were changed since are kept and named, and so is a\n" +
			"dataset with anything in it. It refuses while there are containers or images of ours; with --keep-images the images stay, and with\n" +
			"--force both: containers run on, but containerd cannot make others." + statusHelp,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			conf, err := readConfig(defaultConfig, false)
			if err != nil {
				return exitError{statusRefused, err}
			}
			h, err := newHost(conf)
			if err != nil {
				return err
			}
			if wait {
				if err := unused(c, defaultContainerd, 2*time.Second); err != nil {
					return exitError{statusRefused, err}
				}
			}
			unlock, err := flags.lock(c, h)
			if err != nil {
				return exitError{statusRefused, err}
			}
			defer unlock()
			left := setup.Left{OurPart: onlyContainerd}
			if !onlyContainerd {
				u, err := inUse(c.Context(), conf)
				left.Dataset, left.Programs = err != nil || u.runs() || u.snapshots > 0, err != nil || u.runs()
				if err == nil && (u.runs() || u.snapshots > 0 && !keepImages) {
					err = fmt.Errorf("there are %s: remove them (`containerd-pve container ls`, `containerd-pve snapshots`), or leave them with --force: %w", u, errdefs.ErrFailedPrecondition)
				} else if err != nil {
					err = fmt.Errorf("whether there are containers or images of ours cannot be told: %w: leave them with --force", err)
				}
				if err != nil && !force {
					return exitError{statusRefused, err}
				}
			}
			p, err := h.PlanUninstall(c.Context(), left)
			if err != nil {
				return exitError{statusRefused, err}
			}
			if ok, err := flags.agreed(c, p, "Nothing of `containerd-pve install` is here."); !ok {
				return err
			}
			return h.Uninstall(c.Context(), p, left, flags.say(c))
		},
	}
	flags.add(c)
	c.Flags().BoolVar(&force, "force", false, "although there are containers or images of ours, which stay")
	c.Flags().BoolVar(&keepImages, "keep-images", false, "although there are images of ours, which stay")
	c.Flags().BoolVar(&wait, "wait", false, "wait until there are no containers of ours any more")
	c.Flags().BoolVar(&onlyContainerd, "containerd-only", false, "only containerd's configuration (when the package is removed)")
	return c
}

// agreed shows the plan, and says whether it is to be carried out.
func (f *installFlags) agreed(c *cobra.Command, p *setup.Plan, none string) (bool, error) {
	if f.format != "text" && f.format != "json" {
		return false, exitError{statusRefused, fmt.Errorf("--format %q is neither text nor json: %w", f.format, errdefs.ErrInvalidArgument)}
	}
	if f.format == "json" {
		if err := printJSON(c.OutOrStdout(), p); err != nil {
			return false, err
		}
	}
	if len(p.Steps) == 0 {
		fmt.Fprintln(c.ErrOrStderr(), none)
		return false, nil
	}
	if f.format == "text" && (f.dryRun || !f.yes) {
		if err := p.Print(c.OutOrStdout()); err != nil {
			return false, err
		}
	}
	switch {
	case f.dryRun:
		return false, nil
	case os.Geteuid() != 0:
		return false, exitError{statusRefused, fmt.Errorf("run it as root: %w", errdefs.ErrPermissionDenied)}
	case f.yes:
		return true, nil
	case !term.IsTerminal(int(os.Stdin.Fd())):
		return false, exitError{statusUnwitting, errors.New("nothing was changed: this is no terminal to ask on, --yes carries it out")}
	}
	fmt.Fprint(c.ErrOrStderr(), "Go on? [y/N] ")
	answer, _ := bufio.NewReader(c.InOrStdin()).ReadString('\n')
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return false, exitError{statusUnwitting, errors.New("nothing was changed")}
	}
	return true, nil
}

// say tells of a step that begins.
func (f *installFlags) say(c *cobra.Command) func(setup.Step) {
	return func(s setup.Step) {
		why := ""
		if s.Action == setup.Keep {
			why = ": " + s.Why
		}
		fmt.Fprintf(c.ErrOrStderr(), "%s %s%s\n", s.Action, s.Target, why)
	}
}

// lock keeps other calls from changing this host meanwhile.
func (f *installFlags) lock(c *cobra.Command, h *setup.Host) (unlock func(), err error) {
	if f.dryRun {
		return func() {}, nil
	}
	return h.Lock(c.Context(), func() { fmt.Fprintln(c.ErrOrStderr(), "Another containerd-pve is at work on this host: waiting.") })
}

// lacks is what a host has to have before it is set up; bring says that our programs come with it.
func lacks(ctx context.Context, bring bool) error {
	var all []string
	for _, f := range checkPrograms(ctx) {
		if !f.OK && (!bring || !slices.Contains(setup.Programs, f.Name)) {
			all = append(all, f.Name+": "+f.Detail)
		}
	}
	if len(all) > 0 {
		return fmt.Errorf("this host lacks %s: %w", strings.Join(all, "; "), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// newHost is the host that this runs on.
func newHost(conf config) (*setup.Host, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if conf.Dataset == "" {
		conf.Dataset = "none" // only what is beside it is asked
	}
	if err := conf.complete(); err != nil {
		return nil, exitError{statusRefused, err}
	}
	return &setup.Host{
		Root:    "/",
		Program: self,
		Run:     runProgram,
		Pools: func(ctx context.Context) ([]string, error) {
			if _, err := zfs.Module(); errdefs.IsUnavailable(err) {
				return nil, fmt.Errorf("the ZFS module is not loaded: run `modprobe zfs`: %w", err)
			}
			return zfs.Pools(ctx)
		},
		Storages: func() ([]string, bool, error) { return storagePools(conf) },
		Exists: func(ctx context.Context, dataset string) (bool, error) {
			l, err := zfs.OpenLister(conf.ZFS)
			if err != nil {
				return false, err
			}
			defer l.Close()
			err = snapshotter.Belongs(ctx, l, conf.Root, dataset)
			if errdefs.IsNotFound(err) {
				return false, nil
			}
			return err == nil, err
		},
		Destroy: func(ctx context.Context, dataset string) error { return destroyStore(ctx, conf, dataset) },
	}, nil
}

// runProgram gives what a program says; its error has what it says to standard error.
func runProgram(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if said := strings.TrimSpace(string(exit.Stderr)); said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
	}
	return string(out), err
}

// storagePools are the pools of a Proxmox node's storages for containers.
func storagePools(conf config) (pools []string, proxmox bool, err error) {
	node, err := thisNode(conf)
	if node == nil || err != nil {
		return nil, false, err
	}
	self, err := node.Name()
	if err != nil {
		return nil, true, err
	}
	storages, err := node.Storages(self)
	for _, s := range storages {
		pools = append(pools, pve.PoolOf(s.Pool))
	}
	return pools, true, err
}

// destroyStore destroys a dataset, which ZFS refuses if anything is in it, and the
// records of the store that it was.
func destroyStore(ctx context.Context, conf config, dataset string) error {
	z, err := zfs.New(ctx, conf.ZFS)
	if err != nil {
		return err
	}
	err = z.Destroy(ctx, dataset)
	if err := errors.Join(err, z.Close()); err != nil {
		return err
	}
	return os.RemoveAll(conf.Root)
}
