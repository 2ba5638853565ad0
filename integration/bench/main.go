// Command bench times `ctr run --rm` with our runtime and snapshotter against
// runc with overlayfs and runc with containerd's own zfs snapshotter, in turns
// in one run, so that all three meet the same machine in the same state. It
// needs a containerd that has them; it owns the containers it makes.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
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

type options struct {
	runs      int
	image     string
	plainHTTP bool
	format    string
}

func main() { os.Exit(run()) }

// run gives the exit status, after its deferred calls.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func command() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:           "bench [command in the image...]",
		Short:         "time `ctr run --rm` of four setups, in turns",
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, args []string) error {
			if o.runs < 1 {
				return fmt.Errorf("-n %d: at least one run", o.runs)
			}
			if o.format != "markdown" && o.format != "json" {
				return fmt.Errorf("--format %q is neither markdown nor json", o.format)
			}
			if len(args) == 0 {
				args = []string{"true"}
			}
			results, err := measure(c.Context(), o, args, c.ErrOrStderr())
			if err != nil {
				return err
			}
			return report(c.OutOrStdout(), o.format, results)
		},
	}
	c.Flags().IntVarP(&o.runs, "runs", "n", 20, "runs of each setup")
	c.Flags().StringVar(&o.image, "image", "docker.io/library/debian:13", "image `reference`, pulled for each snapshotter")
	c.Flags().BoolVar(&o.plainHTTP, "plain-http", false, "the registry speaks HTTP")
	c.Flags().StringVar(&o.format, "format", "markdown", "markdown or json")
	return c
}

// measure pulls, warms up once, and runs the setups in turns.
func measure(ctx context.Context, o options, args []string, progress io.Writer) ([]result, error) {
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
	terminal := isTerminal(progress)
	results := make([]result, len(setups))
	for round := 0; round <= o.runs; round++ {
		for i, s := range setups {
			if terminal {
				fmt.Fprintf(progress, "\r\033[Kround %d of %d: %s", round, o.runs, s.Name)
			}
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
	if terminal {
		fmt.Fprint(progress, "\r\033[K")
	}
	summarize(results)
	return results, nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
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
		sorted := slices.Sorted(slices.Values(results[i].Seconds))
		n := len(sorted)
		results[i].Min, results[i].Max = sorted[0], sorted[n-1]
		results[i].Median = (sorted[(n-1)/2] + sorted[n/2]) / 2
	}
	for i := range results {
		results[i].Ratio = results[i].Median / results[base].Median
	}
}

func report(w io.Writer, format string, results []result) error {
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(results)
	}
	var table bytes.Buffer
	t := tabwriter.NewWriter(&table, 0, 0, 1, ' ', tabwriter.Debug)
	fmt.Fprintf(t, "\tctr run --rm\truns\tmedian\tmin\tmax\tto %s\t\n", setups[base].Name)
	fmt.Fprintf(t, "\t:--\t--:\t--:\t--:\t--:\t--:\t\n")
	for _, r := range results {
		fmt.Fprintf(t, "\t%s\t%d\t%.0f ms\t%.0f ms\t%.0f ms\t%.2f\t\n", r.Name, len(r.Seconds), 1000*r.Median, 1000*r.Min, 1000*r.Max, r.Ratio)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(table.String()) {
		// The empty first cell gives the line its first bar, and a blank before it.
		if _, err := io.WriteString(w, strings.TrimPrefix(line, " ")); err != nil {
			return err
		}
	}
	return nil
}
