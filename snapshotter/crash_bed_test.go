//go:build bed

package snapshotter

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// operation is one call to the snapshotter.
type operation struct {
	call string // prepare, view, commit, remove, cleanup; clone and state; layer is prepare of one to be unpacked, spare is prepare and what is put off by it
	key  string
	to   string // prepare, view: the parent; commit: the new name; clone: whose state
}

func (o operation) String() string { return strings.TrimSpace(o.call + " " + o.key + " " + o.to) }

// record is what there has to be.
type record struct {
	kind    snapshots.Kind
	parent  string
	dataset string
	files   map[string]string
	guid    string            // of a committed one's snapshot, whose files were read once
	taken   bool              // active, and a crash may have left its snapshot
	state   map[string]string // the files in its state
}

// world is a daemon, and what has to be in its store.
type world struct {
	t             *testing.T
	way           string
	root, dataset string
	d             *daemon
	records       map[string]*record
	kills         int
}

func newWorld(t *testing.T, pool, way, name string) *world {
	w := &world{t: t, way: way, root: filepath.Join(t.TempDir(), "root"), dataset: pool + "/" + name, records: map[string]*record{}}
	w.restart()
	return w
}

func (w *world) restart() {
	w.t.Helper()
	w.d = startDaemon(w.t, w.root, w.dataset, w.way, 0)
	w.cleanup()
}

func (w *world) cleanup() {
	w.t.Helper()
	if err := w.do(operation{call: "cleanup"}); err != nil {
		w.t.Fatalf("cleanup: %v", err)
	}
}

func (w *world) do(o operation) error {
	return call(func(ctx context.Context) error {
		switch o.call {
		case "prepare":
			_, err := w.d.Prepare(ctx, o.key, o.to)
			return err
		case "layer":
			_, err := w.d.Prepare(ctx, o.key, o.to, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: o.key}))
			return err
		case "spare":
			if _, err := w.d.Prepare(ctx, o.key, o.to); err != nil {
				return err
			}
			return w.spareMade(ctx, w.records[o.to].dataset+committed)
		case "view":
			_, err := w.d.View(ctx, o.key, o.to)
			return err
		case "commit":
			return w.d.Commit(ctx, o.to, o.key)
		case "remove":
			return w.d.Remove(ctx, o.key)
		case "state":
			command(w.t, "zfs", "snapshot", "-o", PropTaken+"=text ", w.records[o.key].dataset+"@"+stateName)
			return nil
		case "clone":
			of := w.records[o.to]
			state := of.dataset + "@" + stateName
			command(w.t, "zfs", "set", PropClone+"=/"+o.key, state)
			_, err := w.d.Prepare(ctx, o.key, of.parent, snapshots.WithLabels(map[string]string{LabelCloneOf: state}))
			return err
		}
		return w.d.Snapshotter.(snapshots.Cleaner).Cleanup(ctx)
	})
}

// spareMade waits until there is a spare of a snapshot.
func (w *world) spareMade(ctx context.Context, of string) error {
	if w.way == zfs.GoZFS {
		return nil // it makes none
	}
	for ; !w.d.isDead() && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		for line := range strings.Lines(w.list()) {
			if f := strings.Split(strings.TrimSpace(line), "\t"); f[2] != zfs.Unset && f[3] == zfs.Unset && f[4] == of {
				return nil
			}
		}
	}
	return fmt.Errorf("there is no spare of %s", of)
}

// stateName is of the one state that a container may have here.
const stateName = "kept"

