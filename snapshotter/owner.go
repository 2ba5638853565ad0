package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// Belongs says whether the store at root may serve the dataset, and changes
// nothing. Errors: NotFound, no such dataset, which New makes; FailedPrecondition,
// another store's.
func Belongs(ctx context.Context, z interface {
	Property(ctx context.Context, name, property string) (string, error)
}, root, dataset string,
) error {
	owner, err := z.Property(ctx, dataset, propStore)
	if err != nil || owner == zfs.Unset {
		return err
	}
	store, err := os.ReadFile(filepath.Join(root, "store"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("reading the store's id: %w", err)
	}
	if id := strings.TrimSpace(string(store)); id != owner {
		return foreign(owner, id)
	}
	return nil
}

// foreign is the refusal of another store's dataset. A store that has no id yet is none yet.
func foreign(owner, store string) error {
	if store == "" {
		store = "of a root that is new"
	}
	return fmt.Errorf("it belongs to another store (%s=%s, not %s): use its root, or another dataset: %w",
		propStore, owner, store, errdefs.ErrFailedPrecondition)
}
