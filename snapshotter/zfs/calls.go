package zfs

import (
	"slices"
	"sync/atomic"

	zfs "github.com/mistifyio/go-zfs/v3"
)

// What this process has asked of ZFS so far, by any of its doors.
var ioctls, processes atomic.Int64

// Calls is how many ioctls were made on /dev/zfs and how many zfs processes were run.
func Calls() (ioctl, process int64) { return ioctls.Load(), processes.Load() }

// counter hears of each process that go-zfs runs, of which there may be several in one call.
type counter struct{}

func (counter) Log(words []string) {
	if slices.Contains(words[:min(2, len(words))], "START") {
		processes.Add(1)
	}
}

func init() { zfs.SetLogger(counter{}) }
