package conformance

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestParseList(t *testing.T) {
	got, err := ParseList("# comment\n\nskips TestA needs CRIU\n fails  TestB/sub_test  wants runc's directory \n")
	want := []Expectation{{"TestA", Skips, "needs CRIU"}, {"TestB/sub_test", Fails, "wants runc's directory"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	for _, bad := range []string{"skips TestA", "passes TestA because", "skips TestA x\nfails TestA y"} {
		if got, err := ParseList(bad); err == nil {
			t.Errorf("%q gave %v and no error", bad, got)
		}
	}
}

func TestFiles(t *testing.T) {
	list, err := ParseList(List)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range Names(Core) {
		if slices.ContainsFunc(list, func(e Expectation) bool { return e.Name == name }) {
			t.Errorf("core.txt: %s says nothing about this runtime: it is in expected.txt", name)
		}
	}
}

func TestRead(t *testing.T) {
	const events = `{"Action":"start"}
{"Action":"run","Test":"TestA"}
{"Action":"output","Test":"TestA","Output":"one\n"}
{"Action":"run","Test":"TestA/sub"}
{"Action":"run","Test":"TestB"}
{"Action":"fail","Test":"TestA/sub","Elapsed":0.5}
{"Action":"fail","Test":"TestA","Elapsed":1.5}
{"Action":"output","Test":"TestB","Output":"panic\n"}
{"Action":"fail","Elapsed":2}
`
	var ended []string
	got, err := Read(strings.NewReader(events), func(r Result) { ended = append(ended, r.Name) })
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, r := range got {
		text = append(text, strings.Join([]string{r.Name, string(r.Outcome), r.Elapsed.String(), r.Output}, "|"))
	}
	want := []string{"TestA|fail|1.5s|one\n", "TestA/sub|fail|500ms|", "TestB|unended|0s|panic\n"}
	if !slices.Equal(text, want) || !slices.Equal(ended, []string{"TestA/sub", "TestA"}) {
		t.Errorf("got %q, ended %q", text, ended)
	}
}

func TestJudge(t *testing.T) {
	list := []Expectation{{"TestSkips", Skips, "r"}, {"TestFails", Fails, "r"}, {"TestSub/bad", Fails, "r"}, {"TestRunc", Elsewhere, "r"}}
	good := []Result{
		{Name: "TestSkips", Outcome: Skip}, {Name: "TestFails", Outcome: Fail}, {Name: "TestSub", Outcome: Fail},
		{Name: "TestSub/bad", Outcome: Fail}, {Name: "TestSub/good", Outcome: Pass}, {Name: "TestRunc", Outcome: Pass},
		{Name: "TestPasses", Outcome: Pass},
	}
	if wrong := Judge(list, good, nil); len(wrong) > 0 {
		t.Errorf("a good run: %q", wrong)
	}
	if got := Count(list, good); got != (Counts{Passed: 2, Failed: 2, Skipped: 1, Elsewhere: 1, Subtests: 2}) {
		t.Errorf("counted %+v", got)
	}
	for _, c := range []struct {
		name    string
		outcome Outcome
		want    string
	}{
		{"TestSkips", Pass, "TestSkips passes: take it off the list"},
		{"TestSkips", Fail, "TestSkips: fail, and the list says that it skips"},
		{"TestFails", Pass, "TestFails passes: take it off the list"},
		{"TestFails", Skip, "TestFails: skip, and the list says that it fails"},
		{"TestRunc", Fail, "TestRunc: fail, and the list says that it passes on what is not ours"},
		{"TestPasses", Fail, "TestPasses failed"},
		{"TestPasses", Skip, "TestPasses was skipped and is not on the list"},
		{"TestPasses", Unended, "TestPasses did not end"},
		{"TestSub/good", Fail, "TestSub/good failed"},
	} {
		results := slices.Clone(good)
		i := slices.IndexFunc(results, func(r Result) bool { return r.Name == c.name })
		results[i].Outcome = c.outcome
		if got := Judge(list, results, nil); !slices.Equal(got, []string{c.want}) {
			t.Errorf("%s %s: got %q, want %q", c.name, c.outcome, got, c.want)
		}
	}
	if got := Judge(list, good[1:], nil); !slices.Equal(got, []string{"TestSkips did not run"}) {
		t.Errorf("a test of the list missing: %q", got)
	}
	if got := Judge(list, good[1:], []string{"TestOther"}); !slices.Equal(got, []string{"TestOther did not run"}) {
		t.Errorf("a wanted test missing: %q", got)
	}
	if got := Judge(nil, nil, nil); len(got) != 1 {
		t.Errorf("nothing ran: %q", got)
	}
	// an own failure of a test is not excused by subtests that pass
	if got := Judge(nil, []Result{{Name: "TestA", Outcome: Fail}, {Name: "TestA/x", Outcome: Pass}}, nil); !slices.Equal(got, []string{"TestA failed"}) {
		t.Errorf("own failure: %q", got)
	}
}

func TestSecondTry(t *testing.T) {
	list := []Expectation{{"TestSub/bad", Fails, "r"}, {"TestListed", Fails, "r"}}
	first := []Result{
		{Name: "TestGood", Outcome: Pass}, {Name: "TestSlow", Outcome: Fail}, {Name: "TestSlow/a", Outcome: Fail},
		{Name: "TestSub", Outcome: Fail}, {Name: "TestSub/bad", Outcome: Fail}, {Name: "TestListed", Outcome: Fail},
		{Name: "TestStuck", Outcome: Unended},
	}
	if got := Failed(list, first); !slices.Equal(got, []string{"TestSlow", "TestStuck"}) {
		t.Errorf("to be tried again: %q", got)
	}
	merged := Merge(first, []Result{{Name: "TestSlow", Outcome: Pass}, {Name: "TestSlow/b", Outcome: Pass}})
	var names []string
	for _, r := range merged {
		names = append(names, r.Name)
	}
	if want := []string{"TestGood", "TestSub", "TestSub/bad", "TestListed", "TestStuck", "TestSlow", "TestSlow/b"}; !slices.Equal(names, want) {
		t.Errorf("merged %q, want %q", names, want)
	}
	if report := Report(Run{}, list, merged); !strings.Contains(report, "second try, alone in a fresh guest: TestSlow.") {
		t.Errorf("the report hides the second try:\n%s", report)
	}
}

// TestResultsAreOfThisList: docs/conformance.md gives the reasons that the list gives now.
func TestResultsAreOfThisList(t *testing.T) {
	doc, err := os.ReadFile("../../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	list, err := ParseList(List)
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for line := range strings.Lines(string(doc)) {
		if strings.HasPrefix(line, "| Test") && !strings.HasPrefix(line, "| Test |") {
			rows++
		}
	}
	for _, e := range list {
		if !strings.Contains(string(doc), "| "+e.Name+" | "+e.Reason+" |\n") {
			t.Errorf("%s is not in docs/conformance.md with its reason: run make conformance update=1", e.Name)
		}
	}
	if rows != len(list) {
		t.Errorf("docs/conformance.md has %d reasons, the list %d: run make conformance update=1", rows, len(list))
	}
}
