package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd-pve/containerd-pve/integration/testbed/agent"
	"github.com/containerd-pve/containerd-pve/integration/testbed/machine"
)

// stressReset resets a guest in the middle of pulls. What happens in the guest
// is in integration/stress/reset; what is compared in integration/stress/agree.
func (b *bed) stressReset(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("stress-reset", flag.ContinueOnError)
	n := flags.Int("n", 3, "resets")
	seed := flags.Uint64("seed", rand.Uint64(), "chooses the moments")
	if err := flags.Parse(args); err != nil {
		return exitError(2)
	}
	if flags.NArg() > 0 || *n < 1 {
		fmt.Fprint(os.Stderr, usage)
		return exitError(2)
	}
	if err := b.setup(ctx); err != nil {
		return err
	}
	saved, err := b.saved(ctx, "")
	if err != nil {
		return err
	}
	programs, err := b.programs(ctx)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bed-reset-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	agree := filepath.Join(dir, "agree")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", agree, "./integration/stress/agree")
	cmd.Dir, cmd.Env = b.repo, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./integration/stress/agree: %w\n%s", err, out)
	}
	m, err := machine.Restore(ctx, b.cache, b.parts, b.cache.Path(saved), b.accel, filepath.Join(dir, "run"), false)
	if err != nil {
		return err
	}
	defer func() { _ = m.Kill() }() // its directory goes with it
	put := toGuest(append(programs, agree))
	put["/usr/local/sbin/bed-reset"] = filepath.Join(b.repo, "integration/stress/reset")
	if err := m.Client.Put(ctx, put); err != nil {
		return err
	}
	step := func(ctx context.Context, name string, out io.Writer, args ...string) error {
		code, err := m.Client.Run(ctx, agent.Command{Argv: append([]string{"bed-reset", name}, args...), Dir: "/", Stdout: out, Stderr: out})
		if err == nil && code != 0 {
			err = fmt.Errorf("status %d", code)
		}
		if err != nil {
			err = fmt.Errorf("reset %s: %w", name, err)
		}
		return err
	}
	fmt.Printf("reset: %d resets, seed=%d\n", *n, *seed)
	if err := step(ctx, "prepare", os.Stdout); err != nil {
		return err
	}
	begin := time.Now()
	if err := step(ctx, "pull", os.Stdout); err != nil {
		return err
	}
	long := time.Since(begin)
	if err := step(ctx, "first", os.Stdout); err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(*seed, 0))
	for i := range *n {
		// Each in a part of its own of the time that the first pull took; the others are quicker.
		part := 0.9 * (float64(i) + rng.Float64()) / float64(*n)
		fmt.Printf("reset: number %d, after %.0f %% of a pull's time\n", i+1, 100*part)
		pulling, answered := make(chan error, 1), []string(nil)
		interrupted, cancel := context.WithCancel(ctx)
		go func() { pulling <- step(interrupted, "pull", io.Discard) }()
		select {
		case err := <-pulling:
			if err != nil {
				cancel()
				return fmt.Errorf("before the reset: %w", err)
			}
			fmt.Println("reset: the pull was done before")
			answered = []string{"answered"}
			pulling <- nil
		case <-time.After(time.Duration(part * float64(long))):
		}
		err := m.Reset(ctx)
		cancel() // nobody tells the connection of the pull that its other side is gone
		if err != nil {
			return err
		}
		<-pulling //nolint:errcheck // it was interrupted
		if err := step(ctx, "after", os.Stdout, answered...); err != nil {
			return errors.Join(err, step(ctx, "logs", os.Stdout))
		}
	}
	fmt.Println("reset: passed")
	return nil
}
