package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/term"
)

// progress says on a terminal how far something is.
type progress struct {
	to   io.Writer // nil: nobody looks
	last time.Time
	what string
}

func newProgress(to io.Writer) *progress {
	if f, ok := to.(*os.File); !ok || !term.IsTerminal(int(f.Fd())) {
		to = nil
	}
	return &progress{to: to}
}

// allOf is the total of what nobody knows the size of before it is done.
const allOf = -1

// show says that n of total is done; a total of 0 is no number at all.
func (p *progress) show(what string, n, total int64) {
	if p.to == nil || (what == p.what && time.Since(p.last) < 200*time.Millisecond) {
		return
	}
	p.last, p.what = time.Now(), what
	far := ""
	switch {
	case total == allOf:
		far = " " + units.BytesSize(float64(n))
	case total > 0:
		far = fmt.Sprintf(" %d%%", n*100/total)
	}
	fmt.Fprintf(p.to, "\r\033[K%s%s", what, far)
}

func (p *progress) end() {
	if p.to != nil && p.what != "" {
		fmt.Fprint(p.to, "\r\033[K")
	}
}
