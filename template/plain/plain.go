// Package plain keeps templates on a host without Proxmox: a template is a container
// of LXC's under a number, which `lxc-copy -s` clones as `pct clone` does on Proxmox. It owns the
// directories of LXC's that have its own file in them. It never touches another container of
// LXC's, nor a dataset.
package plain

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/atomicwriter"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

const (
	// file is the template's conf, in Proxmox's words, in its directory of LXC's.
	file = "containerd-pve.conf"
	// config is what LXC reads. It is there once the template is finished.
	config = "config"
)

// Storage is the name that the confs have for the dataset of all templates.
const Storage = "plain"

// common is what Debian's LXC gives every container: devices, capabilities, mounts.
const common = "/usr/share/lxc/config/common.conf"

// Node is a host's part that pve.Node has on one of Proxmox.
type Node struct {
	// Path is where LXC has its containers, /var/lib/lxc, and Default the
	// configuration that lxc-create gives to each, /etc/lxc/default.conf.
	Path, Default string
	// Pool is the dataset that has the templates' datasets.
	Pool  string
	Range pve.Range
	// Locks is /run/lock/lxc.
	Locks string
}

// first and last bound the numbers where no range is configured.
const first, last = 100, 999_999

func (n *Node) dir(number int) string { return filepath.Join(n.Path, strconv.Itoa(number)) }

// Register reserves a number that no container of LXC's has: want, or the first that is
// free if want is 0. Errors: AlreadyExists; InvalidArgument, what a container of LXC's cannot
// have; ResourceExhausted.
func (n *Node) Register(ctx context.Context, want int, of func(number int) (*pve.Conf, error)) (int, error) {
	if err := os.MkdirAll(n.Path, 0o755); err != nil {
		return 0, fmt.Errorf("registering a template: %w", err)
	}
	if want != 0 {
		if want < first {
			return 0, fmt.Errorf("number %d is less than %d: %w", want, first, errdefs.ErrInvalidArgument)
		}
		err := n.create(want, of)
		if errors.Is(err, os.ErrExist) {
			err = fmt.Errorf("number %d is taken (`lxc-ls` lists the containers): %w: %w", want, err, errdefs.ErrAlreadyExists)
		}
		return want, err
	}
	r := n.Range
	if r == (pve.Range{}) {
		r = pve.Range{Lower: first, Upper: last + 1}
	}
	for number := r.Lower; number < r.Upper; number++ {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if err := n.create(number, of); !errors.Is(err, os.ErrExist) {
			return number, err
		}
	}
	return 0, fmt.Errorf("no number from %d to %d is free below %s: %w", r.Lower, r.Upper-1, n.Path, errdefs.ErrResourceExhausted)
}

// create fails with os.ErrExist if the number is taken.
func (n *Node) create(number int, of func(int) (*pve.Conf, error)) error {
	conf, err := of(number)
	if err != nil {
		return err
	}
	if _, err := n.config(number, conf); err != nil {
		return err
	}
	dir := n.dir(number)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("registering number %d: %w", number, err)
	}
	if err := n.write(number, conf); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	return nil
}

// write writes what is kept, and what LXC reads of a finished one.
func (n *Node) write(number int, conf *pve.Conf) error {
	if err := atomicwriter.WriteFile(filepath.Join(n.dir(number), file), conf.Bytes(), 0o640); err != nil {
		return fmt.Errorf("writing number %d: %w", number, err)
	}
	if conf.Lock() != "" {
		return nil
	}
	text, err := n.config(number, conf)
	if err != nil {
		return err
	}
	if err := atomicwriter.WriteFile(filepath.Join(n.dir(number), config), text, 0o640); err != nil {
		return fmt.Errorf("writing number %d: %w", number, err)
	}
	return nil
}

