//go:build bed

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/docker/go-units"
	"go.yaml.in/yaml/v3"

	"github.com/containerd-pve/containerd-pve/deploy"
)

// TestLongOverhead: what our programs take of a host's memory for a pod of one container is less than the RuntimeClass says that
// a pod takes besides its containers.
func TestLongOverhead(t *testing.T) {
	text, err := deploy.Files.ReadFile("kubernetes/runtimeclass.yaml")
	must(t, err)
	var class struct {
		Overhead struct {
			PodFixed struct{ Memory string } `yaml:"podFixed"`
		}
	}
	must(t, yaml.Unmarshal(text, &class))
	said, err := units.RAMInBytes(strings.TrimSuffix(class.Overhead.PodFixed.Memory, "i") + "iB")
	must(t, err)
	for _, sandboxer := range []string{"shim", "podsandbox"} {
		node(t, Options{Sandboxer: sandboxer}, map[string]func(*bed){"overhead": func(b *bed) {
			p, err := b.RunPod(b.ctx, "overhead", nil)
			defer func() { must(b.T, p.Remove(b.ctx)) }()
			must(b.T, err)
			for i, name := range []string{"one", "two"} {
				c, err := p.Start(b.ctx, name, busybox, []string{"sleep", "1000"}, nil)
				must(b.T, err)
				for range 10 { // as probes do
					_, _, err := c.Exec(b.ctx, "true")
					must(b.T, err)
				}
				got, parts := memory(b.T)
				b.Logf("%s, %d containers: %.1f MiB:%s", sandboxer, i+1, float64(got)/(1<<20), parts)
				if i == 0 && got > said {
					b.Errorf("%s: a pod takes %d bytes, the RuntimeClass says %d", sandboxer, got, said)
				}
			}
		}})
	}
}

// memory is what our programs have of it, shared pages by their share, and the same of each.
func memory(t *testing.T) (sum int64, parts string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/exe")
	must(t, err)
	for _, f := range files {
		program, _ := os.Readlink(f) // it may have ended
		name := filepath.Base(program)
		// What holds a pod's namespaces has no file that this process could name.
		if command, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "cmdline")); strings.HasPrefix(string(command), "pve-init\x00wait\x00") {
			name = "pve-init"
		}
		if !slices.Contains([]string{"containerd-shim-pve-v2", "lxc-start", "pve-init"}, name) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(filepath.Dir(f), "smaps_rollup"))
		must(t, err)
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); f[0] == "Pss:" {
				n, err := strconv.ParseInt(f[1], 10, 64)
				must(t, err)
				sum += n << 10
				parts += fmt.Sprintf(" %s %.1f", name, float64(n)/(1<<10))
			}
		}
	}
	return sum, parts
}