// did changes what there has to be after an operation.
func (w *world) did(o operation) {
	w.t.Helper()
	switch o.call {
	case "state":
		w.records[o.key].state = maps.Clone(w.records[o.key].files)
	case "prepare", "layer", "spare", "view", "clone":
		r := &record{kind: snapshots.KindActive, parent: o.to, files: map[string]string{}}
		switch p := w.records[o.to]; {
		case o.call == "clone":
			r.parent = p.parent
			maps.Copy(r.files, p.state)
		case p != nil:
			maps.Copy(r.files, p.files)
		}
		w.records[o.key] = r
		var ro uintptr
		if o.call == "view" {
			r.kind, ro = snapshots.KindView, unix.MS_RDONLY
		}
		err := call(func(ctx context.Context) error {
			m, err := w.d.Mounts(ctx, o.key)
			if err == nil {
				r.dataset = m[0].Source
			}
			return err
		})
		if err != nil {
			w.t.Fatalf("mounts of %s: %v", o.key, err)
		}
		mounted(w.t, r.dataset, ro, func(dir string) {
			if got := read(w.t, dir); !maps.Equal(got, r.files) {
				w.t.Errorf("%s begins with %v, its parent has %v", o.key, got, r.files)
			}
			if ro == 0 {
				w.write(r, dir, o.key)
			}
		})
	case "commit":
		r := w.records[o.key]
		delete(w.records, o.key)
		r.kind, r.taken = snapshots.KindCommitted, false
		w.records[o.to] = r
	case "remove":
		delete(w.records, o.key)
	}
}

func (w *world) write(r *record, dir, name string) {
	w.t.Helper()
	r.files[name] = strings.Repeat(name, 100)
	if err := os.WriteFile(filepath.Join(dir, name), []byte(r.files[name]), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// done says whether the records have the operation that a crash left in doubt.
func done(o operation, records map[string]snapshots.Info) bool {
	switch o.call {
	case "commit":
		_, ok := records[o.to]
		return ok
	case "remove":
		_, ok := records[o.key]
		return !ok
	case "cleanup":
		return false
	}
	_, ok := records[o.key]
	return ok
}

func (w *world) walk() map[string]snapshots.Info {
	w.t.Helper()
	records := map[string]snapshots.Info{}
	err := call(func(ctx context.Context) error {
		return w.d.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			records[i.Name] = i
			return nil
		})
	})
	if err != nil {
		w.t.Fatalf("walk: %v", err)
	}
	return records
}

// crash does an operation while the daemon is killed, and starts it again. It
// says whether the operation is done, and whether the daemon was killed.
func (w *world) crash(o operation, arm func(*daemon)) (isDone, killed bool) {
	w.t.Helper()
	arm(w.d)
	err := w.do(o)
	if killed = w.d.spare(); !killed {
		if err != nil {
			w.t.Fatalf("%s: %v", o, err)
		}
		w.did(o)
		return true, false
	}
	w.kills++
	w.d.kill()
	w.restart()
	records := w.walk()
	isDone = done(o, records)
	if err == nil && !isDone && o.call != "cleanup" {
		w.t.Errorf("%s returned, and is undone by a crash", o)
	}
	if isDone {
		w.did(o)
	} else if o.call == "commit" {
		w.records[o.key].taken = true
	}
	w.check(o.String(), records)
	return isDone, true
}

// list is what ZFS has, once all filesystems have their marks, which are set within a second.
func (w *world) list() string {
	w.t.Helper()
	for end := time.Now().Add(10 * completeDelay); ; time.Sleep(50 * time.Millisecond) {
		out, err := exec.Command("zfs", "list", "-Hpr", "-t", "filesystem,snapshot", "-o", "name,guid,"+propID+","+PropKey+",origin", w.dataset).Output()
		if err != nil {
			w.t.Fatalf("zfs list: %v", err)
		}
		marked := true
		for line := range strings.Lines(string(out)) {
			fields := strings.Split(strings.TrimSpace(line), "\t")
			marked = marked && (strings.Contains(fields[0], "@") || fields[0] == w.dataset || fields[2] != zfs.Unset)
		}
		if marked || w.d.isDead() || time.Now().After(end) {
			return string(out)
		}
	}
}

