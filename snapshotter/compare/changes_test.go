package compare

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// inode is a file or directory of a model of a filesystem.
type inode struct {
	object, generation, changed uint64
	content                     int
	names                       map[string]*inode // of a directory
}

func (i *inode) dir() bool { return i.names != nil }

// model is a filesystem on which things are done at random.
type model struct {
	root   *inode
	clock  uint64
	unused []uint64 // numbers of what was removed
}

func newModel() *model {
	return &model{root: &inode{object: 34, names: map[string]*inode{}}, clock: 100}
}

func (m *model) make(r *rand.Rand, dir bool) *inode {
	m.clock++
	i := &inode{object: m.clock, generation: m.clock, changed: m.clock, content: int(m.clock)}
	if n := len(m.unused); n > 0 && r.IntN(2) == 0 {
		i.object, m.unused = m.unused[n-1], m.unused[:n-1]
	}
	if dir {
		i.names = map[string]*inode{}
	}
	return i
}

func (m *model) touch(all ...*inode) {
	m.clock++
	for _, i := range all {
		i.changed = m.clock
	}
}

// walk calls f for every name.
func walkModel(i *inode, p string, f func(p string, parent, i *inode)) {
	for _, name := range slices.Sorted(maps.Keys(i.names)) {
		child := i.names[name]
		f(path.Join(p, name), i, child)
		walkModel(child, path.Join(p, name), f)
	}
}

func (m *model) links() map[*inode]int {
	n := map[*inode]int{}
	walkModel(m.root, "/", func(_ string, _, i *inode) { n[i]++ })
	return n
}

// copy has inodes of its own with the same numbers.
func (m *model) copy() *model {
	done := map[*inode]*inode{}
	var clone func(*inode) *inode
	clone = func(i *inode) *inode {
		if c := done[i]; c != nil {
			return c
		}
		c := *i
		done[i] = &c
		if i.dir() {
			c.names = map[string]*inode{}
			for name, child := range i.names {
				c.names[name] = clone(child)
			}
		}
		return &c
	}
	return &model{root: clone(m.root), clock: m.clock, unused: slices.Clone(m.unused)}
}

// remove takes a name away, and what is below it.
func (m *model) remove(r *rand.Rand, parent *inode, name string) {
	i := parent.names[name]
	for n := range i.names {
		m.remove(r, i, n)
	}
	delete(parent.names, name)
	m.touch(parent, i)
	if m.links()[i] == 0 {
		m.unused = append(m.unused, i.object)
	}
}

// step does something at random.
func (m *model) step(r *rand.Rand, hardLinks bool) {
	type place struct {
		parent *inode
		name   string
		path   string
	}
	dirs := []*inode{m.root}
	paths := map[*inode]string{m.root: "/"}
	var all []place
	walkModel(m.root, "/", func(p string, parent, i *inode) {
		all = append(all, place{parent, path.Base(p), p})
		if i.dir() {
			dirs = append(dirs, i)
			paths[i] = p
		}
	})
	dir := dirs[r.IntN(len(dirs))]
	name := string(rune('a' + r.IntN(6)))
	what := r.IntN(6)
	if len(all) == 0 {
		what = 0
	}
	switch what {
	case 0, 1: // a new one
		if dir.names[name] == nil {
			dir.names[name] = m.make(r, r.IntN(3) == 0)
			m.touch(dir)
		}
	case 2:
		p := all[r.IntN(len(all))]
		m.remove(r, p.parent, p.name)
	case 3: // written, or another mode
		p := all[r.IntN(len(all))]
		i := p.parent.names[p.name]
		m.touch(i)
		i.content = int(m.clock)
	case 4: // renamed, over what may be there
		p := all[r.IntN(len(all))]
		i := p.parent.names[p.name]
		if i.dir() && strings.HasPrefix(paths[dir]+"/", p.path+"/") {
			return // into itself
		}
		if old := dir.names[name]; old != nil {
			if old == i || old.dir() != i.dir() || len(old.names) > 0 {
				return
			}
			m.remove(r, dir, name)
		}
		delete(p.parent.names, p.name)
		dir.names[name] = i
		m.touch(p.parent, dir, i)
	case 5:
		p := all[r.IntN(len(all))]
		if i := p.parent.names[p.name]; hardLinks && !i.dir() && dir.names[name] == nil {
			dir.names[name] = i
			m.touch(dir, i)
		}
	}
}

func (m *model) find(p string) *inode {
	i := m.root
	for name := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
		if name != "" {
			if i = i.names[name]; i == nil {
				return nil
			}
		}
	}
	return i
}

func (m *model) file(i *inode) file {
	return file{object: i.object, dir: i.dir(), links: uint64(max(m.links()[i], 1))}
}

func (m *model) stat(p string) (file, error) {
	if i := m.find(p); i != nil {
		return m.file(i), nil
	}
	return file{}, fs.ErrNotExist
}

