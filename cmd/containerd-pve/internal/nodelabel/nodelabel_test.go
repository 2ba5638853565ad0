package nodelabel

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/integration/kubeapi"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// cluster is an API server with a node, and the node of that name as a pod sees it.
func cluster(t *testing.T, name string) (*kubeapi.Server, *Node, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := kubeapi.Start("node-1", dir)
	must(t, err)
	t.Cleanup(s.Close)
	n, err := InCluster(name, dir, env(s.Host, s.Port))
	must(t, err)
	n.pause = time.Millisecond
	return s, n, dir
}

func env(host, port string) func(string) string {
	return func(key string) string {
		return map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}[key]
	}
}

func value(s string) *string { return &s }

// TestSet: labels are set and removed, and others stay.
func TestSet(t *testing.T) {
	s, n, dir := cluster(t, "node-1")
	ctx := context.Background()
	must(t, n.Check(ctx))
	must(t, n.Set(ctx, map[string]*string{"example.org/a": value("true"), "b": value("x")}))
	must(t, n.Set(ctx, map[string]*string{"b": nil, "none": nil}))
	if l := s.Labels(); l["example.org/a"] != "true" || l["kubernetes.io/hostname"] != "node-1" || len(l) != 2 {
		t.Errorf("%v", l)
	}
	// The kubelet has brought a new token.
	s.Expire("new")
	must(t, os.WriteFile(filepath.Join(dir, "token"), []byte("new"), 0o600))
	must(t, n.Check(ctx))
}

// TestAgain: what may pass is tried again, and not for ever.
func TestAgain(t *testing.T) {
	s, n, _ := cluster(t, "node-1")
	for _, status := range []int{409, 429, 500, 503} {
		s.Calls()
		s.Fail(status, status)
		must(t, n.Set(context.Background(), map[string]*string{"a": value("b")}))
		if got := s.Calls(); !slices.Equal(got, []string{"PATCH", "PATCH", "PATCH"}) {
			t.Errorf("%d: %q", status, got)
		}
	}
	s.Fail(slices.Repeat([]int{409}, tries)...)
	s.Calls()
	if err := n.Set(context.Background(), nil); !errdefs.IsConflict(err) || len(s.Calls()) != tries {
		t.Errorf("%v", err)
	}
	s.Close()
	if err := n.Check(context.Background()); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	n.pause = time.Hour
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := n.Check(ctx); err == nil || ctx.Err() == nil {
		t.Errorf("%v", err)
	}
}

// TestRefused: what will not pass is said once, by its kind, with what the server says.
func TestRefused(t *testing.T) {
	ctx := context.Background()
	s, n, dir := cluster(t, "node-2")
	if err := n.Check(ctx); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"node-2" not found`) {
		t.Errorf("%v", err)
	}
	s.Expire("another")
	if err := n.Check(ctx); !errdefs.IsUnauthorized(err) {
		t.Errorf("%v", err)
	}
	for status, is := range map[int]func(error) bool{403: errdefs.IsPermissionDenied, 422: errdefs.IsInvalidArgument} {
		s.Calls()
		s.Fail(status)
		if err := n.Check(ctx); !is(err) || len(s.Calls()) != 1 {
			t.Errorf("%d: %v", status, err)
		}
	}
	must(t, os.Remove(filepath.Join(dir, "token")))
	if err := n.Check(ctx); !errdefs.IsFailedPrecondition(err) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	// Another server than the one whose CA is known.
	other, _, _ := cluster(t, "node-1")
	stranger, err := InCluster("node-1", dir, env("localhost", other.Port)) // its certificate is for 127.0.0.1
	must(t, err)
	stranger.pause = time.Millisecond
	must(t, os.WriteFile(filepath.Join(dir, "token"), []byte("secret"), 0o600))
	other.Calls()
	if err := stranger.Check(ctx); !errdefs.IsUnavailable(err) || len(other.Calls()) > 0 {
		t.Errorf("%v", err)
	}
	for _, c := range []struct{ name, host, ca string }{{"", "h", ""}, {"n", "", ""}, {"n", "h", "-"}, {"n", "h", "no certificate"}} {
		if c.ca == "-" {
			must(t, os.Remove(filepath.Join(dir, "ca.crt")))
		} else if c.ca != "" {
			must(t, os.WriteFile(filepath.Join(dir, "ca.crt"), []byte(c.ca), 0o600))
		}
		if _, err := InCluster(c.name, dir, env(c.host, "1")); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%v: %v", c, err)
		}
	}
}
