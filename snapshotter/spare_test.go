package snapshotter

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// sparesMade has done at once what is put off.
func sparesMade(s Store) {
	s.(*snapshotter).creating.hurry()
	s.(*snapshotter).spares.runs.Wait()
}

// layerIn makes a committed snapshot.
func layerIn(t *testing.T, s Store, name, of string) {
	t.Helper()
	ctx := context.Background()
	if _, err := s.Prepare(ctx, name+"-key", of, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: name})); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(ctx, name, name+"-key"); err != nil {
		t.Fatal(err)
	}
}

// filesystemsOf are the numbers of a fake's.
func filesystemsOf(f *fake) string {
	names, _ := f.Children(context.Background(), parent)
	for i, name := range names {
		names[i] = filepath.Base(name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func source(t *testing.T, s Store, key string) string {
	t.Helper()
	m, err := s.Mounts(context.Background(), key)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Base(m[0].Source)
}

func prepared(t *testing.T, s Store, key, of string) string {
	t.Helper()
	if _, err := s.Prepare(context.Background(), key, of); err != nil {
		t.Fatal(err)
	}
	return source(t, s, key)
}

func clean(t *testing.T, s Store) {
	t.Helper()
	if err := s.(*snapshotter).clean(context.Background(), true); err != nil {
		t.Fatal(err)
	}
}

// TestSpare: a container gets the clone that was made before anybody asked for it, and all that
// another has; the top of an image has one, a layer within has none, and it goes with its image.
func TestSpare(t *testing.T) {
	ctx := context.Background()
	var made atomic.Int32
	z := &fake{datasets: map[string]zfs.Properties{}, creating: func(string) { made.Add(1) }}
	s := startWithSpares(t, z, filepath.Join(t.TempDir(), "root"))
	layerIn(t, s, "bottom", "")
	layerIn(t, s, "top", "bottom")
	sparesMade(s)
	if got := filesystemsOf(z); got != "1 2 3" {
		t.Fatalf("of an image with two layers: %s", got)
	}
	clean(t, s) // lists, and finds a filesystem without a record
	before := made.Load()
	if id := prepared(t, s, "default/1/web", "top"); id != "3" || made.Load() != before {
		t.Errorf("a container has %s, and ZFS made %d filesystems for it", id, made.Load()-before)
	}
	if id := prepared(t, s, "other", "top"); id != "4" {
		t.Errorf("another at the same moment has %s", id)
	}
	sparesMade(s)
	if err := s.(*snapshotter).creating.wait(ctx); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
	if got := filesystemsOf(z); got != "1 2 3 4 5" {
		t.Errorf("with two containers: %s", got)
	}
	for id, key := range map[string]string{"3": "default/1/web", "4": "other", "5": zfs.Unset} {
		of, _ := z.Property(ctx, parent+"/"+id, "origin")
		mark, _ := z.Property(ctx, parent+"/"+id, propID)
		if got, _ := z.Property(ctx, parent+"/"+id, PropKey); got != key || mark != id || of != parent+"/2@snapshot" {
			t.Errorf("%s has the key %q and the mark %q, and is a clone of %s", id, got, mark, of)
		}
	}
	// What cannot be a spare is made.
	if _, err := s.View(ctx, "view", "top"); err != nil || source(t, s, "view") != "6" {
		t.Errorf("a view: %s, %v", source(t, s, "view"), err)
	}
	for _, key := range []string{"view", "other", "default/1/web", "top", "bottom"} {
		if err := s.Remove(ctx, key); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if got := filesystemsOf(z); got != "" {
		t.Errorf("of an image that is removed: %s", got)
	}
}

// TestLayerWithoutSpare: of a layer no spare is made while ZFS makes the one above it, however long that takes.
func TestLayerWithoutSpare(t *testing.T) {
	var s Store
	z := &fake{datasets: map[string]zfs.Properties{}, creating: func(name string) {
		if name == parent+"/2" {
			sparesMade(s)
		}
	}}
	s = startWithSpares(t, z, filepath.Join(t.TempDir(), "root"))
	layerIn(t, s, "bottom", "")
	layerIn(t, s, "top", "bottom")
	if got := filesystemsOf(z); got != "1 2" {
		t.Errorf("%s are there", got)
	}
}

// TestSpareLost: a spare that somebody destroyed, promoted or renamed is given to nobody.
func TestSpareLost(t *testing.T) {
	for name, change := range map[string]func(z *fake){
		"destroyed": func(z *fake) { _ = z.Destroy(context.Background(), parent+"/2") },
		"promoted":  func(z *fake) { _ = z.Promote(context.Background(), parent+"/2") },
		"renamed":   func(z *fake) { z.rename(parent+"/2", parent+"/away") },
	} {
		t.Run(name, func(t *testing.T) {
			z := &fake{datasets: map[string]zfs.Properties{}}
			s := startWithSpares(t, z, filepath.Join(t.TempDir(), "root"))
			layerIn(t, s, "layer", "")
			sparesMade(s)
			change(z)
			_, err := s.Prepare(context.Background(), "root", "layer")
			if name == "promoted" { // the layer has lost its snapshot
				if !errdefs.IsFailedPrecondition(err) {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil || source(t, s, "root") != "3" {
				t.Errorf("%s, %v", source(t, s, "root"), err)
			}
		})
	}
}

// TestSpareCrash: the next daemon destroys what was ready, and completes what was given away.
func TestSpareCrash(t *testing.T) {
	ctx, root := context.Background(), filepath.Join(t.TempDir(), "root")
	z := &fake{datasets: map[string]zfs.Properties{}}
	s := startWithSpares(t, z, root)
	layerIn(t, s, "layer", "")
	sparesMade(s)
	ready := copyOf(t, root)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	next := startWithSpares(t, z, ready)
	clean(t, next)
	if got := filesystemsOf(z); got != "1" {
		t.Errorf("a spare of another daemon: %s", got)
	}
	// It waits for the moment at which marks are set, which does not come.
	prepared(t, next, "first", "layer")
	sparesMade(next)
	id := prepared(t, next, "root", "layer")
	given := copyOf(t, ready)
	next.(*snapshotter).spares.close()
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	delete(z.datasets[parent+"/"+id], PropKey)
	last := startWithSpares(t, z, given)
	clean(t, last)
	if key, _ := z.Property(ctx, parent+"/"+id, PropKey); key != "root" || keys(t, last) != "first layer root" {
		t.Errorf("what was given away has the key %q; records: %s", key, keys(t, last))
	}
}

// TestSpareOrphan: an image may be removed while its spare is made, or is being given away.
func TestSpareOrphan(t *testing.T) {
	ctx := context.Background()
	begun, goOn := make(chan struct{}), make(chan struct{})
	var armed atomic.Bool
	z := &fake{datasets: map[string]zfs.Properties{}, creating: func(string) {
		if armed.Load() {
			close(begun)
			<-goOn
		}
	}}
	s := startWithSpares(t, z, filepath.Join(t.TempDir(), "root"))
	layerIn(t, s, "layer", "")
	armed.Store(true)
	s.(*snapshotter).creating.hurry()
	<-begun
	if err := s.Remove(ctx, "layer"); err != nil {
		t.Fatal(err)
	}
	cleaned := make(chan error)
	go func() { cleaned <- s.Cleanup(ctx) }()
	close(goOn)
	if err := <-cleaned; err != nil {
		t.Fatal(err)
	}
	if got := filesystemsOf(z); got != "" {
		t.Errorf("removed while it was made: %s", got)
	}

	armed.Store(false)
	layerIn(t, s, "layer", "")
	sparesMade(s)
	of, id, err := s.(*snapshotter).takeSpare(ctx, "layer")
	if err != nil || id == "" {
		t.Fatalf("%q, %v", id, err)
	}
	clean(t, s)
	if err := s.Remove(ctx, "layer"); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
	if got := filesystemsOf(z); got != of+" "+id {
		t.Errorf("while it is given away: %s", got)
	}
	s.(*snapshotter).settleSpare(of, id, true)
	clean(t, s)
	if got := filesystemsOf(z); got != "" {
		t.Errorf("removed while it was given away: %s", got)
	}
}

// failing is a pool on which nothing can be cloned any more.
type failing struct {
	*fake
	err error
}

func (f failing) Clone(context.Context, string, string, zfs.Properties) error { return f.err }

// TestSpareFailed: one that cannot be made leaves nothing, and nobody fails because of it.
func TestSpareFailed(t *testing.T) {
	for _, err := range []error{errdefs.ErrResourceExhausted, errdefs.ErrAlreadyExists, errdefs.ErrNotFound} {
		z := failing{&fake{datasets: map[string]zfs.Properties{}}, err}
		s := startWithSpares(t, z, filepath.Join(t.TempDir(), "root"))
		layerIn(t, s, "layer", "")
		sparesMade(s)
		clean(t, s)
		if held := s.(*snapshotter).spares.held(); len(held) != 0 || filesystemsOf(z.fake) != "1" {
			t.Errorf("%v: %v, %s", err, held, filesystemsOf(z.fake))
		}
		if err := s.Remove(context.Background(), "layer"); err != nil {
			t.Error(err)
		}
		clean(t, s)
		if filesystemsOf(z.fake) != "" {
			t.Errorf("%v: left %s", err, filesystemsOf(z.fake))
		}
	}
}

// counting counts what the pool is waited for besides SnapshotAndClone.
type counting struct {
	*fake
	changes atomic.Int32
}

func (c *counting) Clone(ctx context.Context, snapshot, name string, p zfs.Properties) error {
	c.changes.Add(1)
	return c.fake.Clone(ctx, snapshot, name, p)
}

func (c *counting) Snapshot(ctx context.Context, name string, p zfs.Properties) error {
	c.changes.Add(1)
	return c.fake.Snapshot(ctx, name, p)
}

// TestSpareAtOnce: where ZFS can, the filesystem of the next layer is made with the commit of the one before.
func TestSpareAtOnce(t *testing.T) {
	ctx := context.Background()
	z := &counting{fake: &fake{datasets: map[string]zfs.Properties{}, atOnce: true}}
	s := startWithSpares(t, z, filepath.Join(t.TempDir(), "root"))
	layerIn(t, s, "bottom", "")
	layerIn(t, s, "middle", "bottom")
	clean(t, s) // lists, and finds a filesystem without a record
	layerIn(t, s, "top", "middle")
	if id := prepared(t, s, "root", "top"); id != "4" || z.changes.Load() != 0 {
		t.Errorf("a container has %s, and ZFS was waited for %d times besides the commits", id, z.changes.Load())
	}
	sparesMade(s)
	if got := filesystemsOf(z.fake); got != "1 2 3 4 5" {
		t.Errorf("with a container: %s", got)
	}
	// One that is not committed has none.
	if _, err := s.Prepare(ctx, "given-up", "top", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "x"})); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"given-up", "root", "top", "middle", "bottom"} {
		if err := s.Remove(ctx, key); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if held := s.(*snapshotter).spares.held(); filesystemsOf(z.fake) != "" || len(held) != 0 {
		t.Errorf("left %s, held %v", filesystemsOf(z.fake), held)
	}
}

// TestSpareAtOnceCrash: a crash after the snapshot and the spare, and before the record: the next Commit takes the snapshot anew.
func TestSpareAtOnceCrash(t *testing.T) {
	ctx, root := context.Background(), filepath.Join(t.TempDir(), "root")
	crashed := ""
	z := &fake{datasets: map[string]zfs.Properties{}, atOnce: true}
	z.creating = func(name string) {
		if name == parent+"/2" {
			crashed = copyOf(t, root)
		}
	}
	s := startWithSpares(t, z, root)
	layerIn(t, s, "layer", "")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	next := startWithSpares(t, z, crashed)
	if err := next.Commit(ctx, "layer", "layer-key"); err != nil {
		t.Fatal(err)
	}
	sparesMade(next)
	clean(t, next)
	if got := filesystemsOf(z); got != "1 3" || keys(t, next) != "layer" {
		t.Errorf("%s; records: %s", got, keys(t, next))
	}
}

// TestSpareWait: whoever waits for those that are being made waits for the last of them.
func TestSpareWait(t *testing.T) {
	p := spares{most: 2}
	due := func() <-chan struct{} { return make(chan struct{}) } // never
	for _, id := range []string{"1", "2"} {
		p.want(id, "name", due, nil)
		if all := p.begin(); len(all) != 1 || len(p.begin()) != 0 {
			t.Fatalf("wanted %v", all)
		}
	}
	ended := make(chan error)
	go func() { ended <- p.wait(context.Background()) }()
	p.end()
	select {
	case <-ended:
		t.Error("one is being made")
	case <-time.After(20 * time.Millisecond):
	}
	p.end()
	if err := <-ended; err != nil || p.wait(context.Background()) != nil {
		t.Error(err)
	}
}

// TestSpareLimit: the oldest goes when there are too many.
func TestSpareLimit(t *testing.T) {
	p := spares{most: 4}
	var gone []string
	for n := range p.most + 3 {
		if old := p.reserve(fmt.Sprint("p", n), fmt.Sprint(n)); old != "" {
			gone = append(gone, old)
		}
		if n != 1 { // that is being made all the time
			p.settle(fmt.Sprint("p", n), true)
		}
	}
	if got := strings.Join(gone, " "); got != "0 2 3" {
		t.Errorf("%s went", got)
	}
}

// TestNoSpares: where nobody wants any, and a daemon before left one.
func TestNoSpares(t *testing.T) {
	for _, atOnce := range []bool{false, true} {
		root := filepath.Join(t.TempDir(), "root")
		z := &fake{datasets: map[string]zfs.Properties{}, atOnce: atOnce}
		before := startWithSpares(t, z, root)
		layerIn(t, before, "layer", "")
		sparesMade(before)
		if got := filesystemsOf(z); got != "1 2" {
			t.Fatalf("with spares: %s", got)
		}
		if err := before.Close(); err != nil {
			t.Fatal(err)
		}
		s := startWithSpares(t, z, root, WithSpares(0))
		clean(t, s)
		layerIn(t, s, "top", "layer")
		id := prepared(t, s, "root", "top")
		sparesMade(s)
		if got := filesystemsOf(z); got != "1 3 "+id {
			t.Errorf("at once %v: %s are there, of a container %s", atOnce, got, id)
		}
	}
}
