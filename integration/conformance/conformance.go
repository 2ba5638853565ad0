// Package conformance judges a run of containerd's client suite against what is expected of it: all tests pass but
// those in the list, and each of those does what the list says. It reads and writes text; it runs nothing.
package conformance

import (
	"bufio"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// List is the file of expectations, Core the names of the tests that `make test` runs.
var (
	//go:embed expected.txt
	List string
	//go:embed core.txt
	Core string
)

// Kind is what a test in the list does instead of passing for our runtime.
type Kind string

const (
	// Skips means that the suite itself skips it.
	Skips Kind = "skips"
	// Fails means that it cannot pass here, by a fact about the test.
	Fails Kind = "fails"
	// Elsewhere means that it passes, and what it passes on is not ours.
	Elsewhere Kind = "elsewhere"
)

// Expectation is one line of the list.
type Expectation struct {
	Name   string
	Kind   Kind
	Reason string
}

// ParseList reads lines of kind, test's name and reason. Empty lines and lines that begin with # say nothing.
func ParseList(text string) ([]Expectation, error) {
	var all []Expectation
	seen := map[string]bool{}
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		kind, rest, _ := strings.Cut(line, " ")
		name, reason, _ := strings.Cut(strings.TrimSpace(rest), " ")
		e := Expectation{name, Kind(kind), strings.TrimSpace(reason)}
		switch {
		case e.Kind != Skips && e.Kind != Fails && e.Kind != Elsewhere:
			return nil, fmt.Errorf("line %d: %q is not one of skips, fails, elsewhere", i+1, kind)
		case e.Name == "" || e.Reason == "":
			return nil, fmt.Errorf("line %d: a kind, a test and a reason are needed", i+1)
		case seen[e.Name]:
			return nil, fmt.Errorf("line %d: %s is here already", i+1, e.Name)
		}
		seen[e.Name] = true
		all = append(all, e)
	}
	return all, nil
}

// Names are the lines of text that are not empty and no comments.
func Names(text string) []string {
	var all []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			all = append(all, line)
		}
	}
	return all
}

// Outcome is how a test ended.
type Outcome string

// The outcomes.
const (
	Pass    Outcome = "pass"
	Fail    Outcome = "fail"
	Skip    Outcome = "skip"
	Unended Outcome = "unended" // the program ended first
)

// Result is one test or subtest.
type Result struct {
	Name    string
	Outcome Outcome
	Elapsed time.Duration
	Output  string
	Second  bool // of the second try
}

// Top says whether the test is no subtest.
func (r Result) Top() bool { return !strings.Contains(r.Name, "/") }

// Read takes the events of `go tool test2json`, calls ended for each test that ends, and returns all tests in the
// order of their start.
func Read(events io.Reader, ended func(Result)) ([]Result, error) {
	var order []string
	tests := map[string]*Result{}
	output := map[string]*strings.Builder{}
	for d := json.NewDecoder(bufio.NewReader(events)); ; {
		var e struct {
			Action, Test, Output string
			Elapsed              float64
		}
		err := d.Decode(&e)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("test events: %w", err)
		}
		if e.Test == "" {
			continue
		}
		r := tests[e.Test]
		if r == nil {
			r = &Result{Name: e.Test, Outcome: Unended}
			tests[e.Test], output[e.Test] = r, &strings.Builder{}
			order = append(order, e.Test)
		}
		switch e.Action {
		case "output":
			output[e.Test].WriteString(e.Output)
		case "pass", "fail", "skip":
			r.Outcome, r.Elapsed = Outcome(e.Action), time.Duration(e.Elapsed*float64(time.Second))
			r.Output = output[e.Test].String()
			ended(*r)
		}
	}
	var all []Result
	for _, name := range order {
		tests[name].Output = output[name].String()
		all = append(all, *tests[name])
	}
	return all, nil
}

// Judge returns what is not as expected, one sentence each. wanted are tests that must have run; nil means the whole
// suite, and then everything in the list.
func Judge(list []Expectation, results []Result, wanted []string) []string {
	expected := map[string]Expectation{}
	for _, e := range list {
		expected[e.Name] = e
	}
	ran := map[string]Outcome{}
	for _, r := range results {
		ran[r.Name] = r.Outcome
	}
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for _, r := range results {
		e, listed := expected[r.Name]
		switch {
		case r.Outcome == Unended:
			say("%s did not end", r.Name)
		case listed && e.Kind == Elsewhere && r.Outcome != Pass:
			say("%s: %s, and the list says that it passes on what is not ours", r.Name, r.Outcome)
		case listed && e.Kind != Elsewhere && r.Outcome == Pass:
			say("%s passes: take it off the list", r.Name)
		case listed && (e.Kind == Skips) != (r.Outcome == Skip) && e.Kind != Elsewhere:
			say("%s: %s, and the list says that it %s", r.Name, r.Outcome, e.Kind)
		case !listed && r.Outcome == Skip:
			say("%s was skipped and is not on the list", r.Name)
		case !listed && r.Outcome == Fail && !byChildren(r.Name, results):
			say("%s failed", r.Name)
		}
	}
	if wanted == nil {
		for _, e := range list {
			wanted = append(wanted, e.Name)
		}
	}
	for _, name := range wanted {
		if _, ok := ran[name]; !ok {
			say("%s did not run", name)
		}
	}
	if len(results) == 0 {
		say("no test ran")
	}
	return wrong
}

