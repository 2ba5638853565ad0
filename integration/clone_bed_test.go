//go:build bed

package integration

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/snapshotter"
)

// cloned is a container that the tool made, of which no task runs yet.
func cloned(t *testing.T, of *box, name, id string, args ...string) *box {
	t.Helper()
	if out := toolRun(t, 0, append([]string{"clone", name, of.container.ID(), id}, args...)...); !strings.Contains(out, "task start -d "+id) {
		t.Errorf("what is said: %s", out)
	}
	b := &box{t: t, ctx: background(t), client: of.client, out: &bytes.Buffer{}, err: &bytes.Buffer{}}
	var err error
	b.container, err = b.client.LoadContainer(b.ctx, id)
	must(t, err)
	t.Cleanup(b.remove)
	if _, err := b.container.Task(b.ctx, nil); !errdefs.IsNotFound(err) {
		t.Errorf("%s has a task: %v", id, err)
	}
	return b
}

// begin starts a task of a container.
func (b *box) begin() {
	b.t.Helper()
	var err error
	b.task, err = b.container.NewTask(b.ctx, cio.NewCreator(cio.WithStreams(nil, b.out, b.err)))
	must(b.t, err)
	must(b.t, b.task.Start(b.ctx))
}

func used(t *testing.T, dataset string) int64 {
	t.Helper()
	out, code := command("zfs", "get", "-Hpo", "value", "used", dataset)
	n, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if code != 0 || err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	return n
}

// goes waits until a dataset is destroyed.
func goes(t *testing.T, dataset string) {
	t.Helper()
	eventually(t, time.Minute, dataset+" is destroyed", func() bool {
		collect(t)
		_, code := command("zfs", "list", dataset)
		return code != 0
	})
}

