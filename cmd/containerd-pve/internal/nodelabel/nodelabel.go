// Package nodelabel sets labels of one node of a Kubernetes cluster. It owns its
// connection to the API server, and never touches anything but the labels that it
// is given. It speaks HTTP by itself: two requests of the whole API are no reason
// for client-go, which would be most of this program.
package nodelabel

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// ServiceAccount is where a pod finds its account's token and the API server's CA.
const ServiceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

const (
	requestLimit = 10 * time.Second
	tries        = 8
	answerLimit  = 64 << 10
)

// Node is one node, by its cluster's API server.
type Node struct {
	url    string
	token  string // its file, which the kubelet replaces before it expires
	client *http.Client
	pause  time.Duration // before the second try; it doubles
}

// InCluster is the node of that name, for a pod: dir is where its service account is, and getenv has the
// API server's address. Errors: FailedPrecondition, this is no pod with a service account.
func InCluster(name, dir string, getenv func(string) string) (*Node, error) {
	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" || name == "" {
		return nil, fmt.Errorf("this is no pod of the installer's: KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT or the node's name (NODE_NAME, --node) is not set: %w", errdefs.ErrFailedPrecondition)
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("the service account's CA: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s has no certificate: %w", filepath.Join(dir, "ca.crt"), errdefs.ErrFailedPrecondition)
	}
	return &Node{
		url:    "https://" + net.JoinHostPort(host, port) + "/api/v1/nodes/" + url.PathEscape(name),
		token:  filepath.Join(dir, "token"),
		client: &http.Client{Timeout: requestLimit, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}},
		pause:  250 * time.Millisecond,
	}, nil
}

// Check asks for the node. Errors: as of Set.
func (n *Node) Check(ctx context.Context) error { return n.retry(ctx, http.MethodGet, nil) }

// Set sets labels, and removes those whose value is nil; others stay. What may pass (a conflict, a server that is busy or
// away) is tried again for half a minute. Errors: Unauthenticated, PermissionDenied, NotFound (no such node),
// InvalidArgument, Unavailable; the context's.
func (n *Node) Set(ctx context.Context, labels map[string]*string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": labels}})
	if err != nil {
		return err
	}
	return n.retry(ctx, http.MethodPatch, patch)
}

func (n *Node) retry(ctx context.Context, method string, body []byte) error {
	pause := n.pause
	for try := 1; ; try++ {
		again, err := n.request(ctx, method, body)
		if err == nil {
			return nil
		}
		if cause := ctx.Err(); cause != nil {
			err = cause
		}
		if !again || try == tries || ctx.Err() != nil {
			return fmt.Errorf("%s %s: %w", method, n.url, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause *= 2
	}
}

// request says too whether it may pass when it is tried again.
func (n *Node) request(ctx context.Context, method string, body []byte) (again bool, _ error) {
	token, err := os.ReadFile(n.token)
	if err != nil {
		return false, fmt.Errorf("the service account's token: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	r, err := http.NewRequestWithContext(ctx, method, n.url, bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	r.Header.Set("Accept", "application/json")
	if method == http.MethodPatch {
		r.Header.Set("Content-Type", "application/merge-patch+json")
	}
	answer, err := n.client.Do(r)
	if err != nil {
		return true, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer answer.Body.Close()
	if answer.StatusCode/100 == 2 {
		return false, nil
	}
	var status struct {
		Message string `json:"message"`
	}
	text, _ := io.ReadAll(io.LimitReader(answer.Body, answerLimit))
	if json.Unmarshal(text, &status) != nil || status.Message == "" {
		status.Message = "no reason was given"
	}
	again, kind := kindOf(answer.StatusCode)
	return again, fmt.Errorf("%s: %s: %w", answer.Status, status.Message, kind)
}

// kindOf is what an answer's status means, and whether it may pass.
func kindOf(status int) (again bool, kind error) {
	switch {
	case status == http.StatusUnauthorized:
		return false, errdefs.ErrUnauthenticated
	case status == http.StatusForbidden:
		return false, errdefs.ErrPermissionDenied
	case status == http.StatusNotFound:
		return false, errdefs.ErrNotFound
	case status == http.StatusConflict:
		return true, errdefs.ErrConflict
	case status == http.StatusTooManyRequests, status >= 500:
		return true, errdefs.ErrUnavailable
	}
	return false, errdefs.ErrInvalidArgument
}
