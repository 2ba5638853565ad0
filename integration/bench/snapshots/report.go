package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// measurement are the times of one call of one snapshotter with so many
// snapshots there, in seconds.
type measurement struct {
	Snapshots   int       `json:"snapshots"`
	Call        string    `json:"call"`
	Snapshotter string    `json:"snapshotter"`
	Seconds     []float64 `json:"seconds"`
	Median      float64   `json:"median"`
}

// memory is what our daemon had in RAM.
type memory struct {
	Snapshots int `json:"snapshots"`
	KiB       int `json:"kib"`
}

type report struct {
	Measurements []*measurement `json:"measurements"`
	Memory       []memory       `json:"memory"`
}

func (r *report) find(snapshots int, call, snapshotter string) *measurement {
	for _, m := range r.Measurements {
		if m.Snapshots == snapshots && m.Call == call && m.Snapshotter == snapshotter {
			return m
		}
	}
	return nil
}

func (r *report) add(snapshots int, call, snapshotter string, took time.Duration) {
	m := r.find(snapshots, call, snapshotter)
	if m == nil {
		m = &measurement{Snapshots: snapshots, Call: call, Snapshotter: snapshotter}
		r.Measurements = append(r.Measurements, m)
	}
	m.Seconds = append(m.Seconds, took.Seconds())
	sorted := slices.Sorted(slices.Values(m.Seconds))
	n := len(sorted)
	m.Median = (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// columns are the snapshotters, ours first.
var columns = []string{"pve-zfs", "zfs", "overlayfs"}

func (r *report) write(w io.Writer, format string) error {
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	var table bytes.Buffer
	t := tabwriter.NewWriter(&table, 0, 0, 1, ' ', tabwriter.Debug)
	fmt.Fprintf(t, "\tsnapshots\tcall\truns\t%s\tzfs / pve-zfs\toverlayfs / pve-zfs\t\n", strings.Join(columns, "\t"))
	fmt.Fprintf(t, "\t--:\t:--\t--:\t--:\t--:\t--:\t--:\t--:\t\n")
	done := map[string]bool{}
	for _, m := range r.Measurements {
		row := fmt.Sprint(m.Snapshots, m.Call)
		if done[row] {
			continue
		}
		done[row] = true
		fmt.Fprintf(t, "\t%d\t%s\t%d", m.Snapshots, m.Call, len(m.Seconds))
		var medians [3]float64
		for i, c := range columns {
			if of := r.find(m.Snapshots, m.Call, c); of != nil {
				medians[i] = of.Median
			}
			fmt.Fprintf(t, "\t%.1f ms", 1000*medians[i])
		}
		for _, other := range medians[1:] {
			if medians[0] > 0 {
				fmt.Fprintf(t, "\t%.2f", other/medians[0])
			} else {
				fmt.Fprint(t, "\t-")
			}
		}
		fmt.Fprint(t, "\t\n")
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
	for _, m := range r.Memory {
		if _, err := fmt.Fprintf(w, "\nOur daemon with %d snapshots: %.1f MiB in RAM.\n", m.Snapshots, float64(m.KiB)/1024); err != nil {
			return err
		}
	}
	return nil
}
