package setup

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// Handler is the name of our runtime in the configuration of containerd's CRI
// plugin, by which a RuntimeClass means it.
const Handler = "pve"

// criPlugin is the plugin's name in files of version 2.
const criPlugin = "io.containerd.grpc.v1.cri"

// cri is what of the CRI plugin's configuration is of interest here.
type cri struct {
	Containerd struct {
		Runtimes map[string]any `toml:"runtimes"`
	} `toml:"containerd"`
}

// knows says whether the CRI plugin has a runtime of that name.
func (e effective) knows(name string) bool {
	return e.Plugins.Runtime.Containerd.Runtimes[name] != nil || e.Plugins.CRI.Containerd.Runtimes[name] != nil
}

// planPods has containerd's CRI plugin know our runtime. Errors: FailedPrecondition,
// the plugin is switched off, or the configuration is too old.
func (h *Host) planPods(p *Plan, r record) error {
	c := p.containerd
	for _, d := range c.dump.Disabled {
		if slices.Contains([]string{"cri", criPlugin, "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"}, d) {
			return fmt.Errorf("%s has %q among its disabled_plugins, without which there are no pods: take it out: %w", c.config, d, errdefs.ErrFailedPrecondition)
		}
	}
	if c.dump.Version < 2 {
		return fmt.Errorf("%s is of version %d, for which there is no CRI plugin of ours: `containerd config migrate` writes a newer one: %w", c.config, c.dump.Version, errdefs.ErrFailedPrecondition)
	}
	var section map[string]any
	if c.dump.Version == 2 {
		var err error
		if section, err = h.criSection(c.config, map[string]bool{podsDropIn: true}); err != nil {
			return fmt.Errorf("configuration of containerd's CRI plugin: %w", err)
		}
	}
	text, err := c.podsText(section)
	if err != nil {
		return err
	}
	return h.plan(p, r, podsDropIn, text, "containerd's CRI plugin knows the runtime "+Handler)
}

// planAllPods has our snapshotter keep the images and containers of all pods. Errors: FailedPrecondition, containerd is too old.
func (h *Host) planAllPods(p *Plan, r record) error {
	v := p.containerd.fileVersion()
	if v == 0 {
		return fmt.Errorf("containerd 1.7 takes the configuration of its CRI plugin from one file: write snapshotter = %q into [plugins.%q.containerd] of %s, and leave out --default-snapshotter: %w", snapshotterName, criPlugin, p.containerd.config, errdefs.ErrFailedPrecondition)
	}
	text := fmt.Sprintf("# By containerd-pve install --default-snapshotter: images and containers of all pods, of whichever runtime, are our snapshotter's.\n"+
		"# containerd measures the disks of one snapshotter's containers only, its default one's.\nversion = %d\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = %q\n", v, snapshotterName)
	return h.plan(p, r, allPodsDropIn, text, "the images and containers of all pods are our snapshotter's")
}

// planNotAllPods takes back what planAllPods had written. Errors: FailedPrecondition, it was changed since.
func (h *Host) planNotAllPods(p *Plan, r record) error {
	s, there, err := h.removal(allPodsDropIn, r)
	if err != nil || !there {
		return err
	}
	if s.Action != Remove {
		return fmt.Errorf("%s was not written by us, or changed since: remove it yourself, and restart containerd: %w", allPodsDropIn, errdefs.ErrFailedPrecondition)
	}
	s.Why = "pods get containerd's own snapshotter again; those that there are stay on ours until they end"
	p.add(s)
	return nil
}

// criSection is what a file, or the last that it imports and that has one, says of the CRI plugin: containerd 1.7 takes a
// plugin's whole table from one file. seen are files not to be read (again).
func (h *Host) criSection(file string, seen map[string]bool) (map[string]any, error) {
	var section map[string]any
	for pending := []string{file}; len(pending) > 0; { // in containerd's order
		file, pending = pending[0], pending[1:]
		if seen[file] {
			continue
		}
		seen[file] = true
		b, err := os.ReadFile(h.at(file))
		if os.IsNotExist(err) {
			continue
		}
		var text struct {
			imported
			Plugins map[string]map[string]any `toml:"plugins"`
		}
		if err == nil {
			err = toml.Unmarshal(b, &text)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if s := text.Plugins[criPlugin]; s != nil {
			section = s
		}
		for _, i := range text.Imports {
			if !filepath.IsAbs(i) {
				i = filepath.Join(filepath.Dir(file), i)
			}
			matches, err := filepath.Glob(h.at(i))
			if err != nil {
				return nil, fmt.Errorf("%s imports %s: %w", file, i, err)
			}
			for _, m := range matches {
				rel, err := filepath.Rel(h.Root, m)
				if err != nil {
					return nil, err
				}
				pending = append(pending, "/"+rel)
			}
		}
	}
	return section, nil
}

// podsTemplate is for 2.x, which merges the tables of all files.
var podsTemplate = template.Must(template.New("").Parse(`# By containerd-pve install --pods: pods with a RuntimeClass whose handler is "{{.handler}}" get our runtime.
version = {{.version}}
[plugins.'{{.plugin}}'.containerd.runtimes.{{.handler}}]
  runtime_type = "io.containerd.pve.v2"
  snapshotter = "pve-zfs"
{{- if .shim}}
  # The shim holds the pod's namespaces: there is no pause container.
  sandboxer = "shim"
  disable_pause_image_pull = true
{{- end}}
# Without it the kubelet has no figures of the node at all: containerd does not say where this snapshotter's containers are.
[plugins.'io.containerd.cri.v1.images'.runtime_platforms.{{.handler}}]
  snapshotter = "pve-zfs"
`))

// podsText is our part of the CRI plugin's configuration. For 1.7 it has the section that others have, as it takes the place of
// that.
func (c *containerd) podsText(section map[string]any) (string, error) {
	if v := c.fileVersion(); v > 0 {
		plugin := "io.containerd.cri.v1.runtime"
		if v == 2 {
			plugin = criPlugin
		}
		var b strings.Builder
		err := podsTemplate.Execute(&b, map[string]any{"handler": Handler, "version": v, "plugin": plugin, "shim": c.dump.Version >= 4}) // 4: containerd 2.3
		return b.String(), err
	}
	whole, _ := copyTable(section)
	containerd, ok := copyTable(whole["containerd"])
	runtimes, also := copyTable(containerd["runtimes"])
	if !ok || !also {
		return "", fmt.Errorf("plugins.%q.containerd.runtimes is no table: %w", criPlugin, errdefs.ErrInvalidArgument)
	}
	if len(runtimes) == 0 { // with ours alone it would not have its own default
		maps.Copy(runtimes, c.dump.Plugins.CRI.Containerd.Runtimes)
	}
	runtimes[Handler] = map[string]any{"runtime_type": "io.containerd.pve.v2", "snapshotter": snapshotterName}
	containerd["runtimes"], whole["containerd"] = runtimes, containerd
	text, err := toml.Marshal(map[string]any{"plugins": map[string]any{criPlugin: whole}})
	return "# By containerd-pve install --pods: pods with a RuntimeClass whose handler is \"" + Handler + "\" get our runtime.\n" +
		"# containerd 1.7 takes a plugin's whole table from one file: this has what was said elsewhere. Change that there, and run it again.\n" + string(text), err
}

// copyTable gives a table of the same entries; false if v is none.
func copyTable(v any) (map[string]any, bool) {
	t, ok := v.(map[string]any)
	kept := map[string]any{}
	maps.Copy(kept, t)
	return kept, ok || v == nil
}
