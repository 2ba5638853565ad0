package snapshotter

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// LabelCloneOf has Prepare make a filesystem of a state that template/state kept of a
// container's, dataset@name, instead of its parent's. The new snapshot has the same parent
// as the container's, and is of the same namespace of containerd's. Labels are anybody's (the CRI
// plugin makes them of a pod's annotations, containerd's unpacker of an image's), and
// another's files are not: PropClone has to say who is meant.
const LabelCloneOf = "containerd.io/snapshot/pve-zfs.clone-of"

const (
	// PropClone is of that state: the namespace and the name, with a slash between, of the one
	// snapshot that may be made of it now. Who can set it can read the files anyway.
	PropClone = "containerd-pve:clone"
	// orphaned is what a state's name begins with whose container is gone, and which
	// only clones need.
	orphaned = "containerd-pve-"
)

// SplitKey takes containerd's "namespace/number/name" apart. What is not of that
// form came from somebody else, and is a name.
func SplitKey(key string) (namespace, name string) {
	if namespace, rest, ok := strings.Cut(key, "/"); ok {
		if number, name, ok := strings.Cut(rest, "/"); ok {
			if _, err := strconv.ParseUint(number, 10, 64); err == nil {
				return namespace, name
			}
		}
	}
	return "", key
}

// checkClone reads LabelCloneOf of a snapshot that is to be made; empty: it has
// none. Errors: InvalidArgument, NotFound, PermissionDenied, those of ZFS.
func (s *snapshotter) checkClone(ctx context.Context, kind snapshots.Kind, key string, labels map[string]string) (of string, err error) {
	of, asked := labels[LabelCloneOf]
	if !asked {
		return "", nil
	}
	fail := func(why string, kind error) (string, error) {
		return "", fmt.Errorf("label %s: %.300q %s: %w", LabelCloneOf, of, why, kind)
	}
	dataset, name, ok := strings.Cut(of, "@")
	switch {
	case !ok || dataset == "" || name == "" || strings.ContainsAny(name, "@/#"):
		return fail("is not dataset@name", errdefs.ErrInvalidArgument)
	case kind != snapshots.KindActive:
		return fail("is asked for a view", errdefs.ErrInvalidArgument)
	case labels[snapshots.LabelSnapshotRef] != "":
		return fail("is asked for a layer of an image", errdefs.ErrInvalidArgument)
	case !s.Owns(dataset):
		return fail("is of no snapshot's dataset", errdefs.ErrNotFound)
	}
	state, err := s.zfs.Property(ctx, of, PropTaken)
	if err == nil && (state == zfs.Unset || state == "") {
		return fail("is no state of a container (`containerd-pve container snapshots` lists them)", errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("label %s: %w", LabelCloneOf, err)
	}
	allowed, err := s.zfs.Property(ctx, of, PropClone)
	if err != nil {
		return "", fmt.Errorf("label %s: %w", LabelCloneOf, err)
	}
	if namespace, name := SplitKey(key); allowed != namespace+"/"+name {
		return fail("is not to be cloned by this one (`containerd-pve container clone` makes containers of states)", errdefs.ErrPermissionDenied)
	}
	return of, nil
}

// checkSource says, in the transaction that records the clone, whether it may be
// one of that container's. Errors: NotFound, InvalidArgument.
func (s *snapshotter) checkSource(ctx context.Context, of, key, parent string) error {
	if of == "" {
		return nil
	}
	dataset, _, _ := strings.Cut(of, "@")
	keys, err := keysByID(ctx)
	if err != nil {
		return err
	}
	id := s.idOf(dataset)
	source, there := keys[id]
	theirs, _ := SplitKey(source)
	ours, _ := SplitKey(key)
	if !there || s.name(id) != dataset || theirs != ours {
		return fmt.Errorf("label %s: %q is of no snapshot in namespace %q: %w", LabelCloneOf, of, ours, errdefs.ErrNotFound)
	}
	_, info, _, err := storage.GetInfo(ctx, source)
	if err != nil {
		return err
	}
	if info.Kind != snapshots.KindActive || info.Parent != parent {
		return fmt.Errorf("label %s: %q is of the %s snapshot %s with the parent %q, not %q: %w",
			LabelCloneOf, of, strings.ToLower(info.Kind.String()), source, info.Parent, parent, errdefs.ErrInvalidArgument)
	}
	return nil
}

// destroyTaken tries again what failed, where snapshots of the containers' state
// are in the way, as long as that helps, and answers what still does.
func (s *snapshotter) destroyTaken(ctx context.Context, victims []string, failed map[string]error) (map[string]error, error) {
	live, err := s.live(ctx)
	if err != nil {
		return failed, err
	}
	for {
		var again []string
		some := false
		for _, name := range victims {
			if failed[name] == nil {
				continue
			}
			if !strings.Contains(name, "@") {
				unneeded, freed, err := s.free(ctx, name, live)
				if ctx.Err() != nil || errdefs.IsUnavailable(err) {
					return failed, err
				}
				if err != nil {
					log.G(ctx).WithError(err).WithField("dataset", name).Warn("its states are not given to their clones yet")
				}
				some = some || freed || len(unneeded) > 0
				again = append(again, unneeded...)
			}
			again = append(again, name)
		}
		if !some {
			return failed, nil
		}
		before := filesystems(failed)
		var err error
		if failed, err = s.zfs.DestroyAll(ctx, again); err != nil || filesystems(failed) == before {
			return failed, err
		}
		victims = again // one that is gone may have been in another's way
	}
}

// filesystems are how many of the names are no snapshots'.
func filesystems(of map[string]error) int {
	n := 0
	for name := range of {
		if !strings.Contains(name, "@") {
			n++
		}
	}
	return n
}

// free looks at the states of a container that is gone. Of unneeded nobody made
// anything. If a clone was made of one, the clone gets that and what both have in their past, so
// that the container's own filesystem can go, with its name, which is a VMID's on Proxmox.
// freed says that nothing is in the way any more, or that this was done.
func (s *snapshotter) free(ctx context.Context, name string, live map[string]string) (unneeded []string, freed bool, err error) {
	all, err := s.zfs.Taken(ctx, name, []string{PropTaken})
	if errdefs.IsNotFound(err) || err == nil && len(all) == 0 {
		return nil, true, nil // it was a clone's by now
	}
	if err != nil {
		return nil, false, err
	}
	var needed []zfs.Entry
	foreign := false
	for _, e := range all {
		switch _, ours := e.Own[PropTaken]; {
		case !ours:
			foreign = true
		case len(e.Clones) == 0:
			unneeded = append(unneeded, e.Name)
		default:
			needed = append(needed, e)
		}
	}
	// That of the youngest gets the older ones too. Another's snapshots are not moved.
	heir := ""
	for i := len(needed) - 1; i >= 0 && heir == "" && !foreign; i-- {
		if heir, err = s.heir(ctx, needed[i].Clones, live); err != nil {
			return nil, false, err
		}
	}
	if heir == "" {
		return unneeded, false, nil
	}
	// First, or the clone would get them.
	failed, err := s.zfs.DestroyAll(ctx, unneeded)
	if err != nil || len(failed) > 0 {
		return unneeded, false, err
	}
	for _, e := range needed {
		if err := s.orphan(ctx, name, e); err != nil {
			return nil, false, err
		}
	}
	return nil, true, s.zfs.Promote(ctx, heir)
}

// heir is one of the clones that is a snapshot's; empty if none is.
func (s *snapshotter) heir(ctx context.Context, clones []string, live map[string]string) (string, error) {
	for _, c := range clones {
		id := s.idOf(c)
		if _, there := live[id]; !there || s.name(id) != c {
			continue
		}
		mark, err := s.zfs.Property(ctx, c, propID)
		if err != nil && !errdefs.IsNotFound(err) {
			return "", err
		}
		if mark == id {
			return c, nil
		}
	}
	return "", nil
}

// orphan makes of a container's state one that nobody is shown, by a name that no
// clone has, and that goes with the last that needs it. Each step may have been done before a crash.
func (s *snapshotter) orphan(ctx context.Context, dataset string, e zfs.Entry) error {
	// ZFS gives no two snapshots of a filesystem's past the same number.
	to := fmt.Sprintf("%s@%s%d", dataset, orphaned, e.Txg)
	if e.Own[PropTaken] != "" {
		if err := s.zfs.Set(ctx, e.Name, zfs.Properties{PropTaken: "", PropClone: ""}); err != nil {
			return err
		}
	}
	if e.Name != to {
		if err := s.zfs.Rename(ctx, e.Name, to); err != nil {
			return err
		}
	}
	return s.zfs.DestroyLater(ctx, to)
}
