// Package setup makes a host with containerd and systemd serve our snapshotter,
// and takes that back. It owns the files that it wrote, whose digests it keeps in
// Record (the programs among them, if it is asked to bring them), one line of
// containerd's configuration, and whether our service is enabled. It never touches
// a file that it did not write or that was changed since, nor what is in a dataset.
package setup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/containerd-pve/containerd-pve/deploy"
)

const (
	// Record is where what was made is kept.
	Record = "/var/lib/containerd-pve/install.json"

	ourUnit        = "containerd-pve.service"
	ourUnitFile    = "/etc/systemd/system/" + ourUnit
	ourTmpfiles    = "/etc/tmpfiles.d/containerd-pve.conf"
	ourConfig      = "/etc/containerd-pve/config.toml.d/install.toml"
	containerdUnit = "containerd.service"
	dropIn         = "/etc/containerd/conf.d/containerd-pve.toml"
	podsDropIn     = "/etc/containerd/conf.d/containerd-pve-pods.toml"
	allPodsDropIn  = "/etc/containerd/conf.d/containerd-pve-all-pods.toml"
	imports        = "/etc/containerd/conf.d/*.toml"
)

// Host is what is set up.
type Host struct {
	// Root is the directory that the host's files are below.
	Root string
	// Program is the path of containerd-pve, for a unit that has to be written.
	Program string
	// Run starts a program and gives what it writes to its standard output, of one that fails too.
	Run func(ctx context.Context, name string, args ...string) (string, error)
	// Pools are the pools that are imported.
	Pools func(ctx context.Context) ([]string, error)
	// Storages are the pools of Proxmox's storages for containers; proxmox is
	// false on a host without Proxmox.
	Storages func() (pools []string, proxmox bool, err error)
	// Exists says whether a dataset is there and may be ours. Errors:
	// FailedPrecondition, it is another store's.
	Exists func(ctx context.Context, dataset string) (bool, error)
	// Destroy destroys a dataset in which nothing is.
	Destroy func(ctx context.Context, dataset string) error
}

// The actions of steps.
const (
	Copy    = "copy"    // a program of ours
	Write   = "write"   // a file of ours
	Edit    = "edit"    // one line of a file that is not ours
	Dataset = "dataset" // made by the daemon
	Start   = "start"   // enabled, and started anew
	Restart = "restart"
	Remove  = "remove"  // a file of ours
	Keep    = "keep"    // what was changed since
	Disable = "disable" // and stopped
	Destroy = "destroy" // an empty dataset
)

// Step is one change. Its JSON is what other programs read: no field is renamed
// or removed.
type Step struct {
	Action string `json:"action"`
	// Target is a file, a dataset or a unit.
	Target string `json:"target"`
	// From is what is copied.
	From string `json:"from,omitempty"`
	// Why is for people.
	Why string `json:"why,omitempty"`
	// Content is what is written: the file, or of an edit the new line.
	Content string `json:"content,omitempty"`
	// Was is the line that an edit replaces or takes away; empty for a line more.
	Was string `json:"was,omitempty"`

	digest digest.Digest // of what is copied
}

// Plan is what is to be done, in this order.
type Plan struct {
	// Dataset is the parent of the snapshotter's datasets.
	Dataset string `json:"dataset"`
	Steps   []Step `json:"steps"`

	containerd containerd
	pods       bool
}

// Options of Install.
type Options struct {
	// Dataset was asked for; chosen if empty.
	Dataset string
	// Configured is the dataset that the configuration names already.
	Configured string
	// Pods has containerd's CRI plugin know our runtime. Without it what is there of that stays.
	Pods bool
	// AllPods has our snapshotter keep the images and containers of all pods, those of other runtimes too. It means Pods; without it what is there of that stays.
	AllPods bool
	// NotAllPods takes that back.
	NotAllPods bool
	// Programs is a directory, of this process's file system, whose programs are copied to
	// ProgramsDir; none if empty.
	Programs string
}

// at is a file of the host.
func (h *Host) at(path string) string { return filepath.Join(h.Root, path) }

// read gives a file of the host; there is false if it does not exist.
func (h *Host) read(path string) (text string, there bool, err error) {
	info, err := os.Lstat(h.at(path))
	if errors.Is(err, os.ErrNotExist) {
		return "", false, nil
	}
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return "", false, err
	}
	b, err := os.ReadFile(h.at(path))
	return string(b), err == nil, err
}

