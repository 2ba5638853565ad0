package snapshotter

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// ZFS makes a filesystem and gives it its properties one after the other, and
// waits for the pool each time. What is written into it needs few of them, and
// those it inherits from a parent dataset of our making; so the others, the mark
// among them, are set a moment later, of all that were made meanwhile at once. Until they are, the snapshot's id
// stands in the list of what is being made: the next daemon knows what a crash
// left, and completes it.

// needed are the properties without which a filesystem does not take all that a
// layer may hold (zfsprops(7)). What is inherited may be otherwise: OpenZFS's
// guides for a root on ZFS make pools with normalization=formD, where a name has
// to be UTF-8.
var needed = zfs.Properties{"acltype": "posix", "xattr": "sa"}

// anyName are those which a filesystem keeps from its creation, and a clone has
// from its origin.
var anyName = zfs.Properties{"normalization": "none", "utf8only": "off", "casesensitivity": "sensitive"}

// common are the other properties that are the same in all snapshots' filesystems.
var common = zfs.Properties{"mountpoint": "legacy", "com.sun:auto-snapshot": "false"}

// inherit finds out what a filesystem below the parent dataset has of its own
// accord, as it is when the daemon starts.
func (s *snapshotter) inherit(ctx context.Context) error {
	s.inherited = zfs.Properties{}
	for _, wanted := range []zfs.Properties{needed, common} {
		for name, value := range wanted {
			v, err := s.zfs.Property(ctx, s.dataset, name)
			if err != nil {
				return fmt.Errorf("%s of %s: %w", name, s.dataset, err)
			}
			if v == value {
				s.inherited[name] = v
			}
		}
	}
	// Below any other mountpoint it would be mounted by `zfs mount -a`.
	s.hasty = !s.zfs.Detached() && s.inherited["mountpoint"] != ""
	for name := range needed {
		s.hasty = s.hasty && s.inherited[name] != ""
	}
	return nil
}

// description is what the filesystem of snapshot id has besides what it inherits.
func (s *snapshotter) description(id, key string) zfs.Properties {
	props := zfs.Properties{propID: id}
	for _, wanted := range []zfs.Properties{needed, common} {
		for name, value := range wanted {
			if s.inherited[name] == "" {
				props[name] = value
			}
		}
	}
	props[PropKey] = "" // one without it is a spare
	describe(props, PropKey, key)
	return props
}

// describe sets a property for those who read the datasets. One that ZFS could
// not hold they do without.
func describe(props zfs.Properties, name, value string) {
	if len(value) <= maxProperty && !strings.Contains(value, "\x00") {
		props[name] = value
	}
}

// complete gives a filesystem what it lacks of its description. It stays in the
// list if that fails, until Cleanup tries again.
func (s *snapshotter) complete(ctx context.Context, id string, props zfs.Properties) {
	err := s.zfs.Set(ctx, s.name(id), props)
	if err == nil || errdefs.IsNotFound(err) {
		s.creating.end(id)
		return
	}
	s.postpone(ctx, id, err)
}

func (s *snapshotter) postpone(ctx context.Context, id string, err error) {
	s.creating.fail(id)
	log.G(ctx).WithError(err).WithField("dataset", s.name(id)).Warn("the dataset has no mark yet; tried again later")
}

// completeAll does it for all for which it failed before, or a crash came first,
// and waits for those that are on their way.
func (s *snapshotter) completeAll(ctx context.Context) error {
	for id, c := range s.creating.retry() {
		state, err := s.state(ctx, id, c.origin)
		switch {
		case err != nil:
			s.postpone(ctx, id, err)
		case state == unmarked:
			s.complete(ctx, id, c.props)
		default:
			s.creating.end(id)
		}
	}
	return s.creating.wait(ctx)
}

type state int

const (
	missing  state = iota // there is none, or it is somebody's
	unmarked              // it is ours, and lacks its mark or its key
	complete
)

// anyOrigin stands for the origin of a filesystem whose record is gone.
const anyOrigin = "?"

// origin is what the filesystem of a snapshot is a clone of.
func (s *snapshotter) origin(parents []string) string {
	if len(parents) == 0 {
		return zfs.Unset
	}
	return s.name(parents[0]) + committed
}

// state says what became of the filesystem of a snapshot that is in the list.
func (s *snapshotter) state(ctx context.Context, id, origin string) (state, error) {
	mark, err := s.zfs.Property(ctx, s.name(id), propID)
	switch {
	case errdefs.IsNotFound(err):
		return missing, nil
	case err != nil:
		return missing, fmt.Errorf("was %s made: %w", s.name(id), err)
	case mark == id:
		// One that was a spare has no key yet.
		key, err := s.zfs.Property(ctx, s.name(id), PropKey)
		if err != nil {
			return missing, fmt.Errorf("whose is %s: %w", s.name(id), err)
		}
		if key == zfs.Unset {
			return unmarked, nil
		}
		return complete, nil
	case origin == anyOrigin:
		return unmarked, nil
	}
	of, err := s.zfs.Property(ctx, s.name(id), "origin")
	if err != nil {
		return missing, fmt.Errorf("of what was %s made: %w", s.name(id), err)
	}
	if of != origin {
		return missing, nil
	}
	return unmarked, nil
}
