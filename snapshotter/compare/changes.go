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
	made     map[uint64]bool // objects of which there was no such file before
	out      map[string]bool // path: removed
	names    map[uint64]int  // of files with several names, how many are in out
	links    map[uint64]uint64
}

// collect turns the objects that ZFS wrote between two snapshots into changes, in
// the order of their paths, parents first. diff calls its argument for each.
// Errors: errUnclear, or those of the trees and of diff.
func collect(ctx context.Context, from, to tree, diff func(func(zfs.Change) error) error) ([]change, error) {
	c := &collector{from: from, to: to, made: map[uint64]bool{}, out: map[string]bool{}, names: map[uint64]int{}, links: map[uint64]uint64{}}
	var dirs, files []zfs.Change
	err := diff(func(ch zfs.Change) error {
		before, after := ch.Before, ch.After
		for _, n := range []*zfs.Node{before, after} {
			// An attribute that did not fit into its file: that file may not be written itself.
			if n != nil && strings.Contains(n.Path, "<xattrdir>") {
				return fmt.Errorf("%s: %w", n.Path, errUnclear)
			}
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
	for _, ch := range dirs {
		// One that got another path lies in what came anew.
		if removed, there := c.out[ch.After.Path]; ch.After.Path != "/" && (!there || removed) {
			return nil, fmt.Errorf("%s: %w", ch.After.Path, errUnclear)
		}
	}
	// A name that is left out would stay the old file's.
	for object, n := range c.names {
		if uint64(n) != c.links[object] {
			return nil, fmt.Errorf("object %d has %d names, of which %d were found: %w", object, c.links[object], n, errUnclear)
		}
	}
	return sorted(c.out), nil
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
	if before != after {
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
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
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
		return fmt.Errorf("object %d has no path: %w", ch.Object, errUnclear)
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
