package zfs

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

// snapshotAndClone takes a snapshot and clones it, within one transaction group: both
// or neither. It returns the number of the error.
const snapshotAndClone = `
local args = ...
local function describe(name, properties)
	for property, value in pairs(properties) do
		local errno = zfs.sync.set_prop(name, property, value)
		if errno ~= 0 then
			return errno
		end
	end
	return 0
end
local errno = zfs.sync.snapshot(args["snapshot"])
if errno ~= 0 then
	return errno
end
errno = describe(args["snapshot"], args["properties"])
if errno == 0 then
	errno = zfs.sync.clone(args["snapshot"], args["clone"])
	if errno == 0 then
		errno = describe(args["clone"], args["marks"])
		if errno ~= 0 then
			zfs.sync.destroy(args["clone"])
		end
	end
end
if errno ~= 0 then
	zfs.sync.destroy(args["snapshot"])
end
return errno`

// withoutClone are the tested releases that have no zfs.sync.clone.
var withoutClone = []string{"2.0", "2.1", "2.2", "2.3"}

// clonesAtOnce says whether a module has zfs.sync.clone, as OpenZFS has since 2.4.
func clonesAtOnce(version string) bool { return !slices.Contains(withoutClone, release(version)) }

// ClonesAtOnce says whether SnapshotAndClone is to be had. See ZFS.
func (n *Native) ClonesAtOnce() bool { return n.atOnce }

// SnapshotAndClone takes a snapshot and clones it with one wait for the pool. See ZFS.
func (n *Native) SnapshotAndClone(ctx context.Context, snapshot string, props Properties, clone string, marks Properties) error {
	if !n.atOnce {
		return fmt.Errorf("a clone at once with its snapshot %s: %w", snapshot, errdefs.ErrNotImplemented)
	}
	described, err := properties(props)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", snapshot, err)
	}
	marked, err := properties(marks)
	if err != nil {
		return fmt.Errorf("clone %s: %w", clone, err)
	}
	answer, err := n.ChannelProgram(ctx, pool(snapshot), snapshotAndClone, nvlist.List{
		"snapshot": snapshot, "properties": described, "clone": clone, "marks": marked,
	}, false)
	if err != nil {
		return err
	}
	errno, ok := answer["return"].(int64)
	if !ok {
		return fmt.Errorf("a clone at once with its snapshot %s: the module answers %v: %w", snapshot, answer, errdefs.ErrInternal)
	}
	if errno == 0 {
		return nil
	}
	return failure("snapshot with a clone", snapshot, unix.Errno(errno))
}

// ClonesAtOnce is false: the program has no word for it.
func (goZFS) ClonesAtOnce() bool { return false }

// SnapshotAndClone is not implemented.
func (goZFS) SnapshotAndClone(_ context.Context, snapshot string, _ Properties, _ string, _ Properties) error {
	return fmt.Errorf("a clone at once with its snapshot %s: %w", snapshot, errdefs.ErrNotImplemented)
}
