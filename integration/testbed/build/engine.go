// Package build makes the test bed's cached parts: kernel, ZFS module, root filesystem,
// containerds, images, disk. Each stage has a directory of its own outside the repository,
// named by a hash of everything it is made from, and visible only once it is whole.
// It boots nothing.
package build

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// Stage is one part. Its key is the hash of its name, script, parameters and dependencies' keys.
type Stage struct {
	Name   string
	Deps   []*Stage
	Script string                                      // run by bash after recipes/lib.sh, may be empty
	Params map[string]string                           // environment of the script
	Env    []string                                    // environment that is no input: where things lie
	Go     func(ctx context.Context, out string) error // after the script
}

// Key names what the stage is made of.
func (s *Stage) Key() string {
	h := sha256.New()
	field := func(b string) { fmt.Fprintf(h, "%d:%s", len(b), b) }
	field(s.Name)
	field(s.Script)
	names := make([]string, 0, len(s.Params))
	for n := range s.Params {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		field(n)
		field(s.Params[n])
	}
	for _, d := range s.Deps {
		field(d.Key())
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// Cache is the directory of all stages.
type Cache struct {
	Dir      string
	Progress io.Writer // what is being done, for people
	Live     bool      // Progress is a terminal: show what is still running
}

// DefaultDir is where the cache is unless the user says otherwise.
func DefaultDir() (string, error) {
	if d := os.Getenv("CONTAINERD_PVE_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory (or set CONTAINERD_PVE_CACHE): %w", err)
	}
	return filepath.Join(d, "containerd-pve"), nil
}

// Path is where the finished stage is or will be.
func (c *Cache) Path(s *Stage) string { return filepath.Join(c.Dir, s.Name+"-"+s.Key()) }

// Ready tells whether the stage is there, and notes its use.
func (c *Cache) Ready(s *Stage) bool {
	now := time.Now()
	return os.Chtimes(c.Path(s), now, now) == nil
}

// unused is how long an old stage (of another branch, say) is kept after its last use.
const unused = 14 * 24 * time.Hour

// Build makes the stages that target needs and that are not there yet, side by side where
// they do not depend on each other. A second builder waits for the first.
func (c *Cache) Build(ctx context.Context, target *Stage) error {
	if c.Ready(target) {
		return nil
	}
	for _, d := range []string{c.Dir, filepath.Join(c.Dir, "log")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	old, err := filepath.Glob(filepath.Join(c.Dir, "tmp-*"))
	if err != nil {
		return err
	}
	for _, d := range old { // of a builder that was killed: we hold the lock, so it is not at work
		// The host's /proc, /sys and parts of /dev may be mounted below it.
		if err := mount.UnmountRecursive(d, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("what a builder that was killed left mounted: %w", err)
		}
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	r := &run{c: c, done: map[*Stage]chan struct{}{}, times: c.readTimes(), running: map[string]time.Time{}}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.fail = cancel
	stopLive := r.live()
	r.start(ctx, target)
	r.wg.Wait()
	stopLive()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return c.prune()
}

func (c *Cache) lock(ctx context.Context) (func(), error) {
	f, err := os.OpenFile(filepath.Join(c.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !told {
			fmt.Fprintln(c.Progress, "testbed: another build is at work; waiting for it")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (c *Cache) prune() error {
	dirs, err := filepath.Glob(filepath.Join(c.Dir, "*-????????????????"))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		info, err := os.Stat(d)
		if err == nil && time.Since(info.ModTime()) > unused {
			err = os.RemoveAll(d)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (c *Cache) timesFile() string { return filepath.Join(c.Dir, "times.json") }

func (c *Cache) readTimes() map[string]float64 {
	t := map[string]float64{}
	b, err := os.ReadFile(c.timesFile())
	if err == nil {
		err = json.Unmarshal(b, &t)
	}
	if err != nil {
		return map[string]float64{} // only a comfort: an unreadable file is as good as none
	}
	return t
}

type run struct {
	c    *Cache
	fail context.CancelCauseFunc
	wg   sync.WaitGroup
	done map[*Stage]chan struct{}

	mu      sync.Mutex
	times   map[string]float64
	running map[string]time.Time
}

func (r *run) start(ctx context.Context, s *Stage) {
	if _, ok := r.done[s]; ok {
		return
	}
	done := make(chan struct{})
	r.done[s] = done
	if r.c.Ready(s) {
		close(done)
		// what it was made of is still used by those that depend on it directly; they ask for it themselves
		return
	}
	var deps []chan struct{}
	for _, d := range s.Deps {
		r.start(ctx, d)
		deps = append(deps, r.done[d])
	}
	r.wg.Go(func() {
		for _, d := range deps {
			select {
			case <-d:
			case <-ctx.Done():
				return
			}
		}
		if err := r.make(ctx, s); err != nil {
			r.fail(err)
			return
		}
		close(done)
	})
}

func (r *run) say(format string, args ...any) {
	if r.c.Live {
		format = "\r\033[K" + format
	}
	fmt.Fprintf(r.c.Progress, format+"\n", args...)
}

func (r *run) make(ctx context.Context, s *Stage) (err error) {
	begin := time.Now()
	r.mu.Lock()
	last := "not timed here yet"
	if t, ok := r.times[s.Name]; ok {
		last = fmt.Sprintf("took %.0f s last time", t)
	}
	r.running[s.Name] = begin
	r.say("testbed: %-13s begins (%s)", s.Name, last)
	r.mu.Unlock()

	logName := filepath.Join(r.c.Dir, "log", s.Name+".log")
	log, err := os.Create(logName)
	if err != nil {
		return err
	}
	defer log.Close()
	tmp, err := os.MkdirTemp(r.c.Dir, "tmp-"+s.Name+"-")
	if err == nil {
		err = os.Chmod(tmp, 0o755)
	}
	if err == nil && s.Script != "" {
		err = r.script(ctx, s, tmp, log)
	}
	if err == nil && s.Go != nil {
		err = s.Go(ctx, tmp)
		if err != nil {
			fmt.Fprintln(log, err)
		}
	}
	if err == nil {
		err = os.Rename(tmp, r.c.Path(s))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.running, s.Name)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("stage %s: %w; the end of %s:\n%s", s.Name, err, logName, tail(logName, 25))
	}
	took := time.Since(begin).Seconds()
	r.say("testbed: %-13s done in %.0f s", s.Name, took)
	r.times[s.Name] = took
	b, err := json.Marshal(r.times)
	if err != nil {
		return err
	}
	return os.WriteFile(r.c.timesFile(), b, 0o644)
}

func (r *run) script(ctx context.Context, s *Stage, out string, log io.Writer) error {
	lib, err := recipes.ReadFile("recipes/lib.sh")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "bash", "-c", string(lib)+s.Script)
	cmd.Env = append(os.Environ(), "OUT="+out)
	for n, v := range s.Params {
		cmd.Env = append(cmd.Env, n+"="+v)
	}
	cmd.Env = append(cmd.Env, s.Env...)
	for _, d := range s.Deps {
		cmd.Env = append(cmd.Env, "DEP_"+strings.ToUpper(d.Name)+"="+r.c.Path(d))
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd.Run()
}

// live shows, on a terminal, what is being made and for how long.
func (r *run) live() (stop func()) {
	if !r.c.Live {
		return func() {}
	}
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-quit:
				fmt.Fprint(r.c.Progress, "\r\033[K")
				return
			case <-time.After(time.Second):
			}
			r.mu.Lock()
			var parts []string
			for n, t := range r.running {
				p := fmt.Sprintf("%s %.0f s", n, time.Since(t).Seconds())
				if last, ok := r.times[n]; ok {
					p += fmt.Sprintf(" of %.0f", last)
				}
				parts = append(parts, p)
			}
			slices.Sort(parts)
			fmt.Fprintf(r.c.Progress, "\r\033[K  %s", strings.Join(parts, " | "))
			r.mu.Unlock()
		}
	}()
	return func() { close(quit); <-ended }
}

func tail(name string, lines int) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimRight(b, "\n"), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}
