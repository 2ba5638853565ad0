package setup

import (
	"context"
	"fmt"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

const (
	snapshotterName = "pve-zfs"
	differName      = "pve-zfs-diff"
)

// containerd is the one that systemd starts.
type containerd struct {
	program string
	config  string // its file
	text    string // of the file
	there   bool
	dump    effective
}

// effective is what of the whole configuration, defaults included, is of interest here.
type effective struct {
	Version  int            `toml:"version"`
	Disabled []string       `toml:"disabled_plugins"`
	Proxies  map[string]any `toml:"proxy_plugins"`
	Plugins  struct {
		Runtime cri `toml:"io.containerd.cri.v1.runtime"`
		CRI     cri `toml:"io.containerd.grpc.v1.cri"`
		Diff    struct {
			Default []string `toml:"default"`
		} `toml:"io.containerd.service.v1.diff-service"`
		Transfer struct {
			Unpack []map[string]any `toml:"unpack_config"`
		} `toml:"io.containerd.transfer.v1.local"`
	} `toml:"plugins"`
}

var (
	execPath = regexp.MustCompile(`path=(\S+)`)
	execArgv = regexp.MustCompile(`argv\[\]=([^;]*);`)
)

// findContainerd asks systemd which program with which configuration it starts.
func (h *Host) findContainerd(ctx context.Context) (containerd, error) {
	out, err := h.Run(ctx, "systemctl", "show", containerdUnit, "--property=LoadState,ExecStart")
	if err != nil {
		return containerd{}, fmt.Errorf("systemctl show %s: %w", containerdUnit, err)
	}
	path, argv := execPath.FindStringSubmatch(out), execArgv.FindStringSubmatch(out)
	if !strings.Contains(out, "LoadState=loaded") || path == nil || argv == nil {
		return containerd{}, fmt.Errorf("systemd has no %s: run `apt-get install containerd`: %w", containerdUnit, errdefs.ErrFailedPrecondition)
	}
	c := containerd{program: path[1], config: "/etc/containerd/config.toml"}
	words := strings.Fields(argv[1])
	for i, w := range words {
		flag, value, given := strings.Cut(w, "=")
		if flag != "-c" && flag != "--config" && flag != "-config" {
			continue
		}
		if !given && i+1 < len(words) {
			value = words[i+1]
		}
		c.config = value
	}
	if c.text, c.there, err = h.read(c.config); err != nil {
		return c, fmt.Errorf("containerd's configuration: %w", err)
	}
	c.dump, err = h.dump(ctx, c)
	return c, err
}

// dump is the configuration as containerd understands it.
func (h *Host) dump(ctx context.Context, c containerd) (effective, error) {
	args := []string{"--config", c.config, "config", "dump"}
	if !c.there { // containerd 1.7 dumps none then
		args = []string{"config", "default"}
	}
	var e effective
	out, err := h.Run(ctx, c.program, args...)
	if err != nil {
		return e, fmt.Errorf("%s %s: %w", c.program, strings.Join(args, " "), err)
	}
	if err := toml.Unmarshal([]byte(out), &e); err != nil {
		return e, fmt.Errorf("output of %s %s: %w: %w", c.program, strings.Join(args, " "), err, errdefs.ErrInvalidArgument)
	}
	return e, nil
}

// dropIn is our part of containerd's configuration. A list in it takes the place
// of the one that an administrator set elsewhere, so it has what is in that.
func (c *containerd) dropIn() (string, error) {
	differs := slices.DeleteFunc(slices.Clone(c.dump.Plugins.Diff.Default), func(s string) bool { return s == differName })
	if len(differs) == 0 {
		differs = []string{"walking"}
	}
	ours := map[string]any{"platform": platform(), "snapshotter": snapshotterName, "differ": differName}
	unpacks := slices.DeleteFunc(slices.Clone(c.dump.Plugins.Transfer.Unpack), func(u map[string]any) bool { return u["snapshotter"] == snapshotterName })
	if len(unpacks) == 0 {
		unpacks = []map[string]any{{"platform": platform(), "snapshotter": "overlayfs", "differ": "walking"}}
	}
	diff, err := toml.Marshal(map[string][]string{"default": append([]string{differName}, differs...)})
	if err != nil {
		return "", err
	}
	var lists []string
	for _, u := range append(unpacks, ours) {
		text, err := toml.Marshal(said(u))
		if err != nil {
			return "", err
		}
		lists = append(lists, strings.TrimSpace(strings.ReplaceAll("\n"+string(text), "\n", "\n    ")))
	}
	var b strings.Builder
	err = dropInTemplate.Execute(&b, map[string]any{"version": c.fileVersion(), "diff": strings.TrimSpace(string(diff)), "unpacks": lists})
	return b.String(), err
}

// fileVersion is that of files of ours; 0 is none. containerd 2.0 to 2.2 take all files for the newest version that one of
// them has, and forget what a file of version 2 says of plugins that have another name in 3. Docker's package has a file of
// version 1, beside which 1.7 reads none that has a version.
func (c *containerd) fileVersion() int {
	var file struct {
		Version int `toml:"version"`
	}
	switch {
	case c.dump.Version < 3:
		return 0
	case toml.Unmarshal([]byte(c.text), &file) == nil && file.Version == 2:
		return 2
	}
	return 3
}

// said leaves out what a dump shows of what nobody set.
func said(u map[string]any) map[string]any {
	kept := map[string]any{}
	for k, v := range u {
		if r := reflect.ValueOf(v); r.IsValid() && !r.IsZero() && (r.Kind() != reflect.Slice || r.Len() > 0) {
			kept[k] = v
		}
	}
	return kept
}

// planImport has containerd read its conf.d. No release does without that line,
// though the dumps of 2.2 and later show it.
func (h *Host) planImport(p *Plan) error {
	c := p.containerd
	if !c.there {
		text := fmt.Sprintf("version = %d\nimports = [%q]\n", min(max(c.dump.Version, 2), 3), imports)
		p.add(Step{Action: Write, Target: c.config, Why: "containerd reads its conf.d", Content: text})
		return nil
	}
	_, was, line, err := addImport(c.text, filepath.Dir(c.config))
	if err != nil {
		return fmt.Errorf("%s: %w", c.config, err)
	}
	if line != "" {
		p.add(Step{Action: Edit, Target: c.config, Why: "containerd reads its conf.d", Content: line, Was: was})
	}
	return nil
}

var (
	importsLine = regexp.MustCompile(`(?m)^[ \t]*imports[ \t]*=.*$`)
	versionLine = regexp.MustCompile(`(?m)^[ \t]*version[ \t]*=.*\n`)
	tableLine   = regexp.MustCompile(`(?m)^[ \t]*\[`)
)

// imported is what of a file of containerd's matters here.
type imported struct {
	Imports []string `toml:"imports"`
}

// addImport gives text with containerd's conf.d among its imports: line is new, in
// the place of was if that is not empty. No line: it is among them already.
// Errors: InvalidArgument, no TOML; FailedPrecondition, it is to be done by hand.
func addImport(text, dir string) (out, was, line string, err error) {
	var before imported
	if err := toml.Unmarshal([]byte(text), &before); err != nil {
		return "", "", "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, i := range before.Imports {
		if !filepath.IsAbs(i) {
			i = filepath.Join(dir, i)
		}
		if ok, err := filepath.Match(i, dropIn); err == nil && ok {
			return text, "", "", nil
		}
	}
	var quoted []string
	for _, i := range append(before.Imports, imports) {
		quoted = append(quoted, strconv.Quote(i))
	}
	line = "imports = [" + strings.Join(quoted, ", ") + "]"
	top := len(text) // where the tables begin
	if at := tableLine.FindStringIndex(text); at != nil {
		top = at[0]
	}
	if at := importsLine.FindStringIndex(text[:top]); at != nil {
		was = text[at[0]:at[1]]
		out = text[:at[0]] + line + text[at[1]:]
	} else if at := versionLine.FindStringIndex(text[:top]); at != nil {
		out = text[:at[1]] + line + "\n" + text[at[1]:]
	} else {
		out = line + "\n" + text
	}
	if !sameBut(text, out, append(before.Imports, imports)) {
		return "", "", "", fmt.Errorf("add %q to its imports, which cannot be done for you: %w", imports, errdefs.ErrFailedPrecondition)
	}
	return out, was, line, nil
}

// sameBut says whether two texts mean the same but for the imports, which the
// second has as given.
func sameBut(before, after string, list []string) bool {
	var a, b map[string]any
	if toml.Unmarshal([]byte(before), &a) != nil || toml.Unmarshal([]byte(after), &b) != nil {
		return false
	}
	delete(a, "imports")
	delete(b, "imports")
	// containerd reads the name in any case.
	var got imported
	return toml.Unmarshal([]byte(after), &got) == nil && slices.Equal(got.Imports, list) && reflect.DeepEqual(a, b)
}

// dropImport takes back what addImport did, in a text that may have been changed
// elsewhere since; false if the line is not there as it was written, once.
func dropImport(text, was, line string) (string, bool) {
	lines := strings.SplitAfter(text, "\n")
	found := -1
	for i, l := range lines {
		if strings.TrimRight(l, "\r\n") != line {
			continue
		}
		if found >= 0 {
			return text, false
		}
		found = i
	}
	if found < 0 {
		return text, false
	}
	if was == "" {
		return strings.Join(slices.Delete(lines, found, found+1), ""), true
	}
	lines[found] = was + strings.TrimPrefix(lines[found], line)
	return strings.Join(lines, ""), true
}
