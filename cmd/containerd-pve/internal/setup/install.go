package setup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/atomicwriter"
)

// undoLimit is how long it may take to undo what failed.
const undoLimit = 2 * time.Minute

// Install does what the plan says. If a step fails, those before it are undone,
// and the error says what could not be. say is told of every step before it is done.
func (h *Host) Install(ctx context.Context, p *Plan, say func(Step)) (retErr error) {
	if len(p.Steps) == 0 {
		return nil
	}
	before, err := h.record()
	if err != nil {
		return err
	}
	after, err := h.record() // another one: it shares no map
	if err != nil {
		return err
	}
	r := &run{h: h, plan: p, enabled: h.is(ctx, "enabled", ourUnit), active: h.is(ctx, "active", ourUnit)}
	for _, s := range p.Steps {
		h.note(&after, s, r.enabled)
	}
	if err := h.keep(after); err != nil {
		return err
	}
	defer func() {
		if retErr == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
		defer cancel()
		if err := r.back(ctx); err != nil {
			retErr = fmt.Errorf("%w; and what was done before could not all be undone, `containerd-pve uninstall` tries it again: %w", retErr, err)
			return
		}
		retErr = errors.Join(fmt.Errorf("%w; what was done before is undone", retErr), h.keep(before))
	}()
	for _, s := range p.Steps {
		say(s)
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.step(ctx, s); err != nil {
			return fmt.Errorf("%s %s: %w", s.Action, s.Target, err)
		}
	}
	return nil
}

// note has the record say what a step is going to make.
func (h *Host) note(r *record, s Step, enabled bool) {
	switch s.Action {
	case Copy, Write:
		r.Files[s.Target] = s.digest
		if s.Action == Write {
			r.Files[s.Target] = digestOf(s.Content)
		}
		var dirs []string
		for dir := filepath.Dir(s.Target); dir != "/"; dir = filepath.Dir(dir) {
			if _, err := os.Stat(h.at(dir)); err == nil || slices.Contains(r.Dirs, dir) {
				break
			}
			dirs = append(dirs, dir)
		}
		slices.Reverse(dirs)
		r.Dirs = append(r.Dirs, dirs...)
	case Edit:
		r.Edits[s.Target] = edit{s.Content, s.Was}
	case Remove:
		delete(r.Files, s.Target)
	case Dataset:
		r.Dataset = s.Target
	case Start:
		r.Enabled = r.Enabled || !enabled
	}
}

// run is an installation under way.
type run struct {
	h               *Host
	plan            *Plan
	enabled, active bool // the service, before
	undo            []func(context.Context) error
	// started and restarted: our service, and containerd, have begun with what may have to be undone.
	started, restarted bool
}

