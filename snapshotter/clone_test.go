package snapshotter

import (
	"context"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// cloneWorld is a container of the layer "default/1/layer" with a state.
type cloneWorld struct {
	Store
	z     *fake
	root  string
	state string // dataset@one
}

const (
	layerKey  = "default/1/layer"
	sourceKey = "default/2/source"
	copyKey   = "default/3/copy"
)

func newCloneWorld(t *testing.T) *cloneWorld {
	t.Helper()
	ctx := t.Context()
	w := &cloneWorld{z: &fake{datasets: map[string]zfs.Properties{}}, root: filepath.Join(t.TempDir(), "root")}
	w.Store = start(t, w.z, w.root)
	if _, err := w.Prepare(ctx, "default/1/building", ""); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(ctx, layerKey, "default/1/building"); err != nil {
		t.Fatal(err)
	}
	m, err := w.Prepare(ctx, sourceKey, layerKey)
	if err != nil {
		t.Fatal(err)
	}
	w.state = m[0].Source + "@one"
	w.take(t, w.state, "default/copy")
	return w
}

// take takes a state as template/state does, which that one may be made of.
func (w *cloneWorld) take(t *testing.T, state, by string) {
	t.Helper()
	if err := w.z.Snapshot(t.Context(), state, zfs.Properties{PropTaken: "text ", PropClone: by}); err != nil {
		t.Fatal(err)
	}
}

func cloneOf(state string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{LabelCloneOf: state})
}

// clone makes a copy and says where it is.
func (w *cloneWorld) clone(t *testing.T, key, state string) string {
	t.Helper()
	namespace, name := SplitKey(key)
	if err := w.z.Set(t.Context(), state, zfs.Properties{PropClone: namespace + "/" + name}); err != nil {
		t.Fatal(err)
	}
	m, err := w.Prepare(t.Context(), key, layerKey, cloneOf(state))
	if err != nil {
		t.Fatal(err)
	}
	return m[0].Source
}

