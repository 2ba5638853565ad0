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
  stress-reset [-n 3] [-seed N]   reset a guest n times while it pulls an image, and look at what it has afterwards
  stress-program         build containerd-stress, if it is not in the cache, and print its path
  test [-nerdctl] [-kubernetes] [PACKAGE...]   run the packages' bed tests, each in a guest of its own (TESTBED=host: on this host);
                         -nerdctl puts nerdctl and CNI's plugins there, -kubernetes Kubernetes' programs and etcd
  conformance [-core] [-run PATTERN] [-zfs WAY] [-update]   run containerd's client suite (all of it, the core, what matches) in a
                         guest of its own; WAY: auto, native, go-zfs; -update writes docs/conformance.md
Environment: CONTAINERD_PVE_CACHE (where the cache is), BED_ACCEL (kvm or tcg, instead of trying), BED_VM (name of
another guest for run, shell and down), BED_INIT (systemd: for run, shell and down the guest that boots it), BED_TIMEOUT (limit for run and for each package of test, as 15m),
BED_STACK=no (run: do not start the daemons), BED_PARTIAL=1 (go on without commands that do not compile),
BED_MIRROR (another archive of Debian packages), BED_ZFS (the suite of Debian whose ZFS module the guest has, as trixie-backports)
`

// exitError carries a status that is not ours to explain.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func main() { os.Exit(run()) }

// run gives the exit status, after its deferred calls.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := command(ctx, os.Args[1:])
	var status exitError
	switch {
	case errors.As(err, &status):
		return int(status)
	case ctx.Err() != nil:
		return 130
	case err != nil:
		fmt.Fprintln(os.Stderr, "bed:", err)
		return 125
	}
	return 0
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
		for _, init := range []string{"", machine.Systemd} {
			if _, err := b.saved(ctx, init); err != nil {
				return err
			}
		}
		fmt.Fprintf(os.Stderr, "testbed: ready in %s\n", dir)
		return nil
	case "run":
		return b.run(ctx, args[1:])
	case "shell":
		return b.shell(ctx)
	case "down":
		return b.down()
	case "stress-reset":
		return b.stressReset(ctx, args[1:])
	case "stress-program":
		return b.stressProgram(ctx)
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
	accel string
}

// setup makes sure that everything a guest is started from is in the cache.
func (b *bed) setup(ctx context.Context) error {
	parts, err := build.NewBed(b.cache, b.repo, build.FromEnv())
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
	return nil
}

// saved is the guest with the init, booted and prepared.
func (b *bed) saved(ctx context.Context, init string) (*build.Stage, error) {
	s, err := machine.Saved(b.cache, b.parts, b.accel, init)
	if err != nil {
		return nil, err
	}
	return s, b.cache.Build(ctx, s)
}

// bedInit is the init that BED_INIT names.
func bedInit() (string, error) {
	init := os.Getenv("BED_INIT")
	if init != "" && init != machine.Systemd {
		return "", fmt.Errorf("BED_INIT=%s: there is %s, and busybox without it", init, machine.Systemd)
	}
	return init, nil
}

// stressProgram is apart from setup: only `make stress` needs it.
func (b *bed) stressProgram(ctx context.Context) error {
	parts, err := build.NewBed(b.cache, b.repo, build.FromEnv())
	if err != nil {
		return err
	}
	if err := b.cache.Build(ctx, parts.Stress); err != nil {
		return err
	}
	fmt.Println(filepath.Join(b.cache.Path(parts.Stress), "containerd-stress"))
	return nil
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
