package snapshotter

import "sync/atomic"

// Counter is what a snapshotter of New tells besides.
type Counter interface {
	// Cleaned is how many datasets Cleanup has destroyed since the start, and how
	// many the last one had to leave, because something uses them.
	Cleaned() (destroyed, left int64)
}

var _ Counter = (*snapshotter)(nil)

type cleaned struct{ destroyed, left atomic.Int64 }

// count takes note of a Cleanup. One that ended early has not said which datasets
// it did destroy: all of them count as left, until the next one knows.
func (c *cleaned) count(all, left int, err error) {
	if err != nil {
		left = all
	}
	c.destroyed.Add(int64(all - left))
	c.left.Store(int64(left))
}

func (s *snapshotter) Cleaned() (destroyed, left int64) {
	return s.cleaned.destroyed.Load(), s.cleaned.left.Load()
}
