package main

import (
	"bytes"
	"io"
	"sync"
)

// sequence prints what several jobs say at the same time as if they ran one
// after the other: the first prints at once, the others when their turn comes.
type sequence struct {
	w io.Writer

	mu    sync.Mutex
	turn  int
	parts []*part
}

// part is where one job prints. Its last words are asked for when all parts
// before it are closed.
type part struct {
	s    *sequence
	n    int
	buf  bytes.Buffer
	last func() string
	end  bool
}

// add makes the next part. last may be nil.
func (s *sequence) add(last func() string) *part {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &part{s: s, n: len(s.parts), last: last}
	s.parts = append(s.parts, p)
	return p
}

func (p *part) Write(b []byte) (int, error) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	if p.n != p.s.turn {
		return p.buf.Write(b)
	}
	if err := p.flush(); err != nil {
		return 0, err
	}
	return p.s.w.Write(b)
}

func (p *part) flush() error {
	_, err := p.buf.WriteTo(p.s.w)
	return err
}

// Close ends the part, and with it those after it that have ended already.
func (p *part) Close() error {
	s := p.s
	s.mu.Lock()
	defer s.mu.Unlock()
	p.end = true
	for s.turn < len(s.parts) && s.parts[s.turn].end {
		p := s.parts[s.turn]
		if p.last != nil {
			p.buf.WriteString(p.last())
		}
		if err := p.flush(); err != nil {
			return err
		}
		s.turn++
	}
	if s.turn < len(s.parts) {
		return s.parts[s.turn].flush()
	}
	return nil
}
