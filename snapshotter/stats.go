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

func (s *snapshotter) Cleaned() (destroyed, left int64) {
	return s.cleaned.destroyed.Load(), s.cleaned.left.Load()
}
