//go:build bed

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// recorder writes, for every hook that runs it, the state from stdin and where it
// runs into a file of the hook's name.
const recorder = `#!/bin/sh
dir=$(dirname "$0")
name=$1
{ cat; echo; echo "$@"; echo "$MARK"; readlink /proc/self/ns/mnt /proc/self/ns/net; test -e /etc/os-release-of-the-host && echo host || echo container; } >"$dir/$name"
echo "$name" >>"$dir/order"
`

// TestHooks: all six kinds run in order, in their namespaces, with their state.
func TestHooks(t *testing.T) {
	dir := t.TempDir()
	for d := dir; d != filepath.Clean(os.TempDir()); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(dir, "recorder")
	if err := os.WriteFile(program, []byte(recorder), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/etc/os-release-of-the-host", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove("/etc/os-release-of-the-host") })
	hook := func(path, name string) []specs.Hook {
		return []specs.Hook{{Path: path, Args: []string{"argv0", name, "a b"}, Env: []string{"PATH=/usr/bin:/bin", "MARK=" + name}}}
	}
	b, err := create(t, options{id: "hooked", args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) {
		s.Annotations = map[string]string{"some.key": "some value"}
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: dir, Destination: "/hooks", Options: []string{"rbind"}})
		s.Hooks = &specs.Hooks{
			//nolint:staticcheck // prestart is deprecated and still used
			Prestart:      hook(program, "prestart"),
			CreateRuntime: hook(program, "createRuntime"), CreateContainer: hook(program, "createContainer"),
			StartContainer: hook("/hooks/recorder", "startContainer"), Poststart: hook(program, "poststart"), Poststop: hook(program, "poststop"),
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	order := func() string {
		text, _ := os.ReadFile(filepath.Join(dir, "order"))
		return strings.Join(strings.Fields(string(text)), " ")
	}
	if got, want := order(), "prestart createRuntime createContainer"; got != want {
		t.Errorf("hooks at create: %s, want %s", got, want)
	}
	pid := b.task.Pid()
	inside, outside := namespacesOf(t, pid, "mnt", "net"), namespacesOf(t, uint32(os.Getpid()), "mnt", "net")
	if err := b.task.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	if got, want := order(), "prestart createRuntime createContainer startContainer poststart"; got != want {
		t.Errorf("hooks at start: %s, want %s", got, want)
	}
	if err := b.task.Kill(b.ctx, 9); err != nil {
		t.Fatal(err)
	}
	b.wait()
	if got, want := order(), "prestart createRuntime createContainer startContainer poststart poststop"; got != want {
		t.Errorf("hooks at delete: %s, want %s", got, want)
	}
	for _, c := range []struct {
		name   string
		status specs.ContainerState
		pid    int
		ns     []string
		root   string
	}{
		{"prestart", specs.StateCreating, int(pid), outside, "host"},
		{"createRuntime", specs.StateCreating, int(pid), outside, "host"},
		{"createContainer", specs.StateCreating, 1, inside, "host"}, // before the pivot
		{"startContainer", specs.StateCreated, 1, inside, "container"},
		{"poststart", specs.StateRunning, int(pid), outside, "host"},
		{"poststop", specs.StateStopped, 0, outside, "host"},
	} {
		text, err := os.ReadFile(filepath.Join(dir, c.name))
		if err != nil {
			t.Error(err)
			continue
		}
		first, rest, _ := strings.Cut(string(text), "\n")
		var st specs.State
		if err := json.Unmarshal([]byte(first), &st); err != nil {
			t.Errorf("%s: state %q: %v", c.name, first, err)
		}
		if st.Version != specs.Version || st.ID != "hooked" || st.Status != c.status || st.Pid != c.pid ||
			st.Bundle != "/run/containerd/io.containerd.runtime.v2.task/default/hooked" || st.Annotations["some.key"] != "some value" {
			t.Errorf("%s: state %s", c.name, first)
		}
		wholly(t, c.name, rest, c.name+" a b", c.name, c.ns[0], c.ns[1], c.root)
	}
}

// TestHooksOfALostShim: who cleans up after a shim that was killed owes the
// container its last hooks.
func TestHooksOfALostShim(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "poststop")
	b := start(t, options{id: "lostshim", image: busybox, args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) {
		s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat >" + marker}, Env: []string{"PATH=/bin:/usr/bin"}}}}
	}})
	out, code := command("pgrep", "-f", "containerd-shim-pve-v2.* -id lostshim")
	var pid int
	if _, err := fmt.Sscan(out, &pid); code != 0 || err != nil {
		t.Fatalf("no shim: %q", out)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the last hook has run", func() bool {
		text, _ := os.ReadFile(marker)
		return strings.Contains(string(text), `"status":"stopped"`)
	})
	eventually(t, time.Minute, "the task is gone", func() bool {
		_, err := b.container.Task(b.ctx, nil)
		return errdefs.IsNotFound(err)
	})
	b.task = nil
	removeFIFOs()
}

