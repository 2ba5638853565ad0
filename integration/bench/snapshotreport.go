package main

import (
	"fmt"
	"io"
	"strings"
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
	m.Median = median(m.Seconds)
}

// columns are the snapshotters, ours first.
var columns = []string{"pve-zfs", "zfs", "overlayfs"}

func (r *report) write(w io.Writer, format string) error {
	if format == "json" {
		return writeJSON(w, r)
	}
	err := writeTable(w, func(t io.Writer) {
		fmt.Fprintf(t, "\tsnapshots\tcall\truns\t%s\tzfs / pve-zfs\toverlayfs / pve-zfs\t\n", strings.Join(columns, "\t"))
		fmt.Fprintf(t, "\t--:\t:--\t--:\t--:\t--:\t--:\t--:\t--:\t\n")
		done := map[string]bool{}
		for _, m := range r.Measurements {
			row := fmt.Sprint(m.Snapshots, m.Call)
			if done[row] {
				continue
			}
			done[row] = true
			r.row(t, m)
		}
	})
	if err != nil {
		return err
	}
	for _, m := range r.Memory {
		if _, err := fmt.Fprintf(w, "\nOur daemon with %d snapshots: %.1f MiB in RAM.\n", m.Snapshots, float64(m.KiB)/1024); err != nil {
			return err
		}
	}
	return nil
}

// row is one call, with what each snapshotter took for it.
func (r *report) row(t io.Writer, m *measurement) {
	fmt.Fprintf(t, "\t%d\t%s\t%d", m.Snapshots, m.Call, len(m.Seconds))
	var medians [3]float64
	for i, c := range columns {
		if of := r.find(m.Snapshots, m.Call, c); of != nil {
			medians[i] = of.Median
			fmt.Fprintf(t, "\t%.1f ms", 1000*medians[i])
		} else {
			fmt.Fprint(t, "\t-")
		}
	}
	for i, other := range medians[1:] {
		if medians[0] > 0 && r.find(m.Snapshots, m.Call, columns[i+1]) != nil {
			fmt.Fprintf(t, "\t%.2f", other/medians[0])
		} else {
			fmt.Fprint(t, "\t-")
		}
	}
	fmt.Fprint(t, "\t\n")
}
