package lxc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/godbus/dbus/v5"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/systemd"
)

// unit is the scope that systemd makes the container's cgroup for:
// linux.cgroupsPath "slice:prefix:name".
type unit struct {
	Slice  string `json:"slice"`
	Prefix string `json:"prefix"`
	Name   string `json:"name"`
}

const (
	defaultSlice  = "system.slice"
	defaultPrefix = "containerd-pve"
)

// unitWord is what a part of a unit's name may hold.
var unitWord = regexp.MustCompile(`^[A-Za-z0-9_.\\@-]+$`)

// parseUnit reads linux.cgroupsPath for systemd; name is for an empty one.
func parseUnit(path, name string) (*unit, error) {
	if path == "" {
		return &unit{Slice: defaultSlice, Prefix: defaultPrefix, Name: name}, nil
	}
	const form = "linux.cgroupsPath %q is not of the form slice:prefix:name, which systemd's cgroup driver needs"
	parts := strings.Split(path, ":")
	if len(parts) != 3 {
		return nil, invalid(form, path)
	}
	u := &unit{Slice: parts[0], Prefix: parts[1], Name: parts[2]}
	if u.Slice == "" {
		u.Slice = defaultSlice
	}
	if !unitWord.MatchString(u.Prefix) || !unitWord.MatchString(u.Name) || len(u.scope()) > 255 {
		return nil, invalid(form+": %q is no name of a unit", path, u.scope())
	}
	if strings.HasSuffix(u.Name, ".slice") {
		return nil, invalid("linux.cgroupsPath %q: a container is a scope and cannot be a slice", path)
	}
	if _, err := systemd.ExpandSlice(u.Slice); err != nil {
		return nil, invalid(form+": %w", path, err)
	}
	return u, nil
}

func (u *unit) scope() string { return u.Prefix + "-" + u.Name + ".scope" }

// cgroup is where systemd puts the scope.
func (u *unit) cgroup() (string, error) {
	slice, err := systemd.ExpandSlice(u.Slice)
	if err != nil {
		return "", err
	}
	return filepath.Join(slice, u.scope()), nil
}

func (u *unit) manager() (*systemd.UnifiedManager, error) {
	return systemd.NewUnifiedManager(&cgroups.Cgroup{
		Parent: u.Slice, ScopePrefix: u.Prefix, Name: u.Name, Systemd: true, Resources: &cgroups.Resources{},
	}, "")
}

// bounded ends the wait for systemd with the context. The library knows none and
// waits for 30 s; what it still does then, a later stop undoes.
func bounded(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("waiting for systemd: %w", ctx.Err())
	}
}

// stop has systemd forget the scope; one that is gone already is no error.
func (u *unit) stop(ctx context.Context) error {
	if !systemd.IsRunningSystemd() {
		return nil // then there is nothing that could remember it
	}
	m, err := u.manager()
	if err != nil {
		return err
	}
	if err := bounded(ctx, m.Destroy); err != nil {
		return fmt.Errorf("stop %s: %w", u.scope(), err)
	}
	return nil
}

// holder is a process that keeps the scope alive until the container's init is
// in it: systemd starts no scope without a process and ends one that has lost
// its last. It has a cgroup of its own below X, as a cgroup whose controllers
// are delegated may hold no process itself. A pve-init that waits for its plan.
type holder struct {
	cmd  *exec.Cmd
	sync *channel
	dir  string
}

const holderCgroup = "holder"

func startHolder(program *initProgram) (*holder, error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	exe, err := program.open()
	if err != nil {
		ours.close()
		return nil, err
	}
	defer exe.Close()
	cmd := &exec.Cmd{Path: "/proc/self/fd/4", Args: []string{"pve-init", "exec", "3"}, Env: []string{}, Dir: "/", ExtraFiles: []*os.File{theirs, exe}}
	if err := cmd.Start(); err != nil {
		ours.close()
		return nil, fmt.Errorf("start pve-init: %w", err)
	}
	return &holder{cmd: cmd, sync: ours}, nil
}

// release ends the holder and takes its cgroup away. It may be nil.
func (h *holder) release() {
	if h == nil {
		return
	}
	h.sync.close() // it ends by itself then; the signal is for one that hangs
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
	if h.dir != "" {
		_ = os.Remove(h.dir) // what is left is removed with X
	}
}

// startScope makes the container's scope.
func (c *cgroup) startScope(ctx context.Context, u *unit, program *initProgram) (retErr error) {
	if !systemd.IsRunningSystemd() {
		return fmt.Errorf("linux.cgroupsPath or the runtime option SystemdCgroup asks for systemd's cgroup driver: this host was not booted by systemd: %w", errdefs.ErrFailedPrecondition)
	}
	m, err := u.manager()
	if err != nil {
		return err
	}
	h, err := startHolder(program)
	if err != nil {
		return err
	}
	defer func() {
		if retErr != nil {
			h.release()
		}
	}()
	if err := bounded(ctx, func() error { return m.Apply(h.cmd.Process.Pid) }); err != nil {
		if ctx.Err() != nil {
			return err
		}
		var kind error = errdefs.ErrFailedPrecondition
		var answer dbus.Error
		if errors.As(err, &answer) {
			switch answer.Name {
			case "org.freedesktop.systemd1.UnitExists":
				kind = errdefs.ErrAlreadyExists
			case "org.freedesktop.DBus.Error.InvalidArgs":
				kind = errdefs.ErrInvalidArgument
			}
		}
		return fmt.Errorf("linux.cgroupsPath: start %s: %w: %w", u.scope(), err, kind)
	}
	h.dir = filepath.Join(m.Path(""), holderCgroup)
	if err := os.Mkdir(h.dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(h.dir, "cgroup.procs"), []byte(strconv.Itoa(h.cmd.Process.Pid)), 0); err != nil {
		return fmt.Errorf("keep %s alive: %w", u.scope(), err)
	}
	// What the spec leaves out is no limit; systemd would take its own default.
	if c.limits.PidsLimit == nil {
		none := int64(-1)
		c.limits.PidsLimit = &none
	}
	c.manager, c.holder = m, h
	return nil
}