func (r *run) step(ctx context.Context, s Step) error {
	h := r.h
	switch s.Action {
	case Copy:
		return r.copy(s)
	case Write:
		return r.write(s.Target, s.Content, 0o644)
	case Edit:
		text, _, err := h.read(s.Target)
		if err != nil {
			return err
		}
		out, was, line, err := addImport(text, filepath.Dir(s.Target))
		if err == nil && (was != s.Was || line != s.Content) {
			err = fmt.Errorf("it was changed meanwhile: run it again: %w", errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			return err
		}
		r.undo = append(r.undo, func(context.Context) error { return h.rewrite(s.Target, text) })
		return h.rewrite(s.Target, out)
	case Remove:
		old, there, err := h.read(s.Target)
		if err != nil {
			return err
		}
		r.undo = append(r.undo, func(context.Context) error { return h.restore(s.Target, old, there, 0o644, nil) })
		return os.Remove(h.at(s.Target))
	case Dataset:
		r.undo = append(r.undo, func(ctx context.Context) error { return h.destroyEmpty(ctx, s.Target) })
		return nil // the daemon makes it
	case Start:
		r.started = true
		r.undo = append(r.undo, r.serviceBack)
		return h.each(ctx, []string{"systemctl", "daemon-reload"}, []string{"systemctl", "enable", ourUnit}, []string{"systemctl", "restart", ourUnit})
	case Restart:
		if err := h.understood(ctx, r.plan); err != nil {
			return err
		}
		r.restarted = true
		return h.each(ctx, []string{"systemctl", "restart", s.Target})
	}
	return fmt.Errorf("no step of an installation: %w", errdefs.ErrInvalidArgument)
}

// write gives a file of ours a text, and has that undone if need be.
func (r *run) write(path, text string, mode os.FileMode) error {
	old, there, err := r.h.read(path)
	if err != nil {
		return err
	}
	made, err := r.h.makeDirs(filepath.Dir(path))
	r.undo = append(r.undo, func(context.Context) error { return r.h.restore(path, old, there, mode, made) })
	if err != nil {
		return err
	}
	return r.h.write(path, text, mode)
}

// understood asks containerd whether it finds our snapshotter and, for pods, our
// runtime, before it is restarted.
func (h *Host) understood(ctx context.Context, p *Plan) error {
	c := p.containerd
	c.there = true
	e, err := h.dump(ctx, c)
	if err != nil {
		return err
	}
	for name, found := range map[string]bool{snapshotterName: e.Proxies[snapshotterName] != nil, "the runtime " + Handler: !p.pods || e.knows(Handler)} {
		if !found {
			return fmt.Errorf("containerd's configuration is as it should be, and containerd does not find %s in it: is there another file in /etc/containerd/conf.d that goes before?: %w", name, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// back undoes what was done, the last first, and has containerd begin anew with what it had.
func (r *run) back(ctx context.Context) error {
	var errs []error
	for _, undo := range slices.Backward(r.undo) {
		errs = append(errs, undo(ctx))
	}
	if r.started {
		errs = append(errs, r.h.each(ctx, []string{"systemctl", "daemon-reload"}))
	}
	if r.started && r.active {
		errs = append(errs, r.h.each(ctx, []string{"systemctl", "restart", ourUnit}))
	}
	if r.restarted {
		errs = append(errs, r.h.each(ctx, []string{"systemctl", "restart", containerdUnit}))
	}
	return errors.Join(errs...)
}

// serviceBack leaves the service as it was; its files are still the new ones.
func (r *run) serviceBack(ctx context.Context) error {
	var todo [][]string
	if !r.enabled {
		todo = append(todo, []string{"systemctl", "disable", ourUnit})
	}
	if !r.active {
		todo = append(todo, []string{"systemctl", "stop", ourUnit})
	}
	if !r.active && r.h.is(ctx, "failed", ourUnit) { // of another systemd knows nothing any more
		todo = append(todo, []string{"systemctl", "reset-failed", ourUnit})
	}
	return r.h.each(ctx, todo...)
}

// each runs commands until one fails.
func (h *Host) each(ctx context.Context, commands ...[]string) error {
	for _, c := range commands {
		if _, err := h.Run(ctx, c[0], c[1:]...); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(c, " "), err)
		}
	}
	return nil
}

// makeDirs makes a directory with those above it, and says which.
func (h *Host) makeDirs(dir string) (made []string, err error) {
	var missing []string
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(h.at(dir)); err == nil {
			break
		}
		missing = append(missing, dir)
	}
	for _, d := range slices.Backward(missing) {
		if err := os.Mkdir(h.at(d), 0o755); err != nil {
			return made, err
		}
		made = append(made, d)
	}
	return made, nil
}

func (h *Host) write(path, text string, mode os.FileMode) error {
	return atomicwriter.WriteFile(h.at(path), []byte(text), mode)
}

// rewrite gives a file of others' another text and leaves its mode.
func (h *Host) rewrite(path, text string) error {
	info, err := os.Stat(h.at(path))
	if err != nil {
		return err
	}
	return h.write(path, text, info.Mode().Perm())
}

// restore puts a file of ours back as it was.
func (h *Host) restore(path, old string, there bool, mode os.FileMode, made []string) error {
	if there {
		return h.write(path, old, mode)
	}
	if err := os.Remove(h.at(path)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, d := range slices.Backward(made) {
		_ = os.Remove(h.at(d)) // an empty directory only
	}
	return nil
}

// destroyEmpty destroys a dataset that is there and has nothing in it.
func (h *Host) destroyEmpty(ctx context.Context, name string) error {
	there, err := h.Exists(ctx, name)
	if err != nil || !there {
		return err
	}
	return h.Destroy(ctx, name)
}
