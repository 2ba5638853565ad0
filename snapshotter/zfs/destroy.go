package zfs

import (
	"context"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

// destroyEach is DestroyAll by one Destroy for each.
func destroyEach(ctx context.Context, z ZFS, names []string) (map[string]error, error) {
	failed := map[string]error{}
	for _, name := range names {
		err := z.Destroy(ctx, name)
		if err == nil || errdefs.IsNotFound(err) {
			continue
		}
		if ctx.Err() != nil || errdefs.IsUnavailable(err) || ReasonOf(err) == ReadOnly {
			return failed, err
		}
		failed[name] = err
	}
	return failed, nil
}

// destroyProgram destroys in order, within one transaction group, and returns
// the error numbers of what it could not.
const destroyProgram = `
local args = ...
local left = {}
for _, name in ipairs(args["names"]) do
	local errno = zfs.sync.destroy(name)
	if errno ~= 0 and errno ~= 2 then
		left[name] = errno
	end
end
return left`

// atOnce bounds what one transaction group destroys, and with it how long
// others wait for it.
const atOnce = 256

// DestroyAll removes filesystems and snapshots of one pool in their order, up to
// atOnce of them with one wait for the pool. See ZFS.
func (n *Native) DestroyAll(ctx context.Context, names []string) (map[string]error, error) {
	failed := map[string]error{}
	for len(names) > 0 {
		lot := names[:min(len(names), atOnce)]
		names = names[len(lot):]
		left := lot
		answer, err := n.ChannelProgram(ctx, pool(lot[0]), destroyProgram, nvlist.List{"names": lot}, false)
		if err == nil {
			numbers, _ := answer["return"].(nvlist.List)
			left = slices.DeleteFunc(slices.Clone(lot), func(name string) bool { return numbers[name] == nil })
		}
		// One by one says the reason, unmounts a snapshot that somebody has looked
		// into, and is allowed in a pool that is full.
		each, err := destroyEach(ctx, n, left)
		maps.Copy(failed, each)
		if err != nil {
			return failed, err
		}
	}
	return failed, nil
}
