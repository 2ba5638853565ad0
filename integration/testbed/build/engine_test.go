package build

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKey(t *testing.T) {
	base := func() *Stage {
		return &Stage{Name: "a", Script: "b", Params: map[string]string{"X": "1", "Y": "2"}, Deps: []*Stage{{Name: "d", Script: "e"}}}
	}
	key := base().Key()
	if base().Key() != key {
		t.Error("the same inputs have two keys")
	}
	for name, change := range map[string]func(*Stage){
		"name":       func(s *Stage) { s.Name = "b" },
		"script":     func(s *Stage) { s.Script = "c" },
		"boundary":   func(s *Stage) { s.Name, s.Script = "ab", "" },
		"parameter":  func(s *Stage) { s.Params["X"] = "3" },
		"names":      func(s *Stage) { s.Params = map[string]string{"X": "1Y2"} },
		"dependency": func(s *Stage) { s.Deps[0].Script = "f" },
	} {
		s := base()
		change(s)
		if s.Key() == key {
			t.Errorf("another %s does not change the key", name)
		}
	}
	s := base()
	s.Env = []string{"Z=1"}
	if s.Key() != key {
		t.Error("where things lie changes the key")
	}
}

func TestBuild(t *testing.T) {
	var progress bytes.Buffer
	c := &Cache{Dir: t.TempDir(), Progress: &progress}
	a := &Stage{Name: "a", Script: `echo one > "$OUT/f"`}
	b := &Stage{Name: "b", Deps: []*Stage{a}, Script: `cat "$DEP_A/f" > "$OUT/g"; echo "$P" >> "$OUT/g"`, Params: map[string]string{"P": "two"}}
	if err := os.MkdirAll(filepath.Join(c.Dir, "tmp-a-1"), 0o755); err != nil { // a killed builder's
		t.Fatal(err)
	}
	if err := c.Build(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(c.Path(b), "g"))
	if err != nil || string(got) != "one\ntwo\n" {
		t.Errorf("%q, %v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(c.Dir, "tmp-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	progress.Reset()
	if err := c.Build(t.Context(), b); err != nil || progress.Len() > 0 {
		t.Errorf("a second build: %v, %q", err, progress.String())
	}
}

// TestMountsOfAKilledBuilder: what was mounted in its directory is not the cache's to remove.
func TestMountsOfAKilledBuilder(t *testing.T) {
	c := &Cache{Dir: t.TempDir(), Progress: &bytes.Buffer{}}
	left, host := filepath.Join(c.Dir, "tmp-a-1", "root", "dev"), t.TempDir()
	file := filepath.Join(host, "of-the-host")
	if err := errors.Join(os.MkdirAll(left, 0o755), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(host, left, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("mounts are not allowed here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(left, unix.MNT_DETACH) })
	if err := c.Build(t.Context(), &Stage{Name: "b", Script: "true"}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(c.Dir, "tmp-a-1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its directory: %v", err)
	}
}

func TestBuildFailureLeavesNoStage(t *testing.T) {
	c := &Cache{Dir: t.TempDir(), Progress: &bytes.Buffer{}}
	s := &Stage{Name: "a", Script: `touch "$OUT/half"; echo the reason >&2; false`}
	after := &Stage{Name: "b", Deps: []*Stage{s}, Script: `true`}
	err := c.Build(t.Context(), after)
	if err == nil || !strings.Contains(err.Error(), "the reason") {
		t.Errorf("error %v", err)
	}
	if c.Ready(s) || c.Ready(after) {
		t.Error("a failed stage counts as ready")
	}
}

func TestBuildCancelled(t *testing.T) {
	c := &Cache{Dir: t.TempDir(), Progress: &bytes.Buffer{}}
	ctx, cancel := context.WithCancel(t.Context())
	s := &Stage{Name: "a", Go: func(ctx context.Context, _ string) error { cancel(); <-ctx.Done(); return ctx.Err() }}
	if err := c.Build(ctx, s); !errors.Is(err, context.Canceled) || c.Ready(s) {
		t.Errorf("%v", err)
	}
}

func TestParallelBuildersMakeItOnce(t *testing.T) {
	dir := t.TempDir()
	var made atomic.Int32
	s := &Stage{Name: "a", Go: func(context.Context, string) error { made.Add(1); return nil }}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := (&Cache{Dir: dir, Progress: &bytes.Buffer{}}).Build(t.Context(), s); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 1 {
		t.Errorf("made %d times", made.Load())
	}
}
