package snapshotter

import (
	"sync"
	"sync/atomic"
	"testing"
)

// TestObjects: the counts of two snapshots do not wait for one another, and
// nobody counts what somebody counts already.
func TestObjects(t *testing.T) {
	var o objects
	var counts atomic.Int64
	other := make(chan struct{})
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			n, err := o.get("1", func() (int64, error) {
				<-other
				return counts.Add(1) + 41, nil
			})
			if n != 42 || err != nil {
				t.Errorf("%d files, %v", n, err)
			}
		})
	}
	if n, err := o.get("2", func() (int64, error) { close(other); return 7, nil }); n != 7 || err != nil {
		t.Errorf("%d files of the other, %v", n, err)
	}
	group.Wait()
	if n, err := o.anew("1", func() (int64, error) { return 50, nil }); n != 50 || err != nil {
		t.Errorf("counted anew: %d, %v", n, err)
	}
}
