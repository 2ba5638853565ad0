package state

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// host is ZFS, Proxmox and containerd in one; it writes down what was done.
type host struct {
	taken  []zfs.Entry
	conf   *pve.Conf
	log    []string
	fail   map[string]error
	pinned string            // a snapshot that a clone needs
	files  string            // the snapshot that the files are of
	config string            // what containerd knows of it
	held   string            // the snapshot it is on its way to
	keys   map[string]string // of datasets
	left   int               // steps until the end of this process; 0: none
}

type crash struct{}

func (h *host) did(format string, args ...any) error {
	step := fmt.Sprintf(format, args...)
	if h.left > 0 {
		if h.left--; h.left == 0 {
			panic(crash{})
		}
	}
	h.log = append(h.log, step)
	return h.fail[strings.Fields(step)[0]]
}

func (h *host) Taken(context.Context, string, []string) ([]zfs.Entry, error) {
	return slices.Clone(h.taken), nil
}

func (h *host) Property(_ context.Context, name, _ string) (string, error) {
	if key, there := h.keys[name]; there {
		return key, nil
	}
	return zfs.Unset, nil
}

func (h *host) Snapshot(_ context.Context, name string, props zfs.Properties) error {
	if err := h.did("snapshot %s", name); err != nil {
		return err
	}
	h.taken = append(h.taken, zfs.Entry{Name: name, Own: props, Created: time.Unix(int64(len(h.taken)), 0)})
	return nil
}

func (h *host) Rollback(_ context.Context, name string) error {
	if err := h.did("rollback %s", name); err != nil {
		return err
	}
	if h.taken[len(h.taken)-1].Name != name {
		return errdefs.ErrFailedPrecondition
	}
	h.files = name
	return nil
}

func (h *host) Set(_ context.Context, name string, props zfs.Properties) error {
	if err := h.did("mark %s %v", name, props); err != nil {
		return err
	}
	i := slices.IndexFunc(h.taken, func(e zfs.Entry) bool { return e.Name == name })
	maps.Copy(h.taken[i].Own, props)
	return nil
}

func (h *host) DestroyAll(_ context.Context, names []string) (map[string]error, error) {
	failed := map[string]error{}
	for _, name := range names {
		if name == h.pinned {
			failed[name] = errdefs.ErrFailedPrecondition
			continue
		}
		_ = h.did("destroy %s", name)
		h.taken = slices.DeleteFunc(h.taken, func(e zfs.Entry) bool { return e.Name == name })
	}
	return failed, nil
}

func (h *host) Change(_ context.Context, _ int, change func(*pve.Conf) error) error {
	conf := pve.Parse(h.conf.Bytes())
	if err := change(conf); err != nil {
		return err
	}
	if err := h.did("conf"); err != nil {
		return err
	}
	h.conf = conf
	return nil
}

func (h *host) Still(context.Context, string) (func(context.Context) error, error) {
	return func(context.Context) error { return h.did("resume") }, h.did("pause")
}

func (h *host) Stop(context.Context, string) (func(context.Context) error, error) {
	return func(context.Context) error { return h.did("start") }, h.did("stop")
}

func (h *host) Config(context.Context, string) (Config, error) {
	return Config{Image: "img@sha256:1", Record: []byte(h.config)}, h.fail["config"]
}

func (h *host) SetConfig(_ context.Context, _ string, record []byte) error {
	if err := h.did("config"); err != nil {
		return err
	}
	h.config, h.held = string(record), ""
	return nil
}

func (h *host) Hold(_ context.Context, _, name string) error {
	if err := h.did("hold %q", name); err != nil {
		return err
	}
	h.held = name
	return nil
}

func (h *host) Held(context.Context, string) (string, error) { return h.held, nil }

func (h *host) steps() string {
	s := strings.Join(h.log, "; ")
	h.log = nil
	return s
}

func store(h *host) *Store { return &Store{ZFS: h, Tasks: h, Configs: h, Confs: h} }