// PlanInstall says what is to be done so that this host serves, and changes
// nothing. Without steps it is done already. Errors: FailedPrecondition, the host
// lacks something, or what is there is in the way; InvalidArgument.
func (h *Host) PlanInstall(ctx context.Context, o Options) (*Plan, error) {
	if _, err := os.Stat(h.at(lockDir)); err != nil {
		return nil, notSystemd()
	}
	c, err := h.findContainerd(ctx)
	if err != nil {
		return nil, err
	}
	r, err := h.record()
	if err != nil {
		return nil, err
	}
	p := &Plan{containerd: c, pods: o.Pods || o.AllPods}
	if p.Dataset, err = h.dataset(ctx, o); err != nil {
		return nil, err
	}
	there, err := h.Exists(ctx, p.Dataset)
	if err != nil {
		return nil, fmt.Errorf("dataset %s: %w", p.Dataset, err)
	}
	if o.Programs != "" {
		if err := h.planPrograms(p, r, o.Programs); err != nil {
			return nil, err
		}
	}
	if !there {
		p.add(Step{Action: Dataset, Target: p.Dataset, Why: "parent of all layers and containers; the daemon makes it"})
	}
	if o.Configured != p.Dataset {
		err = h.plan(p, r, ourConfig, "# By containerd-pve install. It goes before /etc/containerd-pve/config.toml.\ndataset = \""+p.Dataset+"\"\n", "where images and containers are")
	}
	if err == nil {
		err = h.planOurs(p, r, "systemd/"+ourUnit, ourUnitFile)
	}
	if err != nil {
		return nil, err
	}
	if len(p.Steps) > 0 || !h.is(ctx, "enabled", ourUnit) || !h.is(ctx, "active", ourUnit) || h.stale(ctx, r, ourUnit, ProgramsDir, filepath.Dir(ourConfig), filepath.Dir(ourUnitFile)) {
		p.add(Step{Action: Start, Target: ourUnit, Why: "the snapshotter, now and at every boot"})
	}
	if err := h.planOurs(p, r, "tmpfiles/"+filepath.Base(ourTmpfiles), ourTmpfiles); err != nil {
		return nil, err
	}
	n := len(p.Steps)
	text, err := c.dropIn()
	if err == nil {
		err = h.plan(p, r, dropIn, text, "containerd finds our snapshotter")
	}
	if err == nil && p.pods {
		err = h.planPods(p, r)
	}
	if err == nil && o.AllPods {
		err = h.planAllPods(p, r)
	}
	if err == nil && o.NotAllPods {
		err = h.planNotAllPods(p, r)
	}
	if err == nil {
		err = h.planImport(p)
	}
	if err != nil {
		return nil, err
	}
	if len(p.Steps) > n || !h.is(ctx, "active", containerdUnit) || h.stale(ctx, r, containerdUnit, filepath.Dir(dropIn)) {
		p.add(Step{Action: Restart, Target: containerdUnit, Why: "containers go on meanwhile"})
	}
	return p, nil
}

func (p *Plan) add(s Step) { p.Steps = append(p.Steps, s) }

// plan has a file written, unless it is there already. One that is there and was
// not written by us, or was changed since, is refused.
func (h *Host) plan(p *Plan, r record, path, content, why string) error {
	text, there, err := h.read(path)
	switch {
	case err != nil:
		return err
	case there && text == content:
		return nil
	case there && r.Files[path] != digestOf(text):
		return fmt.Errorf("%s is there, and is not what would be written: see `containerd-pve install --dry-run` after moving it away, and put into another file of that directory what has to stay of it: %w", path, errdefs.ErrFailedPrecondition)
	}
	p.add(Step{Action: Write, Target: path, Why: why, Content: content})
	return nil
}

