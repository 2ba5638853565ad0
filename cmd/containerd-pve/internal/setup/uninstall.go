package setup

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Left is what of an installation is not taken back.
type Left struct {
	// OurPart: our service, its configuration, the programs and the dataset.
	OurPart bool
	// Dataset: there are snapshots in it.
	Dataset bool
	// Programs: there are containers, whose shims need them.
	Programs bool
}

// PlanUninstall says how what Install made is taken back, and changes nothing.
// Without steps there is nothing.
func (h *Host) PlanUninstall(ctx context.Context, left Left) (*Plan, error) {
	r, err := h.record()
	if err != nil {
		return nil, err
	}
	p := &Plan{Dataset: r.Dataset}
	ofContainerd := func(path string) bool { return strings.HasPrefix(path, "/etc/containerd/") }
	// containerd first: then nobody asks our daemon any more. What is gone already may be an interrupted call's, which did not
	// come to the restart.
	changed := len(r.Edits) > 0
	for path, e := range r.Edits {
		text, _, err := h.read(path)
		if err != nil {
			return nil, err
		}
		if _, ok := dropImport(text, e.Was, e.Line); !ok {
			p.add(Step{Action: Keep, Target: path, Why: "the line " + e.Line + " is not there any more as it was written"})
			continue
		}
		p.add(Step{Action: Edit, Target: path, Content: e.Was, Was: e.Line})
	}
	var rest []Step
	for _, path := range r.paths() {
		s, there, err := h.removal(path, r)
		if err != nil {
			return nil, err
		}
		switch {
		case !there:
			changed = changed || ofContainerd(path)
		case filepath.Dir(path) == ProgramsDir && left.Programs:
			rest = append(rest, Step{Action: Keep, Target: path, Why: "containers run with it"})
		case !ofContainerd(path):
			rest = append(rest, s)
		default:
			changed = changed || s.Action == Remove
			p.add(s)
		}
	}
	if changed && h.is(ctx, "active", containerdUnit) {
		p.add(Step{Action: Restart, Target: containerdUnit, Why: "containers go on meanwhile"})
	}
	if left.OurPart {
		return p, nil
	}
	if r.Enabled {
		p.add(Step{Action: Disable, Target: ourUnit})
	}
	p.Steps = append(p.Steps, rest...)
	if r.Dataset != "" {
		there, err := h.Exists(ctx, r.Dataset)
		switch {
		case err != nil || left.Dataset:
			p.add(Step{Action: Keep, Target: r.Dataset, Why: "images and containers are in it; with the records in /var/lib/containerd-pve"})
		case there && r.Enabled: // otherwise the daemon goes on with it
			p.add(Step{Action: Destroy, Target: r.Dataset, Why: "nothing is in it; its records in /var/lib/containerd-pve go too"})
		}
	}
	return p, nil
}

// paths are the files that were written, in an order that is always the same.
func (r record) paths() []string {
	var all []string
	for path := range r.Files {
		all = append(all, path)
	}
	slices.Sort(all)
	return all
}

// removal is what becomes of a file that was written.
func (h *Host) removal(path string, r record) (s Step, there bool, err error) {
	text, there, err := h.read(path)
	if err != nil || !there {
		return s, there, err
	}
	if digestOf(text) != r.Files[path] {
		return Step{Action: Keep, Target: path, Why: "it was changed since"}, true, nil
	}
	return Step{Action: Remove, Target: path}, true, nil
}

// Uninstall does what the plan says. What fails does not keep it from the rest.
func (h *Host) Uninstall(ctx context.Context, p *Plan, left Left, say func(Step)) error {
	r, err := h.record()
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range p.Steps {
		say(s)
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if err := h.takeBack(ctx, s, r); err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", s.Action, s.Target, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err // the record stays, for another try
	}
	for _, d := range slices.Backward(r.Dirs) {
		_ = os.Remove(h.at(d)) // an empty directory only
	}
	now := record{Version: recordVersion}
	switch {
	case left.OurPart:
		now = r
		now.Edits = nil
		maps.DeleteFunc(now.Files, func(path string, _ digest.Digest) bool { return strings.HasPrefix(path, "/etc/containerd/") })
	case left.Programs: // another call takes them away
		now.Files, now.Dirs = maps.Clone(r.Files), r.Dirs
		maps.DeleteFunc(now.Files, func(path string, _ digest.Digest) bool { return filepath.Dir(path) != ProgramsDir })
	}
	return h.keep(now)
}

func (h *Host) takeBack(ctx context.Context, s Step, r record) error {
	switch s.Action {
	case Edit:
		text, there, err := h.read(s.Target)
		if err != nil || !there {
			return err
		}
		out, ok := dropImport(text, r.Edits[s.Target].Was, r.Edits[s.Target].Line)
		if !ok {
			return nil
		}
		return h.rewrite(s.Target, out)
	case Remove:
		again, there, err := h.removal(s.Target, r)
		if err != nil || !there || again.Action != Remove {
			return err
		}
		if err := os.Remove(h.at(s.Target)); err != nil || s.Target != ourUnitFile {
			return err
		}
		return h.each(ctx, []string{"systemctl", "daemon-reload"})
	case Restart:
		return h.each(ctx, []string{"systemctl", "restart", s.Target})
	case Disable:
		return h.each(ctx, []string{"systemctl", "disable", "--now", s.Target})
	case Destroy:
		return h.destroyEmpty(ctx, s.Target)
	}
	return nil
}