func (m *model) list(p string) (map[string]file, error) {
	i := m.find(p)
	if i == nil || !i.dir() {
		return nil, fmt.Errorf("%s is no directory", p)
	}
	all := map[string]file{}
	for name, child := range i.names {
		all[name] = m.file(child)
	}
	return all, nil
}

// nodes are what the module says of all objects.
func (m *model) nodes(r *rand.Rand) map[uint64]*zfs.Node {
	all := map[uint64]*zfs.Node{m.root.object: {Path: "/", Mode: unix.S_IFDIR, Changed: [2]uint64{m.root.changed}}}
	links := m.links()
	walkModel(m.root, "/", func(p string, _, i *inode) {
		if all[i.object] != nil && r.IntN(2) == 0 {
			return // any of its names
		}
		n := &zfs.Node{Path: p, Generation: i.generation, Changed: [2]uint64{i.changed}, Links: uint64(links[i])}
		if i.dir() {
			n.Mode = unix.S_IFDIR
		} else if links[i] > 1 && r.IntN(4) == 0 {
			n.Path = ""
		}
		all[i.object] = n
	})
	return all
}

// diff is what `zfs diff` would tell, in no order.
func diffOf(r *rand.Rand, from, to *model) func(func(zfs.Change) error) error {
	before, after := from.nodes(r), to.nodes(r)
	return func(f func(zfs.Change) error) error {
		objects := map[uint64]bool{}
		for o := range before {
			objects[o] = true
		}
		for o := range after {
			objects[o] = true
		}
		for o := range objects {
			b, a := before[o], after[o]
			if b != nil && a != nil && b.Generation == a.Generation && b.Changed == a.Changed {
				continue
			}
			if err := f(zfs.Change{Object: o, Before: b, After: a}); err != nil {
				return err
			}
		}
		return nil
	}
}

// unpack does to from what a layer of changes does; what is in it is to's.
func unpack(t *testing.T, from, to *model, changes []change) {
	linked := map[uint64]*inode{}
	for _, c := range changes {
		parent, name := from.find(path.Dir(c.path)), path.Base(c.path)
		if c.removed {
			if parent == nil || parent.names[name] == nil {
				t.Errorf("a whiteout of %s, which there is not", c.path)
				continue
			}
			delete(parent.names, name)
			continue
		}
		now := to.find(c.path)
		if old := parent.names[name]; now.dir() && old != nil && old.dir() {
			old.content = now.content
			continue
		}
		i := linked[now.object]
		if i == nil {
			i = &inode{object: now.object, content: now.content}
			if now.dir() {
				i.names = map[string]*inode{}
			}
			linked[now.object] = i
		}
		parent.names[name] = i
	}
}

// print is all that can be seen of a filesystem.
func (m *model) print() string {
	var b strings.Builder
	names := map[*inode]string{}
	walkModel(m.root, "/", func(p string, _, i *inode) {
		if names[i] == "" {
			names[i] = p
		}
		fmt.Fprintf(&b, "%s dir=%v content=%d as=%s\n", p, i.dir(), i.content, names[i])
	})
	return b.String()
}

// TestCollect: a layer of what was collected makes of the tree before the tree
// after, whatever was done in between.
func TestCollect(t *testing.T) {
	for _, hardLinks := range []bool{false, true} {
		for seed := range uint64(3000) {
			r := rand.New(rand.NewPCG(seed, 1))
			from := newModel()
			for range 40 {
				from.step(r, hardLinks)
			}
			to := from.copy()
			for range 1 + r.IntN(20) {
				to.step(r, hardLinks)
			}
			changes, err := collect(context.Background(), from, to, diffOf(r, from, to))
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			got := from.copy()
			unpack(t, got, to, changes)
			if d := cmp.Diff(to.print(), got.print()); d != "" {
				t.Fatalf("seed %d, hard links %v: the layer %v makes this (+), not that (-):\n%s\nof\n%s", seed, hardLinks, changes, d, from.print())
			}
		}
	}
}

// TestCollectLittle: one changed file of many is found without looking elsewhere.
func TestCollectLittle(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	from := newModel()
	for d := range 20 {
		dir := from.make(r, true)
		from.root.names[fmt.Sprint("d", d)] = dir
		for f := range 50 {
			dir.names[fmt.Sprint("f", f)] = from.make(r, false)
		}
	}
	to := &counting{model: from.copy()}
	to.touch(to.find("/d7/f30"))
	changes, err := collect(context.Background(), from, to, diffOf(r, from, to.model))
	if err != nil {
		t.Fatal(err)
	}
	if want := []change{{path: "/d7/f30"}}; !slices.Equal(changes, want) {
		t.Errorf("%v, not %v", changes, want)
	}
	if to.calls > 2 {
		t.Errorf("%d calls to find one file", to.calls)
	}
}

type counting struct {
	*model
	calls int
}

func (c *counting) list(p string) (map[string]file, error) { c.calls++; return c.model.list(p) }
func (c *counting) stat(p string) (file, error)            { c.calls++; return c.model.stat(p) }
