package snapshotter

import (
	"context"
	"testing"
	"time"
)

// TestLater: what was put off is done for all at once, in time, and at once when somebody waits for it.
func TestLater(t *testing.T) {
	closed := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return true
		case <-time.After(10 * time.Millisecond):
			return false
		}
	}
	var c creations
	one, other := c.later(time.Hour), c.later(time.Hour)
	if one != other || closed(one) {
		t.Error("they are not together, or too early")
	}
	if err := c.wait(context.Background()); err != nil || !closed(one) {
		t.Errorf("nobody hurries: %v", err)
	}
	if next := c.later(time.Millisecond); next == one {
		t.Error("what comes later is not put off")
	} else {
		<-next
	}
}
