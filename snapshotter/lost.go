package snapshotter

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// lost is the error of a call to ZFS for the dataset of the snapshot key. That
// ZFS does not find what a record names is FailedPrecondition: NotFound would
// tell containerd that there is no such snapshot, which it takes for an answer.
func (s *snapshotter) lost(ctx context.Context, err error, id, key string) error {
	if !errdefs.IsNotFound(err) {
		return err
	}
	if _, rerr := s.Stat(ctx, key); rerr != nil {
		return rerr // it was removed meanwhile, or the records cannot be read
	}
	// The kind of err must not be found in the chain.
	return fmt.Errorf("%s: somebody renamed or destroyed %s, the dataset of snapshot %s: rename it back (`zfs list -o name,%s` shows where %s is), or remove the image or container of the snapshot and make it again: %w",
		err.Error(), s.name(id), key, propID, id, errdefs.ErrFailedPrecondition)
}

// lostRoot is lost for the dataset that all others are below.
func (s *snapshotter) lostRoot(err error) error {
	if !errdefs.IsNotFound(err) {
		return err
	}
	return fmt.Errorf("%s: somebody renamed or destroyed %s: rename it back (`zfs list -o name,%s` shows where it is): %w",
		err.Error(), s.dataset, propStore, errdefs.ErrFailedPrecondition)
}