var (
	plain = Container{ID: "web", Dataset: "tank/c/7"}
	ct    = Container{ID: "web", Dataset: "tank/data/subvol-100-disk-0", VMID: 100}
)

func isSteps(t *testing.T, h *host, want string) {
	t.Helper()
	if got := h.steps(); got != want {
		t.Errorf("%s\nnot\n%s", got, want)
	}
}

// TestPlain: without Proxmox.
func TestPlain(t *testing.T) {
	ctx, h := t.Context(), &host{}
	s := store(h)
	for _, name := range []string{"one", "two", "three"} {
		if err := s.Take(ctx, plain, name, "of "+name); err != nil {
			t.Fatal(err)
		}
		isSteps(t, h, "pause; snapshot tank/c/7@"+name+"; resume")
	}
	if err := s.Take(ctx, plain, "two", ""); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	for _, bad := range []string{"snapshot", "a b", "", "current", "x@y"} {
		if err := s.Take(ctx, plain, bad, ""); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	all, err := s.List(ctx, plain)
	if err != nil || len(all) != 3 || all[1].Name != "two" || all[1].Description != "of two" || all[1].Foreign {
		t.Errorf("%+v, %v", all, err)
	}
	if err := s.Rollback(ctx, plain, "none", true); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "one, two, three") {
		t.Error(err)
	}
	if err := s.Rollback(ctx, plain, "one", false); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "two, three") {
		t.Error(err)
	}
	isSteps(t, h, "")
	if err := s.Rollback(ctx, plain, "one", true); err != nil {
		t.Error(err)
	}
	isSteps(t, h, `stop; hold "one"; destroy tank/c/7@three; destroy tank/c/7@two; rollback tank/c/7@one; config; hold ""; start`)
	if err := s.Remove(ctx, plain, "one"); err != nil {
		t.Error(err)
	}
	if err := s.Remove(ctx, plain, "one"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// TestProxmox: with a conf, which is written last, and once.
func TestProxmox(t *testing.T) {
	ctx, h := t.Context(), &host{conf: pve.Parse([]byte("memory: 64\n"))}
	s := store(h)
	if err := s.Take(ctx, ct, "one", "text"); err != nil {
		t.Fatal(err)
	}
	isSteps(t, h, "pause; snapshot tank/data/subvol-100-disk-0@one; resume; conf")
	if got := h.conf.Snapshots(); !slices.Equal(got, []string{"one"}) {
		t.Errorf("%v", got)
	}
	if err := h.conf.Set("memory", "128"); err != nil {
		t.Fatal(err)
	}
	if err := s.Take(ctx, ct, "two", ""); err != nil {
		t.Fatal(err)
	}
	h.steps()
	if err := s.Rollback(ctx, ct, "one", true); err != nil {
		t.Fatal(err)
	}
	isSteps(t, h, "stop; mark tank/data/subvol-100-disk-0@one map[containerd-pve:rollback:begun]; conf; destroy tank/data/subvol-100-disk-0@two; "+
		"rollback tank/data/subvol-100-disk-0@one; config; conf; mark tank/data/subvol-100-disk-0@one map[containerd-pve:rollback:]; start")
	if v, _ := h.conf.Get("memory"); v != "64" || !slices.Equal(h.conf.Snapshots(), []string{"one"}) {
		t.Errorf("%s", h.conf.Bytes())
	}
	// What a crash left, of which the conf knows nothing.
	h.taken = append(h.taken, zfs.Entry{Name: ct.Dataset + "@left", Own: zfs.Properties{snapshotter.PropTaken: " "}})
	if err := s.Take(ctx, ct, "left", ""); err != nil {
		t.Error(err)
	}
	isSteps(t, h, "destroy tank/data/subvol-100-disk-0@left; pause; snapshot tank/data/subvol-100-disk-0@left; resume; conf")
	// Somebody's, or Proxmox's own.
	h.taken = append(h.taken, zfs.Entry{Name: ct.Dataset + "@theirs", Own: zfs.Properties{}})
	for _, err := range []error{s.Remove(ctx, ct, "theirs"), s.Rollback(ctx, ct, "one", true)} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "theirs") {
			t.Error(err)
		}
	}
	isSteps(t, h, "")
	if err := s.Rollback(ctx, ct, "theirs", false); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "theirs") {
		t.Errorf("no section: %v", err)
	}
	isSteps(t, h, "")
	if err := h.conf.Set("lock", "backup"); err != nil {
		t.Fatal(err)
	}
	h.steps()
	for _, err := range []error{s.Take(ctx, ct, "more", ""), s.Remove(ctx, ct, "one"), s.Rollback(ctx, ct, "left", true)} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pct unlock 100") {
			t.Error(err)
		}
	}
	isSteps(t, h, "")
}

