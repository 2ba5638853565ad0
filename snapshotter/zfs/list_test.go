package zfs

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	zfs "github.com/mistifyio/go-zfs/v3"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

const getOutput = "tank/c\ttype\t-\tfilesystem\n" +
	"tank/c\tx:key\tlocal\tof the parent\n" +
	"tank/c/1\ttype\t-\tfilesystem\n" +
	"tank/c/1\torigin\t-\t-\n" +
	"tank/c/1\tclones\t-\t-\n" +
	"tank/c/1\tcreation\t-\t1764038000\n" +
	"tank/c/1\tcreatetxg\t-\t12\n" +
	"tank/c/1\tused\t-\t100\n" +
	"tank/c/1\treferenced\t-\t90\n" +
	"tank/c/1\tx:key\tlocal\ta key\twith a tab\nand a line break\n" +
	"tank/c/1\tx:name\tinherited from tank/c\tnot its own\n" +
	"tank/c/1@s\ttype\t-\tsnapshot\n" +
	"tank/c/1@s\torigin\t-\t-\n" +
	"tank/c/1@s\tclones\t-\ttank/c/2,tank/b\n" +
	"tank/c/1@s\tcreation\t-\t1764038001\n" +
	"tank/c/1@s\tcreatetxg\t-\t13\n" +
	"tank/c/1@s\tused\t-\t0\n" +
	"tank/c/1@s\treferenced\t-\t90\n" +
	"tank/c/1@s\tx:key\tinherited from tank/c/1\ta key\n" +
	"tank/c/1@s\tx:name\treceived\tn\n" +
	"tank/c/2\ttype\t-\tfilesystem\n" +
	"tank/c/2\torigin\t-\ttank/c/1@s\n" +
	"tank/c/2\tcreation\t-\t1764038002\n" +
	"tank/c/2\tcreatetxg\t-\t14\n" +
	"tank/c/2\tused\t-\t8192\n" +
	"tank/c/2\treferenced\t-\t98\n" +
	"tank/c/2\tx:key\t-\t-\n" +
	"tank/c/2\tx:name\t-\t-\n" +
	"tank/c/2/deep\ttype\t-\tfilesystem\n"

func TestParseGet(t *testing.T) {
	got, err := parseGet(getOutput, "tank/c", "/", []string{"x:key", "x:name"})
	if err != nil {
		t.Fatal(err)
	}
	at := func(s int64) time.Time { return time.Unix(1764038000+s, 0).UTC() }
	want := []Entry{
		{Name: "tank/c/1", Created: at(0), Txg: 12, Used: 100, Referenced: 90, Own: Properties{"x:key": "a key\twith a tab\nand a line break"}},
		{Name: "tank/c/1@s", Snapshot: true, Clones: []string{"tank/b", "tank/c/2"}, Created: at(1), Txg: 13, Referenced: 90, Own: Properties{"x:name": "n"}},
		{Name: "tank/c/2", Origin: "tank/c/1@s", Created: at(2), Txg: 14, Used: 8192, Referenced: 98, Own: Properties{}},
	}
	same(t, got, want)
	for _, bad := range []string{"nonsense\n", "tank/c/1\ttype\t-\tfilesystem\n"} {
		if got, err := parseGet(bad, "tank/c", "/", nil); !errdefs.IsInternal(err) {
			t.Errorf("%q: %v, %v", bad, got, err)
		}
	}
}

func same(t *testing.T, got, want []Entry) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d entries %+v, want %d", len(got), got, len(want))
	}
	for i := range got {
		g, w := got[i], want[i]
		if !maps.Equal(g.Own, w.Own) {
			t.Errorf("%s: own %q, want %q", w.Name, g.Own, w.Own)
		}
		if g.Name != w.Name || g.Snapshot != w.Snapshot || g.Origin != w.Origin || !g.Created.Equal(w.Created) || g.Txg != w.Txg || g.Used != w.Used || g.Referenced != w.Referenced {
			t.Errorf("%+v, want %+v", g, w)
		}
	}
}

func TestOwn(t *testing.T) {
	d := &Dataset{Name: "tank/c/1", properties: nvlist.List{
		"a:own":       nvlist.List{"value": "x", "source": "tank/c/1"},
		"a:received":  nvlist.List{"value": "x", "source": "$recvd"},
		"a:inherited": nvlist.List{"value": "x", "source": "tank/c"},
		"used":        nvlist.List{"value": uint64(1)},
	}}
	for name, want := range map[string]bool{"a:own": true, "a:received": true, "a:inherited": false, "used": false, "a:none": false} {
		if own(d, name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

// TestCalls counts the processes of go-zfs and of our own list, with a program in the place of zfs.
func TestCalls(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "zfs"), []byte("#!/bin/sh\n[ \"$1\" = get ]\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":/bin:/usr/bin")
	_, before := Calls()
	if _, err := zfs.GetDataset("tank/c"); err == nil {
		t.Error("a list that fails succeeded")
	}
	if got, err := (goZFS{}).Contents(context.Background(), "tank/c", nil); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
	if _, after := Calls(); after != before+2 {
		t.Errorf("%d processes counted, want 2", after-before)
	}
}
