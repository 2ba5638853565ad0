//go:build bed

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// listed is a snapshot as `containerd-pve snapshots --format json` tells it.
type listed struct {
	Dataset, Kind, Key, Namespace, Name, Parent string
	Images                                      []string
	Used, Referenced                            int64
	Created                                     time.Time
}

// tool runs containerd-pve with both its outputs.
func tool(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command("containerd-pve", args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// TestSnapshots: the list is what ZFS holds, and says whose it is.
func TestSnapshots(t *testing.T) {
	collect(t) // what the test before has left is not destroyed meanwhile
	b := start(t, options{args: []string{"sleep", "1000"}})
	id := b.container.ID()
	image, err := b.client.GetImage(b.ctx, debian)
	must(t, err)
	list := func(args ...string) ([]listed, string) {
		t.Helper()
		out, stderr, err := tool(t, append([]string{"snapshots", "--format", "json"}, args...)...)
		if err != nil {
			t.Fatalf("%v: %s", err, stderr)
		}
		var all []listed
		must(t, json.Unmarshal([]byte(out), &all))
		return all, stderr
	}
	var all []listed
	var root, spare listed
	var stderr string
	find := func(of func(listed) bool) (s listed) {
		if i := slices.IndexFunc(all, of); i >= 0 {
			s = all[i]
		}
		return s
	}
	eventually(t, 30*time.Second, "the container's root and a spare for the next", func() bool {
		all, stderr = list()
		root = find(func(s listed) bool { return s.Name == id })
		spare = find(func(s listed) bool { return s.Kind == "spare" && s.Parent == root.Parent })
		return root.Dataset != "" && spare.Dataset != ""
	})
	if stderr != "" {
		t.Errorf("standard error: %s", stderr)
	}
	byDataset := map[string]listed{}
	for i, s := range all {
		byDataset[s.Dataset] = s
		if i > 0 && s.Created.Before(all[i-1].Created) {
			t.Errorf("%s is older than the one before it", s.Dataset)
		}
	}
	if root.Kind != "active" || root.Namespace != "default" || !strings.HasSuffix(root.Key, "/"+id) || !slices.Equal(root.Images, []string{debian}) {
		t.Fatalf("the container's root is %+v in %+v", root, all)
	}
	top := byDataset[root.Parent]
	chain, err := image.RootFS(b.ctx)
	must(t, err)
	if top.Kind != "committed" || top.Name != identity.ChainID(chain).String() || !slices.Contains(top.Images, debian) {
		t.Errorf("its parent is %+v", top)
	}

	if spare.Key != "" || !slices.Contains(spare.Images, debian) {
		t.Errorf("the next container's root is %+v", spare)
	}

	// ZFS itself says the same of each.
	parent := root.Dataset[:strings.LastIndex(root.Dataset, "/")]
	held := map[string][]string{}
	for line := range strings.Lines(output(t, "zfs", "list", "-Hp", "-d", "1", "-o", "name,used,refer,creation,origin", parent)) {
		f := strings.Fields(line)
		held[f[0]] = f[1:]
	}
	delete(held, parent)
	if len(held) != len(all) {
		t.Errorf("%d snapshots are listed, ZFS holds %d: %v", len(all), len(held), held)
	}
	for _, s := range all {
		origin := "-"
		if s.Parent != "" {
			origin = s.Parent + "@snapshot"
		}
		want := []string{strconv.FormatInt(s.Used, 10), strconv.FormatInt(s.Referenced, 10), strconv.FormatInt(s.Created.Unix(), 10), origin}
		if s.Dataset != root.Dataset && !slices.Equal(held[s.Dataset], want) { // what runs may write meanwhile
			t.Errorf("%+v, but ZFS says %v", s, held[s.Dataset])
		}
	}

	// Without containerd, and without the daemon's socket, the datasets are listed all the same.
	alone, stderr := list("--containerd-address", "/run/none.sock")
	if len(alone) != len(all) || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, "/run/none.sock") {
		t.Errorf("%d snapshots without containerd; standard error: %s", len(alone), stderr)
	}
	for _, s := range alone {
		if s.Images != nil {
			t.Errorf("images without containerd: %+v", s)
		}
	}
	table := output(t, "containerd-pve", "snapshot", "ls")
	t.Logf("containerd-pve snapshot ls\n%s", table)
	lines := strings.Split(table, "\n")
	if len(lines) != len(all)+1 || !strings.HasPrefix(lines[0], "DATASET ") {
		t.Errorf("table:\n%s", table)
	}
	row := lines[slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, root.Dataset+" ") })]
	if f := strings.Fields(row); len(f) < 5 || strings.Join(f[1:5], " ") != "active default "+id+" "+filepath.Base(root.Parent) || f[len(f)-1] != debian {
		t.Errorf("row %q", row)
	}
}

// filePool makes a small pool in a file. It is gone when the test ends.
func filePool(t *testing.T, pool string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	img := filepath.Join(dir, "disk")
	must(t, os.WriteFile(img, nil, 0o600))
	must(t, os.Truncate(img, 64<<20))
	output(t, "zpool", "create", "-O", "mountpoint=none", pool, img)
	t.Cleanup(func() { _ = exec.Command("zpool", "export", "-f", pool).Run() }) // its disk goes with dir
	return dir
}