// check compares what there has to be with the records and with what ZFS has.
func (w *world) check(after string, records map[string]snapshots.Info) {
	w.t.Helper()
	want := map[string]bool{w.dataset: true}
	for name, r := range w.records {
		i, ok := records[name]
		if !ok || i.Kind != r.kind || i.Parent != r.parent {
			w.t.Errorf("after %s: record of %s (%v of %q) is %+v", after, name, r.kind, r.parent, i)
			continue
		}
		want[r.dataset] = true
		if r.kind == snapshots.KindCommitted {
			want[r.dataset+committed] = true
		}
		if r.state != nil {
			want[r.dataset+"@"+stateName] = true
		}
	}
	for name := range records {
		if w.records[name] == nil {
			w.t.Errorf("after %s: a record of %s, which is nobody's", after, name)
		}
	}
	guids := map[string]string{}
	for line := range strings.Lines(w.list()) {
		fields := strings.Split(strings.TrimSpace(line), "\t")
		name := fields[0]
		if strings.Contains(name, "@"+orphaned) {
			continue // other clones need it, and it goes with the last
		}
		if of, ok := strings.CutSuffix(fields[4], committed); ok && !want[name] && fields[2] == filepath.Base(name) && fields[3] == zfs.Unset && want[of] {
			continue // a spare
		}
		guids[name] = fields[1]
		if filesystem := !strings.Contains(name, "@"); filesystem && name != w.dataset && fields[2] != filepath.Base(name) {
			w.t.Errorf("after %s: the mark of %s is %q", after, name, fields[2])
		}
	}
	for _, r := range w.records {
		if r.taken && guids[r.dataset+committed] != "" {
			want[r.dataset+committed] = true
		}
	}
	got, wanted := slices.Sorted(maps.Keys(guids)), slices.Sorted(maps.Keys(want))
	if !slices.Equal(got, wanted) {
		w.t.Errorf("after %s: ZFS has\n%s\nthe records say\n%s", after, strings.Join(got, "\n"), strings.Join(wanted, "\n"))
	}
	for name, r := range w.records {
		snap := r.dataset + committed
		if r.kind != snapshots.KindCommitted || guids[snap] == "" || r.guid == guids[snap] {
			continue
		}
		if r.guid != "" {
			w.t.Errorf("after %s: the snapshot of %s is another one", after, name)
		}
		r.guid = guids[snap]
		mounted(w.t, snap, unix.MS_RDONLY, func(dir string) {
			if got := read(w.t, dir); !maps.Equal(got, r.files) {
				w.t.Errorf("after %s: %s holds %v, what was committed is %v", after, name, got, r.files)
			}
		})
	}
}

// again does the operation that a crash interrupted once more, as containerd does.
func (w *world) again(o operation, isDone bool) {
	w.t.Helper()
	if r := w.records[o.key]; r != nil && r.taken {
		// What is written before the second try belongs to what is committed.
		mounted(w.t, r.dataset, 0, func(dir string) { w.write(r, dir, "late") })
	}
	err := w.do(o)
	switch {
	case !isDone:
		if err != nil {
			w.t.Fatalf("%s, again: %v", o, err)
		}
		w.did(o)
		if o.call == "commit" {
			w.check(o.String()+", again", w.walk())
		}
	case o.call == "remove":
		if !errdefs.IsNotFound(err) {
			w.t.Errorf("%s, which was done: %v", o, err)
		}
	case o.call != "cleanup":
		if !errdefs.IsAlreadyExists(err) {
			w.t.Errorf("%s, which was done: %v", o, err)
		}
	}
}

// must does an operation that nothing disturbs.
func (w *world) must(o operation) {
	w.t.Helper()
	if err := w.do(o); err != nil {
		w.t.Fatalf("%s: %v", o, err)
	}
	w.did(o)
}

// end removes all there is, and looks whether anything is left.
func (w *world) end() {
	w.t.Helper()
	for len(w.records) > 0 {
		for key := range w.records {
			if !w.hasChild(key) {
				w.must(operation{"remove", key, ""})
			}
		}
	}
	w.cleanup()
	w.check("the end", w.walk())
	w.d.kill()
}

