package archive

import (
	"archive/tar"
	"fmt"
	"hash/maphash"
	"math"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// rules are what an archive may have.
type rules int

const (
	// ofRoot: a whole root, where each name comes once and nothing lies below.
	ofRoot rules = iota
	// ofLayer: files over others. A directory may come again, as some builders write it.
	ofLayer
	// ofImages: blobs and what names them, and what lies beside an LXC image's root.
	ofImages
)

// maxName is the longest path that the kernel takes.
const maxName = 4096

// state is what is known of a name.
type state byte

const (
	implied   state = iota + 1 // a directory that other names tell of
	directory                  // one with an entry
	symlink
	other
)

// tree holds the names of an archive, as hashes: two of two million that are not the
// same are taken for it once in some million archives.
type tree struct {
	rules  rules
	budget *budget
	seed   maphash.Seed
	names  map[uint64]state
}

func newTree(r rules, b *budget) *tree {
	return &tree{rules: r, budget: b, seed: maphash.MakeSeed(), names: map[uint64]state{}}
}

func (t *tree) of(name string) state { return t.names[maphash.String(t.seed, name)] }

func (t *tree) set(name string, s state) { t.names[maphash.String(t.seed, name)] = s }

// add checks an entry and keeps its name. It is the name as the tree has it: relative,
// without what says nothing; "." is the root. Errors: InvalidArgument, ResourceExhausted.
func (t *tree) add(h *tar.Header) (string, error) {
	if err := t.budget.entry(); err != nil {
		return "", err
	}
	name, err := t.clean(h.Name)
	if err != nil {
		return "", err
	}
	if h.Uid < 0 || h.Gid < 0 || h.Uid >= math.MaxUint32 || h.Gid >= math.MaxUint32 {
		return "", refuse("its owner %d:%d is none", h.Uid, h.Gid)
	}
	is := other
	switch h.Typeflag {
	case tar.TypeDir:
		is = directory
	case tar.TypeReg, tar.TypeGNUSparse:
		if err := t.budget.file(h.Size); err != nil {
			return "", err
		}
	case tar.TypeSymlink:
		is = symlink
		if h.Linkname == "" {
			return "", refuse("it is a symbolic link to nothing")
		}
	case tar.TypeLink:
		if err := t.link(h); err != nil {
			return "", err
		}
	case tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
		if err := t.node(name, h); err != nil {
			return "", err
		}
	default:
		return "", refuse("it is of type %q, which no file has", h.Typeflag)
	}
	if name == "." {
		if is != directory {
			return "", refuse("it is in the place of the root, and no directory")
		}
		return name, nil
	}
	if err := t.whiteout(name, is); err != nil {
		return "", err
	}
	if err := t.parents(name, true); err != nil {
		return "", err
	}
	switch was := t.of(name); {
	case was == 0, is == directory && was == implied, is == directory && was == directory && t.rules != ofRoot:
	case was == implied:
		return "", refuse("entries before it take it for a directory")
	default:
		return "", refuse("it is there twice")
	}
	t.set(name, is)
	return name, nil
}

// clean refuses names that leave.
func (t *tree) clean(name string) (string, error) {
	if len(name) > maxName {
		return "", refuse("its name has %d bytes", len(name))
	}
	if t.rules == ofLayer {
		name = strings.TrimLeft(name, "/") // of the root, as all who unpack layers read it
	}
	if name == "" || strings.ContainsRune(name, 0) {
		return "", refuse("it has no name")
	}
	if path.IsAbs(name) {
		return "", refuse("its name is absolute")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", refuse("its name leaves the root")
		}
	}
	return path.Clean(name), nil
}

// parents wants every directory above a name to be none of anything else. With keep
// they are taken for directories from now on.
func (t *tree) parents(name string, keep bool) error {
	for i, c := range name {
		if c != '/' {
			continue
		}
		switch dir := name[:i]; t.of(dir) {
		case symlink:
			return refuse("%q above it is a symbolic link", dir)
		case other:
			return refuse("%q above it is no directory", dir)
		case 0:
			if !keep {
				continue
			}
			// Many names in one are many.
			if err := t.budget.entry(); err != nil {
				return err
			}
			t.set(dir, implied)
		}
	}
	return nil
}

// link wants a hard link's target in the archive before it; in a layer it may be below.
func (t *tree) link(h *tar.Header) error {
	if t.rules == ofImages {
		return refuse("it is a hard link, of which such an archive has none")
	}
	target, err := t.clean(h.Linkname)
	if err != nil {
		return fmt.Errorf("its target %q: %w", h.Linkname, err)
	}
	if err := t.parents(target, false); err != nil {
		return fmt.Errorf("its target %q: %w", h.Linkname, err)
	}
	switch was := t.of(target); {
	case target == ".", was == directory, was == implied:
		return refuse("its target %q is a directory", h.Linkname)
	case was == 0 && t.rules != ofLayer:
		return refuse("its target %q is not there before it", h.Linkname)
	}
	return nil
}

// node wants no device but those that every container has.
func (t *tree) node(name string, h *tar.Header) error {
	if t.rules == ofImages {
		return refuse("it is a device or FIFO, of which such an archive has none")
	}
	if h.Typeflag == tar.TypeFifo {
		return nil
	}
	known := map[string][2]int64{
		"null": {1, 3}, "zero": {1, 5}, "full": {1, 7}, "random": {1, 8}, "urandom": {1, 9}, "tty": {5, 0}, "console": {5, 1}, "ptmx": {5, 2}, "pts/ptmx": {5, 2},
	}
	base, below := strings.CutPrefix(name, "dev/")
	want, ok := known[base]
	if n, err := strconv.Atoi(strings.TrimPrefix(base, "tty")); err == nil && n >= 0 && n < 64 && base == "tty"+strconv.Itoa(n) {
		want, ok = [2]int64{4, int64(n)}, true
	}
	if !below || !ok || h.Typeflag != tar.TypeChar || want != [2]int64{h.Devmajor, h.Devminor} {
		return refuse("it is a device (%c %d:%d) that a container has no use for; pack it without", map[byte]rune{tar.TypeChar: 'c', tar.TypeBlock: 'b'}[h.Typeflag], h.Devmajor, h.Devminor)
	}
	return nil
}

// whiteout knows the names by which a layer takes away what is below.
func (t *tree) whiteout(name string, is state) error {
	const prefix = ".wh."
	base, ok := strings.CutPrefix(path.Base(name), prefix)
	if !ok || t.rules == ofImages {
		return nil
	}
	if t.rules == ofRoot {
		return refuse("it would be taken for a whiteout, which takes %q away", path.Join(path.Dir(name), base))
	}
	if base == "" || base == "." || base == ".." {
		return refuse("it is a whiteout of a directory that it is not in")
	}
	if is != other {
		return refuse("it is a whiteout and no file")
	}
	return nil
}

func refuse(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
