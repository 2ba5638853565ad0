package zfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Command is ZFS by the zfs program, one process a call. The go-zfs module is
// not used: it takes no context and lists 13 properties after every mutation.
type Command struct{}

var _ ZFS = Command{}

// run returns the output of zfs. Its failure carries zfs's words for people;
// what kind of failure it was is found by explain, never from the words.
func run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "zfs", args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out, msg bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &msg
	err := cmd.Run()
	switch {
	case err == nil:
		return out.String(), nil
	case ctx.Err() != nil:
		return "", fmt.Errorf("zfs %s: %w", args[0], ctx.Err())
	case errors.Is(err, exec.ErrNotFound):
		return "", fmt.Errorf("the zfs program is not on PATH (install zfsutils-linux): %w", errdefs.ErrUnavailable)
	}
	return "", fmt.Errorf("zfs %s: %s (%w)", args[0], strings.TrimSpace(msg.String()), err)
}

// Ready says whether the kernel has ZFS and the pool of name is imported.
func Ready(name string) error {
	for _, p := range []string{"/sys/module/zfs", "/dev/zfs"} {
		if _, err := os.Stat(p); err != nil {
			return fmt.Errorf("the ZFS kernel module is not loaded (%s is missing): run `modprobe zfs`: %w", p, errdefs.ErrUnavailable)
		}
	}
	pool, _, _ := strings.Cut(name, "/")
	if _, err := os.Stat(filepath.Join("/proc/spl/kstat/zfs", pool)); err != nil {
		return fmt.Errorf("ZFS pool %q is not imported: run `zpool import %s`, or create it, or set another dataset: %w", pool, pool, errdefs.ErrUnavailable)
	}
	return nil
}

func flags(p Properties) (args []string) {
	for _, k := range slices.Sorted(maps.Keys(p)) {
		args = append(args, "-o", k+"="+p[k])
	}
	return args
}

// explain gives a failed creation its kind, by looking at what is there now.
func explain(ctx context.Context, err error, name, origin string) error {
	if ctx.Err() != nil || errdefs.IsUnavailable(err) {
		return err
	}
	if rerr := Ready(name); rerr != nil {
		return rerr
	}
	if exists(ctx, name) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	}
	if !exists(ctx, origin) {
		return fmt.Errorf("%s: %w: %w", origin, err, errdefs.ErrNotFound)
	}
	fs, _, _ := strings.Cut(name, "@")
	if fs == name {
		fs = filepath.Dir(name)
	}
	if d, gerr := (Command{}).Get(ctx, fs, "available"); gerr == nil && d.Properties["available"] == "0" {
		return fmt.Errorf("no space left for %s: %w: %w", name, err, errdefs.ErrResourceExhausted)
	}
	return err
}

func exists(ctx context.Context, name string) bool {
	_, err := run(ctx, "list", "-H", "-o", "name", "-t", "filesystem,snapshot", name)
	return err == nil
}

func (Command) Create(ctx context.Context, name string, p Properties) error {
	if _, err := run(ctx, append(append([]string{"create"}, flags(p)...), name)...); err != nil {
		return explain(ctx, err, name, filepath.Dir(name))
	}
	return nil
}

func (Command) Clone(ctx context.Context, snapshot, name string, p Properties) error {
	if _, err := run(ctx, append(append([]string{"clone"}, flags(p)...), snapshot, name)...); err != nil {
		return explain(ctx, err, name, snapshot)
	}
	return nil
}

func (Command) Snapshot(ctx context.Context, name string) error {
	if _, err := run(ctx, "snapshot", name); err != nil {
		fs, _, _ := strings.Cut(name, "@")
		return explain(ctx, err, name, fs)
	}
	return nil
}

func (c Command) Destroy(ctx context.Context, name string) error {
	_, err := run(ctx, "destroy", name)
	if err == nil {
		return nil
	}
	if _, gerr := c.Get(ctx, name, "type"); gerr != nil {
		return gerr
	}
	return fmt.Errorf("%s is in use: %w: %w", name, err, errdefs.ErrFailedPrecondition)
}

func (Command) Get(ctx context.Context, name string, props ...string) (Dataset, error) {
	ds, err := list(ctx, name, []string{"-t", "filesystem,snapshot"}, props)
	if err != nil {
		return Dataset{}, err
	}
	return ds[0], nil
}

func (Command) Children(ctx context.Context, parent string, props ...string) ([]Dataset, error) {
	ds, err := list(ctx, parent, []string{"-t", "filesystem", "-d", "1"}, props)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(ds, func(d Dataset) bool { return d.Name == parent }), nil
}

func list(ctx context.Context, name string, opts, props []string) ([]Dataset, error) {
	args := append([]string{"list", "-H", "-p", "-o", strings.Join(append([]string{"name"}, props...), ",")}, opts...)
	out, err := run(ctx, append(args, name)...)
	if err != nil {
		if ctx.Err() != nil || errdefs.IsUnavailable(err) {
			return nil, err
		}
		if rerr := Ready(name); rerr != nil {
			return nil, rerr
		}
		// With the module there and the pool imported, a list by root of
		// one well-formed name fails only because the name is not there.
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	var ds []Dataset
	for line := range strings.Lines(out) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != len(props)+1 {
			return nil, fmt.Errorf("zfs list %s: %d columns instead of %d: %w", name, len(f), len(props)+1, errdefs.ErrInternal)
		}
		d := Dataset{Name: f[0], Properties: Properties{}}
		for i, p := range props {
			d.Properties[p] = f[i+1]
		}
		ds = append(ds, d)
	}
	if len(ds) == 0 {
		return nil, fmt.Errorf("dataset %s: %w", name, errdefs.ErrNotFound)
	}
	return ds, nil
}

func (c Command) Set(ctx context.Context, name, property, value string) error {
	if _, err := run(ctx, "set", property+"="+value, name); err != nil {
		if _, gerr := c.Get(ctx, name, "type"); gerr != nil {
			return gerr
		}
		return err
	}
	return nil
}

// New returns the one implementation there is.
func New() ZFS { return Command{} }
