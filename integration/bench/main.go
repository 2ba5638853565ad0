// Command bench compares us with what people use otherwise, in turns in one run,
// so that all meet the same machine in the same state: `bench run` our runtime
// and snapshotter with runc, by `ctr run --rm`; `bench snapshots` our snapshotter
// with containerd's own. It owns the containers and datasets that it makes.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func main() { os.Exit(run()) }

// run gives the exit status, after its deferred calls.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c := &cobra.Command{Use: "bench", Short: "compare us with what people use otherwise", SilenceUsage: true, SilenceErrors: true}
	c.AddCommand(runCommand(), snapshotsCommand())
	if err := c.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func formatFlag(c *cobra.Command, format *string) {
	c.Flags().StringVar(format, "format", "markdown", "markdown or json")
}

func checkFormat(format string) error {
	if format != "markdown" && format != "json" {
		return fmt.Errorf("--format %q is neither markdown nor json", format)
	}
	return nil
}

// progress says what is done, on a terminal only.
func progress(w io.Writer) func(format string, args ...any) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func(string, ...any) {}
	}
	return func(format string, args ...any) { fmt.Fprintf(w, "\r\033[K"+format, args...) }
}

func median(seconds []float64) float64 {
	sorted := slices.Sorted(slices.Values(seconds))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// writeTable writes Markdown. rows begins each line with a tab and ends it with one.
func writeTable(w io.Writer, rows func(io.Writer)) error {
	var table bytes.Buffer
	t := tabwriter.NewWriter(&table, 0, 0, 1, ' ', tabwriter.Debug)
	rows(t)
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