// Failed are the top-level tests that failed or did not end, and may not.
func Failed(list []Expectation, results []Result) []string {
	var names []string
	for _, r := range results {
		if !r.Top() {
			continue
		}
		of := slices.DeleteFunc(slices.Clone(results), func(x Result) bool {
			return x.Name != r.Name && !strings.HasPrefix(x.Name, r.Name+"/") || x.Outcome == Pass || x.Outcome == Skip
		})
		if len(of) > 0 && len(Judge(list, of, []string{})) > 0 {
			names = append(names, r.Name)
		}
	}
	return names
}

// Merge puts the results of the second try in the place of the first's.
func Merge(first, second []Result) []Result {
	again := map[string]bool{}
	for _, r := range second {
		if r.Top() {
			again[r.Name] = true
		}
	}
	var all []Result
	for _, r := range first {
		if top, _, _ := strings.Cut(r.Name, "/"); !again[top] {
			all = append(all, r)
		}
	}
	for _, r := range second {
		r.Second = true
		all = append(all, r)
	}
	return all
}

// byChildren says whether the test failed because a subtest did: that one is judged itself.
func byChildren(name string, results []Result) bool {
	return slices.ContainsFunc(results, func(r Result) bool {
		return r.Outcome != Pass && r.Outcome != Skip && strings.HasPrefix(r.Name, name+"/")
	})
}

// Counts of top-level tests.
type Counts struct{ Passed, Failed, Skipped, Unended, Elsewhere, Subtests int }

// Count counts; what passes elsewhere is among the passed too.
func Count(list []Expectation, results []Result) Counts {
	var c Counts
	elsewhere := map[string]bool{}
	for _, e := range list {
		elsewhere[e.Name] = e.Kind == Elsewhere
	}
	for _, r := range results {
		if !r.Top() {
			c.Subtests++
			continue
		}
		switch r.Outcome {
		case Pass:
			c.Passed++
			if elsewhere[r.Name] {
				c.Elsewhere++
			}
		case Fail:
			c.Failed++
		case Skip:
			c.Skipped++
		default:
			c.Unended++
		}
	}
	return c
}

func (c Counts) String() string {
	s := fmt.Sprintf("%d tests (and %d subtests): %d passed, %d failed, %d skipped",
		c.Passed+c.Failed+c.Skipped+c.Unended, c.Subtests, c.Passed, c.Failed, c.Skipped)
	if c.Unended > 0 {
		s += fmt.Sprintf(", %d did not end", c.Unended)
	}
	return s
}

// Run says what was run, for the report.
type Run struct {
	Date, Commit, Containerd, Go, Kernel string
	// ZFS is the snapshotter's way to it, as in its configuration.
	ZFS string
}

// Report is docs/conformance.md.
func Report(run Run, list []Expectation, results []Result) string {
	var b strings.Builder
	c := Count(list, results)
	fmt.Fprintf(&b, `# containerd's client suite

Written by `+"`make conformance update=1`"+`; do not edit. The suite is `+"`integration/client`"+` of containerd's module,
compiled unchanged, with our runtime and our snapshotter; it starts its containerd itself, and restarts it. Tests that
start another containerd (TestRestartMonitor, TestDaemonRuntimeRoot) ask for no runtime of ours: there our shim stands under
runc's name, and the snapshotter is overlayfs.

- commit: %s
- date: %s
- containerd: %s, %s
- kernel: %s
- the snapshotter's way to ZFS: %s
- result: **%s**

Not run: the suite's three fuzz targets (they have no seeds, and one downloads from GitHub), its benchmarks, and
`+"`TestShimTraceContextPropagation`"+`, which is compiled only with runc's shim built with the tag shim_tracing.

`, run.Commit, run.Date, run.Containerd, run.Go, run.Kernel, run.ZFS, c)
	kinds := []struct {
		kind  Kind
		title string
	}{
		{Fails, "Fail"}, {Skips, "Skipped by the suite"}, {Elsewhere, "Pass, but not on our runtime"},
	}
	for _, k := range kinds {
		var lines []string
		for _, e := range list {
			if e.Kind == k.kind {
				lines = append(lines, fmt.Sprintf("| %s | %s |", e.Name, e.Reason))
			}
		}
		if len(lines) > 0 {
			fmt.Fprintf(&b, "## %s\n\n| Test | Why |\n|---|---|\n%s\n\n", k.title, strings.Join(lines, "\n"))
		}
	}
	expected := map[string]bool{}
	for _, e := range list {
		expected[e.Name] = true
	}
	var passed []string
	for _, r := range results {
		if r.Top() && r.Outcome == Pass && !expected[r.Name] {
			passed = append(passed, r.Name)
		}
	}
	slices.Sort(passed)
	fmt.Fprintf(&b, "## Pass: %d\n\n%s\n", len(passed), strings.Join(passed, "\n"))
	var second []string
	for _, r := range results {
		if r.Top() && r.Outcome == Pass && r.Second {
			second = append(second, r.Name)
		}
	}
	if len(second) > 0 {
		fmt.Fprintf(&b, "\nOf these at the second try, alone in a fresh guest: %s.\n", strings.Join(second, ", "))
	}
	if wrong := Judge(list, results, nil); len(wrong) > 0 {
		fmt.Fprintf(&b, "\n## Not as the list says\n\n- %s\n", strings.Join(wrong, "\n- "))
	}
	return b.String()
}