// TestClone: another container of a state has the files of then, its own name and cgroup, and
// takes no space; whichever of them is removed first.
func TestClone(t *testing.T) {
	volume := t.TempDir()
	b := start(t, options{id: "original", args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) {
		s.Hostname = "original"
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: volume, Destination: "/volume", Options: []string{"rbind", "rw"}})
	}})
	b.write("/data", "1")
	if out, code, err := b.execIn(sh("head -c 20000000 /dev/urandom >/big"), nil); err != nil || code != 0 {
		t.Fatal(out, err)
	}
	toolRun(t, 0, "snapshot", "one", "original")
	b.write("/data", "2")
	spec, err := b.container.Spec(b.ctx)
	must(t, err)
	spec.Process.Env = append(spec.Process.Env, "LATER=1")
	must(t, b.container.Update(b.ctx, client.UpdateContainerOpts(client.WithSpec(spec))))

	for _, refused := range [][]string{
		{"none", "original", "x1"}, {"one", "none", "x1"}, {"one", "original", "original"}, {"one", "original", "a b"}, {"one", "original", "x1", "--vmid", "100"}, {"one", "original"},
	} {
		t.Log(refused, toolRun(t, 1, append([]string{"clone"}, refused...)...))
	}
	if _, err := b.client.SnapshotService(zfs).Stat(b.ctx, "x1"); !errdefs.IsNotFound(err) {
		t.Errorf("what was refused has left a snapshot: %v", err)
	}

	c := cloned(t, b, "one", "copy")
	source, dataset := datasetOf(t, b), datasetOf(t, c)
	if n := used(t, dataset); n > 1<<20 {
		t.Errorf("the clone takes %d bytes", n)
	}
	c.begin()
	c.isFile("/data", "1")
	b.isFile("/data", "2")
	for args, want := range map[string]string{
		"cat /proc/sys/kernel/hostname": "copy", "stat -c %s /big": "20000000", "test -d /volume && echo yes": "yes", "grep -c LATER /proc/1/environ": "0",
	} {
		if out, _, err := c.execIn(sh(args), nil); err != nil || strings.TrimSpace(out) != want {
			t.Errorf("%s: %q, %v", args, out, err)
		}
	}
	if _, err := os.Stat("/sys/fs/cgroup/default/copy"); err != nil {
		t.Error(err)
	}
	// What clones are made of stays.
	toolRun(t, 0, "snapshot", "two", "original")
	d := cloned(t, b, "two", "second")
	var list []struct {
		Name   string
		Clones []string
	}
	must(t, json.Unmarshal([]byte(toolRun(t, 0, "snapshots", "original", "--format", "json")), &list))
	if len(list) != 2 || !slices.Equal(list[0].Clones, []string{"copy"}) || !slices.Equal(list[1].Clones, []string{"second"}) {
		t.Errorf("%+v", list)
	}
	for _, refused := range [][]string{{"rm-snapshot", "one", "original"}, {"rollback", "one", "original", "--force"}} {
		out := toolRun(t, 1, refused...)
		if name := map[string]string{"rm-snapshot": "(copy)", "rollback": "(second)"}[refused[0]]; !strings.Contains(out, name) {
			t.Errorf("%v: %s", refused, out)
		}
	}
	b.isFile("/data", "2") // the same task
	second := datasetOf(t, d)
	d.remove()
	goes(t, second)
	toolRun(t, 0, "rm-snapshot", "two", "original")

	// A clone has states of its own, of the same names.
	c.write("/data", "3")
	toolRun(t, 0, "snapshot", "one", "copy")
	c.write("/data", "4")
	e := cloned(t, c, "one", "third")
	if out, code := command("zfs", "destroy", "-nr", source); code == 0 {
		t.Errorf("nothing depends on the first container: %s", out)
	}
	b.remove()
	goes(t, source)
	c.isFile("/data", "4")
	e.begin()
	e.isFile("/data", "3")
	if out := toolRun(t, 0, "snapshots", "copy"); strings.Count(out, "\n") != 2 || !strings.Contains(out, "third") {
		t.Errorf("the states of the clone: %s", out)
	}
	if out, code := command("zfs", "list", "-H", "-o", "name", "-t", "snapshot", "-r", filepath.Dir(source)); code != 0 || strings.Contains(out, "@containerd-pve-") {
		t.Errorf("what no clone needs any more: %s", out)
	}
	toolRun(t, 0, "rollback", "one", "copy")
	c.again()
	c.isFile("/data", "3")
	// A layer of a clone's changes.
	if out, code := command("ctr", "snapshots", "--snapshotter", zfs, "diff", "--media-type", ocispec.MediaTypeImageLayer, "copy"); code != 0 || !strings.Contains(out, "data\x00") {
		t.Errorf("its difference from the image: %d, %.200q", code, out)
	}
	c.remove()
	goes(t, dataset)
	e.isFile("/data", "3")
	last := datasetOf(t, e)
	e.remove()
	goes(t, last)
}