// TestClone: what clones need stays, and is named by the containers they are of.
func TestClone(t *testing.T) {
	ctx := t.Context()
	h := &host{conf: pve.Parse([]byte("memory: 64\n")), config: "of then", keys: map[string]string{"tank/c/9": "default/12/copy"}}
	s := store(h)
	for _, name := range []string{"one", "two"} {
		if err := s.Take(ctx, ct, name, ""); err != nil {
			t.Fatal(err)
		}
	}
	h.config = "of now"
	h.steps()
	var made []string
	note := func(snapshot string, record []byte) error {
		made = append(made, snapshot, string(record))
		return nil
	}
	if err := s.Clone(ctx, ct, "one", note); err != nil || !slices.Equal(made, []string{ct.Dataset + "@one", "of then"}) {
		t.Errorf("%v, %v", made, err)
	}
	no := errors.New("no")
	if err := s.Clone(ctx, ct, "one", func(string, []byte) error { return no }); !errors.Is(err, no) {
		t.Error(err)
	}
	h.taken = append(h.taken, zfs.Entry{Name: ct.Dataset + "@theirs", Own: zfs.Properties{}})
	if err := s.Clone(ctx, ct, "theirs", note); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another's: %v", err)
	}
	if err := s.Clone(ctx, ct, "none", note); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	h.taken = h.taken[:2]
	h.steps()
	h.taken[1].Clones = []string{"tank/c/9", "tank/somebodys"}
	for _, err := range []error{s.Remove(ctx, ct, "two"), s.Rollback(ctx, ct, "one", true)} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "(copy, tank/somebodys)") {
			t.Error(err)
		}
	}
	isSteps(t, h, "")
	// Proxmox's tools may take the section away all the same; and it may be of a container that is gone.
	h.conf.RemoveSnapshot("two")
	h.taken = append(h.taken, zfs.Entry{Name: ct.Dataset + "@containerd-pve-7", Own: zfs.Properties{snapshotter.PropTaken: ""}})
	for _, err := range []error{s.Remove(ctx, ct, "two"), s.Rollback(ctx, ct, "one", true)} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "(copy, tank/somebodys)") {
			t.Errorf("without a section: %v", err)
		}
	}
	if err := s.Take(ctx, ct, "two", ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("without a section: %v", err)
	}
	isSteps(t, h, "")
	if err := s.Take(ctx, ct, "three", ""); err != nil {
		t.Error(err)
	}
	isSteps(t, h, "pause; snapshot tank/data/subvol-100-disk-0@three; resume; conf")
	all, err := s.List(ctx, plain)
	if err != nil || names(all) != "one, two, three" || !slices.Equal(all[1].Clones, []string{"copy", "tank/somebodys"}) {
		t.Errorf("%+v, %v", all, err)
	}
}

