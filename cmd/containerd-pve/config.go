package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/lxc/pve/registry"
	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

const (
	defaultConfig  = "/etc/containerd-pve/config.toml"
	defaultAddress = "/run/containerd-pve/snapshotter.sock"
	defaultRoot    = "/var/lib/containerd-pve/snapshotter"
)

// config is the TOML file.
type config struct {
	// Dataset is the parent of all datasets of the snapshotter.
	Dataset string `toml:"dataset"`
	// Root holds the snapshotter's metadata.
	Root string `toml:"root"`
	// Address is the unix socket.
	Address string `toml:"address"`
	// Containerd is the socket of the containerd whose content store exported layers go to.
	Containerd string `toml:"containerd_address"`
	// ZFS is the way to ZFS: auto, native or go-zfs.
	ZFS string `toml:"zfs"`
	// Spares is how many filesystems are made before they are asked for, at most; snapshotter.DefaultSpares if nil.
	Spares *int `toml:"spares"`
	// LogLevel is one of trace, debug, info, warn, error.
	LogLevel string `toml:"log_level"`
	// LogFormat is text or json.
	LogFormat string `toml:"log_format"`
	// ProxmoxRoot is where the cluster's filesystem of Proxmox is.
	ProxmoxRoot string `toml:"proxmox_root"`
	// ProxmoxDatabase is where that keeps its files: a host that has it is a node of Proxmox.
	ProxmoxDatabase string `toml:"proxmox_database"`
	// Registry is the unix socket for shims on a node of Proxmox.
	Registry string `toml:"registry_address"`
	// VMIDRange is where VMIDs are taken from, FIRST-LAST; next-id of datacenter.cfg if empty.
	VMIDRange string `toml:"vmid_range"`
	// Storage is the name of the storage for containers' disks, of type zfspool on
	// the dataset's pool; the first of these if empty.
	Storage string `toml:"storage"`
	// MetricsAddress is where Prometheus finds the metrics: HOST:PORT, or the path
	// of a unix socket. None if empty.
	MetricsAddress string `toml:"metrics_address"`
}

// readConfig reads the file and those of the directory FILE.d in the order of
// their names (*.toml), of which the last to set a key decides; only a file that
// was asked for must exist.
func readConfig(path string, must bool) (config, error) {
	more, err := filepath.Glob(filepath.Join(escapeGlob(path)+".d", "*.toml"))
	if err != nil {
		return config{}, fmt.Errorf("configuration: %w", err)
	}
	var c config
	for i, file := range append([]string{path}, more...) {
		data, err := os.ReadFile(file)
		if i == 0 && errors.Is(err, os.ErrNotExist) && !must {
			continue
		}
		if err != nil {
			return config{}, fmt.Errorf("configuration: %w", err)
		}
		if err := c.parse(data); err != nil {
			return config{}, fmt.Errorf("configuration %s: %w", file, err)
		}
	}
	return c, nil
}

// escapeGlob has a path mean itself in a pattern.
func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
}

// parse sets what the file sets and refuses unknown keys by name.
func (c *config) parse(data []byte) error {
	d := toml.NewDecoder(strings.NewReader(string(data)))
	d.DisallowUnknownFields()
	err := d.Decode(c)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var keys []string
		for _, e := range strict.Errors {
			keys = append(keys, strings.Join(e.Key(), "."))
		}
		return fmt.Errorf("unknown key %s (known: dataset, root, address, containerd_address, zfs, spares, log_level, log_format, metrics_address, proxmox_root, proxmox_database, registry_address, vmid_range, storage): %w", strings.Join(keys, ", "), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// complete fills in what is not set and checks the rest.
func (c *config) complete() error {
	if c.Root == "" {
		c.Root = defaultRoot
	}
	if c.Address == "" {
		c.Address = defaultAddress
	}
	if c.Containerd == "" {
		c.Containerd = defaultContainerd
	}
	if c.ProxmoxRoot == "" {
		c.ProxmoxRoot = "/etc/pve"
	}
	if c.ProxmoxDatabase == "" {
		c.ProxmoxDatabase = pve.Database
	}
	if c.Registry == "" {
		c.Registry = registry.Address
	}
	if c.ZFS == "" {
		c.ZFS = zfs.Auto
	}
	if c.Spares == nil {
		most := snapshotter.DefaultSpares
		c.Spares = &most
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
	}
	if c.LogFormat == "" {
		c.LogFormat = "text"
	}
	if c.Dataset == "" {
		return fmt.Errorf("no dataset: run `containerd-pve install`, or set dataset = \"POOL/containerd-pve\" in %s, or give --dataset: %w", defaultConfig, errdefs.ErrInvalidArgument)
	}
	if strings.ContainsAny(c.Dataset, "@# \t\n") || strings.HasPrefix(c.Dataset, "/") || strings.HasPrefix(c.Dataset, "-") || strings.HasSuffix(c.Dataset, "/") {
		return fmt.Errorf("dataset %q is not the name of a filesystem as in `zfs list`: %w", c.Dataset, errdefs.ErrInvalidArgument)
	}
	for name, path := range map[string]string{"root": c.Root, "address": c.Address, "containerd_address": c.Containerd, "proxmox_root": c.ProxmoxRoot, "proxmox_database": c.ProxmoxDatabase, "registry_address": c.Registry} {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%s %q is not an absolute path: %w", name, path, errdefs.ErrInvalidArgument)
		}
	}
	if !slices.Contains([]string{zfs.Auto, zfs.NativeOnly, zfs.GoZFS}, c.ZFS) {
		return fmt.Errorf("zfs %q is none of %s, %s, %s: %w", c.ZFS, zfs.Auto, zfs.NativeOnly, zfs.GoZFS, errdefs.ErrInvalidArgument)
	}
	if *c.Spares < 0 {
		return fmt.Errorf("spares %d is no number of filesystems (0 has none made before they are asked for): %w", *c.Spares, errdefs.ErrInvalidArgument)
	}
	if _, err := parseVMIDs(c.VMIDRange); err != nil {
		return err
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		return fmt.Errorf("log_format %q is neither text nor json: %w", c.LogFormat, errdefs.ErrInvalidArgument)
	}
	if a := c.MetricsAddress; a != "" && !filepath.IsAbs(a) {
		if _, port, err := net.SplitHostPort(a); err != nil || port == "" {
			return fmt.Errorf("metrics_address %q is neither HOST:PORT nor the path of a socket: %w", a, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
