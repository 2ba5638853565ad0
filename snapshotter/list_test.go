package snapshotter

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

const chainID = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

var born = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// smallStore is what ZFS says of one.
func smallStore() []zfs.Entry {
	made := func(name, origin string, txg uint64, own zfs.Properties) zfs.Entry {
		return zfs.Entry{
			Name: name, Origin: origin, Txg: txg, Own: own,
			Created: born.Add(time.Duration(txg) * time.Minute), Used: 5 << 20, Referenced: 80 << 20,
		}
	}
	final := func(name string, own zfs.Properties) zfs.Entry {
		return zfs.Entry{Name: name, Snapshot: true, Own: own}
	}
	return []zfs.Entry{
		made("tank/c/10", "tank/c/2@snapshot", 9, zfs.Properties{propID: "10", PropKey: "k8s.io/12/web"}),
		made("tank/c/2", "", 1, zfs.Properties{propID: "2", PropKey: "default/3/extract-1 " + chainID}),
		final("tank/c/2@snapshot", zfs.Properties{propName: "default/4/" + chainID}),
		final("tank/c/2@zfs-auto-snap", zfs.Properties{}),
		made("tank/c/9", "tank/c/2@snapshot", 9, zfs.Properties{propID: "9", PropKey: "default/11/first"}),
		final("tank/c/9@zfs-auto-snap", zfs.Properties{}),
		made("tank/c/11", "tank/c/2@snapshot", 12, zfs.Properties{propID: "11", PropKey: "default/12/look", "readonly": "on"}),
		made("tank/c/12", "", 13, zfs.Properties{propID: "12"}),                         // of an older version, active
		made("tank/c/13", "", 14, zfs.Properties{propID: "13"}),                         // and committed
		final("tank/c/13@snapshot", zfs.Properties{}),                                   //
		made("tank/c/14", "", 15, zfs.Properties{propID: "14", PropKey: "a\tb\x1b[2J"}), // not containerd's
		made("tank/c/15", "tank/c/2@snapshot", 16, zfs.Properties{propID: "10"}),        // somebody's clone of ours
		made("tank/data/subvol-100-disk-0", "tank/c/2@snapshot", 18, zfs.Properties{propID: "16", PropKey: "default/20/ct", propPlace: "tank/data/subvol-100-disk-0"}),
		made("tank/data/subvol-101-disk-0", "tank/c/2@snapshot", 19, zfs.Properties{propID: "16", propPlace: "tank/data/subvol-100-disk-0"}), // a copy of that
		made("tank/c/other", "", 17, zfs.Properties{}),
		made("tank/c/17", "tank/c/2@snapshot", 20, zfs.Properties{}),  // made a moment ago
		made("tank/c/18", "tank/c/17@snapshot", 21, zfs.Properties{}), // and committed
		final("tank/c/18@snapshot", zfs.Properties{propName: "default/5/" + chainID}),
		made("tank/c/19", "tank/data/x@snapshot", 22, zfs.Properties{}), // somebody's
		made("tank/c/20", "", 23, zfs.Properties{}),
		made("tank/c/21", "tank/c/2@snapshot", 24, zfs.Properties{propID: "21"}),
		made("tank/c/22", "tank/c/2@snapshot", 25, zfs.Properties{propID: "22", PropKey: ""}), // its key is too long
	}
}

func TestMarked(t *testing.T) {
	want := func(name, parent string, kind snapshots.Kind, minute int, key string) Dataset {
		return Dataset{
			Name: name, Kind: kind, Key: key, Parent: parent,
			Created: born.Add(time.Duration(minute) * time.Minute), Used: 5 << 20, Referenced: 80 << 20,
		}
	}
	list := []Dataset{
		want("tank/c/2", "", snapshots.KindCommitted, 1, "default/4/"+chainID),
		want("tank/c/9", "tank/c/2", snapshots.KindActive, 9, "default/11/first"),
		want("tank/c/10", "tank/c/2", snapshots.KindActive, 9, "k8s.io/12/web"),
		want("tank/c/11", "tank/c/2", snapshots.KindView, 12, "default/12/look"),
		want("tank/c/12", "", snapshots.KindActive, 13, ""),
		want("tank/c/13", "", snapshots.KindCommitted, 14, ""),
		want("tank/c/14", "", snapshots.KindActive, 15, "a\tb\x1b[2J"),
		want("tank/data/subvol-100-disk-0", "tank/c/2", snapshots.KindActive, 18, "default/20/ct"),
		want("tank/c/17", "tank/c/2", snapshots.KindActive, 20, ""),
		want("tank/c/18", "tank/c/17", snapshots.KindCommitted, 21, "default/5/"+chainID),
	}
	spare := want("tank/c/21", "tank/c/2", snapshots.KindActive, 24, "")
	spare.Spare = true
	list = append(list, spare, want("tank/c/22", "tank/c/2", snapshots.KindActive, 25, ""))
	if got := marked(smallStore()); !slices.Equal(got, list) {
		t.Errorf("%+v\nwant %+v", got, list)
	}
}

func TestCleaned(t *testing.T) {
	s := &snapshotter{}
	for _, c := range []struct {
		all, left            int
		err                  error
		destroyed, remaining int64
	}{
		{3, 0, nil, 3, 0}, {3, 1, nil, 5, 1}, {4, 0, errors.New("pool suspended"), 5, 4}, {0, 0, nil, 5, 0},
	} {
		s.cleaned.count(c.all, c.left, c.err)
		if d, l := s.Cleaned(); d != c.destroyed || l != c.remaining {
			t.Errorf("%+v: %d destroyed, %d left", c, d, l)
		}
	}
}
