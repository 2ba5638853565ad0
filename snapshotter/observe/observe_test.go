package observe

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
)

const (
	traceID     = "0af7651916cd43dd8448eb211c80319c"
	traceparent = "00-" + traceID + "-b7ad6b7169203331-01"
)

// fake fails as it is told.
type fake struct {
	snapshots.Snapshotter
	err  error
	hold chan struct{}
}

func (f *fake) Prepare(context.Context, string, string, ...snapshots.Opt) ([]mount.Mount, error) {
	return nil, f.err
}

func (f *fake) Commit(context.Context, string, string, ...snapshots.Opt) error { return f.err }

func (f *fake) Update(context.Context, snapshots.Info, ...string) (snapshots.Info, error) {
	return snapshots.Info{}, f.err
}

func (f *fake) Stat(context.Context, string) (snapshots.Info, error) {
	return snapshots.Info{}, f.err
}

func (f *fake) Remove(context.Context, string) error {
	f.hold <- struct{}{}
	<-f.hold
	return f.err
}

func (f *fake) Walk(ctx context.Context, _ snapshots.WalkFunc, _ ...string) error {
	log.G(ctx).Info("inside")
	return f.err
}

// buffer is written by the server and read by the test.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// lines takes what was logged so far.
func (b *buffer) lines(t *testing.T) []map[string]any {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []map[string]any
	d := json.NewDecoder(&b.b)
	for {
		var m map[string]any
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			b.b.Reset()
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
}

func logged(t *testing.T) *buffer {
	t.Helper()
	b := &buffer{}
	old, formatter := log.L.Logger.Out, log.L.Logger.Formatter
	log.L.Logger.SetOutput(b)
	if err := errors.Join(log.SetFormat(log.JSONFormat), log.SetLevel("debug")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		log.L.Logger.SetOutput(old)
		log.L.Logger.SetFormatter(formatter)
		log.SetLevel("info")
	})
	return b
}

func connect(t *testing.T, c *Calls, s snapshots.Snapshotter) snapshotsapi.SnapshotsClient {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(c.Unary), grpc.ChainStreamInterceptor(c.Stream))
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	go server.Serve(l)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:bed", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return snapshotsapi.NewSnapshotsClient(conn)
}

// TestLog: one line for each failed call, with what it was about, and none for one that succeeded.
func TestLog(t *testing.T) {
	out := logged(t)
	f := &fake{}
	client := connect(t, NewCalls(), f)
	ctx := metadata.AppendToOutgoingContext(context.Background(), "traceparent", traceparent)
	prepare := func(ctx context.Context) error {
		_, err := client.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Key: "k", Parent: "p"})
		return err
	}
	commit := func(ctx context.Context) error {
		_, err := client.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Key: "k", Name: "n"})
		return err
	}
	update := func(ctx context.Context) error {
		_, err := client.Update(ctx, &snapshotsapi.UpdateSnapshotRequest{Info: &snapshotsapi.Info{Name: "k"}})
		return err
	}
	stat := func(ctx context.Context) error {
		_, err := client.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Key: "k"})
		return err
	}
	for _, c := range []struct {
		call func(context.Context) error
		err  error
		want string // level, method, code, key, parent, name
	}{
		{prepare, errdefs.ErrFailedPrecondition, "warning Prepare FailedPrecondition k p -"},
		{prepare, errdefs.ErrResourceExhausted, "error Prepare ResourceExhausted k p -"},
		{commit, errdefs.ErrAlreadyExists, "debug Commit AlreadyExists k - n"},
		{stat, errdefs.ErrNotFound, "debug Stat NotFound k - -"},
		{update, errors.New("other"), "error Update Unknown k - -"},
		{stat, context.DeadlineExceeded, "info Stat DeadlineExceeded k - -"},
		{prepare, nil, ""},
	} {
		f.err = c.err
		if err := c.call(ctx); (err == nil) != (c.err == nil) {
			t.Fatalf("%v, want %v", err, c.err)
		}
		lines := out.lines(t)
		if c.err == nil {
			if len(lines) != 0 {
				t.Errorf("a call that succeeded: %v", lines)
			}
			continue
		}
		if len(lines) != 1 {
			t.Fatalf("%s: %d lines: %v", c.want, len(lines), lines)
		}
		m := lines[0]
		var got []string
		for _, field := range []string{"level", "method", "code", "key", "parent", "name"} {
			v, ok := m[field].(string)
			if !ok {
				v = "-"
			}
			got = append(got, v)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s, want %s", strings.Join(got, " "), c.want)
		}
		if m["trace_id"] != traceID || m["msg"] != "call failed" || m["error"] != c.err.Error() || m["duration"] == "" {
			t.Errorf("%v", m)
		}
	}
}

