package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/containerd-pve/containerd-pve/snapshotter"
)

const (
	chainID = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	debian  = "localhost:5000/debian:13"
)

var born = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// store is a small one.
func store() []snapshotter.Dataset {
	made := func(name, parent string, kind snapshots.Kind, minute int, key string) snapshotter.Dataset {
		return snapshotter.Dataset{
			Name: name, Kind: kind, Key: key, Parent: parent,
			Created: born.Add(time.Duration(minute) * time.Minute), Used: 5 << 20, Referenced: 80 << 20,
		}
	}
	return []snapshotter.Dataset{
		made("tank/c/2", "", snapshots.KindCommitted, 1, "default/4/"+chainID),
		made("tank/c/9", "tank/c/2", snapshots.KindActive, 9, "default/11/first"),
		made("tank/c/10", "tank/c/2", snapshots.KindActive, 9, "k8s.io/12/web"),
		made("tank/c/11", "tank/c/2", snapshots.KindView, 12, "default/12/look"),
		made("tank/c/12", "", snapshots.KindActive, 13, ""),            // of an older version
		made("tank/c/14", "", snapshots.KindActive, 15, "a\tb\x1b[2J"), // not containerd's
	}
}

func TestPrintSnapshots(t *testing.T) {
	list := named(store())
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
		list = named(store())
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
	if err := printSnapshots(&got, "json", named(nil), born); err != nil || got.String() != "[]\n" {
		t.Errorf("%q, %v", got.String(), err)
	}
}

func TestSplitKey(t *testing.T) {
	for key, want := range map[string][2]string{
		"default/12/sha256:1": {"default", "sha256:1"}, "default/12/a/b": {"default", "a/b"}, "default/x/a": {"", "default/x/a"},
		"a": {"", "a"}, "": {"", ""}, "a/1": {"", "a/1"}, "default/12/": {"default", ""},
	} {
		if n, name := snapshotter.SplitKey(key); n != want[0] || name != want[1] {
			t.Errorf("%q: %q, %q", key, n, name)
		}
	}
}
