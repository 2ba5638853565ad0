package zfs

import (
	"context"
	"encoding/binary"
)

const (
	userObjectsUsed = 4 // ZFS_PROP_USEROBJUSED of zfs_userquota_prop_t

	// zfs_useracct_t (include/sys/zfs_vfsops.h): a domain of 256 bytes, the id, what
	// the compiler puts between, and the count.
	accountSize  = 272
	accountCount = 264
	// accounts is how many owners' counts one call brings.
	accounts = 256
)

// Objects are the files and directories of a snapshot, or of a mounted
// filesystem, by ZFS's own account of each owner's (man 8 zfs-userspace). See ZFS.
func (n *Native) Objects(ctx context.Context, name string) (int64, error) {
	var c command
	if err := c.setText(offName, nameSize, name); err != nil {
		return 0, err
	}
	c.put64(offObjsType, userObjectsUsed)
	buffer := buffers.Get().(*[firstResult]byte)
	defer buffers.Put(buffer)
	result := buffer[:accounts*accountSize]
	var sum int64
	for {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if errno := n.device.ioctl(reqUserspaceMany, &c, nil, result); errno != 0 {
			return 0, failure("files in", name, errno)
		}
		filled := min(int(c.get64(offResultLen)), len(result))
		for at := 0; at+accountSize <= filled; at += accountSize {
			sum += int64(binary.NativeEndian.Uint64(result[at+accountCount:]))
		}
		if filled < len(result) {
			return sum, nil
		}
	}
}
