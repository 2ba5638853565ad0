package pve

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Storage is a storage of type zfspool: volumes are filesystems right below Pool.
type Storage struct {
	Name string
	Pool string // a dataset
}

// As in PVE::SectionConfig: "type: name", and below it indented lines of a property each.
var (
	storageHeader   = regexp.MustCompile(`^([a-z][a-z0-9_-]*):\s*(\S+)\s*$`)
	storageProperty = regexp.MustCompile(`^\s+([a-zA-Z0-9_-]+)(?:\s+(.*?))?\s*$`)
)

// Storages are those of type zfspool that node may put containers on, in the order of storage.cfg.
func (n *Node) Storages(node string) ([]Storage, error) {
	text, err := os.ReadFile(filepath.Join(n.Root, "storage.cfg"))
	if err != nil {
		if err = n.failed("reading the storages", err); errdefs.IsNotFound(err) {
			err = nil
		}
		return nil, err
	}
	return parseStorages(string(text), node), nil
}

func parseStorages(text, node string) []Storage {
	type section struct {
		kind, name string
		of         map[string]string
	}
	var all []section
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(strings.TrimSpace(line), "#") {
			continue
		}
		if m := storageHeader.FindStringSubmatch(line); m != nil {
			all = append(all, section{m[1], m[2], map[string]string{}})
		} else if m := storageProperty.FindStringSubmatch(line); m != nil && len(all) > 0 {
			all[len(all)-1].of[m[1]] = m[2]
		}
	}
	list := func(s string) []string {
		return strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(",; ", r) })
	}
	var storages []Storage
	for _, s := range all {
		nodes, restricted := s.of["nodes"]
		_, disabled := s.of["disable"]
		if disabled && s.of["disable"] == "0" {
			disabled = false
		}
		// Without content a zfspool takes images and containers (ZFSPoolPlugin.pm, plugindata).
		content, said := s.of["content"]
		if s.kind != "zfspool" || s.of["pool"] == "" || disabled ||
			restricted && !slices.Contains(list(nodes), node) || said && !slices.Contains(list(content), "rootdir") {
			continue
		}
		storages = append(storages, Storage{Name: s.name, Pool: s.of["pool"]})
	}
	return storages
}

// PoolOf is the pool that a dataset is of.
func PoolOf(dataset string) string {
	pool, _, _ := strings.Cut(dataset, "/")
	return pool
}

// Storage is the one of that name, or, if name is empty, the first that lies on
// the pool that dataset is of: only there can be clones of its snapshots. Errors:
// NotFound, FailedPrecondition for one on another pool.
func (n *Node) Storage(node, name, dataset string) (Storage, error) {
	all, err := n.Storages(node)
	if err != nil {
		return Storage{}, err
	}
	for _, s := range all {
		if name != "" && s.Name != name {
			continue
		}
		if PoolOf(s.Pool) == PoolOf(dataset) {
			return s, nil
		}
		if name != "" {
			return Storage{}, fmt.Errorf("storage %s is on pool %s, the snapshots are in %s: a clone stays in its pool: %w", name, PoolOf(s.Pool), dataset, errdefs.ErrFailedPrecondition)
		}
	}
	if name == "" {
		name = "of type zfspool on pool " + PoolOf(dataset)
	}
	return Storage{}, fmt.Errorf("this node has no storage %s for containers (content rootdir) in storage.cfg: add one in the GUI under Datacenter, Storage: %w", name, errdefs.ErrNotFound)
}
