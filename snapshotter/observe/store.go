package observe

import (
	"context"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/prometheus/client_golang/prometheus"
)

// collectLimit is how long ZFS may take to answer Prometheus.
const collectLimit = 5 * time.Second

// Store is a prometheus.Collector of what is there: each function is called when
// Prometheus asks.
type Store struct {
	// Walk goes through the snapshots' records, as a Snapshotter does.
	Walk func(context.Context, snapshots.WalkFunc, ...string) error
	// Cleaned is how many datasets were destroyed, and how many could not be yet.
	Cleaned func() (destroyed, left int64)
	// Calls is how many ioctls and processes ZFS was asked by.
	Calls func() (ioctls, processes int64)
	// Available are the bytes free for the parent dataset.
	Available func(context.Context) (int64, error)
}

var (
	descSnapshots = prometheus.NewDesc(prefix+"snapshots", "Snapshots by kind.", []string{"kind"}, nil)
	descDestroyed = prometheus.NewDesc(prefix+"datasets_destroyed_total", "Datasets of removed snapshots that were destroyed.", nil, nil)
	descLeft      = prometheus.NewDesc(prefix+"datasets_left", "Datasets of removed snapshots that the last cleanup could not destroy, because something uses them.", nil, nil)
	descCalls     = prometheus.NewDesc(prefix+"zfs_calls_total", "Calls to ZFS: ioctls of /dev/zfs, or zfs processes.", []string{"kind"}, nil)
	descAvailable = prometheus.NewDesc(prefix+"available_bytes", "Bytes that may still be written below the parent dataset: of the pool, or of a quota.", nil, nil)
)

// Describe serves Prometheus.
func (s *Store) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descSnapshots, descDestroyed, descLeft, descCalls, descAvailable} {
		ch <- d
	}
}

// Collect serves Prometheus.
func (s *Store) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), collectLimit)
	defer cancel()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	kinds := map[snapshots.Kind]float64{snapshots.KindActive: 0, snapshots.KindView: 0, snapshots.KindCommitted: 0}
	err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		kinds[info.Kind]++
		return nil
	})
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descSnapshots, err)
	} else {
		for kind, n := range kinds {
			gauge(descSnapshots, n, strings.ToLower(kind.String()))
		}
	}
	destroyed, left := s.Cleaned()
	counter(descDestroyed, destroyed)
	gauge(descLeft, float64(left))
	ioctls, processes := s.Calls()
	counter(descCalls, ioctls, "ioctl")
	counter(descCalls, processes, "process")
	if n, err := s.Available(ctx); err != nil {
		ch <- prometheus.NewInvalidMetric(descAvailable, err)
	} else {
		gauge(descAvailable, float64(n))
	}
}
