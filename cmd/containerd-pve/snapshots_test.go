package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

const (
	chainID = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	debian  = "localhost:5000/debian:13"
)

var born = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// entries are what ZFS says of a small store.
func entries() []zfs.Entry {
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
		made("tank/c/10", "tank/c/2@snapshot", 9, zfs.Properties{propID: "10", propKey: "k8s.io/12/web"}),
		made("tank/c/2", "", 1, zfs.Properties{propID: "2", propKey: "default/3/extract-1 " + chainID}),
		final("tank/c/2@snapshot", zfs.Properties{propName: "default/4/" + chainID}),
		final("tank/c/2@zfs-auto-snap", zfs.Properties{}),
		made("tank/c/9", "tank/c/2@snapshot", 9, zfs.Properties{propID: "9", propKey: "default/11/first"}),
		final("tank/c/9@zfs-auto-snap", zfs.Properties{}),
		made("tank/c/11", "tank/c/2@snapshot", 12, zfs.Properties{propID: "11", propKey: "default/12/look", "readonly": "on"}),
		made("tank/c/12", "", 13, zfs.Properties{propID: "12"}),                         // of an older version, active
		made("tank/c/13", "", 14, zfs.Properties{propID: "13"}),                         // and committed
		final("tank/c/13@snapshot", zfs.Properties{}),                                   //
		made("tank/c/14", "", 15, zfs.Properties{propID: "14", propKey: "a\tb\x1b[2J"}), // not containerd's
		made("tank/c/15", "tank/c/2@snapshot", 16, zfs.Properties{propID: "10"}),        // somebody's clone of ours
		made("tank/c/other", "", 17, zfs.Properties{}),
	}
}

func TestSnapshotsOf(t *testing.T) {
	list := snapshotsOf(entries())
	u := &users{
		layers: map[snapshotName][]string{{"default", chainID}: {"zebra", debian}},
		tops:   map[snapshotName][]string{{"default", chainID}: {debian}},
		roots:  map[snapshotName]string{{"k8s.io", "web"}: "nginx"},
	}
	for file, with := range map[string]*users{"snapshots": u, "snapshots-alone": nil} {
		if with != nil {
			with.name(list)
		}
		for _, format := range []string{"table", "json"} {
			var got bytes.Buffer
			if err := printSnapshots(&got, format, list, born.Add(time.Hour)); err != nil {
				t.Fatal(err)
			}
			golden(t, file+"."+format, got.Bytes())
		}
		list = snapshotsOf(entries())
	}
}

// golden compares with a file in testdata; UPDATE_GOLDEN=1 writes it.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\n%s\nwant:\n%s", name, got, want)
	}
}

func TestNoSnapshots(t *testing.T) {
	var got bytes.Buffer
	if err := printSnapshots(&got, "json", snapshotsOf(nil), born); err != nil || got.String() != "[]\n" {
		t.Errorf("%q, %v", got.String(), err)
	}
}

func TestSplitKey(t *testing.T) {
	for key, want := range map[string][2]string{
		"default/12/sha256:1": {"default", "sha256:1"}, "default/12/a/b": {"default", "a/b"}, "default/x/a": {"", "default/x/a"},
		"a": {"", "a"}, "": {"", ""}, "a/1": {"", "a/1"}, "default/12/": {"default", ""},
	} {
		if n, name := splitKey(key); n != want[0] || name != want[1] {
			t.Errorf("%q: %q, %q", key, n, name)
		}
	}
}
