package zfs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	zfs "github.com/mistifyio/go-zfs/v3"
	"golang.org/x/sys/unix"
)

// goZFS is ZFS by the go-zfs module, which runs the zfs program.
type goZFS struct{}

// call runs a function of go-zfs, which knows no context: when ctx ends, the
// call goes on alone and its result is nobody's. What it still makes then is a
// dataset without a record, or a snapshot that the next Commit replaces.
func call[T any](ctx context.Context, what, name string, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("%s %s: %w", what, name, err)
	}
	done := make(chan result, 1)
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case <-ctx.Done():
		return none, fmt.Errorf("%s %s: %w", what, name, ctx.Err())
	case r := <-done:
		return r.value, wrap(what, name, r.err)
	}
}

// wrap puts the program's words into the error, and a kind where it did not even run.
func wrap(what, name string, err error) error {
	if err == nil {
		return nil
	}
	var failed *zfs.Error
	if !errors.As(err, &failed) {
		return fmt.Errorf("%s %s: %w", what, name, err)
	}
	if errors.Is(failed.Err, exec.ErrNotFound) {
		return notInstalled("zfs")
	}
	return fmt.Errorf("%s %s: %s (%w)", what, name, strings.TrimSpace(failed.Stderr), failed.Err)
}

func notInstalled(program string) error {
	return fmt.Errorf("the %s program is not on PATH (install zfsutils-linux): %w", program, errdefs.ErrUnavailable)
}

