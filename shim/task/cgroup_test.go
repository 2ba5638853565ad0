package task

import (
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
)

// TestLimitsToo: statistics have the limits that Proxmox knows, which are those of the processes' own cgroup.
func TestLimitsToo(t *testing.T) {
	for _, c := range []struct {
		name             string
		files            map[string]string
		usage, swap      uint64
		wantUse, wantSwp uint64
	}{
		{"limited below", map[string]string{"memory.max": "67108864\n", "memory.swap.max": "0\n"}, math.MaxUint64, math.MaxUint64, 67108864, 0},
		{"limited above", map[string]string{"memory.max": "max\n", "memory.swap.max": "max\n"}, 1 << 20, 1 << 21, 1 << 20, 1 << 21},
		{"the lower counts", map[string]string{"memory.max": "4096\n", "memory.swap.max": "8192\n"}, 1 << 20, 4096, 4096, 4096},
		{"it has ended", nil, 1 << 20, math.MaxUint64, 1 << 20, math.MaxUint64},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range c.files {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			m := &stats.MemoryStat{UsageLimit: c.usage, SwapLimit: c.swap}
			limitsToo(m, dir)
			if m.UsageLimit != c.wantUse || m.SwapLimit != c.wantSwp {
				t.Errorf("%d and %d, want %d and %d", m.UsageLimit, m.SwapLimit, c.wantUse, c.wantSwp)
			}
		})
	}
	limitsToo(nil, t.TempDir()) // no memory controller
}
