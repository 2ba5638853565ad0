package task

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"
)

// flushLimit is how long the last events may take at the shim's end.
const flushLimit = 3 * time.Second

// queue publishes events one after the other, in the order they were put in.
// Putting one in never blocks: it is done under a process's lock.
type queue struct {
	publisher shim.Publisher

	mu     sync.Mutex
	events []events.Event
	closed bool
	wake   chan struct{}
	done   chan struct{}
}

func newQueue(ctx context.Context, p shim.Publisher) *queue {
	q := &queue{publisher: p, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go q.run(ctx)
	return q
}

func (q *queue) put(e events.Event) {
	q.mu.Lock()
	q.events = append(q.events, e)
	q.mu.Unlock()
	q.signal()
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *queue) run(ctx context.Context) {
	defer close(q.done)
	for {
		q.mu.Lock()
		batch, closed := q.events, q.closed
		q.events = nil
		q.mu.Unlock()
		for _, e := range batch {
			if err := q.publisher.Publish(ctx, runtime.GetTopic(e), e); err != nil {
				log.G(ctx).WithError(err).Errorf("publish %s", runtime.GetTopic(e))
			}
		}
		if len(batch) > 0 {
			continue
		}
		if closed {
			return
		}
		<-q.wake
	}
}

// close publishes what is left, bounded, and ends.
func (q *queue) close() error {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.signal()
	select {
	case <-q.done:
	case <-time.After(flushLimit):
	}
	return q.publisher.Close()
}