// planOurs writes a file of ours, for systemd, where no package has brought it. name is its name in deploy.
func (h *Host) planOurs(p *Plan, r record, name, path string) error {
	of := strings.TrimPrefix(path, "/etc/")
	for _, file := range []string{path, "/usr/lib/" + of, "/lib/" + of} {
		if _, ours := r.Files[file]; ours {
			continue
		}
		if _, err := os.Stat(h.at(file)); err == nil {
			return nil
		}
	}
	text, err := deploy.Files.ReadFile(name)
	if err != nil {
		return err
	}
	return h.plan(p, r, path, strings.ReplaceAll(string(text), "/usr/local/bin/containerd-pve", h.Program), "no package has brought it")
}

// is asks systemd for a state: enabled or active.
func (h *Host) is(ctx context.Context, state, unit string) bool {
	out, _ := h.Run(ctx, "systemctl", "is-"+state, unit) // it fails to say no
	return strings.TrimSpace(out) == state
}

// stale says whether a unit began before a file of ours in these directories was written: a call was killed in between.
func (h *Host) stale(ctx context.Context, r record, unit string, dirs ...string) bool {
	out, err := h.Run(ctx, "systemctl", "show", "--property=ActiveEnterTimestamp", "--value", "--timestamp=unix", unit)
	began, perr := strconv.ParseInt(strings.TrimPrefix(strings.TrimSpace(out), "@"), 10, 64)
	if err != nil || perr != nil { // systemd before 248 knows no such form
		return false
	}
	for path := range r.Files {
		info, err := os.Stat(h.at(path))
		if err == nil && slices.Contains(dirs, filepath.Dir(path)) && info.ModTime().Unix() > began {
			return true
		}
	}
	return false
}

// dataset is the one asked for or configured, or the only one there is reason for.
func (h *Host) dataset(ctx context.Context, o Options) (string, error) {
	if o.Dataset != "" && o.Configured != "" && o.Dataset != o.Configured {
		return "", fmt.Errorf("dataset %s was asked for, but /etc/containerd-pve has %s already: change it there, or run `containerd-pve uninstall` first: %w", o.Dataset, o.Configured, errdefs.ErrFailedPrecondition)
	}
	pools, proxmox, err := h.Storages()
	if err == nil && !proxmox {
		pools, err = h.Pools(ctx)
	}
	if err != nil {
		return "", err
	}
	slices.Sort(pools)
	pools = slices.Compact(pools)
	what, way := "pool", "import or create one (`zpool create`)"
	if proxmox {
		what, way = "pool of a storage for containers (zfspool)", "add one in the GUI under Datacenter, Storage"
	}
	if len(pools) == 0 {
		return "", fmt.Errorf("there is no %s: %s: %w", what, way, errdefs.ErrFailedPrecondition)
	}
	name := o.Dataset
	if name == "" {
		name = o.Configured
	}
	if name != "" {
		pool, _, below := strings.Cut(name, "/")
		if !below {
			return "", fmt.Errorf("%s is a whole pool: give a dataset in it, as %s/containerd-pve: %w", name, name, errdefs.ErrInvalidArgument)
		}
		if !slices.Contains(pools, pool) {
			return "", fmt.Errorf("%s is on no %s (there are: %s): %w", name, what, strings.Join(pools, ", "), errdefs.ErrFailedPrecondition)
		}
		return name, nil
	}
	if len(pools) > 1 {
		var choices []string
		for _, p := range pools {
			choices = append(choices, "--dataset "+p+"/containerd-pve")
		}
		return "", fmt.Errorf("there is more than one %s: choose with %s: %w", what, strings.Join(choices, " or "), errdefs.ErrFailedPrecondition)
	}
	return pools[0] + "/containerd-pve", nil
}

// Print shows a plan to a person.
func (p *Plan) Print(w io.Writer) error {
	for _, s := range p.Steps {
		why := ""
		if s.Why != "" {
			why = " (" + s.Why + ")"
		}
		if _, err := fmt.Fprintf(w, "  %-8s %s%s\n", s.Action, s.Target, why); err != nil {
			return err
		}
		if s.Was != "" {
			fmt.Fprintf(w, "           - %s\n", s.Was)
		}
		for line := range strings.Lines(s.Content) {
			if t := strings.TrimSpace(line); t != "" && t[0] != '#' {
				fmt.Fprintf(w, "           + %s\n", strings.TrimSuffix(line, "\n"))
			}
		}
	}
	return nil
}

// platform is this machine's, in containerd's words.
func platform() string { return "linux/" + runtime.GOARCH }