// TestCloneLabels: a client of containerd's gets no other container's files by a label.
func TestCloneLabels(t *testing.T) {
	b := start(t, options{id: "private", args: []string{"sleep", "1000"}})
	b.write("/secret", "1")
	toolRun(t, 0, "snapshot", "one", "private")
	service := b.client.SnapshotService(zfs)
	info, err := service.Stat(b.ctx, "private")
	must(t, err)
	state := datasetOf(t, b) + "@one"
	for name, c := range map[string]struct {
		of, parent string
		is         func(error) bool
	}{
		"nobody asked the tool":  {state, info.Parent, errdefs.IsPermissionDenied},
		"of no state":            {datasetOf(t, b) + "@none", info.Parent, errdefs.IsNotFound},
		"of another dataset":     {pool() + "@one", info.Parent, errdefs.IsNotFound},
		"no name of a snapshot":  {datasetOf(t, b), info.Parent, errdefs.IsInvalidArgument},
		"with another's options": {"-o@x y", info.Parent, errdefs.IsNotFound},
	} {
		_, err := service.Prepare(b.ctx, "thief", c.parent, snapshots.WithLabels(map[string]string{snapshotter.LabelCloneOf: c.of}))
		if !c.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if out, code := command("zfs", "set", snapshotter.PropClone+"=default/thief", state); code != 0 {
		t.Fatal(out)
	}
	if _, err := service.Prepare(b.ctx, "thief", "", snapshots.WithLabels(map[string]string{snapshotter.LabelCloneOf: state})); !errdefs.IsInvalidArgument(err) {
		t.Errorf("with another parent: %v", err)
	}
	if _, err := service.Stat(b.ctx, "thief"); !errdefs.IsNotFound(err) {
		t.Errorf("the snapshot: %v", err)
	}
	b.remove()
}

// TestProxmoxClone: on a node of Proxmox each has a VMID and a volume of its own, and no
// order of removal leaves a conf, a volume or a snapshot.
func TestProxmoxClone(t *testing.T) {
	proxmox(t)
	for _, first := range []string{"source", "clone"} {
		b := start(t, options{id: "original-" + first, args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) { s.Annotations = map[string]string{"io.containerd.pve.vmid": "100"} }})
		b.write("/data", "1")
		toolRun(t, 0, "snapshot", "one", "100")
		b.write("/data", "2")
		if out := toolRun(t, 1, "clone", "one", "100", "x1", "--vmid", "100"); !strings.Contains(out, "VMID 100 is taken") {
			t.Errorf("a VMID that is taken: %s", out)
		}
		if out := toolRun(t, 1, "clone", "one", "100", "x1", "--vmid", "7"); !strings.Contains(out, "VMID 7") {
			t.Errorf("no VMID: %s", out)
		}
		c := cloned(t, b, "one", "copy-"+first, "--vmid", "205")
		if !noConf(205) {
			t.Error("it has a conf before it has a task")
		}
		c.begin()
		c.isFile("/data", "1")
		b.isFile("/data", "2")
		if got, want := datasetOf(t, c), volumes()+"/subvol-205-disk-0"; got != want {
			t.Errorf("its volume is %s, not %s", got, want)
		}
		if conf := confOf(t, 205); strings.Contains(conf, "[one]") || strings.Contains(conf, "parent:") || !strings.Contains(conf, "subvol-205-disk-0") {
			t.Errorf("its conf:\n%s", conf)
		}
		if n := used(t, datasetOf(t, c)); n > 1<<20 {
			t.Errorf("it takes %d bytes", n)
		}
		if out := toolRun(t, 1, "rm-snapshot", "one", "100"); !strings.Contains(out, "(copy-"+first+")") {
			t.Errorf("a state that a clone needs: %s", out)
		}
		if !strings.Contains(confOf(t, 100), "[one]") {
			t.Error("its section is gone")
		}
		toolRun(t, 0, "snapshot", "one", "205")
		gone, goneID, stays, staysID := b, 100, c, 205
		if first == "clone" {
			gone, goneID, stays, staysID = c, 205, b, 100
		}
		dataset := datasetOf(t, gone)
		gone.remove()
		eventually(t, 30*time.Second, "the conf is gone", func() bool { return noConf(goneID) })
		goes(t, dataset)
		stays.isFile("/data", map[string]string{"source": "1", "clone": "2"}[first])
		if out := toolRun(t, 0, "snapshots", strconv.Itoa(staysID)); strings.Count(out, "\n") != 2 {
			t.Errorf("its states:\n%s", out)
		}
		// Its own one can be gone back to, and removed.
		toolRun(t, 0, "rollback", "one", strconv.Itoa(staysID))
		stays.again()
		stays.isFile("/data", "1")
		toolRun(t, 0, "rm-snapshot", "one", strconv.Itoa(staysID))
		// The number can be had again.
		again := start(t, options{id: "again-" + first, args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) {
			s.Annotations = map[string]string{"io.containerd.pve.vmid": strconv.Itoa(goneID)}
		}})
		again.remove()
		stays.remove()
		eventually(t, time.Minute, "the confs are gone", func() bool { return noConf(100) && noConf(205) })
		eventually(t, time.Minute, "the volumes are gone", func() bool {
			collect(t)
			out, _ := command("zfs", "list", "-H", "-o", "name", "-t", "filesystem,snapshot", "-r", volumes())
			return out == volumes()+"\n"
		})
	}
}
