// Command bed builds the test bed, runs commands and tests in its guest, and ends it.
// It touches nothing outside its cache, ./bin and ./.bed of the checkout.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/term"

	"github.com/containerd-pve/containerd-pve/integration/testbed/build"
	"github.com/containerd-pve/containerd-pve/integration/testbed/machine"
)

const usage = `usage: bed COMMAND    (in the checkout's root)
  setup                  build the test bed's cache
  run [-f FILE]... CMD   run CMD with bash in the guest, the daemons up; FILEs go to /work first
  shell                  a shell in that guest
  down                   end that guest
  test [PACKAGE...]      run the packages' bed tests, each in a guest of its own (TESTBED=host: on this host)
  conformance [-core] [-run PATTERN] [-update]   run containerd's client suite (all of it, the core, what matches) in a
                         guest of its own; -update writes docs/conformance.md
Environment: CONTAINERD_PVE_CACHE (where the cache is), BED_ACCEL (kvm or tcg, instead of trying), BED_VM (name of
another guest for run, shell and down), BED_TIMEOUT (limit for run and for each package of test, as 15m),
BED_STACK=no (run: do not start the daemons), BED_PARTIAL=1 (go on without commands that do not compile),
BED_MIRROR (another archive of Debian packages)
`

// exitError carries a status that is not ours to explain.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := command(ctx, os.Args[1:])
	var status exitError
	switch {
	case errors.As(err, &status):
		os.Exit(int(status))
	case ctx.Err() != nil:
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bed:", err)
		os.Exit(125)
	}
}

func command(ctx context.Context, args []string) error {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return exitError(2)
	}
	repo, err := os.Getwd()
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(repo, "integration/testbed")); err != nil {
		return fmt.Errorf("not in the root of the checkout: %w", err)
	}
	dir, err := build.DefaultDir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "log"), 0o755); err != nil {
		return err
	}
	b := &bed{repo: repo, cache: &build.Cache{Dir: dir, Progress: os.Stderr, Live: term.IsTerminal(int(os.Stderr.Fd()))}}
	switch args[0] {
	case "setup":
		if err := b.setup(ctx); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "testbed: ready in %s\n", dir)
		return nil
	case "run":
		return b.run(ctx, args[1:])
	case "shell":
		return b.shell(ctx)
	case "down":
		return b.down()
	case "test":
		return b.test(ctx, args[1:])
	case "conformance":
		return b.conformance(ctx, args[1:])
	}
	fmt.Fprint(os.Stderr, usage)
	return exitError(2)
}

type bed struct {
	repo  string
	cache *build.Cache
	parts *build.Bed
	saved *build.Stage
	accel string
}

// setup makes sure that everything a guest is started from is in the cache.
func (b *bed) setup(ctx context.Context) error {
	parts, err := build.NewBed(b.cache, b.repo, os.Getenv("BED_MIRROR"))
	if err != nil {
		return err
	}
	b.parts = parts
	if !b.cache.Ready(parts.Disk) {
		say := func(s string) { fmt.Fprintln(b.cache.Progress, "testbed:", s) }
		if err := build.HostPackages(ctx, say); err != nil {
			return err
		}
	}
	// The disk may be there and the tools gone that QEMU comes from
	for _, s := range []*build.Stage{parts.Disk, parts.Tools} {
		if err := b.cache.Build(ctx, s); err != nil {
			return err
		}
	}
	if b.accel, err = machine.Accel(ctx, b.cache, parts); err != nil {
		return err
	}
	if b.saved, err = machine.Saved(b.cache, parts, b.accel); err != nil {
		return err
	}
	return b.cache.Build(ctx, b.saved)
}

// quiet sends what is not the command's own output to a log file, unless a person looks on.
func (b *bed) quiet() (io.Closer, error) {
	if b.cache.Live {
		return io.NopCloser(nil), nil
	}
	f, err := os.Create(filepath.Join(b.cache.Dir, "log", "run.log"))
	if err != nil {
		return nil, err
	}
	b.cache.Progress = f
	return f, nil
}
