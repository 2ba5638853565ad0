package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/containerd-pve/containerd-pve/integration/conformance"
	"github.com/containerd-pve/containerd-pve/integration/testbed/agent"
	"github.com/containerd-pve/containerd-pve/integration/testbed/build"
	"github.com/containerd-pve/containerd-pve/integration/testbed/machine"
)

// perSuite is the time limit for the suite: it sleeps much, and the guest is slow.
const perSuite = time.Hour

// maxAgain is how many failed tests are tried a second time: more have one cause, and it is not time.
const maxAgain = 5

// conformance runs containerd's client suite and holds its results against the list.
func (b *bed) conformance(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("conformance", flag.ContinueOnError)
	core := flags.Bool("core", false, "run the core only")
	pattern := flags.String("run", "", "run the tests that match")
	update := flags.Bool("update", false, "write docs/conformance.md")
	way := flags.String("zfs", "auto", "the snapshotter's way to ZFS, as in its configuration")
	if err := flags.Parse(args); err != nil {
		return exitError(2)
	}
	switch {
	case flags.NArg() > 0 || *core && *pattern != "" || *update && (*core || *pattern != ""):
		fmt.Fprint(os.Stderr, usage)
		return exitError(2)
	case os.Getenv("TESTBED") == "host":
		return errors.New("the suite changes /etc/hosts and takes port 443: it runs in the guest only")
	}
	list, err := conformance.ParseList(conformance.List)
	if err != nil {
		return fmt.Errorf("integration/conformance/expected.txt: %w", err)
	}
	run, wanted := "^Test", []string(nil)
	switch {
	case *core:
		wanted = conformance.Names(conformance.Core)
		run = "^(" + strings.Join(wanted, "|") + ")$"
	case *pattern != "":
		run, wanted = *pattern, []string{}
	}
	if _, err := regexp.Compile(run); err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	if err := b.setup(ctx); err != nil {
		return err
	}
	if err := b.cache.Build(ctx, b.parts.Suite); err != nil {
		return err
	}
	programs, err := b.programs(ctx)
	if err != nil {
		return err
	}
	about, err := b.about(ctx)
	if err != nil {
		return err
	}
	results, kernel, err := b.suite(ctx, programs, *way, run, "conformance")
	if err != nil {
		return err
	}
	about.Kernel, about.ZFS = kernel, *way
	// Some of the suite's tests give daemons and restarts a second or two, which a loaded machine's emulated guest may
	// not keep. The second try is in a guest of its own, and the report names it.
	if again := conformance.Failed(list, results); len(again) > 0 && len(again) <= maxAgain {
		fmt.Println("conformance: once more:", strings.Join(again, " "))
		second, _, err := b.suite(ctx, programs, *way, "^("+strings.Join(again, "|")+")$", "conformance-again")
		if err != nil {
			return err
		}
		results = conformance.Merge(results, second)
	}
	wrong := conformance.Judge(list, results, wanted)
	for _, w := range wrong {
		fmt.Println("conformance:", w)
	}
	if *update {
		name := filepath.Join(b.repo, "docs", "conformance.md")
		if err := os.WriteFile(name, []byte(conformance.Report(about, list, results)), 0o644); err != nil {
			return err
		}
	}
	fmt.Println("conformance:", conformance.Count(list, results))
	if len(wrong) > 0 {
		fmt.Printf("conformance: %d not as integration/conformance/expected.txt says; all output is in .bed/conformance\n", len(wrong))
		return exitError(1)
	}
	fmt.Println("conformance: all as integration/conformance/expected.txt says")
	return nil
}

// about says which state of the project is run, before that changes.
func (b *bed) about(ctx context.Context) (conformance.Run, error) {
	git := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = b.repo
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("git %s: %w", strings.Join(args, " "), err)
		}
		return strings.TrimSpace(string(out)), nil
	}
	r := conformance.Run{Date: time.Now().UTC().Format(time.DateOnly), Containerd: build.ContainerdVersion, Go: runtime.Version()}
	var err error
	if r.Commit, err = git("rev-parse", "--short=12", "HEAD"); err != nil {
		return r, err
	}
	changed, err := git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
	if changed != "" {
		r.Commit += ", with changes that are not committed"
	}
	return r, err
}

