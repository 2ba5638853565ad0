package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// setup is one of the things compared.
type setup struct {
	Name        string `json:"name"`
	Runtime     string `json:"runtime"`
	Snapshotter string `json:"snapshotter"`
}

// The second is what the ratios are against: what people use otherwise.
var setups = []setup{
	{"pve.v2 + pve-zfs", "io.containerd.pve.v2", "pve-zfs"},
	{"runc + overlayfs", "io.containerd.runc.v2", "overlayfs"},
	{"runc + zfs", "io.containerd.runc.v2", "zfs"},
	{"pve.v2 + overlayfs", "io.containerd.pve.v2", "overlayfs"},
}

const base = 1

// result are the times of one setup, in seconds.
type result struct {
	setup
	Seconds []float64 `json:"seconds"`
	Median  float64   `json:"median"`
	Min     float64   `json:"min"`
	Max     float64   `json:"max"`
	// Ratio is this median over that of runc with overlayfs.
	Ratio float64 `json:"ratio"`
}

type runOptions struct {
	runs      int
	image     string
	plainHTTP bool
	format    string
}

func runCommand() *cobra.Command {
	var o runOptions
	c := &cobra.Command{
		Use:   "run [command in the image...]",
		Short: "time `ctr run --rm` of four setups, in turns",
		RunE: func(c *cobra.Command, args []string) error {
			if o.runs < 1 {
				return fmt.Errorf("-n %d: at least one run", o.runs)
			}
			if err := checkFormat(o.format); err != nil {
				return err
			}
			if len(args) == 0 {
				args = []string{"true"}
			}
			results, err := measureRuns(c.Context(), o, args, progress(c.ErrOrStderr()))
			if err != nil {
				return err
			}
			return reportRuns(c.OutOrStdout(), o.format, results)
		},
	}
	c.Flags().IntVarP(&o.runs, "runs", "n", 20, "runs of each setup")
	c.Flags().StringVar(&o.image, "image", "docker.io/library/debian:13", "image `reference`, pulled for each snapshotter")
	c.Flags().BoolVar(&o.plainHTTP, "plain-http", false, "the registry speaks HTTP")
	formatFlag(c, &o.format)
	return c
}

// measureRuns pulls, warms up once, and runs the setups in turns.
func measureRuns(ctx context.Context, o runOptions, args []string, say func(string, ...any)) ([]result, error) {
	pulled := map[string]bool{}
	for _, s := range setups {
		if pulled[s.Snapshotter] {
			continue
		}
		pulled[s.Snapshotter] = true
		pull := []string{"images", "pull", "--snapshotter", s.Snapshotter}
		if o.plainHTTP {
			pull = append(pull, "--plain-http")
		}
		if _, err := ctr(ctx, append(pull, "--local", o.image)...); err != nil {
			return nil, err
		}
	}
	results := make([]result, len(setups))
	for round := 0; round <= o.runs; round++ {
		for i, s := range setups {
			say("round %d of %d: %s", round, o.runs, s.Name)
			id := fmt.Sprintf("bench-%d-%d-%d", os.Getpid(), round, i)
			took, err := ctr(ctx, append([]string{"run", "--rm", "--runtime", s.Runtime, "--snapshotter", s.Snapshotter, o.image, id}, args...)...)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.Name, err)
			}
			results[i].setup = s
			if round > 0 { // the first fills caches
				results[i].Seconds = append(results[i].Seconds, took.Seconds())
			}
		}
	}
	say("")
	summarize(results)
	return results, nil
}

func ctr(ctx context.Context, args ...string) (time.Duration, error) {
	begin := time.Now()
	out, err := exec.CommandContext(ctx, "ctr", args...).CombinedOutput()
	took := time.Since(begin)
	if err != nil {
		return 0, errors.Join(fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out), ctx.Err())
	}
	return took, nil
}

func summarize(results []result) {
	for i := range results {
		seconds := results[i].Seconds
		results[i].Min, results[i].Max, results[i].Median = slices.Min(seconds), slices.Max(seconds), median(seconds)
	}
	for i := range results {
		results[i].Ratio = results[i].Median / results[base].Median
	}
}

func reportRuns(w io.Writer, format string, results []result) error {
	if format == "json" {
		return writeJSON(w, results)
	}
	return writeTable(w, func(t io.Writer) {
		fmt.Fprintf(t, "\tctr run --rm\truns\tmedian\tmin\tmax\tto %s\t\n", setups[base].Name)
		fmt.Fprintf(t, "\t:--\t--:\t--:\t--:\t--:\t--:\t\n")
		for _, r := range results {
			fmt.Fprintf(t, "\t%s\t%d\t%.0f ms\t%.0f ms\t%.0f ms\t%.2f\t\n", r.Name, len(r.Seconds), 1000*r.Median, 1000*r.Min, 1000*r.Max, r.Ratio)
		}
	})
}
