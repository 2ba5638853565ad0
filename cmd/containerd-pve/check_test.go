package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// fakeLister has the datasets that are in it, with the bytes free.
type fakeLister map[string]int64

func (f fakeLister) Contents(context.Context, string, []string) ([]zfs.Entry, error) { return nil, nil }

func (f fakeLister) Available(_ context.Context, name string) (int64, error) {
	free, ok := f[name]
	if !ok {
		return 0, fmt.Errorf("%s: %w", name, errdefs.ErrNotFound)
	}
	return free, nil
}

func (f fakeLister) Property(context.Context, string, string) (string, error) {
	return zfs.Unset, nil
}

func (f fakeLister) Close() error { return nil }

// TestCheckStore: each state of the store, and the way out of it.
func TestCheckStore(t *testing.T) {
	conf := config{Dataset: "tank/a/c"}
	if err := conf.complete(); err != nil {
		t.Fatal(err)
	}
	kind := func(text string, kind error) error { return fmt.Errorf("%s: %w", text, kind) }
	type state struct {
		ready, module, belongs, serving error
		pool                            zfs.Pool
		datasets                        fakeLister
		way                             string
	}
	online := zfs.Pool{Name: "tank", Health: "ONLINE", Capacity: 40}
	var got bytes.Buffer
	for _, c := range []struct {
		name   string
		change func(*state)
	}{
		{"ready", func(*state) {}},
		{"no module", func(s *state) {
			s.ready, s.module = kind("run `modprobe zfs`", errdefs.ErrUnavailable), errdefs.ErrUnavailable
		}},
		{"no pool", func(s *state) { s.ready = kind("run `zpool import tank`", errdefs.ErrUnavailable) }},
		{"another release", func(s *state) {
			s.module = kind(`the ABI of ZFS module "2.3.9-1" is not known here`, errdefs.ErrNotImplemented)
		}},
		{"another release, and nothing else is allowed", func(s *state) {
			s.way, s.module = zfs.NativeOnly, kind(`the ABI of ZFS module "2.3.9-1" is not known here`, errdefs.ErrNotImplemented)
		}},
		{"go-zfs is wanted", func(s *state) { s.way = zfs.GoZFS }},
		{"suspended", func(s *state) { s.pool = zfs.Pool{Name: "tank", Health: "SUSPENDED"} }},
		{"faulted", func(s *state) { s.pool.Health = "FAULTED" }},
		{"degraded", func(s *state) { s.pool.Health = "DEGRADED" }},
		{"read-only", func(s *state) { s.pool.ReadOnly = true }},
		{"nearly full", func(s *state) { s.pool.Capacity = 93 }},
		{"full", func(s *state) { s.pool.Capacity, s.datasets["tank/a/c"] = 100, 4096 }},
		{"no dataset", func(s *state) {
			s.belongs = errdefs.ErrNotFound
			delete(s.datasets, "tank/a/c")
		}},
		{"nor what is above it", func(s *state) { s.belongs, s.datasets = errdefs.ErrNotFound, nil }},
		{"another store's", func(s *state) {
			s.belongs = kind("it belongs to another store (…): use its root, or another dataset", errdefs.ErrFailedPrecondition)
		}},
		{"no daemon", func(s *state) { s.serving = errdefs.ErrUnavailable }},
		{"a stuck daemon", func(s *state) { s.serving = context.DeadlineExceeded }},
	} {
		s := state{way: zfs.Auto, pool: online, datasets: fakeLister{"tank/a": 2 << 30, "tank/a/c": 1 << 30}}
		c.change(&s)
		conf := conf
		conf.ZFS = s.way
		h := storeHost{
			ready:   func(string) error { return s.ready },
			module:  func() (string, error) { return "2.3.9-1", s.module },
			pool:    func(context.Context, string) (zfs.Pool, error) { return s.pool, nil },
			lister:  func(string) (zfs.Lister, error) { return s.datasets, nil },
			belongs: func(context.Context, zfs.Lister, string, string) error { return s.belongs },
			serving: func(context.Context, string) error { return s.serving },
		}
		fmt.Fprintf(&got, "== %s\n", c.name)
		if err := report(&got, "text", h.check(t.Context(), conf)); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "check.text", got.Bytes())

	got.Reset()
	if err := report(&got, "json", []finding{warning("pool", "slow"), result("daemon", "", errdefs.ErrUnavailable)}); err != nil {
		t.Fatal(err)
	}
	golden(t, "check.json", got.Bytes())
}

type statServer struct {
	snapshotsapi.UnimplementedSnapshotsServer
	err  error
	hold chan struct{}
}

func (s statServer) Stat(context.Context, *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	if s.hold != nil {
		// Not until the caller's time is up: this side learns of that too, and
		// its answer could overtake the caller's own clock.
		<-s.hold
	}
	return nil, errgrpc.ToGRPC(s.err)
}

func TestServing(t *testing.T) {
	for _, c := range []struct {
		name   string
		server *statServer
		is     func(error) bool
	}{
		{"it answers", &statServer{err: errdefs.ErrNotFound}, func(err error) bool { return err == nil }},
		{"nobody listens", nil, errdefs.IsUnavailable},
		{"it is stuck", &statServer{hold: make(chan struct{})}, errdefs.IsDeadlineExceeded},
		{"it is no snapshotter", &statServer{err: errdefs.ErrNotImplemented}, func(err error) bool {
			return err != nil && !errdefs.IsUnavailable(err) && !errdefs.IsDeadlineExceeded(err)
		}},
	} {
		address := filepath.Join(t.TempDir(), "s.sock")
		limit := time.Minute
		if c.server != nil {
			l, err := net.Listen("unix", address)
			if err != nil {
				t.Fatal(err)
			}
			server := grpc.NewServer()
			snapshotsapi.RegisterSnapshotsServer(server, c.server)
			go server.Serve(l)
			defer server.Stop()
			if c.server.hold != nil {
				defer close(c.server.hold)
				limit = 100 * time.Millisecond
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		if err := serving(ctx, address); !c.is(err) {
			t.Errorf("%s: %v", c.name, err)
		}
		cancel()
	}
}
