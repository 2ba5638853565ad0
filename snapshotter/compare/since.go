package compare

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/log"
)

// Kind of a Difference; the letters are those of `docker diff`.
type Kind string

// The kinds.
const (
	Added    Kind = "A"
	Modified Kind = "C"
	Deleted  Kind = "D"
)

// Difference is a name in a filesystem that is not what it was.
type Difference struct {
	Kind Kind `json:"kind"`
	// Path begins with a slash at the filesystem's root. Of what is deleted with a
	// directory, that is the only one; of a directory in which a name came or went there is one as well.
	Path string `json:"path"`
}

// Since are the differences of a filesystem to one of its own snapshots
// (dataset@name), in the order of their paths. Errors: those of ZFS.
func Since(ctx context.Context, z ZFS, snapshot string) (_ []Difference, err error) {
	filesystem, _, _ := strings.Cut(snapshot, "@")
	fail := func(err error) ([]Difference, error) {
		return nil, fmt.Errorf("comparing %s with %s: %w", filesystem, snapshot, err)
	}
	from, err := attach(ctx, side{dataset: snapshot, view: true})
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, from.close()) }()
	to, err := attach(ctx, side{dataset: filesystem})
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, to.close()) }()
	differ, ok := z.(Differ)
	changes, err := []change(nil), errUnclear
	if ok {
		changes, err = asked(ctx, differ, snapshot, filesystem, from, to)
	}
	if errors.Is(err, errUnclear) {
		log.G(ctx).WithField("dataset", filesystem).Debugf("both trees are walked: %v", err)
		changes, err = walk(ctx, from, to)
	}
	if err == nil {
		changes, err = rootToo(changes, from, to)
	}
	if err != nil {
		return fail(err)
	}
	all := make([]Difference, 0, len(changes))
	listed := map[string]bool{}
	add := func(k Kind, p string) {
		if !listed[p] {
			listed[p] = true
			all = append(all, Difference{Kind: k, Path: p})
		}
	}
	for _, c := range changes {
		k := Deleted
		if !c.removed {
			k = Modified
			if _, err := from.stat(c.path); isGone(err) {
				k = Added
			} else if err != nil {
				return fail(err)
			}
		}
		add(k, c.path)
	}
	// ZFS tells of a directory in which a name came or went; a walk does not.
	for _, c := range all {
		if dir := path.Dir(c.Path); c.Kind != Modified && dir != "/" {
			add(Modified, dir)
		}
	}
	slices.SortFunc(all, func(a, b Difference) int { return strings.Compare(a.Path, b.Path) })
	return all, nil
}
