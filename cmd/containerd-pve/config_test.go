package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter"
)

func TestParseConfig(t *testing.T) {
	var c config
	err := c.parse([]byte("dataset = 'tank/x'\nlog_level = 'debug'"))
	if err != nil || c.Dataset != "tank/x" || c.LogLevel != "debug" {
		t.Errorf("%+v, %v", c, err)
	}
	if err := new(config).parse([]byte("datset = 'x'")); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "datset") {
		t.Errorf("%v", err)
	}
}

// TestConfigDirectory: files of FILE.d go before FILE, the last of them before the others.
func TestConfigDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "[odd] *.toml")
	put := func(name, text string) {
		t.Helper()
		err := os.MkdirAll(filepath.Dir(name), 0o700)
		if err == nil {
			err = os.WriteFile(name, []byte(text), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put(path+".d/a.toml", "dataset = 'tank/a'\nzfs = 'go-zfs'")
	if c, err := readConfig(path, false); err != nil || c.Dataset != "tank/a" {
		t.Errorf("%+v, %v", c, err)
	}
	put(path, "dataset = 'tank/x'\nlog_level = 'debug'")
	put(path+".d/b.toml", "dataset = 'tank/b'")
	put(path+".d/c.toml~", "nonsense")
	if c, err := readConfig(path, true); err != nil || c.Dataset != "tank/b" || c.LogLevel != "debug" || c.ZFS != "go-zfs" {
		t.Errorf("%+v, %v", c, err)
	}
	put(path+".d/d.toml", "datset = ''")
	if _, err := readConfig(path, true); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "d.toml") {
		t.Errorf("%v", err)
	}
	if _, err := readConfig(path+"x", true); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestComplete(t *testing.T) {
	c := config{Dataset: "tank/x"}
	if err := c.complete(); err != nil || c.Root != defaultRoot || c.Address != defaultAddress || c.LogLevel != "info" {
		t.Errorf("%+v, %v", c, err)
	}
	for _, address := range []string{"", "127.0.0.1:9123", "[::1]:9123", ":9123", "/run/containerd-pve/metrics.sock"} {
		c := config{Dataset: "tank/x", MetricsAddress: address}
		if err := c.complete(); err != nil || c.LogFormat != "text" {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for given, want := range map[string]int{"": snapshotter.DefaultSpares, "spares = 0": 0, "spares = 3": 3} {
		c := config{Dataset: "tank/x"}
		if err := errors.Join(c.parse([]byte(given)), c.complete()); err != nil || *c.Spares != want {
			t.Errorf("%q: %v, %v", given, c.Spares, err)
		}
	}
	less := -1
	for _, bad := range []config{{}, {Dataset: "a", Spares: &less}, {Dataset: "a@b"}, {Dataset: "/a"}, {Dataset: "a", Root: "x"}, {Dataset: "a", Address: "x"},
		{Dataset: "a", ZFS: "lua"}, {Dataset: "a", LogFormat: "xml"}, {Dataset: "a", MetricsAddress: "localhost"}, {Dataset: "a", MetricsAddress: "metrics.sock"}} {
		if err := bad.complete(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("dataset = 'tank/x'"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := new(config).parse(data); err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v", err)
		}
	})
}