func (w *world) hasChild(key string) bool {
	for _, r := range w.records {
		if r.parent == key {
			return true
		}
	}
	return false
}

// exhaust kills the daemon before each syscall of each operation that changes
// anything, and after the last: all the moments there are.
func exhaust(t *testing.T, pool, way string) {
	points := 0
	w := newWorld(t, pool, way, "each-"+way)
	w.must(operation{"prepare", "base", ""})
	w.must(operation{"commit", "base", "layer"})
	w.must(operation{"prepare", "source", "layer"})
	w.must(operation{"state", "source", ""})
	for _, c := range []struct {
		o    operation
		with []operation // what goes before
	}{
		{o: operation{"prepare", "a", ""}},
		{o: operation{"prepare", "b", "layer"}},
		{o: operation{"spare", "n", "layer"}},
		{o: operation{"prepare", "o", "layer"}, with: []operation{{"spare", "p", "layer"}}},
		{o: operation{"view", "c", "layer"}},
		{o: operation{"commit", "d", "e"}, with: []operation{{"prepare", "d", "layer"}}},
		{o: operation{"commit", "q", "r"}, with: []operation{{"layer", "q", "layer"}}},
		{o: operation{"layer", "s", "t"}, with: []operation{{"layer", "u", "layer"}, {"commit", "u", "t"}}},
		{o: operation{"remove", "f", ""}, with: []operation{{"prepare", "f", "layer"}}},
		{o: operation{"cleanup", "", ""}, with: []operation{{"prepare", "g", "layer"}, {"commit", "g", "h"}, {"prepare", "i", "h"}, {"remove", "i", ""}, {"remove", "h", ""}}},
		{o: operation{"clone", "k", "source"}},
		{o: operation{"cleanup", "l", ""}, with: []operation{{"prepare", "m", "layer"}, {"state", "m", ""}, {"clone", "l", "m"}, {"state", "l", ""}, {"remove", "m", ""}}},
	} {
		for n, killed := 1, true; killed && !t.Failed(); n++ {
			named := func(o operation) operation { // each round has names of its own
				for _, name := range []*string{&o.key, &o.to} {
					if *name != "" && *name != "layer" && *name != "source" {
						*name += strconv.Itoa(n)
					}
				}
				return o
			}
			for _, o := range c.with {
				w.must(named(o))
			}
			o := named(c.o)
			var isDone bool
			if isDone, killed = w.crash(o, func(d *daemon) { d.killAt(n) }); !killed {
				// It has less than n: killed when it has answered.
				w.d.kill()
				w.restart()
				w.check(o.String()+", answered", w.walk())
			}
			points++
			w.again(o, isDone)
			for _, key := range []string{o.key, o.to} {
				if key != "layer" && key != "source" && w.records[key] != nil {
					w.must(operation{"remove", key, ""})
				}
			}
			w.cleanup()
			w.check(o.String()+", again", w.walk())
		}
	}
	w.end()
	t.Logf("%s: killed at %d moments of the operations", way, points)
	if points < 20 {
		t.Errorf("only %d moments", points)
	}

	// The first start makes the store, the dataset and the metadata.
	points = 0
	root := filepath.Join(t.TempDir(), "first")
	for n, killed := 1, true; killed && !t.Failed(); n++ {
		if err := os.RemoveAll(root); err != nil {
			t.Fatal(err)
		}
		dataset := fmt.Sprintf("%s/first-%s-%d", pool, way, n)
		d := startDaemon(t, root, dataset, way, n)
		killed = d.spare()
		d.kill()
		w := &world{t: t, way: way, root: root, dataset: dataset, records: map[string]*record{}}
		w.restart()
		w.must(operation{"prepare", "a", ""})
		w.check(fmt.Sprintf("a first start killed at %d", n), w.walk())
		w.d.kill()
		points++
	}
	t.Logf("%s: killed at %d moments of the first start", way, points)
	if points < 5 {
		t.Errorf("only %d moments", points)
	}
}