// config is a conf in LXC's words (lxc.container.conf(5)). Errors: InvalidArgument,
// LXC has none.
func (n *Node) config(number int, conf *pve.Conf) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("# A template that containerd-pve made: `lxc-copy -s` clones it.\n")
	for _, name := range []string{common, n.Default} {
		if _, err := os.Stat(name); err == nil {
			fmt.Fprintf(&b, "lxc.include = %s\n", name)
		}
	}
	if _, ok := conf.Get("net0"); ok {
		return nil, fmt.Errorf("--net is for nodes of Proxmox: here a clone has the networks that %s says: %w", n.Default, errdefs.ErrInvalidArgument)
	}
	get := func(key string) string { value, _ := conf.Get(key); return value }
	rootfs, _, _ := strings.Cut(get("rootfs"), ",")
	fmt.Fprintf(&b, "lxc.rootfs.path = zfs:%s\n", path.Join(n.Pool, strings.TrimPrefix(rootfs, Storage+":")))
	fmt.Fprintf(&b, "lxc.uts.name = %s\nlxc.arch = %s\n", get("hostname"), get("arch"))
	for _, of := range [][2]string{{"memory", "lxc.cgroup2.memory.max"}, {"swap", "lxc.cgroup2.memory.swap.max"}} {
		if mib, err := strconv.ParseInt(get(of[0]), 10, 64); err == nil {
			fmt.Fprintf(&b, "%s = %d\n", of[1], mib<<20)
		}
	}
	// A start would change what is cloned, and lxc-destroy destroys what a dataset was cloned
	// of with it: a layer of containerd's. lxc-copy gives the clones the same hooks.
	for _, of := range [][2]string{{"pre-start", fmt.Sprintf("lxc-copy -n %d -N NAME -s clones it", number)}, {"destroy", fmt.Sprintf("containerd-pve template rm %d removes it", number)}} {
		fmt.Fprintf(&b, "lxc.hook.%s = sh -c 'test \"$LXC_NAME\" != %d || { echo \"containerd-pve: %[2]d is a template: %[3]s\" >&2; exit 1; }'\n", of[0], number, of[1])
	}
	if line := get("entrypoint"); line != "" {
		fmt.Fprintf(&b, "lxc.init.cmd = %s\n", line)
	}
	for _, e := range conf.LXC() {
		// Proxmox's LXC has a word of its own for it.
		if e.Key == "lxc.environment.runtime" {
			e.Key = "lxc.environment"
		}
		fmt.Fprintf(&b, "%s = %s\n", e.Key, e.Value)
	}
	return b.Bytes(), nil
}

// Guests are the numbers of the templates.
func (n *Node) Guests() ([]int, error) {
	names, err := filepath.Glob(filepath.Join(n.Path, "*", file))
	if err != nil {
		return nil, err
	}
	var all []int
	for _, name := range names {
		if number, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			all = append(all, number)
		}
	}
	slices.Sort(all)
	return all, nil
}

// Read is a template's conf. Errors: NotFound.
func (n *Node) Read(number int) (*pve.Conf, error) {
	text, err := os.ReadFile(filepath.Join(n.dir(number), file))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("number %d: %w: %w", number, err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("number %d: %w", number, err)
	}
	return pve.Parse(text), nil
}

// Change changes a conf; errors of change leave it as it was. Errors: NotFound.
func (n *Node) Change(ctx context.Context, number int, change func(*pve.Conf) error) error {
	return n.Exclusive(ctx, "template-"+strconv.Itoa(number), func() error {
		conf, err := n.Read(number)
		if err != nil {
			return err
		}
		if err := change(conf); err != nil {
			return err
		}
		return n.write(number, conf)
	})
}

// Remove gives a number back if mine says that its conf is ours; before is called first,
// while LXC knows it no more. Errors: FailedPrecondition; those of before.
func (n *Node) Remove(ctx context.Context, number int, mine func(*pve.Conf) bool, before func(*pve.Conf) error) error {
	return n.Exclusive(ctx, "template-"+strconv.Itoa(number), func() error {
		conf, err := n.Read(number)
		if errdefs.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if !mine(conf) {
			return fmt.Errorf("number %d is no template of containerd-pve's: it stays: %w", number, errdefs.ErrFailedPrecondition)
		}
		if err := before(conf); err != nil {
			return err
		}
		if err := os.RemoveAll(n.dir(number)); err != nil {
			return fmt.Errorf("removing number %d: %w", number, err)
		}
		return nil
	})
}

// Exclusive calls f while no other process on this host is in one of the same name.
func (n *Node) Exclusive(ctx context.Context, name string, f func() error) error {
	return (&pve.Node{Locks: n.Locks}).Exclusive(ctx, name, f)
}