// TestFailures: what runs goes on, and nothing is half done.
func TestFailures(t *testing.T) {
	ctx, no := t.Context(), errors.New("no")
	h := &host{conf: pve.Parse([]byte("memory: 64\n")), fail: map[string]error{"snapshot": no}}
	s := store(h)
	if err := s.Take(ctx, ct, "one", ""); !errors.Is(err, no) {
		t.Error(err)
	}
	isSteps(t, h, "pause; snapshot tank/data/subvol-100-disk-0@one; resume")
	h.fail = map[string]error{"pause": no}
	if err := s.Take(ctx, ct, "one", ""); !errors.Is(err, no) {
		t.Error(err)
	}
	isSteps(t, h, "pause")
	h.fail = nil
	// A description that no conf takes.
	if err := s.Take(ctx, ct, "one", strings.Repeat("x", 9000)); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if len(h.taken) > 0 {
		t.Errorf("left %v", h.taken)
	}
	h.steps()
	for _, name := range []string{"one", "two"} {
		if err := s.Take(ctx, ct, name, ""); err != nil {
			t.Fatal(err)
		}
	}
	h.steps()
	h.fail = map[string]error{"rollback": no}
	if err := s.Rollback(ctx, ct, "two", false); !errors.Is(err, no) {
		t.Error(err)
	}
	same(t, h, "rollback tank/data/subvol-100-disk-0@two")
	h.fail, h.pinned = nil, ct.Dataset+"@two"
	if err := s.Rollback(ctx, ct, "one", true); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "two") {
		t.Error(err)
	}
	same(t, h, "")
	if err := s.Remove(ctx, ct, "two"); !errdefs.IsFailedPrecondition(err) || len(h.conf.Snapshots()) != 2 {
		t.Error(err)
	}
	// One of two that are newer is destroyed, the other cannot be.
	if err := s.Take(ctx, ct, "three", ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Rollback(ctx, ct, "one", true); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	same(t, h, "destroy tank/data/subvol-100-disk-0@three")
}

// same wants a container as before a rollback that failed, which runs.
func same(t *testing.T, h *host, step string) {
	t.Helper()
	if got := h.steps(); !strings.Contains(got, step) || !strings.HasSuffix(got, "; start") {
		t.Errorf("steps: %s", got)
	}
	if got := h.conf.Snapshots(); !slices.Equal(got, []string{"one", "two"}) || h.conf.Lock() != "" {
		t.Errorf("the conf:\n%s", h.conf.Bytes())
	}
	for _, e := range h.taken {
		if e.Own[propBack] != "" {
			t.Errorf("%s is still marked", e.Name)
		}
	}
}

// TestCrashes: a process that ends before any step leaves the old state, the new one, or one
// that nobody uses until the same command ends it.
func TestCrashes(t *testing.T) {
	ctx := t.Context()
	prepared := func() *host {
		h := &host{conf: pve.Parse([]byte("memory: 64\n"))}
		s := store(h)
		h.config = "of one"
		one := s.Take(ctx, ct, "one", "")
		h.config = "of two"
		for _, err := range []error{one, h.conf.Set("memory", "128"), s.Take(ctx, ct, "two", ""), s.Take(ctx, ct, "three", "")} {
			if err != nil {
				t.Fatal(err)
			}
		}
		return h
	}
	for name, f := range map[string]func(*Store) error{
		"rollback": func(s *Store) error { return s.Rollback(ctx, ct, "one", true) },
		"remove":   func(s *Store) error { return s.Remove(ctx, ct, "two") },
		"take":     func(s *Store) error { return s.Take(ctx, ct, "four", "") },
	} {
		want := prepared()
		if err := f(store(want)); err != nil {
			t.Fatal(err)
		}
		steps := 0
		for n := 1; ; n++ {
			h := prepared()
			old := string(h.conf.Bytes())
			h.left = n
			died := dies(t, func() error { return f(store(h)) })
			if !died {
				break
			}
			steps++
			memory, _ := h.conf.Get("memory")
			if back := h.files != ""; h.conf.Lock() == "" && (back != (memory == "64") || back != (h.config == "of one")) {
				t.Errorf("%s, step %d: files of %q with memory of %s, configuration %s, and no lock", name, n, h.files, memory, h.config)
			}
			isOld := string(h.conf.Bytes()) == old
			if err := f(store(h)); err != nil && (isOld || !errdefs.IsNotFound(err) && !errdefs.IsAlreadyExists(err)) {
				t.Errorf("%s again after step %d: %v", name, n, err)
			}
			if err := store(h).Take(ctx, ct, "last", ""); err != nil {
				t.Errorf("%s, step %d: %v", name, n, err)
			}
			if err := store(h).Remove(ctx, ct, "last"); err != nil {
				t.Error(err)
			}
			if got, want := unTimed(h.conf), unTimed(want.conf); got != want {
				t.Errorf("%s, step %d: conf\n%s\nnot\n%s", name, n, got, want)
			}
			var got, all []string
			for _, e := range h.taken {
				got = append(got, e.Name)
			}
			for _, e := range want.taken {
				all = append(all, e.Name)
			}
			if !slices.Equal(got, all) || h.files != want.files || h.config != want.config {
				t.Errorf("%s, step %d: %v of %q, not %v of %q", name, n, got, h.files, all, want.files)
			}
		}
		if steps < 2 {
			t.Errorf("%s: %d steps", name, steps)
		}
	}
}

