package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"

	"github.com/containerd-pve/containerd-pve/cmd/containerd-pve/internal/setup"
	"github.com/containerd-pve/containerd-pve/deploy"
)

// TestManifests: deploy/kubernetes means the labels, the handler and the commands that are here.
func TestManifests(t *testing.T) {
	read := func(file string) string {
		t.Helper()
		b, err := deploy.Files.ReadFile("kubernetes/" + file)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	var class struct {
		Handler    string
		Scheduling struct {
			NodeSelector map[string]string `yaml:"nodeSelector"`
		}
	}
	if err := yaml.Unmarshal([]byte(read("runtimeclass.yaml")), &class); err != nil || class.Handler != setup.Handler || class.Scheduling.NodeSelector[runtimeLabel] != "true" {
		t.Errorf("%+v, %v", class, err)
	}
	for file, label := range map[string]string{"install.yaml": "install", "remove.yaml": "remove"} {
		text := read(file)
		if !strings.Contains(text, "\n        "+nodeLabel+": "+label+"\n") {
			t.Errorf("%s is for other nodes", file)
		}
		for line := range strings.Lines(text) {
			_, list, ok := strings.Cut(strings.TrimSpace(line), "args: ")
			if !ok {
				continue
			}
			var args []string
			if err := yaml.Unmarshal([]byte(list), &args); err != nil {
				t.Fatal(err)
			}
			if c, rest, err := root().Find(args); err != nil || len(rest) > 0 || c.Parent().Name() != "node" {
				t.Errorf("%s: %q: %v", file, args, err)
			}
		}
	}
}

// TestNodeRefused: outside a pod nothing is done.
func TestNodeRefused(t *testing.T) {
	for _, args := range [][]string{{"node", "install"}, {"node", "uninstall"}, {"node", "install", "--node", "node-1"}} {
		t.Setenv("KUBERNETES_SERVICE_HOST", "")
		c := root()
		c.SetArgs(args)
		err := c.Execute()
		var e exitError
		if !errdefs.IsFailedPrecondition(err) || !errors.As(err, &e) || e.status != statusRefused {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// TestHold: it ends with its context, and well.
func TestHold(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	c := root()
	c.SetArgs([]string{"node", "hold"})
	if err := c.ExecuteContext(ctx); err != nil || ctx.Err() == nil {
		t.Errorf("%v", err)
	}
}