// TestHooksThatFail: what fails before the start fails the create or the start,
// names the hook, and leaves nothing; what fails at the end is only told.
func TestHooksThatFail(t *testing.T) {
	run(t, options{args: []string{"true"}}) // whatever is made once is made now
	before := count(t)
	dir := t.TempDir()
	marker := filepath.Join(dir, "poststop")
	one := 1
	for _, c := range []struct {
		kind    string
		args    []string
		timeout *int
		at      string // create, start or delete
		want    string
	}{
		{"prestart", []string{"sh", "-c", "echo why >&2; exit 3"}, nil, "create", "why"},
		{"createRuntime", []string{"sh", "-c", "sleep 1000"}, &one, "create", "deadline"},
		{"createContainer", []string{"sh", "-c", "echo why >&2; exit 3"}, nil, "create", "exited with status 3: why"},
		{"createContainer", []string{"sh", "-c", "sleep 1000"}, &one, "create", "signal 9"},
		{"startContainer", []string{"sh", "-c", "echo why; exit 4"}, nil, "start", "exited with status 4: why"},
		{"poststart", []string{"sh", "-c", "echo why; exit 5"}, nil, "start", "why"},
		{"poststop", []string{"sh", "-c", "exit 6"}, nil, "delete", ""},
	} {
		t.Run(fmt.Sprintf("%s %v", c.kind, c.timeout != nil), func(t *testing.T) {
			os.Remove(marker)
			began := time.Now()
			b, err := create(t, options{args: []string{"sleep", "1000"}, edit: func(s *oci.Spec) {
				s.Hooks = &specs.Hooks{}
				h := []specs.Hook{{Path: "/bin/sh", Args: c.args, Timeout: c.timeout, Env: []string{"PATH=/bin:/usr/bin"}}}
				switch c.kind {
				case "prestart":
					//nolint:staticcheck // prestart is deprecated and still used
					s.Hooks.Prestart = h
				case "createRuntime":
					s.Hooks.CreateRuntime = h
				case "createContainer":
					s.Hooks.CreateContainer = h
				case "startContainer":
					s.Hooks.StartContainer = h
				case "poststart":
					s.Hooks.Poststart = h
				case "poststop":
					s.Hooks.Poststop = h
				}
				s.Hooks.Poststop = append(s.Hooks.Poststop, specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "touch " + marker}, Env: []string{"PATH=/bin:/usr/bin"}})
			}})
			at := "create"
			if err == nil {
				at = "start"
				err = b.task.Start(b.ctx)
			}
			if err == nil {
				at = "delete"
				if _, derr := b.task.Delete(b.ctx, client.WithProcessKill); derr != nil {
					t.Error(derr)
				}
				b.task = nil
			} else if !strings.Contains(err.Error(), "hooks."+c.kind+"[0]") || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v", err)
			}
			if at != c.at {
				t.Errorf("failed at %s: %v", at, err)
			}
			if at == "start" {
				select {
				case <-b.exit: // the container was stopped
				case <-time.After(time.Minute):
					t.Error("the container still runs")
				}
				if _, err := b.task.Delete(b.ctx); err != nil {
					t.Error(err)
				}
				b.task = nil
			}
			if c.timeout != nil && time.Since(began) > 2*time.Minute {
				t.Error("the time limit did not hold")
			}
			if _, err := os.Stat(marker); err != nil {
				t.Errorf("the hooks of the end did not run: %v", err)
			}
		})
	}
	same(t, before)
}