// remove removes snapshots and cleans up.
func (w *cloneWorld) remove(t *testing.T, keys ...string) {
	t.Helper()
	for _, key := range keys {
		if err := w.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// names are those of all datasets and snapshots but the layer's.
func (w *cloneWorld) names() []string {
	w.z.mu.Lock()
	defer w.z.mu.Unlock()
	return slices.DeleteFunc(slices.Sorted(maps.Keys(w.z.datasets)), func(n string) bool {
		return n == parent || n == parent+"/1" || n == parent+"/1"+committed
	})
}

// TestCloneOf: the clone is of the state, has its mark at once, and survives its source,
// whose dataset goes whoever is removed first.
func TestCloneOf(t *testing.T) {
	for _, order := range [][]string{{sourceKey, copyKey}, {copyKey, sourceKey}} {
		w := newCloneWorld(t)
		dataset := w.clone(t, copyKey, w.state)
		w.z.mu.Lock()
		origin, mark := w.z.datasets[dataset]["origin"], w.z.datasets[dataset][propID]
		w.z.mu.Unlock()
		if origin != w.state || parent+"/"+mark != dataset {
			t.Errorf("origin %s, mark %s of %s", origin, mark, dataset)
		}
		if info, err := w.Stat(t.Context(), copyKey); err != nil || info.Parent != layerKey {
			t.Errorf("%+v, %v", info, err)
		}
		w.remove(t, order[0])
		left := map[string]string{sourceKey: dataset, copyKey: parent + "/2"}[order[0]]
		for _, n := range w.names() {
			if n != left && n != w.state {
				t.Errorf("after the removal of %s there is %s", order[0], n)
			}
		}
		w.remove(t, order[1])
		if got := w.names(); len(got) > 0 {
			t.Errorf("left: %v", got)
		}
	}
}

// TestCloneRefused: labels are anybody's.
func TestCloneRefused(t *testing.T) {
	w := newCloneWorld(t)
	ctx := t.Context()
	dataset, _, _ := strings.Cut(w.state, "@")
	placed, err := w.Prepare(ctx, "default/5/placed", layerKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Place(ctx, placed[0].Source, disk, nil); err != nil {
		t.Fatal(err)
	}
	w.take(t, disk+"@one", "default/copy")
	w.take(t, dataset+"@foreign", "")
	w.take(t, dataset+"@orphaned", "default/copy")
	w.take(t, dataset+"@others", "default/other")
	for name, p := range map[string]zfs.Properties{dataset + "@foreign": {PropTaken: zfs.Unset}, dataset + "@orphaned": {PropTaken: ""}} {
		if err := w.z.Set(ctx, name, p); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Prepare(ctx, "other/6/theirs", layerKey); err != nil {
		t.Fatal(err)
	}
	w.take(t, parent+"/4@one", "default/copy")
	before := keys(t, w)
	for _, c := range []struct {
		key, parent, of string
		view            bool
		labels          map[string]string
		is              func(error) bool
	}{
		{of: "", is: errdefs.IsInvalidArgument},
		{of: dataset, is: errdefs.IsInvalidArgument},
		{of: "@one", is: errdefs.IsInvalidArgument},
		{of: w.state + "@two", is: errdefs.IsInvalidArgument},
		{of: dataset + "@one/x", is: errdefs.IsInvalidArgument},
		{of: w.state, view: true, is: errdefs.IsInvalidArgument},
		{of: w.state, labels: map[string]string{snapshots.LabelSnapshotRef: "sha256:1"}, is: errdefs.IsInvalidArgument},
		{of: w.state, parent: "none", is: errdefs.IsInvalidArgument},
		{of: "pool/foreign@one", is: errdefs.IsNotFound},
		{of: dataset + "/below@one", is: errdefs.IsNotFound},
		{of: dataset + "@two", is: errdefs.IsNotFound},
		{of: dataset + "@foreign", is: errdefs.IsNotFound},
		{of: dataset + "@orphaned", is: errdefs.IsNotFound},
		{of: parent + "/1" + committed, is: errdefs.IsNotFound},
		{of: parent + "/3@one", is: errdefs.IsNotFound}, // where the other was
		{of: dataset + "@others", is: errdefs.IsPermissionDenied},
		{of: w.state, key: "default/9/another", is: errdefs.IsPermissionDenied},
		{of: w.state, key: "other/9/copy", is: errdefs.IsPermissionDenied},
		{of: parent + "/4@one", is: errdefs.IsNotFound}, // another namespace's
	} {
		labels := map[string]string{LabelCloneOf: c.of}
		maps.Copy(labels, c.labels)
		if c.key == "" {
			c.key = copyKey
		}
		if c.parent == "" {
			c.parent = layerKey
		} else {
			c.parent = ""
		}
		call := w.Prepare
		if c.view {
			call = w.View
		}
		if _, err := call(ctx, c.key, c.parent, snapshots.WithLabels(labels)); !c.is(err) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if got := keys(t, w); got != before {
		t.Errorf("records %s, before %s", got, before)
	}
	if _, err := w.Prepare(ctx, copyKey, layerKey, cloneOf(disk+"@one")); err != nil {
		t.Errorf("one that has a place: %v", err)
	}
}

// TestCloneCrash: a daemon that dies before the clone is made has no record of it, and one
// that dies before it is marked has it whole.
func TestCloneCrash(t *testing.T) {
	w := newCloneWorld(t)
	ctx := t.Context()
	var before string
	w.z.creating = func(string) { before = copyOf(t, w.root) }
	dataset := w.clone(t, copyKey, w.state)
	w.z.creating = nil
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w.z.mu.Lock()
	delete(w.z.datasets[dataset], propID) // ZFS makes a filesystem first, and sets its properties then
	w.z.mu.Unlock()
	next := start(t, w.z, before)
	if err := next.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if m, err := next.Mounts(ctx, copyKey); err != nil || m[0].Source != dataset {
		t.Errorf("%v, %v", m, err)
	}
	if mark, err := w.z.Property(ctx, dataset, propID); err != nil || parent+"/"+mark != dataset {
		t.Errorf("mark %s, %v", mark, err)
	}
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.z.Destroy(ctx, dataset); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, start(t, w.z, copyOf(t, before))); !strings.Contains(got, copyKey) {
		t.Errorf("one that was made, and that somebody destroyed: %s", got)
	}
	w = newCloneWorld(t)
	w.z.creating = func(string) { before = copyOf(t, w.root) }
	dataset = w.clone(t, copyKey, w.state)
	w.z.creating = nil
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.z.Destroy(ctx, dataset); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, start(t, w.z, before)); strings.Contains(got, copyKey) {
		t.Errorf("one that was not made: %s", got)
	}
}

// TestHeirs: what only clones need is shown to nobody, has a name that is in nobody's way, and
// goes with the last of them. Another's snapshots and clones stay where they are.
func TestHeirs(t *testing.T) {
	ctx := context.Background()
	w := newCloneWorld(t)
	first := w.clone(t, "default/3/first", w.state)
	second := w.clone(t, "default/4/second", w.state)
	w.take(t, first+"@one", "") // of the same name
	w.take(t, parent+"/2@two", "")
	w.remove(t, sourceKey)
	got := w.names()
	want := []string{first, first + "@" + orphaned + "2", first + "@one", second}
	if !slices.Equal(got, want) {
		t.Errorf("%v, not %v", got, want)
	}
	if text, err := w.z.Property(ctx, first+"@"+orphaned+"2", PropTaken); err != nil || text != "" {
		t.Errorf("it is a state still: %q, %v", text, err)
	}
	// To the next heir, and with it.
	w.remove(t, "default/3/first")
	if got := w.names(); !slices.Equal(got, []string{second}) {
		t.Errorf("%v", got)
	}
	w.remove(t, "default/4/second")

	w = newCloneWorld(t)
	first = w.clone(t, copyKey, w.state)
	if err := w.z.Snapshot(ctx, parent+"/2@theirs", nil); err != nil {
		t.Fatal(err)
	}
	w.remove(t, sourceKey)
	if got := w.names(); !slices.Equal(got, []string{parent + "/2", w.state, parent + "/2@theirs", first}) {
		t.Errorf("with another's snapshot: %v", got)
	}
	if err := w.z.Destroy(ctx, parent+"/2@theirs"); err != nil {
		t.Fatal(err)
	}
	w.remove(t)
	if got := w.names(); !slices.Equal(got, []string{first}) {
		t.Errorf("without it: %v", got)
	}

	w = newCloneWorld(t)
	if err := w.z.Clone(ctx, w.state, "pool/theirs", nil); err != nil {
		t.Fatal(err)
	}
	w.remove(t, sourceKey)
	if got := w.names(); !slices.Equal(got, []string{parent + "/2", w.state, "pool/theirs"}) {
		t.Errorf("with another's clone: %v", got)
	}
}

// orders are all in which some may be removed.
func orders(of []string) [][]string {
	if len(of) == 0 {
		return [][]string{nil}
	}
	var all [][]string
	for i, first := range of {
		rest := slices.Delete(slices.Clone(of), i, i+1)
		for _, o := range orders(rest) {
			all = append(all, append([]string{first}, o...))
		}
	}
	return all
}

// TestCloneModel: in whatever order a container, two clones and a clone of a clone are removed,
// with states of the same names, one by one or some at once, what was removed is gone, and the
// others have their states.
func TestCloneModel(t *testing.T) {
	names := map[string]string{"source": sourceKey, "ofA": "default/3/ofA", "ofB": "default/4/ofB", "of-ofA": "default/5/of-ofA"}
	for i, order := range orders(slices.Sorted(maps.Keys(names))) {
		w := newCloneWorld(t)
		at := map[string]string{"source": parent + "/2"}
		w.take(t, at["source"]+"@two", "")
		w.take(t, at["source"]+"@three", "")
		at["ofA"] = w.clone(t, names["ofA"], at["source"]+"@one")
		at["ofB"] = w.clone(t, names["ofB"], at["source"]+"@two")
		for _, c := range []string{"ofA", "ofB"} {
			w.take(t, at[c]+"@one", "")
			w.take(t, at[c]+"@two", "")
		}
		at["of-ofA"] = w.clone(t, names["of-ofA"], at["ofA"]+"@one")
		for n := 0; n < len(order); {
			last := n + 1
			for last < len(order) && i>>last&1 == 1 {
				last++
			}
			var gone []string
			for _, c := range order[n:last] {
				gone = append(gone, names[c])
			}
			n = last
			w.remove(t, gone...)
			for c, dataset := range at {
				_, err := w.z.Property(t.Context(), dataset, propID)
				if there := slices.Contains(order[n:], c); there != (err == nil) {
					t.Errorf("%v, %d removed: %s is there: %v", order, n, c, err == nil)
				}
			}
			for _, c := range order[n:] {
				for state, has := range map[string]bool{"one": c != "of-ofA", "two": c != "of-ofA", "three": c == "source"} {
					if text, _ := w.z.Property(t.Context(), at[c]+"@"+state, PropTaken); has != (text == "text ") {
						t.Errorf("%v, %d removed: %s@%s is %q", order, n, c, state, text)
					}
				}
			}
		}
		if left := w.names(); len(left) > 0 {
			t.Errorf("%v: left %v", order, left)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}