// random does random operations, and kills the daemon in one of two: before
// one of its next syscalls, or some time later.
func random(t *testing.T, pool, way string, operations int, seed uint64) {
	fmt.Printf("stress: STRESS_SEED=%d repeats the operations of crashes with %s (not the moments of kills by time)\n", seed, way)
	rng := rand.New(rand.NewPCG(seed, 0))
	w := newWorld(t, pool, way, "random-"+way)
	for i := range operations {
		if t.Failed() {
			t.Fatalf("before operation %d of STRESS_SEED=%d", i, seed)
		}
		o := w.choose(rng, i)
		if o.call == "remove" && w.hasChild(o.key) {
			if err := w.do(o); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%s, which has children: %v", o, err)
			}
			continue
		}
		if o.call == "state" {
			w.must(o) // no call of the daemon's
			continue
		}
		n, after := 1+rng.IntN(5), time.Duration(rng.IntN(100))*time.Millisecond
		switch rng.IntN(4) {
		case 0:
			if isDone, killed := w.crash(o, func(d *daemon) { d.killAt(n) }); killed {
				w.again(o, isDone)
			}
		case 1:
			if isDone, killed := w.crash(o, func(d *daemon) { d.killAfter(after) }); killed {
				w.again(o, isDone)
			}
		default:
			w.must(o)
		}
		if i%25 == 24 {
			w.cleanup()
			w.check(o.String(), w.walk())
		}
	}
	kills := w.kills
	w.end()
	fmt.Printf("stress: crashes of %s: operations=%d kills=%d\n", way, operations, kills)
}

// choose is a random operation that may be done now, but for the removal of a
// parent.
func (w *world) choose(rng *rand.Rand, i int) operation {
	parents, active := []string{""}, []string{}
	keys := slices.Sorted(maps.Keys(w.records))
	for _, key := range keys {
		switch w.records[key].kind {
		case snapshots.KindCommitted:
			parents = append(parents, key)
		case snapshots.KindActive:
			active = append(active, key)
		}
	}
	pick := func(from []string) string { return from[rng.IntN(len(from))] }
	what := rng.IntN(10)
	switch {
	case what < 1:
		return operation{call: "cleanup"}
	case what < 4 && len(active) > 0:
		return operation{"commit", pick(active), fmt.Sprint("layer", i)}
	case what < 6 && len(keys) > 0, len(keys) > 16:
		return operation{"remove", pick(keys), ""}
	case what < 7:
		if p := pick(parents); p != "" {
			return operation{"view", fmt.Sprint("view", i), p}
		}
	case what < 8 && len(active) > 0:
		key := pick(active)
		if w.records[key].state == nil {
			return operation{call: "state", key: key}
		}
		return operation{"clone", fmt.Sprint("copy", i), key}
	}
	return operation{[]string{"prepare", "layer"}[rng.IntN(2)], fmt.Sprint("active", i), pick(parents)}
}

// fromEnv is a number from the environment, for `make stress`, or another one.
func fromEnv(t *testing.T, variable string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s=%s: %v", variable, text, err)
	}
	return n
}

// TestCrash: whenever the daemon is killed, records and datasets agree after the
// next start, nothing that was answered is undone, and what was interrupted can
// be done again.
func TestCrash(t *testing.T) {
	pool := makePool(t)
	exhaust(t, pool, zfs.NativeOnly)
	random(t, pool, zfs.NativeOnly, 24, rand.Uint64())
}

// TestLongCrash is the same for longer, and with the zfs program.
func TestLongCrash(t *testing.T) {
	operations, seed := int(fromEnv(t, "STRESS_OPERATIONS", 1000)), fromEnv(t, "STRESS_SEED", rand.Uint64())
	pool := makePool(t)
	random(t, pool, zfs.NativeOnly, operations, seed)
	random(t, pool, zfs.GoZFS, operations/5, seed)
	exhaust(t, pool, zfs.GoZFS)
}
