package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// fake is a ZFS that has only names and user properties.
type fake struct {
	mu         sync.Mutex
	datasets   map[string]zfs.Properties
	creating   func(name string)       // called before a filesystem is made
	setting    func(name string) error // called before properties are set
	renaming   func() error            // called before a filesystem is renamed
	objects    int64                   // in every snapshot; 0: not counted
	destroying error                   // what DestroyAll answers
	listed     int                     // calls of Children
	taken      int                     // snapshots so far, which createtxg of each counts
	atOnce     bool                    // it clones at once with the snapshot
}

func (f *fake) Create(_ context.Context, name string, p zfs.Properties) error {
	if f.creating != nil {
		f.creating(name)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.datasets[name] != nil {
		return errdefs.ErrAlreadyExists
	}
	f.datasets[name] = maps.Clone(p)
	return nil
}

func (f *fake) Clone(ctx context.Context, snapshot, name string, p zfs.Properties) error {
	if _, err := f.Property(ctx, snapshot, ""); err != nil {
		return err
	}
	p = maps.Clone(p)
	if p == nil {
		p = zfs.Properties{}
	}
	p["origin"] = snapshot
	return f.Create(ctx, name, p)
}

func (f *fake) Snapshot(ctx context.Context, name string, p zfs.Properties) error {
	dataset, _, _ := strings.Cut(name, "@")
	p = maps.Clone(p)
	if p == nil {
		p = zfs.Properties{}
	}
	f.mu.Lock()
	f.taken++
	p["createtxg"] = strconv.Itoa(f.taken)
	f.mu.Unlock()
	return f.Clone(ctx, dataset, name, p)
}

func (f *fake) ClonesAtOnce() bool { return f.atOnce }

func (f *fake) SnapshotAndClone(ctx context.Context, snapshot string, props zfs.Properties, clone string, cloneProps zfs.Properties) error {
	if !f.atOnce {
		return errdefs.ErrNotImplemented
	}
	if _, err := f.Property(ctx, clone, ""); err == nil {
		return errdefs.ErrAlreadyExists
	}
	if err := f.Snapshot(ctx, snapshot, props); err != nil {
		return err
	}
	return f.Clone(ctx, snapshot, clone, cloneProps)
}

// txg is a snapshot's place in time.
func (f *fake) txg(snapshot string) uint64 {
	n, _ := strconv.ParseUint(f.datasets[snapshot]["createtxg"], 10, 64)
	return n
}

func (f *fake) Destroy(ctx context.Context, name string) error {
	if _, err := f.Property(ctx, name, ""); err != nil {
		return err
	}
	if f.needed(name) {
		return errdefs.ErrFailedPrecondition
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.datasets, name)
	return nil
}

// DestroyAll leaves what a clone needs, and filesystems with snapshots.
func (f *fake) DestroyAll(ctx context.Context, names []string) (map[string]error, error) {
	f.mu.Lock()
	refused := f.destroying
	f.mu.Unlock()
	if refused != nil {
		return nil, refused
	}
	failed := map[string]error{}
	for _, name := range names {
		if f.needed(name) {
			failed[name] = errdefs.ErrFailedPrecondition
			continue
		}
		origin, _ := f.Property(ctx, name, "origin")
		_ = f.Destroy(ctx, name) // it can only be gone already
		if later, _ := f.Property(ctx, origin, "defer_destroy"); later == "on" && !f.needed(origin) {
			_ = f.Destroy(ctx, origin)
		}
	}
	return failed, nil
}

func (f *fake) needed(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for other := range f.datasets {
		if strings.HasPrefix(other, name+"@") {
			return true
		}
	}
	return strings.Contains(name, "@") && len(f.clones(name)) > 0
}

// clones are the filesystems whose origin is that snapshot.
func (f *fake) clones(snapshot string) []string {
	var all []string
	for name, p := range f.datasets {
		if p["origin"] == snapshot && !strings.Contains(name, "@") {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

func (f *fake) DestroyLater(ctx context.Context, snapshot string) error {
	if !f.needed(snapshot) {
		_ = f.Destroy(ctx, snapshot)
		return nil
	}
	return f.Set(ctx, snapshot, zfs.Properties{"defer_destroy": "on"})
}

func (f *fake) Promote(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.datasets[name] == nil {
		return errdefs.ErrNotFound
	}
	origin := f.datasets[name]["origin"]
	from, _, _ := strings.Cut(origin, "@")
	until := f.txg(origin)
	for full := range maps.Clone(f.datasets) {
		last, ok := strings.CutPrefix(full, from+"@")
		if !ok || f.txg(full) > until {
			continue
		}
		to := name + "@" + last
		if f.datasets[to] != nil {
			return errdefs.ErrAlreadyExists
		}
		for _, c := range f.clones(full) {
			f.datasets[c]["origin"] = to
		}
		f.datasets[to] = f.datasets[full]
		delete(f.datasets, full)
	}
	f.datasets[name]["origin"] = f.datasets[from]["origin"]
	f.datasets[from]["origin"] = name + "@" + origin[strings.Index(origin, "@")+1:]
	return nil
}

func (f *fake) Property(_ context.Context, name, property string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.datasets[name]
	if p == nil {
		return "", errdefs.ErrNotFound
	}
	if v, ok := p[property]; ok {
		return v, nil
	}
	return zfs.Unset, nil
}

func (f *fake) Set(_ context.Context, name string, p zfs.Properties) error {
	if f.setting != nil {
		if err := f.setting(name); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.datasets[name] == nil {
		return errdefs.ErrNotFound
	}
	maps.Copy(f.datasets[name], p)
	return nil
}

func (f *fake) Taken(_ context.Context, name string, properties []string) ([]zfs.Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []zfs.Entry
	for _, full := range slices.Sorted(maps.Keys(f.datasets)) {
		if !strings.HasPrefix(full, name+"@") {
			continue
		}
		e := zfs.Entry{Name: full, Snapshot: true, Own: zfs.Properties{}, Clones: f.clones(full), Txg: f.txg(full)}
		for _, p := range properties {
			if v, there := f.datasets[full][p]; there {
				e.Own[p] = v
			}
		}
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b zfs.Entry) int { return cmp.Compare(a.Txg, b.Txg) })
	return all, nil
}

func (f *fake) Detached() bool { return false }

func (f *fake) Space(ctx context.Context, name string) (zfs.Space, error) {
	_, err := f.Property(ctx, name, "")
	return zfs.Space{Used: 1, Referenced: 1}, err
}

func (f *fake) Objects(context.Context, string) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects == 0 {
		return 0, errdefs.ErrNotImplemented
	}
	return f.objects, nil
}

func (f *fake) Children(_ context.Context, parent string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listed++
	var names []string
	for name := range f.datasets {
		if path.Dir(name) == parent && !strings.Contains(name, "@") {
			names = append(names, name)
		}
	}
	return names, nil
}

func (f *fake) Close() error { return nil }

func (f *fake) Rename(_ context.Context, from, to string) error {
	if f.renaming != nil {
		if err := f.renaming(); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.datasets[from] == nil {
		return errdefs.ErrNotFound
	}
	if f.datasets[to] != nil {
		return errdefs.ErrAlreadyExists
	}
	f.datasets[to] = f.datasets[from]
	delete(f.datasets, from)
	for full := range maps.Clone(f.datasets) { // its snapshots, and their clones
		if full == to || full != from && !strings.HasPrefix(full, from+"@") && f.datasets[full]["origin"] != from && !strings.HasPrefix(f.datasets[full]["origin"], from+"@") {
			continue
		}
		p := f.datasets[full]
		if rest, ok := strings.CutPrefix(p["origin"], from); ok {
			p["origin"] = to + rest
		}
		if rest, ok := strings.CutPrefix(full, from); ok {
			f.datasets[to+rest] = p
			delete(f.datasets, full)
		}
	}
	return nil
}

func (f *fake) rename(from, to string) { _ = f.Rename(context.Background(), from, to) }

const parent = "pool/parent"

func start(t *testing.T, z zfs.ZFS, root string) Store {
	t.Helper()
	s := startWithSpares(t, z, root)
	s.(*snapshotter).spares.close() // the datasets that a test counts are those of its snapshots
	return s
}

func startWithSpares(t *testing.T, z zfs.ZFS, root string, options ...Option) Store {
	t.Helper()
	s, err := New(context.Background(), z, root, parent, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func keys(t *testing.T, s snapshots.Snapshotter) string {
	t.Helper()
	var all []string
	err := s.Walk(context.Background(), func(_ context.Context, i snapshots.Info) error {
		all = append(all, i.Name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// copyOf is what a crash at this moment leaves of a root.
func copyOf(t *testing.T, root string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "root")
	if err := os.CopyFS(to, os.DirFS(root)); err != nil {
		t.Fatal(err)
	}
	return to
}

// TestUnfinished: a start drops the record of a dataset that was being made and
// is not there; it keeps those whose datasets were renamed, and those that were made.
func TestUnfinished(t *testing.T) {
	ctx, z, root := context.Background(), &fake{datasets: map[string]zfs.Properties{}}, filepath.Join(t.TempDir(), "root")
	s := start(t, z, root)
	prepare := func(key string) string {
		t.Helper()
		m, err := s.Prepare(ctx, key, "")
		if err != nil {
			t.Fatal(err)
		}
		return m[0].Source
	}
	renamed := prepare("renamed")
	prepare("there")
	// Once they have their marks, which Prepare does not wait for.
	own, ok := s.(*snapshotter)
	if !ok {
		t.Fatal("another type")
	}
	if err := errors.Join(own.creating.wait(ctx), own.settle(ctx)); err != nil {
		t.Fatal(err)
	}
	var before, after string
	z.creating = func(string) { before = copyOf(t, root) }
	made := prepare("made")
	z.creating = nil
	after = copyOf(t, root) // no transaction has told yet that it was made
	z.rename(renamed, parent+"/away")

	if got := keys(t, start(t, z, after)); got != "made renamed there" {
		t.Errorf("when all was made: %s", got)
	}
	if _, err := z.Property(ctx, made, ""); err != nil {
		t.Errorf("what was made: %v", err)
	}
	z.rename(made, "elsewhere/made")
	first := start(t, z, before)
	if got := keys(t, first); got != "renamed there" {
		t.Errorf("when one was not made: %s", got)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, start(t, z, before)); got != "renamed there" {
		t.Errorf("the next time: %s", got)
	}

	// Once it was told, a dataset that is missing was renamed.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, start(t, z, root)); got != "made renamed there" {
		t.Errorf("after an orderly end: %s", got)
	}
}

// TestFailedCreation leaves no record, now and after the next start.
func TestFailedCreation(t *testing.T) {
	ctx, z, root := context.Background(), &fake{datasets: map[string]zfs.Properties{}}, filepath.Join(t.TempDir(), "root")
	s := start(t, z, root)
	if got := keys(t, s); got != "" { // not that there is no such thing, as before the first record
		t.Errorf("records of a new store: %s", got)
	}
	z.creating = func(name string) { // somebody was faster
		z.mu.Lock()
		defer z.mu.Unlock()
		z.datasets[name] = zfs.Properties{}
	}
	if _, err := s.Prepare(ctx, "key", ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("prepare: %v", err)
	}
	if got := keys(t, s); got != "" {
		t.Errorf("records %s", got)
	}
	z.creating = nil
	if got := keys(t, start(t, z, copyOf(t, root))); got != "" {
		t.Errorf("records after the next start: %s", got)
	}
}

// TestBind: records that do not belong to the datasets are refused.
func TestBind(t *testing.T) {
	ctx, z, root := context.Background(), &fake{datasets: map[string]zfs.Properties{}}, filepath.Join(t.TempDir(), "root")
	s := start(t, z, root)
	m, err := s.Prepare(ctx, "key", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	lost := copyOf(t, root)
	if err := os.Remove(filepath.Join(lost, "metadata.db")); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a refusal is no beginning
		if _, err := New(ctx, z, lost, parent); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), m[0].Source) {
			t.Errorf("without the records: %v", err)
		}
	}
	mixed := copyOf(t, root)
	b, err := os.ReadFile(filepath.Join(mixed, "store"))
	if err != nil {
		t.Fatal(err)
	}
	z.datasets[parent][propStore] = "another" + string(b)
	if err := os.WriteFile(filepath.Join(mixed, "store"), []byte("another"+string(b)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(ctx, z, mixed, parent); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "metadata.db") {
		t.Errorf("with another store's records: %v", err)
	}
	if _, err := z.Property(ctx, m[0].Source, ""); err != nil {
		t.Errorf("the dataset: %v", err)
	}
}

// TestCommittedUnmarked: a snapshot that was committed before its dataset had its mark keeps no
// daemon from starting after a crash, and is marked then.
func TestCommittedUnmarked(t *testing.T) {
	ctx, z, root := context.Background(), &fake{datasets: map[string]zfs.Properties{}}, filepath.Join(t.TempDir(), "root")
	s := start(t, z, root)
	z.setting = func(string) error { return errdefs.ErrUnavailable }
	var made []string
	for _, c := range [][2]string{{"", "first"}, {"first", "second"}} {
		m, err := s.Prepare(ctx, "key", c[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Commit(ctx, c[1], "key"); err != nil {
			t.Fatal(err)
		}
		made = append(made, m[0].Source)
	}
	crashed := copyOf(t, root)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	z.setting = nil
	next := start(t, z, crashed)
	if err := next.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	for _, name := range made {
		if mark, err := z.Property(ctx, name, propID); err != nil || parent+"/"+mark != name {
			t.Errorf("%s: mark %s, %v", name, mark, err)
		}
	}
}

// TestCountedAgain: what a Commit that failed had counted is not taken for what
// the next one has.
func TestCountedAgain(t *testing.T) {
	ctx, f := context.Background(), &fake{datasets: map[string]zfs.Properties{"tank": {}}, objects: 5}
	s, err := New(ctx, f, t.TempDir(), "tank/c")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Prepare(ctx, "key", ""); err != nil {
		t.Fatal(err)
	}
	broken := func(*snapshots.Info) error { return errdefs.ErrAborted }
	if err := s.Commit(ctx, "name", "key", broken); !errdefs.IsAborted(err) {
		t.Fatalf("a commit that fails after it counted: %v", err)
	}
	f.mu.Lock()
	f.objects = 9
	f.mu.Unlock()
	if err := s.Commit(ctx, "name", "key"); err != nil {
		t.Fatal(err)
	}
	if u, err := s.Usage(ctx, "name"); err != nil || u.Inodes != 9 {
		t.Errorf("%+v, %v: want 9 files", u, err)
	}
}

// TestHasty: Prepare answers before the dataset has its mark; whoever collects
// waits for it.
func TestHasty(t *testing.T) {
	ctx, f := context.Background(), &fake{datasets: map[string]zfs.Properties{}}
	s := start(t, f, filepath.Join(t.TempDir(), "root"))
	cleanup := func() error { return s.(snapshots.Cleaner).Cleanup(ctx) }
	if err := cleanup(); err != nil { // after the first sweep's, at the latest
		t.Fatal(err)
	}
	release := make(chan struct{})
	f.setting = func(string) error { <-release; return nil }
	m, err := s.Prepare(ctx, "key", "")
	if err != nil {
		t.Fatal(err)
	}
	if mark, err := f.Property(ctx, m[0].Source, propID); err != nil || mark != zfs.Unset {
		t.Errorf("the mark is %q already, %v", mark, err)
	}
	if err := s.Remove(ctx, "key"); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := s.(snapshots.Cleaner).Cleanup(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cleanup does not wait: %v", err)
	}
	close(release)
	if err := cleanup(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Property(ctx, m[0].Source, propID); !errdefs.IsNotFound(err) {
		t.Errorf("the dataset is still there: %v", err)
	}
	// What needs a property at once, or does not inherit it, waits for all.
	f.setting = func(string) error { t.Error("properties are set later"); return nil }
	m, err = s.View(ctx, "view", "")
	if err != nil {
		t.Fatal(err)
	}
	if mark, err := f.Property(ctx, m[0].Source, propID); err != nil || mark == zfs.Unset {
		t.Errorf("a view without its mark: %v", err)
	}
}

// TestUnmarked: a dataset that could not be marked is marked by the next
// Cleanup, of this daemon or of the next, whether its record is there or not.
func TestUnmarked(t *testing.T) {
	ctx, f, root := context.Background(), &fake{datasets: map[string]zfs.Properties{}}, filepath.Join(t.TempDir(), "root")
	s := start(t, f, root)
	f.setting = func(string) error { return errdefs.ErrUnavailable }
	kept, err := s.Prepare(ctx, "kept", "")
	if err != nil {
		t.Fatal(err)
	}
	gone, err := s.Prepare(ctx, "gone", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Remove(ctx, "gone"), s.(snapshots.Cleaner).Cleanup(ctx)); err != nil {
		t.Fatal(err)
	}
	states := func() (string, string) {
		t.Helper()
		mark, err := f.Property(ctx, kept[0].Source, propID)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Property(ctx, gone[0].Source, propID)
		if err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		return mark, map[bool]string{true: "there", false: "destroyed"}[err == nil]
	}
	if mark, other := states(); mark != zfs.Unset || other != "there" {
		t.Fatalf("while ZFS refuses: mark %s, the other is %s", mark, other)
	}
	crashed := copyOf(t, root)
	datasets := func(from map[string]zfs.Properties) map[string]zfs.Properties {
		all := map[string]zfs.Properties{}
		for name, p := range from {
			all[name] = maps.Clone(p)
		}
		return all
	}
	before := datasets(f.datasets)
	for name, next := range map[string]func() snapshots.Snapshotter{
		"the same daemon":            func() snapshots.Snapshotter { return s },
		"the next one after a crash": func() snapshots.Snapshotter { return start(t, f, crashed) },
	} {
		f.mu.Lock()
		f.datasets, f.setting = datasets(before), nil
		f.mu.Unlock()
		if err := next().(snapshots.Cleaner).Cleanup(ctx); err != nil {
			t.Fatal(err)
		}
		if mark, other := states(); mark == zfs.Unset || other != "destroyed" {
			t.Errorf("%s: mark %s, the other is %s", name, mark, other)
		}
	}
}
