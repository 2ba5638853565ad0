package compare

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// change is one that a difference is made of.
type change struct {
	path    string // from the root, with a slash before it
	removed bool
}

// file is what this package asks of a file or directory.
type file struct {
	object uint64 // its inode number
	dir    bool
	links  uint64
}

// tree is a filesystem to be looked at. Paths begin with a slash at its root;
// symbolic links are not followed.
type tree interface {
	list(dir string) (map[string]file, error)
	stat(path string) (file, error)
}

// errUnclear: what ZFS says does not tell all that changed, the trees have to be walked.
var errUnclear = errors.New("the changes cannot be told from what ZFS wrote")

// collector finds the names of what changed. ZFS tells objects that it wrote,
// each with one path at most, so names are told from directories: one in which a
// name came, went or stands for another file was written itself.
type collector struct {
	from, to tree
	made     map[uint64]bool   // objects of which there was no such file before
	out      map[string]bool   // path: removed
	links    map[uint64]uint64 // of the files in out with several names, how many they are
	names    map[uint64]uint64 // and how many of those are in out
	nameless map[uint64]bool   // files of which no name was found yet
}

// collect turns the objects that ZFS wrote between two snapshots into changes, in
// the order of their paths, parents first. diff calls its argument for each.
// Errors: errUnclear, or those of the trees and of diff.
func collect(ctx context.Context, from, to tree, diff func(func(zfs.Change) error) error) ([]change, error) {
	c := &collector{
		from: from, to: to, made: map[uint64]bool{}, out: map[string]bool{},
		links: map[uint64]uint64{}, names: map[uint64]uint64{}, nameless: map[uint64]bool{},
	}
	var dirs, files []zfs.Change
	var owners []string
	err := diff(func(ch zfs.Change) error {
		before, after := ch.Before, ch.After
		if owner, ok := attributeOf(before, after); ok {
			owners = append(owners, owner)
		}
		switch {
		case after == nil: // its directory says so
		case before == nil || before.Generation != after.Generation:
			c.made[ch.Object] = true
		case after.Mode&unix.S_IFMT == unix.S_IFDIR:
			dirs = append(dirs, ch)
		default:
			files = append(files, ch)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// After all that was made is known.
	for _, ch := range dirs {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := c.directory(ch); err != nil {
			return nil, err
		}
	}
	for _, ch := range files {
		if err := c.file(ch); err != nil {
			return nil, err
		}
	}
	for _, p := range owners {
		if err := c.owner(p); err != nil {
			return nil, err
		}
	}
	for _, ch := range dirs {
		// One that got another path lies in what came anew.
		if removed, there := c.out[ch.After.Path]; ch.After.Path != "/" && !isAttribute(ch.After.Path) && (!there || removed) {
			return nil, fmt.Errorf("%s: %w", ch.After.Path, errUnclear)
		}
	}
	if err := c.search(ctx); err != nil {
		return nil, err
	}
	return sorted(c.out), nil
}

// xattrDir is in the path of an attribute that did not fit into its file: it is
// an object of its own, whose file is not written when it is.
const xattrDir = "/<xattrdir>"

func isAttribute(p string) bool { return strings.Contains(p, xattrDir) }

// attributeOf is the path of the file that an attribute is of.
func attributeOf(before, after *zfs.Node) (owner string, ok bool) {
	for _, n := range []*zfs.Node{after, before} {
		if n != nil {
			if owner, _, ok = strings.Cut(n.Path, xattrDir); ok {
				return owner, true
			}
		}
	}
	return "", false
}

// owner is for a file of which an attribute changed; a directory may have a file
// that is called like it.
func (c *collector) owner(p string) error {
	f, err := c.to.stat(p)
	if isGone(err) {
		return nil // the file went with it, or its new name is new
	}
	if err == nil && p != "/" {
		c.add(p, f)
	}
	return err
}

func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

// search looks for all names of the files of which some are missing: one that is
// left out would stay the old file's.
func (c *collector) search(ctx context.Context) error {
	missing := maps.Clone(c.nameless)
	for object, n := range c.links {
		if c.names[object] != n {
			missing[object] = true
		}
	}
	if len(missing) == 0 {
		return nil
	}
	var look func(dir string) error
	look = func(dir string) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		files, err := c.to.list(dir)
		if err != nil {
			return err
		}
		for name, f := range files {
			p := path.Join(dir, name)
			if missing[f.object] && !f.dir {
				delete(c.nameless, f.object)
				c.add(p, f)
			}
			if f.dir {
				if err := look(p); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := look("/"); err != nil {
		return err
	}
	for object := range missing {
		if c.nameless[object] || c.names[object] != c.links[object] {
			return fmt.Errorf("object %d has %d names, of which %d were found: %w", object, c.links[object], c.names[object], errUnclear)
		}
	}
	return nil
}

// sorted puts a directory before what is in it.
func sorted(out map[string]bool) []change {
	var all []change
	for _, p := range slices.SortedFunc(maps.Keys(out), func(a, b string) int {
		return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
	}) {
		all = append(all, change{path: p, removed: out[p]})
	}
	return all
}

// add takes a path of to.
func (c *collector) add(p string, f file) {
	if _, there := c.out[p]; there {
		return
	}
	c.out[p] = false
	if !f.dir && f.links > 1 {
		c.names[f.object]++
		c.links[f.object] = f.links
	}
}

// directory is for one that was there before.
func (c *collector) directory(ch zfs.Change) error {
	before, after := ch.Before.Path, ch.After.Path
	if before == "" || after == "" {
		return fmt.Errorf("directory %d has no path: %w", ch.Object, errUnclear)
	}
	if before != after || isAttribute(after) {
		return nil // it, or one above it, is a new name in another one
	}
	if f, err := c.to.stat(after); err != nil {
		return err
	} else if f.object != ch.Object {
		return fmt.Errorf("%s: %w", after, errUnclear)
	} else if after != "/" {
		c.add(after, f)
	}
	return c.entries(before, after, false)
}

// file is for one that was there before, and is not a directory.
func (c *collector) file(ch zfs.Change) error {
	found := false
	for _, p := range []string{ch.After.Path, ch.Before.Path} {
		if p == "" {
			continue
		}
		f, err := c.to.stat(p)
		if isGone(err) {
			found = found || isAttribute(p)
			continue // another of its names
		}
		if err != nil {
			return err
		}
		if f.object == ch.Object {
			found = true
			c.add(p, f)
		}
	}
	if !found {
		c.nameless[ch.Object] = true
	}
	return nil
}

// entries compares two directories, of which before may be none. all: they are
// not the same one, so everything in it is new.
func (c *collector) entries(before, after string, all bool) error {
	old := map[string]file{}
	if before != "" {
		var err error
		if old, err = c.from.list(before); err != nil {
			return err
		}
	}
	now, err := c.to.list(after)
	if err != nil {
		return err
	}
	for name := range old {
		if _, there := now[name]; !there {
			c.out[path.Join(after, name)] = true
		}
	}
	for name, f := range now {
		was, there := old[name]
		if !all && there && was.object == f.object && !c.made[f.object] {
			continue
		}
		p := path.Join(after, name)
		c.add(p, f)
		if !f.dir {
			continue
		}
		// A layer's directory is laid over one that is there.
		below := ""
		if there && was.dir {
			below = path.Join(before, name)
		}
		if err := c.entries(below, p, true); err != nil {
			return err
		}
	}
	return nil
}
