package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestParseImage(t *testing.T) {
	if i, err := parseImage("60x20x4096"); err != nil || i != (image{60, 20, 4096}) || i.String() != "60x20x4096" {
		t.Errorf("%v, %v", i, err)
	}
	for _, bad := range []string{"", "1x2", "1x2x3x4", "0x1x1", "ax1x1", "1x1x-1"} {
		if i, err := parseImage(bad); err == nil {
			t.Errorf("%q: %v", bad, i)
		}
	}
}

func TestReport(t *testing.T) {
	r := &report{}
	for i, c := range columns {
		for n := range 3 {
			r.add(10, "Prepare", c, time.Duration(1+i)*time.Duration(1+n)*time.Millisecond)
		}
	}
	r.add(10, "Cleanup", "pve-zfs", 4*time.Millisecond)
	r.Memory = []memory{{Snapshots: 10, KiB: 2048}}
	var out bytes.Buffer
	if err := r.write(&out, "markdown"); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"| snapshots | call | runs | pve-zfs | zfs | overlayfs | zfs / pve-zfs | overlayfs / pve-zfs |",
		"| --: | :-- | --: | --: | --: | --: | --: | --: |",
		"| 10 | Prepare | 3 | 2.0 ms | 4.0 ms | 6.0 ms | 2.00 | 3.00 |",
		"| 10 | Cleanup | 1 | 4.0 ms | - | - | - | - |",
		"", "Our daemon with 10 snapshots: 2.0 MiB in RAM.",
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		got = append(got, strings.Join(strings.Fields(strings.ReplaceAll(line, "|", " | ")), " "))
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s", out.String())
	}
}
