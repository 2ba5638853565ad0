package task

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/cgroups/v3/cgroup2/stats"
	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/log"
)

const cgroupRoot = "/sys/fs/cgroup"

// limitsToo puts the limits of the cgroup in dir in the place of higher ones: a
// container of Proxmox's is limited where its processes are, below the cgroup that is counted. One that
// has ended has none.
func limitsToo(m *stats.MemoryStat, dir string) {
	if m == nil {
		return
	}
	for file, limit := range map[string]*uint64{"memory.max": &m.UsageLimit, "memory.swap.max": &m.SwapLimit} {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			continue
		}
		if n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64); err == nil { // else "max"
			*limit = min(*limit, n)
		}
	}
}

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