// TestServeObserved: what a daemon tells of itself while it serves, and what check
// says of its pool in each state that it may be found in.
func TestServeObserved(t *testing.T) {
	const pool = "observed"
	dir := filePool(t, pool)
	dataset, socket := pool+"/c", filepath.Join(dir, "s.sock")
	conf := filepath.Join(dir, "config.toml")
	must(t, os.WriteFile(conf, []byte(strings.Join([]string{
		`dataset = "` + dataset + `"`, `root = "` + dir + `/root"`, `address = "` + socket + `"`,
		`log_format = "json"`, `metrics_address = "127.0.0.1:9123"`,
	}, "\n")), 0o600))
	check := func(name string, ok bool, want string) (detail string) {
		t.Helper()
		out, stderr, err := tool(t, "check", "--config", conf, "--format", "json")
		var findings []struct {
			Name, Detail string
			OK           bool
		}
		if jerr := json.Unmarshal([]byte(out), &findings); jerr != nil {
			t.Fatalf("%v: %s%s", jerr, out, stderr)
		}
		var exit *exec.ExitError
		if ready := !strings.Contains(out, `"ok": false`); ready != (err == nil) || err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
			t.Errorf("exit %v of\n%s", err, out)
		}
		for _, f := range findings {
			if f.Name == name {
				if t.Logf("%v %s: %s", f.OK, f.Name, f.Detail); f.OK != ok || !strings.Contains(f.Detail, want) {
					t.Errorf("%+v, want %v with %q", f, ok, want)
				}
				return f.Detail
			}
		}
		t.Errorf("no finding %s in\n%s", name, out)
		return ""
	}
	check("dataset", true, "does not exist yet")
	check("daemon", false, "systemctl start containerd-pve")

	var logged bytes.Buffer
	serve := exec.Command("containerd-pve", "serve", "--config", conf)
	serve.Stderr = &logged
	must(t, serve.Start())
	ended := make(chan error, 1)
	go func() { ended <- serve.Wait() }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		_ = serve.Process.Signal(os.Interrupt)
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	}
	t.Cleanup(stop)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("nobody listens on %s: %s", socket, logged.String())
		}
		time.Sleep(10 * time.Millisecond)
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	s := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), zfs)
	_, err = s.Prepare(ctx, "layer", "")
	must(t, err)
	must(t, s.Commit(ctx, "one", "layer"))
	_, err = s.View(ctx, "look", "one")
	must(t, err)
	_, err = s.Prepare(ctx, "gone", "one")
	must(t, err)
	must(t, s.Remove(ctx, "gone"))
	must(t, s.(interface{ Cleanup(context.Context) error }).Cleanup(ctx))
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	traced := metadata.AppendToOutgoingContext(ctx, "traceparent", "00-"+trace+"-00f067aa0ba902b7-01")
	if _, err := s.Prepare(traced, "orphan", "nobody"); !errdefs.IsNotFound(err) {
		t.Errorf("a parent that is not there: %v", err)
	}
	if err := s.Commit(traced, "two", "look"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit of a view: %v", err)
	}

	resp, err := http.Get("http://127.0.0.1:9123/metrics")
	must(t, err)
	page, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	must(t, err)
	const prefix = "\ncontainerd_pve_snapshotter_"
	for _, line := range []string{
		`call_duration_seconds_count{code="OK",method="Prepare"} 2`,
		`call_duration_seconds_count{code="NotFound",method="Prepare"} 1`,
		`call_duration_seconds_count{code="FailedPrecondition",method="Commit"} 1`,
		`calls_in_flight{method="Prepare"} 0`,
		`datasets_destroyed_total 1`, `datasets_left 0`,
		`snapshots{kind="active"} 0`, `snapshots{kind="committed"} 1`, `snapshots{kind="view"} 1`,
		`zfs_calls_total{kind="process"} 0`,
	} {
		if !bytes.Contains(page, []byte(prefix+line+"\n")) {
			t.Errorf("no metric %s", line)
		}
	}
	for _, name := range []string{"zfs_calls_total{kind=\"ioctl\"} ", "available_bytes "} {
		if !bytes.Contains(page, []byte(prefix+name)) {
			t.Errorf("no metric %s", name)
		}
	}
	for line := range strings.Lines(string(page)) {
		if strings.HasPrefix(line, prefix[1:]) && !strings.Contains(line, "_bucket") {
			t.Log(strings.TrimSuffix(line, "\n"))
		}
	}
	check("daemon", true, socket)
	check("dataset", true, dataset)
	check("pool", true, "ONLINE")
	stop()

	// One line for the call that failed for a reason of its own; NotFound is no trouble.
	var failed []map[string]any
	d := json.NewDecoder(&logged)
	for {
		var line map[string]any
		err := d.Decode(&line)
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		if line["msg"] == "call failed" {
			failed = append(failed, line)
		}
	}
	t.Log(failed)
	if len(failed) != 1 || failed[0]["method"] != "Commit" || failed[0]["key"] != "look" || failed[0]["name"] != "two" ||
		failed[0]["code"] != "FailedPrecondition" || failed[0]["trace_id"] != trace || failed[0]["level"] != "warning" {
		t.Errorf("logged: %v", failed)
	}

	// The states that a pool may be found in.
	output(t, "zfs", "set", "containerd-pve:store=somebody", dataset)
	check("dataset", false, "another store")
	output(t, "zfs", "create", "-o", "compression=off", "-o", "mountpoint="+dir+"/fill", pool+"/fill")
	if err := exec.Command("dd", "if=/dev/zero", "of="+dir+"/fill/f", "bs=1M").Run(); err == nil {
		t.Error("the pool was not filled")
	}
	output(t, "sync", "-f", dir+"/fill/f")
	if left := check("space", false, "full"); strings.Contains(left, "MiB are left") {
		t.Error("the pool is not full")
	}
	output(t, "zpool", "export", pool)
	check("pool", false, "zpool import "+pool)
	output(t, "zpool", "import", "-d", dir, "-o", "readonly=on", pool)
	check("pool", false, "read-only")
}