// TestTrace: the id of a caller's trace is in each line logged for its call, of a stream too; without one there is none.
func TestTrace(t *testing.T) {
	out := logged(t)
	client := connect(t, NewCalls(), &fake{err: errdefs.ErrUnavailable})
	for parent, want := range map[string]any{traceparent: traceID, "": nil, "00-nonsense": nil} {
		ctx := context.Background()
		if parent != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", parent)
		}
		list, err := client.List(ctx, &snapshotsapi.ListSnapshotsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := list.Recv(); err == nil {
			t.Error("a list that fails succeeded")
		}
		lines := out.lines(t)
		if len(lines) != 2 || lines[0]["msg"] != "inside" || lines[1]["method"] != "List" || lines[1]["code"] != "Unavailable" {
			t.Fatalf("%q: %v", parent, lines)
		}
		for _, m := range lines {
			if m["trace_id"] != want {
				t.Errorf("%q: trace_id %v in %v", parent, m["trace_id"], m)
			}
		}
	}
}

func scrape(t *testing.T, h http.Handler) string {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func has(t *testing.T, metrics string, want ...string) {
	t.Helper()
	for _, line := range want {
		if !strings.Contains("\n"+metrics, "\n"+line+"\n") {
			t.Errorf("no line %q in\n%s", line, metrics)
		}
	}
}

func TestMetrics(t *testing.T) {
	out := logged(t)
	calls := NewCalls()
	var walkErr error
	store := &Store{
		Walk: func(ctx context.Context, f snapshots.WalkFunc, _ ...string) error {
			for _, k := range []snapshots.Kind{snapshots.KindActive, snapshots.KindCommitted, snapshots.KindCommitted} {
				if err := f(ctx, snapshots.Info{Kind: k}); err != nil {
					return err
				}
			}
			return walkErr
		},
		Cleaned:   func() (int64, int64) { return 7, 1 },
		Calls:     func() (int64, int64) { return 42, 3 },
		Available: func(context.Context) (int64, error) { return 1 << 30, nil },
	}
	server, err := Server(calls, store)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{hold: make(chan struct{})}
	client := connect(t, calls, f)
	ctx := context.Background()
	f.err = errdefs.ErrNotFound
	if _, err := client.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Key: "k"}); err == nil {
		t.Error("no error")
	}
	f.err = nil
	done := make(chan error, 1)
	go func() {
		_, err := client.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Key: "k"})
		done <- err
	}()
	<-f.hold
	has(t, scrape(t, server.Handler), prefix+`calls_in_flight{method="Remove"} 1`)
	f.hold <- struct{}{}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	metrics := scrape(t, server.Handler)
	has(t, metrics,
		prefix+`calls_in_flight{method="Remove"} 0`,
		prefix+`call_duration_seconds_count{code="OK",method="Remove"} 1`,
		prefix+`call_duration_seconds_count{code="NotFound",method="Stat"} 1`,
		prefix+`snapshots{kind="active"} 1`, prefix+`snapshots{kind="committed"} 2`, prefix+`snapshots{kind="view"} 0`,
		prefix+`datasets_destroyed_total 7`, prefix+`datasets_left 1`,
		prefix+`zfs_calls_total{kind="ioctl"} 42`, prefix+`zfs_calls_total{kind="process"} 3`,
		prefix+`available_bytes 1.073741824e+09`,
	)
	if !strings.Contains(metrics, "\nprocess_resident_memory_bytes ") || !strings.Contains(metrics, "\ngo_goroutines ") {
		t.Error("nothing of the process itself")
	}

	// What cannot be told is left out, and the rest is there.
	walkErr = fmt.Errorf("records: %w", errdefs.ErrInternal)
	store.Available = func(context.Context) (int64, error) { return 0, errdefs.ErrUnavailable }
	out.lines(t)
	metrics = scrape(t, server.Handler)
	has(t, metrics, prefix+`datasets_left 1`)
	if strings.Contains(metrics, prefix+"snapshots{") || strings.Contains(metrics, prefix+"available_bytes ") {
		t.Errorf("%s", metrics)
	}
	lines := out.lines(t)
	if len(lines) == 0 || !strings.Contains(fmt.Sprint(lines), "records") {
		t.Errorf("logged: %v", lines)
	}
}
