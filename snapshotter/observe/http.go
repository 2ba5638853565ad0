package observe

import (
	"net/http"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Server answers /metrics with what the collectors and the Go runtime tell. What
// one of them cannot tell is logged, and left out.
func Server(of ...prometheus.Collector) (*http.Server, error) {
	r := prometheus.NewRegistry()
	for _, c := range append(of, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})) {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{
		ErrorLog: log.L.WithField("component", "metrics"), ErrorHandling: promhttp.ContinueOnError,
	}))
	return &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}, nil
}
