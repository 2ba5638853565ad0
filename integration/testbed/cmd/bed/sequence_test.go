package main

import (
	"fmt"
	"strings"
	"testing"
)

func TestSequence(t *testing.T) {
	var out strings.Builder
	s := &sequence{w: &out}
	a, b, c := s.add(nil), s.add(func() string { return "[b]" }), s.add(func() string { return "[c]" })
	say := func(p *part, text string) {
		t.Helper()
		if _, err := fmt.Fprint(p, text); err != nil {
			t.Fatal(err)
		}
	}
	end := func(p *part, want string) {
		t.Helper()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if out.String() != want {
			t.Errorf("%q, want %q", out.String(), want)
		}
	}
	say(b, "b1")
	say(a, "a1")
	say(c, "c1")
	end(c, "a1")
	say(a, "a2")
	end(a, "a1a2b1")
	say(b, "b2")
	end(b, "a1a2b1b2[b]c1[c]")
	d := s.add(nil)
	say(d, "d")
	end(d, "a1a2b1b2[b]c1[c]d")
}