// suite runs the tests in a fresh guest and prints each result as it comes.
func (b *bed) suite(ctx context.Context, programs []string, way, pattern, name string) ([]conformance.Result, string, error) {
	dir, err := os.MkdirTemp("", "bed-suite-")
	if err != nil {
		return nil, "", err
	}
	defer os.RemoveAll(dir)
	saved, err := b.saved(ctx, "")
	if err != nil {
		return nil, "", err
	}
	m, err := machine.Restore(ctx, b.cache, b.parts, b.cache.Path(saved), b.accel, dir, false)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = m.Kill() }() // the directory goes with it
	limited, cancel, err := limit(ctx, perSuite)
	if err != nil {
		return nil, "", err
	}
	defer cancel()
	const work = "/work/conformance"
	put := toGuest(programs)
	for name, from := range map[string]string{
		"run": filepath.Join(b.repo, "integration/conformance/guest/run"),
		"bin": filepath.Join(b.repo, "integration/conformance/guest/bin"),
		// the test program and the files it reads
		"client.test": filepath.Join(b.cache.Path(b.parts.Suite), "client.test"),
		"testdata":    filepath.Join(b.cache.Path(b.parts.Suite), "testdata"),
	} {
		put[work+"/"+name] = from
	}
	if err := m.Client.Put(limited, put); err != nil {
		return nil, "", err
	}
	var kernel bytes.Buffer
	if _, err := m.Client.Run(limited, agent.Command{Argv: []string{"uname", "-sr"}, Dir: "/", Stdout: &kernel}); err != nil {
		return nil, "", err
	}
	out := filepath.Join(b.repo, ".bed", name)
	if err := errors.Join(os.RemoveAll(out), os.MkdirAll(out, 0o755)); err != nil {
		return nil, "", err
	}
	log, err := os.Create(filepath.Join(out, "output.log"))
	if err != nil {
		return nil, "", err
	}
	defer log.Close()
	convert := exec.CommandContext(limited, "go", "tool", "test2json", "-t")
	in, err := convert.StdinPipe()
	if err != nil {
		return nil, "", err
	}
	events, err := convert.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	convert.Stderr = os.Stderr
	if err := convert.Start(); err != nil {
		return nil, "", err
	}
	ended := make(chan error, 1)
	go func() {
		to := io.MultiWriter(log, in)
		// The status says no more than the results do, and those are judged.
		_, err := m.Client.Run(limited, agent.Command{Dir: work, Stdout: to, Stderr: to, Env: []string{"TESTBED_POOL=tank", "CONFORMANCE_ZFS=" + way},
			Argv: []string{"./run", "-test.v=test2json", "-test.run=" + pattern, "-test.timeout=" + (perSuite - perSuite/20).String()}})
		ended <- errors.Join(err, in.Close())
	}()
	results, err := conformance.Read(events, func(r conformance.Result) {
		if r.Top() {
			fmt.Printf("%-5s%s (%.1f s)\n", strings.ToUpper(string(r.Outcome)), r.Name, r.Elapsed.Seconds())
		}
		if r.Outcome == conformance.Fail {
			for line := range strings.Lines(r.Output) {
				if !strings.Contains(line, " log_hook.go:") { // the client's own log
					fmt.Print("     ", line)
				}
			}
		}
	})
	if err = errors.Join(err, <-ended, convert.Wait()); err != nil {
		if ctx.Err() == nil {
			err = fmt.Errorf("%w\nthe guest is ended; its console:\n%s", err, m.Console())
		}
		return nil, "", err
	}
	collecting, cancelCollecting := context.WithTimeout(ctx, time.Minute)
	defer cancelCollecting()
	return results, strings.TrimSpace(kernel.String()), m.Client.Get(collecting, out, "var/log/stack", "var/crash")
}