// TestPlainCrashes: without Proxmox too.
func TestPlainCrashes(t *testing.T) {
	ctx := t.Context()
	for n := 1; ; n++ {
		h := &host{config: "of one"}
		one := store(h).Take(ctx, plain, "one", "")
		h.config = "of two"
		if err := errors.Join(one, store(h).Take(ctx, plain, "two", "")); err != nil {
			t.Fatal(err)
		}
		h.left = n
		died := dies(t, func() error { return store(h).Rollback(ctx, plain, "one", true) })
		h.left = 0
		isOld, isNew := h.files == "" && h.config == "of two" && len(h.taken) == 2, h.files != "" && h.config == "of one"
		if h.held == "" && !isOld && !isNew {
			t.Errorf("step %d: files of %q, configuration %s, %d snapshots, and nothing holds it", n, h.files, h.config, len(h.taken))
		}
		if err := store(h).Take(ctx, plain, "three", ""); h.held != "" && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "rollback one web")) {
			t.Errorf("step %d: held: %v", n, err)
		}
		if err := store(h).Rollback(ctx, plain, "one", true); err != nil || h.files == "" || h.config != "of one" || h.held != "" || len(h.taken) != 1 {
			t.Errorf("step %d, again: %v, files of %q, configuration %s, held %q", n, err, h.files, h.config, h.held)
		}
		if !died {
			if n < 5 {
				t.Errorf("%d steps", n)
			}
			return
		}
	}
}

// TestPlainFailures: a rollback that fails holds nothing.
func TestPlainFailures(t *testing.T) {
	ctx, no := t.Context(), errors.New("no")
	h := &host{config: "of now"}
	if err := store(h).Take(ctx, plain, "one", ""); err != nil {
		t.Fatal(err)
	}
	h.fail = map[string]error{"rollback": no}
	if err := store(h).Rollback(ctx, plain, "one", false); !errors.Is(err, no) || h.held != "" || h.config != "of now" {
		t.Errorf("%v, held %q, configuration %s", err, h.held, h.config)
	}
}

func dies(t *testing.T, f func() error) (died bool) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(crash); !ok {
				panic(r)
			}
			died = true
		}
	}()
	if err := f(); err != nil {
		t.Error(err)
	}
	return false
}

func unTimed(c *pve.Conf) string {
	var lines []string
	for line := range strings.Lines(string(c.Bytes())) {
		if !strings.HasPrefix(line, "snaptime:") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

func TestConfig(t *testing.T) {
	// One that cannot be read stops a rollback before anything is done.
	ctx, h := t.Context(), &host{}
	if err := store(h).Take(ctx, plain, "one", ""); err != nil {
		t.Fatal(err)
	}
	h.steps()
	h.taken[0].Own[propRecord] = "rubbish"
	if err := store(h).Rollback(ctx, plain, "one", false); !errdefs.IsDataLoss(err) {
		t.Errorf("rubbish: %v", err)
	}
	isSteps(t, h, "")
	h.fail = map[string]error{"config": errdefs.ErrNotFound}
	if err := store(h).Take(ctx, plain, "two", ""); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	isSteps(t, h, "")
}
