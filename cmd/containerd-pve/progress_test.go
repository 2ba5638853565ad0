package main

import (
	"bytes"
	"testing"
)

// TestProgress: nothing where nobody looks, and one line elsewhere.
func TestProgress(t *testing.T) {
	var none bytes.Buffer
	p := newProgress(&none)
	p.show("a", 1, 2)
	if p.end(); none.Len() > 0 {
		t.Errorf("%q", none.String())
	}
	var out bytes.Buffer
	p = &progress{to: &out}
	p.show("pulling", 0, 0)
	p.show("checking", 1, 4)
	p.show("checking", 2, 4) // too soon
	p.show("written:", 3<<20, allOf)
	p.end()
	if want := "\r\033[Kpulling\r\033[Kchecking 25%\r\033[Kwritten: 3MiB\r\033[K"; out.String() != want {
		t.Errorf("%q", out.String())
	}
}