// do is call for what has no result of interest.
func do(ctx context.Context, what, name string, f func() error) error {
	_, err := call(ctx, what, name, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

func (goZFS) Create(ctx context.Context, name string, p Properties) error {
	err := do(ctx, "create", name, func() error {
		_, err := zfs.CreateFilesystem(name, p)
		return err
	})
	return explain(ctx, err, name, path.Dir(name), path.Dir(name))
}

func (goZFS) Clone(ctx context.Context, snapshot, name string, p Properties) error {
	// go-zfs clones with -p, which takes a filesystem that is there for the clone.
	if _, err := get(ctx, name); err == nil {
		return fmt.Errorf("clone %s: %w", name, errdefs.ErrAlreadyExists)
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	err := do(ctx, "clone", name, func() error {
		_, err := (&zfs.Dataset{Name: snapshot, Type: zfs.DatasetSnapshot}).Clone(name, p)
		return err
	})
	return explain(ctx, err, name, snapshot, path.Dir(name))
}

func (z goZFS) Snapshot(ctx context.Context, name string, p Properties) error {
	dataset, snapshot, _ := strings.Cut(name, "@")
	err := do(ctx, "snapshot", name, func() error {
		_, err := (&zfs.Dataset{Name: dataset}).Snapshot(snapshot, false)
		return err
	})
	if err != nil {
		return explain(ctx, err, name, dataset, dataset)
	}
	// go-zfs takes none along. A snapshot without them is one all the same.
	return z.Set(ctx, name, p)
}

// room is about what ZFS wants to have free to make a dataset or a snapshot
// (three blocks of 16 KiB), though less is there.
const room = 64 << 10

// explain gives a failed creation of name out of origin its kind, by looking at
// what is there now. It takes its space from the filesystem space.
func explain(ctx context.Context, err error, name, origin, space string) error {
	if err == nil || ctx.Err() != nil || errdefs.IsUnavailable(err) {
		return err
	}
	if rerr := Ready(name); rerr != nil {
		return rerr
	}
	if _, gerr := get(ctx, name); gerr == nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	}
	if _, gerr := get(ctx, origin); gerr != nil {
		return fmt.Errorf("%w: %s: %w", err, origin, errdefs.ErrNotFound)
	}
	if d, gerr := get(ctx, space); gerr == nil && d.Avail < room {
		return fmt.Errorf("%w: %s in %s: %w", err, NoSpace, space, errdefs.ErrResourceExhausted)
	}
	return readOnly(ctx, err, name)
}

// readOnly gives a failed change its kind if the pool is imported read-only.
func readOnly(ctx context.Context, err error, name string) error {
	p, perr := call(ctx, "list the pool of", name, func() (*zfs.Zpool, error) { return zfs.GetZpool(pool(name)) })
	if perr == nil && p.ReadOnly {
		return fmt.Errorf("%w: %w", err, &Error{Op: "change", Name: name, Reason: ReadOnly, Errno: unix.EROFS})
	}
	return err
}

// get finds one dataset by its name. A list of one well-formed name fails, with
// the module there and the pool imported, only because the name is not there.
func get(ctx context.Context, name string) (*zfs.Dataset, error) {
	d, err := call(ctx, "list", name, func() (*zfs.Dataset, error) { return zfs.GetDataset(name) })
	if err == nil || ctx.Err() != nil || errdefs.IsUnavailable(err) {
		return d, err
	}
	if rerr := Ready(name); rerr != nil {
		return nil, rerr
	}
	return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
}

func (goZFS) Rename(ctx context.Context, from, to string) error {
	if _, err := get(ctx, to); err == nil {
		return fmt.Errorf("rename %s to %s: %w", from, to, errdefs.ErrAlreadyExists)
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	err := do(ctx, "rename", from, func() error {
		_, err := (&zfs.Dataset{Name: from}).Rename(to, false, false)
		return err
	})
	return missing(ctx, err, from)
}

func (goZFS) Destroy(ctx context.Context, name string) error {
	err := do(ctx, "destroy", name, func() error {
		return (&zfs.Dataset{Name: name}).Destroy(zfs.DestroyDefault)
	})
	return explained(ctx, err, name, "in use")
}

// DestroyLater is `zfs destroy -d`.
func (goZFS) DestroyLater(ctx context.Context, snapshot string) error {
	err := do(ctx, "destroy", snapshot, func() error {
		return (&zfs.Dataset{Name: snapshot}).Destroy(zfs.DestroyDeferDeletion)
	})
	if err = explained(ctx, err, snapshot, "in use"); errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Promote runs the zfs program: go-zfs has no such call.
func (goZFS) Promote(ctx context.Context, name string) error {
	processes.Add(1)
	out, err := exec.CommandContext(ctx, "zfs", "promote", name).CombinedOutput()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return notInstalled("zfs")
	}
	return explained(ctx, fmt.Errorf("promote %s: %s (%w)", name, strings.TrimSpace(string(out)), err), name, "both have a snapshot of the same name, or it is no clone")
}

func (goZFS) Rollback(ctx context.Context, snapshot string) error {
	err := do(ctx, "rollback to", snapshot, func() error {
		return (&zfs.Dataset{Name: snapshot, Type: zfs.DatasetSnapshot}).Rollback(false)
	})
	return explained(ctx, err, snapshot, "it is not the latest, or in use")
}

// explained gives a failed change its kind, where nothing but why is left if name is
// there and can be written.
func explained(ctx context.Context, err error, name, why string) error {
	if err == nil || ctx.Err() != nil || errdefs.IsUnavailable(err) {
		return err
	}
	if _, gerr := get(ctx, name); gerr != nil {
		return gerr
	}
	if rerr := readOnly(ctx, err, name); errdefs.IsFailedPrecondition(rerr) {
		return rerr
	}
	return fmt.Errorf("%w: %s: %w", err, why, errdefs.ErrFailedPrecondition)
}

func (z goZFS) DestroyAll(ctx context.Context, names []string) (map[string]error, error) {
	return destroyEach(ctx, z, names)
}

func (goZFS) Property(ctx context.Context, name, property string) (string, error) {
	v, err := call(ctx, "get "+property+" of", name, func() (string, error) {
		return (&zfs.Dataset{Name: name}).GetProperty(property)
	})
	return v, missing(ctx, err, name)
}

// Set sets them one by one, in the order of their names: a zfs process for each.
func (goZFS) Set(ctx context.Context, name string, p Properties) error {
	for _, property := range slices.Sorted(maps.Keys(p)) {
		err := do(ctx, "set "+property+" of", name, func() error {
			return (&zfs.Dataset{Name: name}).SetProperty(property, p[property])
		})
		if err != nil {
			return missing(ctx, err, name)
		}
	}
	return nil
}

// missing says NotFound where the dataset is the reason.
func missing(ctx context.Context, err error, name string) error {
	if err == nil {
		return nil
	}
	if _, gerr := get(ctx, name); gerr != nil {
		return gerr
	}
	return err
}

func (goZFS) Space(ctx context.Context, name string) (Space, error) {
	d, err := get(ctx, name)
	if err != nil {
		return Space{}, err
	}
	return Space{Used: int64(d.Used), Referenced: int64(d.Referenced)}, nil
}

func (goZFS) Objects(_ context.Context, name string) (int64, error) {
	return 0, fmt.Errorf("files in %s: go-zfs does not count them: %w", name, errdefs.ErrNotImplemented)
}

func (goZFS) Children(ctx context.Context, parent string) ([]string, error) {
	all, err := call(ctx, "list below", parent, func() ([]*zfs.Dataset, error) {
		return (&zfs.Dataset{Name: parent}).Children(1)
	})
	if err != nil {
		return nil, missing(ctx, err, parent)
	}
	var names []string
	for _, d := range all {
		if d.Type == zfs.DatasetFilesystem {
			names = append(names, d.Name)
		}
	}
	return names, nil
}

// Detached is true: the zfs process that is on its way is nobody's then, and not killed.
func (goZFS) Detached() bool { return true }

func (goZFS) Close() error { return nil }
