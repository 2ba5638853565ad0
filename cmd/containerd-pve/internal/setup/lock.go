package setup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// lockDir is a directory that every host with systemd has: nothing need be made for the lock.
const lockDir = "/run/systemd/system"

// Lock has nobody else set up this host, or take that back, until unlock is called. It waits for others, of which it tells
// wait once. Errors: the context's; FailedPrecondition, the host was not booted by systemd.
func (h *Host) Lock(ctx context.Context, wait func()) (unlock func(), err error) {
	f, err := os.Open(h.at(lockDir))
	if err != nil {
		return nil, notSystemd()
	}
	for waited := false; ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, &os.PathError{Op: "flock", Path: lockDir, Err: err}
		}
		if !waited {
			wait()
		}
		waited = true
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for another containerd-pve that sets up this host: %w", ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func notSystemd() error {
	return fmt.Errorf("this host was not booted by systemd, whose services are to be set up: %w", errdefs.ErrFailedPrecondition)
}
