//go:build bed

package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// keepState writes a file into a dataset and takes a state, which that one may be made of.
func keepState(t *testing.T, dataset, state, by string) {
	t.Helper()
	mounted(t, dataset, 0, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte(state), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	command(t, "zfs", "snapshot", "-o", PropTaken+"=text ", "-o", PropClone+"="+by, dataset+"@"+state)
}

func isOf(t *testing.T, dataset, state string) {
	t.Helper()
	mounted(t, dataset, unix.MS_RDONLY, func(dir string) {
		if got := read(t, dir)["file"]; got != state {
			t.Errorf("%s has the files of %q, not of %q", dataset, got, state)
		}
	})
}

// family is a container with the states a and b, a clone of each, with states of the same
// names, and a clone of a clone.
func family(t *testing.T, s Store) map[string]string {
	t.Helper()
	layer(t, s, "layer", "")
	of := map[string]string{"source": prepare(t, s, "source", "layer")}
	clone := func(key, from, state string) {
		m, err := s.Prepare(context.Background(), key, "layer", snapshots.WithLabels(map[string]string{LabelCloneOf: of[from] + "@" + state}))
		if err != nil {
			t.Fatal(err)
		}
		of[key] = m[0].Source
	}
	keepState(t, of["source"], "a", "/ofA")
	keepState(t, of["source"], "b", "/ofB")
	keepState(t, of["source"], "c", "/none")
	clone("ofA", "source", "a")
	clone("ofB", "source", "b")
	for _, key := range []string{"ofA", "ofB"} {
		isOf(t, of[key], strings.ToLower(strings.TrimPrefix(key, "of")))
		keepState(t, of[key], "a", "/of-"+key)
		keepState(t, of[key], "b", "/none")
	}
	clone("of-ofA", "ofA", "a")
	return of
}

// states are the files that each of family has when all is made.
var states = map[string]string{"source": "c", "ofA": "b", "ofB": "b", "of-ofA": "a"}

// TestCloneOrders: in whichever of some orders containers and clones are removed, one after the other or
// two at once, each dataset is gone then, the others have their files, and nothing is left.
func TestCloneOrders(t *testing.T) {
	pool := makePool(t)
	for _, way := range []string{zfs.NativeOnly, zfs.GoZFS} {
		all := orders([]string{"source", "ofA", "ofB", "of-ofA"})
		every := 4 // each begins with another, and six of them do
		if way == zfs.GoZFS {
			every = 23
		}
		for i, order := range all {
			if i%every != 0 {
				continue
			}
			name := fmt.Sprintf("%s, %v", way, order)
			dataset := fmt.Sprintf("%s/%s-%d", pool, way, i)
			s := openStore(t, way, dataset)
			of := family(t, s)
			for n := 0; n < len(order); {
				gone := order[n : n+1+(i/every+n)%2*min(1, len(order)-n-1)]
				n += len(gone)
				remove(t, s, gone...)
				cleanup(t, s)
				list := strings.Fields(command(t, "zfs", "list", "-Hro", "name", "-t", "filesystem", dataset))
				if len(list) != 2+len(order)-n {
					t.Errorf("%s: after %v there are %v", name, gone, list)
				}
				for _, key := range order[n:] {
					isOf(t, of[key], states[key])
					if key == "ofA" || key == "ofB" {
						command(t, "zfs", "list", "-t", "snapshot", of[key]+"@a", of[key]+"@b")
					}
				}
			}
			if left := command(t, "zfs", "list", "-Hro", "name", "-t", "filesystem,snapshot", dataset); strings.Contains(left, orphaned) || len(strings.Fields(left)) != 3 {
				t.Errorf("%s: left\n%s", name, left)
			}
			remove(t, s, "layer")
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestCloneFaults: whichever call to ZFS fails, before its effect or after it, while a container
// goes whose clone lives, the next Cleanup ends it.
func TestCloneFaults(t *testing.T) {
	pool := makePool(t)
	ctx := context.Background()
	calls := 0
	for _, after := range []bool{false, true} {
		for at, injected := 1, true; injected; at++ {
			name, dataset := fmt.Sprintf("call %d, after %v", at, after), fmt.Sprintf("%s/%d%v", pool, at, after)
			f := &faults{}
			s, err := New(ctx, watched{open(t, zfs.NativeOnly), f.around}, t.TempDir(), dataset)
			if err != nil {
				t.Fatal(err)
			}
			s.(*snapshotter).spares.close() // its calls are not to be counted
			cleanup(t, s)
			layer(t, s, "layer", "")
			source := prepare(t, s, "source", "layer")
			keepState(t, source, "a", "/copy")
			keepState(t, source, "b", "/none")
			m, err := s.Prepare(ctx, "copy", "layer", snapshots.WithLabels(map[string]string{LabelCloneOf: source + "@a"}))
			if err != nil {
				t.Fatal(err)
			}
			command(t, "zfs", "snapshot", "-o", PropTaken+"=text ", m[0].Source+"@a")
			remove(t, s, "source")
			f.arm(at, after)
			_ = s.Cleanup(ctx)
			injected = f.calls >= at
			calls = max(calls, f.calls)
			f.arm(0, false)
			cleanup(t, s)
			if list := command(t, "zfs", "list", "-Hro", "name", "-t", "filesystem", dataset); strings.Contains(list+"\n", source+"\n") {
				t.Errorf("%s: the container's dataset is there: %s", name, list)
			}
			isOf(t, m[0].Source, "a")
			remove(t, s, "copy")
			cleanup(t, s)
			if left := command(t, "zfs", "list", "-Hro", "name", "-t", "filesystem,snapshot", dataset); len(strings.Fields(left)) != 3 {
				t.Errorf("%s: left\n%s", name, left)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	if calls < 6 {
		t.Errorf("only %d calls", calls)
	}
}
