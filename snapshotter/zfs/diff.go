package zfs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// dmu_diff_record_t (include/sys/zfs_ioctl.h): type, first and last object.
	diffRecordSize = 24
	diffInUse      = 2 // DDR_INUSE
	diffFree       = 4 // DDR_FREE
	// unlinked is what stands for the path of a file that was open when its last
	// name was removed, before the snapshot was taken.
	unlinked = unix.ESTALE
)

// Node is a file or directory in one of the snapshots of a Diff.
type Node struct {
	// Path begins with a slash at the filesystem's root. It is one of a file's names
	// only, and empty if the module found none, which happens to hard links. That of
	// an extended attribute in a file of its own has a part "<xattrdir>".
	Path       string
	Mode       uint32 // as st_mode
	Links      uint64
	Generation uint64 // the transaction group that made it: another is another file
	Changed    [2]uint64
}

// Change is a file or directory that is not the same in both snapshots. Before
// is nil if it was made, After if it was removed.
type Change struct {
	Object        uint64 // the inode number
	Before, After *Node
}

// Diff calls f for each change between two snapshots: from is of the same
// filesystem, or one that the filesystem was cloned from, and was taken before.
// What lies in a directory that got another name has not changed.
//
// The module tells which objects it wrote, in an order that says nothing.
func (n *Native) Diff(ctx context.Context, from, to string, f func(Change) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	read, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("diff of %s: %w", to, err)
	}
	defer read.Close()
	done := make(chan error, 1)
	go func() {
		defer write.Close()
		var c command
		if err := errors.Join(c.setText(offName, nameSize, to), c.setText(offValue, valueSize, from)); err != nil {
			done <- err
			return
		}
		c.put64(offCookie, uint64(write.Fd()))
		_, err := n.device.call(ctx, reqDiff, &c, nil, false)
		done <- err
	}()
	ferr := n.changes(ctx, read, from, to, f)
	if ferr != nil {
		_ = read.Close() // the module ends when nobody reads
	}
	err = failure("diff of", to, <-done)
	if ferr != nil {
		return ferr
	}
	return err
}

// changes reads the records that the module writes.
func (n *Native) changes(ctx context.Context, records io.Reader, from, to string, f func(Change) error) error {
	var record [diffRecordSize]byte
	for {
		if _, err := io.ReadFull(records, record[:]); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("diff of %s: %w", to, err)
		}
		kind, first, last := binary.NativeEndian.Uint64(record[:]), binary.NativeEndian.Uint64(record[8:]), binary.NativeEndian.Uint64(record[16:])
		if kind != diffInUse && kind != diffFree || last < first {
			return fmt.Errorf("diff of %s: a record of type %d from %d to %d: %w", to, kind, first, last, errdefs.ErrInternal)
		}
		for object := max(first, 1); object <= last; object++ { // nothing is object 0
			if kind == diffFree {
				// It may be as long as object numbers go: only what was there is looked at.
				next, err := n.nextObject(ctx, from, object)
				if err != nil {
					return err
				}
				if object = next; object > last {
					break
				}
			}
			before, err := n.node(ctx, from, object)
			if err != nil {
				return err
			}
			var after *Node
			if kind == diffInUse {
				if after, err = n.node(ctx, to, object); err != nil {
					return err
				}
			}
			if before == nil && after == nil || before != nil && after != nil && before.Generation == after.Generation && before.Changed == after.Changed {
				continue
			}
			if err := f(Change{Object: object, Before: before, After: after}); err != nil {
				return err
			}
		}
	}
}

// nextObject is the first object of a snapshot that is at least object, which is not 0.
func (n *Native) nextObject(ctx context.Context, snapshot string, object uint64) (uint64, error) {
	var c command
	if err := c.setText(offName, nameSize, snapshot); err != nil {
		return 0, err
	}
	c.put64(offObject, object-1) // the module goes on behind it
	_, err := n.device.call(ctx, reqNextObject, &c, nil, false)
	if errors.Is(err, unix.ESRCH) {
		return math.MaxUint64, nil
	}
	return c.get64(offObject), failure("objects of", snapshot, err)
}

// node is nil for an object that is not there, is no file, or had no name left.
func (n *Native) node(ctx context.Context, snapshot string, object uint64) (*Node, error) {
	var c command
	if err := c.setText(offName, nameSize, snapshot); err != nil {
		return nil, err
	}
	c.put64(offObject, object)
	_, err := n.device.call(ctx, reqObjectStats, &c, nil, false)
	node := &Node{
		Path: c.text(offValue, valueSize), Generation: c.get64(offStat), Mode: uint32(c.get64(offStat + 8)), Links: c.get64(offStat + 16),
		Changed: [2]uint64{c.get64(offStat + 24), c.get64(offStat + 32)},
	}
	switch {
	case err == nil:
		return node, nil
	case errors.Is(err, unlinked), errors.Is(err, unix.ENOTSUP):
		return nil, nil
	case node.Generation == 0 && errors.Is(err, unix.ENOENT):
		return nil, nil
	case node.Generation != 0:
		node.Path = "" // it is there, and only its name was not found
		return node, nil
	}
	return nil, failure(fmt.Sprintf("object %d of", object), snapshot, err)
}
