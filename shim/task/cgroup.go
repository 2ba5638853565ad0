package task

import (
	"context"

	"github.com/containerd/cgroups/v3/cgroup2"
	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/log"
)

// watchOOM publishes an event for every process the OOM killer took.
func (t *taskState) watchOOM(ctx context.Context) {
	m, err := cgroup2.Load(t.container.CgroupPath())
	if err != nil {
		log.G(ctx).WithError(err).Warn("no OOM events of " + t.id)
		return
	}
	found, failed := m.EventChan()
	for {
		select {
		case e := <-found:
			t.noteOOM(e.OOMKill)
		case err := <-failed:
			if err != nil {
				log.G(ctx).WithError(err).Warn("no more OOM events of " + t.id)
			}
			return // with the cgroup
		}
	}
}

// lastOOM reads the counter once more, so that an OOM kill of init is told
// before its end.
func (t *taskState) lastOOM() { t.noteOOM(t.container.OOMKills()) }

func (t *taskState) noteOOM(kills uint64) {
	for {
		old := t.oomKills.Load()
		if kills <= old {
			return
		}
		if t.oomKills.CompareAndSwap(old, kills) {
			t.service.events.put(&eventsapi.TaskOOM{ContainerID: t.id})
			return
		}
	}
}
