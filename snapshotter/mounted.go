package snapshotter

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/mounts"
)

// kstats is where the module has a file for each filesystem that is mounted, anywhere.
const kstats = "/proc/spl/kstat/zfs"

// shared is m, or a bind mount of where it is mounted for writing already. A
// host may have thousands of mounts, and what is not mounted at all (each container
// that starts) is told by one file. That ZFS is asked for its name; of one that is fresh it
// would answer only after the pool is written, which takes longer than to read all mounts.
func (s *snapshotter) shared(ctx context.Context, m mount.Mount, fresh bool) mount.Mount {
	if !fresh && !s.anywhere(ctx, m.Source) {
		return m // if it is not there whoever mounts it will see
	}
	all, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.FSType != m.Type || i.Source != m.Source, false
	})
	if err != nil {
		log.G(ctx).WithError(err).Debugf("where %s is mounted", m.Source)
		return m
	}
	if at := writable(all, reached); at != nil {
		return mounts.Bind(m, at.Mountpoint, mapped(at))
	}
	return m
}

// anywhere says whether a filesystem is mounted, in whichever mount namespace; false if that cannot be told.
func (s *snapshotter) anywhere(ctx context.Context, name string) bool {
	set, err := s.zfs.Property(ctx, name, "objsetid")
	if err != nil {
		return false
	}
	n, err := strconv.ParseUint(set, 10, 64)
	return err == nil && mountedAnywhere(name, n)
}

// mountedAnywhere is anywhere for a filesystem whose number is known.
func mountedAnywhere(name string, objset uint64) bool {
	pool, _, _ := strings.Cut(name, "/")
	_, err := os.Stat(filepath.Join(kstats, pool, "objset-0x"+strconv.FormatUint(objset, 16)))
	return err == nil
}

// writable is the best of a filesystem's mounts to be bound elsewhere, nil if there is none: the whole, written to,
// and reached by its name. Best is one at which owners are those of the disk.
func writable(all []*mountinfo.Info, reached func(*mountinfo.Info) bool) *mountinfo.Info {
	has := func(options, option string) bool { return slices.Contains(strings.Split(options, ","), option) }
	all = slices.DeleteFunc(slices.Clone(all), func(i *mountinfo.Info) bool {
		return i.Root != "/" || has(i.VFSOptions, "ro") || has(i.Options, "ro")
	})
	rank := func(i *mountinfo.Info) int {
		if mapped(i) {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(all, func(a, b *mountinfo.Info) int { return cmp.Compare(rank(a), rank(b)) })
	for _, i := range all {
		if reached(i) {
			return i
		}
	}
	return nil
}

func mapped(i *mountinfo.Info) bool {
	return slices.Contains(strings.Split(i.Options, ","), "idmapped")
}

// reached says whether a mount is what its directory shows: another may be on it, or it is removed.
func reached(i *mountinfo.Info) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, i.Mountpoint, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &st)
	return err == nil && st.Mnt_id == uint64(i.ID)
}
