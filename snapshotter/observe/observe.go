// Package observe tells what the snapshotter does: a histogram of its calls, one
// line in the log for each call that failed, the trace that a call belongs to.
// It sits in the gRPC server, where a call's answer is exactly the one containerd
// gets, and each caller's metadata are there. It changes no call and no answer.
package observe

import (
	"context"
	"path"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// prefix of all metrics.
const prefix = "containerd_pve_snapshotter_"

// Calls watches the calls of a gRPC server. It is a prometheus.Collector.
type Calls struct {
	duration *prometheus.HistogramVec
	inFlight *prometheus.GaugeVec
}

// NewCalls watches nothing yet: give Unary and Stream to the server.
func NewCalls() *Calls {
	return &Calls{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: prefix + "call_duration_seconds",
			Help: "Duration of the calls of containerd, by method and gRPC status code.",
			// From a record that is read (some 50 µs) to a pool that is stuck.
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"method", "code"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: prefix + "calls_in_flight",
			Help: "Calls that have begun and not ended.",
		}, []string{"method"}),
	}
}

// Describe and Collect serve Prometheus.
func (c *Calls) Describe(ch chan<- *prometheus.Desc) {
	c.duration.Describe(ch)
	c.inFlight.Describe(ch)
}

// Collect serves Prometheus.
func (c *Calls) Collect(ch chan<- prometheus.Metric) {
	c.duration.Collect(ch)
	c.inFlight.Collect(ch)
}

// Unary is the interceptor of calls with one answer.
func (c *Calls) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	ctx = traced(ctx)
	end := c.begin(ctx, path.Base(info.FullMethod), req)
	defer func() { end(err) }()
	return handler(ctx, req)
}

// Stream is the interceptor of calls with many answers.
func (c *Calls) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ctx := traced(ss.Context())
	end := c.begin(ctx, path.Base(info.FullMethod), nil)
	defer func() { end(err) }()
	return handler(srv, stream{ServerStream: ss, ctx: ctx})
}

// stream is a ServerStream with another context.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s stream) Context() context.Context { return s.ctx }

func (c *Calls) begin(ctx context.Context, method string, req any) func(error) {
	inFlight := c.inFlight.WithLabelValues(method)
	inFlight.Inc()
	began := time.Now()
	return func(err error) {
		inFlight.Dec()
		took := time.Since(began)
		// What a handler did not give a code gets the one that its kind has.
		code := status.Code(errgrpc.ToGRPC(err))
		c.duration.WithLabelValues(method, code.String()).Observe(took.Seconds())
		if err == nil {
			return
		}
		fields := log.Fields{
			"method": method, "code": code.String(), "duration": took.String(), "error": status.Convert(err).Message(),
		}
		for name, value := range names(req) {
			if value != "" {
				fields[name] = value
			}
		}
		log.G(ctx).WithFields(fields).Log(level(code), "call failed")
	}
}

// names are the snapshots that a request is about.
func names(req any) map[string]string {
	m := map[string]string{}
	if r, ok := req.(*snapshotsapi.UpdateSnapshotRequest); ok {
		m["key"] = r.GetInfo().GetName()
	}
	if r, ok := req.(interface{ GetKey() string }); ok {
		m["key"] = r.GetKey()
	}
	if r, ok := req.(interface{ GetParent() string }); ok {
		m["parent"] = r.GetParent()
	}
	if r, ok := req.(interface{ GetName() string }); ok {
		m["name"] = r.GetName()
	}
	return m
}

// level sorts failures. containerd asks for what may not be there, makes what
// may be there already and asks its next differ for what ours does not do: those are answers, not troubles.
func level(code codes.Code) log.Level {
	switch code {
	case codes.NotFound, codes.AlreadyExists, codes.Unimplemented:
		return log.DebugLevel
	case codes.Canceled, codes.DeadlineExceeded:
		return log.InfoLevel
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return log.WarnLevel
	}
	return log.ErrorLevel
}

// carrier is a call's metadata as OpenTelemetry reads them.
type carrier metadata.MD

func (c carrier) Get(key string) string {
	if v := metadata.MD(c).Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

func (c carrier) Set(key, value string) { metadata.MD(c).Set(key, value) }

func (c carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for k := range c {
		keys = append(keys, k)
	}
	return keys
}

// traced puts the caller's W3C trace, if it sent one, into the context, and its
// id into each line that is logged with that.
func traced(ctx context.Context) context.Context {
	md, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		return ctx
	}
	ctx = propagation.TraceContext{}.Extract(ctx, carrier(md))
	if s := trace.SpanContextFromContext(ctx); s.IsValid() {
		ctx = log.WithLogger(ctx, log.G(ctx).WithField("trace_id", s.TraceID().String()))
	}
	return ctx
}
