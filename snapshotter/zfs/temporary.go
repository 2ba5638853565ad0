package zfs

import (
	"context"
	"fmt"
)

// TemporarySnapshot takes a snapshot whose name begins with prefix and a hyphen,
// of a filesystem that may be in use. ZFS destroys it when end is called, when this process
// ends in whatever way, or when the pool is imported after the machine crashed.
func (n *Native) TemporarySnapshot(ctx context.Context, filesystem, prefix string) (name string, end func() error, err error) {
	// It lives as long as this file is open (zfs_onexit.c).
	owner, err := openDevice()
	if err != nil {
		return "", nil, fmt.Errorf("snapshot %s: %w", filesystem, err)
	}
	var c command
	if err = c.setText(offName, nameSize, filesystem); err == nil {
		err = c.setText(offValue, valueSize, prefix)
	}
	if err == nil {
		c.put32(offCleanup, uint32(owner.file.Fd()))
		_, err = n.device.call(ctx, reqTmpSnapshot, &c, nil, false)
	}
	if err != nil {
		owner.file.Close()
		return "", nil, failure("snapshot", filesystem, err)
	}
	return filesystem + "@" + c.text(offValue, valueSize), owner.file.Close, nil
}
