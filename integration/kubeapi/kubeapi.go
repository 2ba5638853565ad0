// Package kubeapi is a stand-in for a Kubernetes API server, of which it has one node's labels: by TLS, with a service
// account's token, and with the answers of the real one where it refuses. It owns its listener and the directory that it is
// told to put the service account's files in.
package kubeapi

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
)

// Server has one node.
type Server struct {
	Host, Port string

	server *httptest.Server
	node   string

	mu     sync.Mutex
	token  string
	labels map[string]string
	fail   []int // answers to the next requests
	calls  []string
}

// Start starts a server that knows a node of that name, and writes into dir what a pod finds of its service account there.
func Start(node, dir string) (*Server, error) {
	s := &Server{node: node, token: "secret", labels: map[string]string{"kubernetes.io/hostname": node}}
	s.server = httptest.NewTLSServer(s)
	var err error
	if s.Host, s.Port, err = net.SplitHostPort(s.server.Listener.Addr().String()); err != nil {
		return nil, err
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.server.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), ca, 0o644); err != nil {
		return nil, err
	}
	return s, os.WriteFile(filepath.Join(dir, "token"), []byte("secret\n"), 0o600)
}

// Close ends it.
func (s *Server) Close() { s.server.Close() }

// Expire has another token count from now on.
func (s *Server) Expire(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = token
}

// Fail has the next requests answered with these statuses.
func (s *Server) Fail(statuses ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = statuses
}

// Label sets a label, as kubectl would.
func (s *Server) Label(key, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.labels[key] = value
}

// Labels are the node's.
func (s *Server) Labels() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.labels)
}

// Calls are the methods that were asked for since the last call of this.
func (s *Server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := s.calls
	s.calls = nil
	return calls
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, r.Method)
	refuse := func(status int, message string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status})
	}
	var patch struct {
		Metadata struct {
			Labels map[string]*string `json:"labels"`
		} `json:"metadata"`
	}
	switch {
	case len(s.fail) > 0:
		status := s.fail[0]
		s.fail = s.fail[1:]
		refuse(status, "the object has been modified; please apply your changes to the latest version and try again")
	case r.Header.Get("Authorization") != "Bearer "+s.token:
		refuse(http.StatusUnauthorized, "Unauthorized")
	case r.URL.Path != "/api/v1/nodes/"+s.node:
		refuse(http.StatusNotFound, fmt.Sprintf("nodes %q not found", filepath.Base(r.URL.Path)))
	case r.Method == http.MethodPatch && r.Header.Get("Content-Type") != "application/merge-patch+json":
		refuse(http.StatusUnsupportedMediaType, "the body of the request was in an unknown format")
	case r.Method == http.MethodPatch:
		d := json.NewDecoder(r.Body)
		d.DisallowUnknownFields()
		if err := d.Decode(&patch); err != nil {
			refuse(http.StatusBadRequest, err.Error())
			return
		}
		for k, v := range patch.Metadata.Labels {
			if v == nil {
				delete(s.labels, k)
			} else {
				s.labels[k] = *v
			}
		}
		fallthrough
	case r.Method == http.MethodGet:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Node", "apiVersion": "v1", "metadata": map[string]any{"name": s.node, "labels": s.labels}})
	default:
		refuse(http.StatusForbidden, fmt.Sprintf("cannot %s resource \"nodes\"", r.Method))
	}
}
