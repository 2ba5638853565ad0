package zfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Module is the version of the ZFS module that is loaded. NotImplemented: its ABI
// is not known here, so that the zfs program has to serve.
func Module() (version string, err error) {
	b, err := os.ReadFile("/sys/module/zfs/version")
	if err != nil {
		return "", fmt.Errorf("version of the ZFS module: %w: %w", err, errdefs.ErrUnavailable)
	}
	version = strings.TrimSpace(string(b))
	return version, checkVersion(version)
}

// Pool is the state of an imported pool.
type Pool struct {
	Name     string
	Health   string // in ZFS's word: ONLINE, DEGRADED, SUSPENDED, FAULTED, UNAVAIL
	ReadOnly bool
	Capacity int // per cent in use
	Free     int64
}

// HealthSuspended is the health of a pool that waits for devices it has lost.
const HealthSuspended = "SUSPENDED"

// InspectPool looks at the pool of a dataset. Of one that is suspended only the
// health is told: the zpool program would have to wait for it.
func InspectPool(ctx context.Context, dataset string) (Pool, error) {
	p := Pool{Name: pool(dataset)}
	// Unlike the program, this file answers always.
	if state, err := os.ReadFile(filepath.Join("/proc/spl/kstat/zfs", p.Name, "state")); err == nil {
		p.Health = strings.TrimSpace(string(state))
	}
	if p.Health == HealthSuspended {
		return p, nil
	}
	cmd := exec.CommandContext(ctx, "zpool", "get", "-Hp", "-o", "property,value", "health,readonly,capacity,free", p.Name)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return p, notInstalled("zpool")
	}
	if err != nil {
		return p, fmt.Errorf("zpool get of %s: %s (%w)", p.Name, strings.TrimSpace(stderr.String()), err)
	}
	return parsePool(p, string(out))
}

// Pools are the names of the imported pools.
func Pools(ctx context.Context) ([]string, error) {
	cmd := exec.CommandContext(ctx, "zpool", "list", "-H", "-o", "name")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, notInstalled("zpool")
	}
	if err != nil {
		return nil, fmt.Errorf("zpool list: %s (%w)", strings.TrimSpace(stderr.String()), err)
	}
	return strings.Fields(string(out)), nil
}

// parsePool reads `zpool get -Hp -o property,value`.
func parsePool(p Pool, out string) (Pool, error) {
	var err [2]error
	for line := range strings.Lines(out) {
		property, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		switch property {
		case "health":
			p.Health = value
		case "readonly":
			p.ReadOnly = value == "on"
		case "capacity":
			p.Capacity, err[0] = strconv.Atoi(value)
		case "free":
			p.Free, err[1] = strconv.ParseInt(value, 10, 64)
		}
	}
	if err := errors.Join(err[:]...); err != nil {
		return p, fmt.Errorf("`zpool get` of %s: %w: %w", p.Name, err, errdefs.ErrInternal)
	}
	return p, nil
}
