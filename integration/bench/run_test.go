package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestRunReport(t *testing.T) {
	results := []result{
		{setup: setups[0], Seconds: []float64{0.3, 0.1, 0.2}},
		{setup: setups[1], Seconds: []float64{0.4, 0.1, 0.3, 0.8}},
	}
	summarize(results)
	if results[0].Median != 0.2 || results[1].Median != 0.35 || results[1].Min != 0.1 || results[1].Max != 0.8 || results[1].Ratio != 1 {
		t.Errorf("%+v", results)
	}
	var out bytes.Buffer
	if err := reportRuns(&out, "markdown", results); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 4 || !strings.Contains(lines[2], "200 ms") || !strings.Contains(lines[2], "0.57") || !strings.HasPrefix(lines[1], "|:--") {
		t.Errorf("table:\n%s", out.String())
	}
	out.Reset()
	if err := reportRuns(&out, "json", results); err != nil || !strings.Contains(out.String(), `"median": 0.35`) {
		t.Errorf("%v\n%s", err, out.String())
	}
}

func TestBadFlags(t *testing.T) {
	for _, args := range [][]string{{"-n", "0"}, {"--format", "xml"}} {
		c := runCommand()
		c.SetArgs(args)
		if err := c.Execute(); err == nil || !strings.Contains(err.Error(), args[1]) {
			t.Errorf("%v: %v", args, err)
		}
	}
}
