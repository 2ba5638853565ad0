package snapshotter

import (
	"cmp"
	"context"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// Dataset is a snapshot as its dataset tells of it. The records may differ for
// the moment of a call, and where a crash came in between: of a snapshot that was
// removed the dataset is there until Cleanup.
type Dataset struct {
	Name string
	Kind snapshots.Kind
	// Spare says that it is no snapshot, but ready to be one of its parent's; one that was given away is
	// a spare for a second more.
	Spare bool
	// Key is the name of a committed snapshot, the key of another. Empty if it was
	// made by a version that did not write it down, or is longer than ZFS takes.
	Key              string
	Parent           string // the parent's Name
	Created          time.Time
	Used, Referenced int64
}

// Committed is the snapshot that others are made of, dataset@name; empty if it is none yet.
func (d Dataset) Committed() string {
	if d.Kind != snapshots.KindCommitted {
		return ""
	}
	return d.Name + committed
}

// Datasets lists the snapshots below dataset as ZFS holds them, and those that have
// places below others; the oldest first. It needs no daemon and disturbs none.
func Datasets(ctx context.Context, z zfs.Lister, dataset string, others ...string) ([]Dataset, error) {
	store, err := z.Property(ctx, dataset, propStore)
	if err != nil {
		return nil, err
	}
	properties := []string{propID, PropKey, propName, propStore, propPlace, "readonly"}
	entries, err := z.Contents(ctx, dataset, properties)
	if err != nil {
		return nil, err
	}
	for _, other := range others {
		placed, err := z.Contents(ctx, other, properties)
		if err != nil {
			return nil, err
		}
		for _, e := range placed {
			if e.Own[propPlace] == e.Name && e.Own[propStore] == store {
				entries = append(entries, e)
			}
		}
	}
	return marked(entries), nil
}

// fresh says whether a filesystem without a mark is one that gets it in a moment: it has a name of ours, and is
// committed, or a clone of a snapshot of ours beside it.
func fresh(e zfs.Entry, final map[string]zfs.Entry) bool {
	if _, err := strconv.ParseUint(path.Base(e.Name), 10, 64); err != nil || e.Own[propID] != "" {
		return false
	}
	of, ok := strings.CutSuffix(e.Origin, committed)
	return final[e.Name].Own[propName] != "" || ok && path.Dir(of) == path.Dir(e.Name) && final[of].Own[propName] != ""
}

// marked are the filesystems that bear the snapshotter's mark, or will.
func marked(entries []zfs.Entry) []Dataset {
	final := map[string]zfs.Entry{}
	for _, e := range entries {
		if of, ok := strings.CutSuffix(e.Name, committed); ok && e.Snapshot {
			final[of] = e
		}
	}
	entries = slices.DeleteFunc(slices.Clone(entries), func(e zfs.Entry) bool {
		return e.Snapshot || e.Own[propID] != path.Base(e.Name) && e.Own[propPlace] != e.Name && !fresh(e, final)
	})
	id := func(e zfs.Entry) uint64 {
		n, _ := strconv.ParseUint(cmp.Or(e.Own[propID], path.Base(e.Name)), 10, 64)
		return n
	}
	slices.SortFunc(entries, func(a, b zfs.Entry) int {
		return cmp.Or(cmp.Compare(a.Txg, b.Txg), cmp.Compare(id(a), id(b)))
	})
	var list []Dataset
	for _, e := range entries {
		parent, at, _ := strings.Cut(e.Origin, "@")
		_, keyed := e.Own[PropKey]
		d := Dataset{
			Name: e.Name, Kind: snapshots.KindActive, Key: e.Own[PropKey], Parent: parent,
			Created: e.Created, Used: e.Used, Referenced: e.Referenced,
		}
		if f, ok := final[e.Name]; ok {
			d.Kind, d.Key = snapshots.KindCommitted, f.Own[propName]
		} else if e.Own["readonly"] == "on" {
			d.Kind = snapshots.KindView
		} else {
			d.Spare = !keyed && e.Own[propID] != "" && "@"+at == committed
		}
		list = append(list, d)
	}
	return list
}
