package pve

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

const running = `#notes
arch: amd64
lock: snapshot
memory: 512
ostype: unmanaged
rootfs: tank:subvol-100-disk-0,size=8G
unused0: tank:subvol-100-disk-1
lxc.signal.halt: 15
`

// TestSnapshots: sections as Proxmox's tools write them (write_pct_config), and back.
func TestSnapshots(t *testing.T) {
	c := Parse([]byte(running))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	is := func(step, want string) {
		t.Helper()
		if d := cmp.Diff(want, string(c.Bytes())); d != "" {
			t.Errorf("%s:\n%s", step, d)
		}
	}
	must(c.AddSnapshot("first", "before: it\nbreaks", time.Unix(1000, 0)))
	const first = `#notes
arch: amd64
lock: snapshot
memory: 512
ostype: unmanaged
parent: first
rootfs: tank:subvol-100-disk-0,size=8G
unused0: tank:subvol-100-disk-1
lxc.signal.halt: 15

[first]
#before%3A it
#breaks
arch: amd64
memory: 512
ostype: unmanaged
rootfs: tank:subvol-100-disk-0,size=8G
snaptime: 1000
lxc.signal.halt: 15
`
	is("one", first)
	must(c.Set("memory", "1024"))
	must(c.AddSnapshot("second", "", time.Unix(2000, 0)))
	must(c.Set("memory", "2048"))
	const current = `#notes
arch: amd64
lock: snapshot
memory: 2048
ostype: unmanaged
parent: second
rootfs: tank:subvol-100-disk-0,size=8G
unused0: tank:subvol-100-disk-1
lxc.signal.halt: 15

[first]
#before%3A it
#breaks
arch: amd64
memory: 512
ostype: unmanaged
rootfs: tank:subvol-100-disk-0,size=8G
snaptime: 1000
lxc.signal.halt: 15

[second]
arch: amd64
memory: 1024
ostype: unmanaged
parent: first
rootfs: tank:subvol-100-disk-0,size=8G
snaptime: 2000
lxc.signal.halt: 15
`
	is("two", current)
	if got := c.Snapshots(); !cmp.Equal(got, []string{"first", "second"}) {
		t.Errorf("%v", got)
	}
	if err := c.AddSnapshot("first", "", time.Unix(3000, 0)); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	if err := c.Rollback("none"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	is("what failed", current)

	must(c.Rollback("first"))
	if v, _ := c.Get("memory"); v != "512" || c.Description() != "notes\n" {
		t.Errorf("after the rollback:\n%s", c.Bytes())
	}
	if _, there := c.Get("snaptime"); there {
		t.Errorf("after the rollback:\n%s", c.Bytes())
	}
	for key, want := range map[string]string{"parent": "first", "unused0": "tank:subvol-100-disk-1"} {
		if v, _ := c.Get(key); v != want {
			t.Errorf("after the rollback %s: %q", key, v)
		}
	}
	c.RemoveSnapshot("none")
	c.RemoveSnapshot("first")
	is("without the first", `#notes
arch: amd64
memory: 512
ostype: unmanaged
rootfs: tank:subvol-100-disk-0,size=8G
unused0: tank:subvol-100-disk-1
lxc.signal.halt: 15

[second]
arch: amd64
memory: 1024
ostype: unmanaged
rootfs: tank:subvol-100-disk-0,size=8G
snaptime: 2000
lxc.signal.halt: 15
`)
	c.RemoveSnapshot("second")
	if len(c.Snapshots()) > 0 {
		t.Errorf("left:\n%s", c.Bytes())
	}
}

// TestSnapshotsBeside: an administrator's sections and pending changes stay to the byte.
func TestSnapshotsBeside(t *testing.T) {
	c := Parse([]byte(admin))
	if err := c.AddSnapshot("mine", "", time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if v, _ := c.Get("parent"); v != "mine" {
		t.Errorf("parent %q", v)
	}
	c.RemoveSnapshot("mine")
	if v, _ := c.Get("parent"); v != "before_upgrade" {
		t.Errorf("parent %q", v)
	}
	want, got := Parse([]byte(admin)), c
	if d := cmp.Diff(trimmed(want.sections), got.sections); d != "" {
		t.Error(d)
	}
	if want.Description() != got.Description() {
		t.Errorf("description %q", got.Description())
	}
}

func TestCheckSnapshotName(t *testing.T) {
	for name, ok := range map[string]bool{
		"before_1": true, "Ab": true, "a-1": true, "a": false, "": false, "1a": false, "_a": false, "__base__": false, "a b": false, "a@b": false, "a/b": false, "ä1": false, "a\nb": false,
		"current": false, "Pending": false, "vzdump": false, "a234567890123456789012345678901234567890": true, "a2345678901234567890123456789012345678901": false,
	} {
		if err := CheckSnapshotName(name); (err == nil) != ok || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func FuzzSnapshots(f *testing.F) {
	f.Add(admin, "x1")
	f.Add(running, "before_upgrade")
	f.Add("[a1]\nparent: a1\n\n[pve:pending]\nmemory: 1\n[A1]\n", "a1")
	f.Fuzz(func(t *testing.T, text, name string) {
		c := Parse([]byte(text))
		before := c.Snapshots()
		if err := c.AddSnapshot(name, text, time.Unix(1, 0)); err != nil {
			return
		}
		read := Parse(c.Bytes())
		if got := read.Snapshots(); !cmp.Equal(got, append(before, name)) {
			t.Fatalf("%q, not %q and %q", got, before, name)
		}
		if err := read.Rollback(name); err != nil {
			t.Fatal(err)
		}
		read.RemoveSnapshot(name)
		if got := Parse(read.Bytes()).Snapshots(); len(got) != len(before) {
			t.Fatalf("%q, not %q", got, before)
		}
	})
}
