package template

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
	"github.com/containerd-pve/containerd-pve/template/record"
)

// Details are a template with all that is kept of its image.
type Details struct {
	Template
	// Origin is the snapshot that it was cloned of.
	Origin string `json:"origin"`
	// Config is the image's own; null if it cannot be read.
	Config json.RawMessage `json:"config"`
	// Conf is what Proxmox has.
	Conf string `json:"conf"`
}

// Base is the snapshot that its clones are of, dataset@name. Nobody writes to it.
func (t Template) Base() string { return t.Dataset + "@" + base }

// Finding is what is found of a part of a template.
type Finding struct {
	Name   string
	OK     bool
	Detail string
}

// kept are the dataset and the snapshot of a template, as far as they are there.
func (s *Store) kept(ctx context.Context, vmid int) (dataset, snapshot *zfs.Entry, err error) {
	entries, err := s.ZFS.Contents(ctx, s.Storage.Pool, append(record.Properties(propConfig), propDigest, propImage, propConfigDigest))
	if err != nil {
		return nil, nil, err
	}
	for i, e := range entries {
		switch e.Name {
		case s.dataset(vmid):
			dataset = &entries[i]
		case s.dataset(vmid) + "@" + base:
			snapshot = &entries[i]
		}
	}
	return dataset, snapshot, nil
}

// find is a template by its VMID. Errors: NotFound.
func (s *Store) find(ctx context.Context, vmid int) (Template, *pve.Conf, error) {
	all, err := s.List(ctx)
	if err != nil {
		return Template{}, nil, err
	}
	i := slices.IndexFunc(all, func(t Template) bool { return t.VMID == vmid })
	if i < 0 {
		return Template{}, nil, fmt.Errorf("VMID %d is no template of containerd-pve's on this node: %w", vmid, errdefs.ErrNotFound)
	}
	conf, err := s.Node.Read(vmid)
	return all[i], conf, err
}

// Inspect is all that is known of a template. Errors: NotFound.
func (s *Store) Inspect(ctx context.Context, vmid int) (Details, error) {
	t, conf, err := s.find(ctx, vmid)
	if err != nil {
		return Details{}, err
	}
	d := Details{Template: t, Conf: string(conf.Bytes())}
	dataset, _, err := s.kept(ctx, vmid)
	if err != nil || dataset == nil {
		return d, err
	}
	d.Origin = dataset.Origin
	if blob, err := record.Decode(propConfig, dataset.Own); err == nil && json.Valid(blob) {
		d.Config = blob
	}
	return d, nil
}

// OptionsOf are those to make another template like this one.
func (s *Store) OptionsOf(vmid int) (Options, error) {
	conf, err := s.Node.Read(vmid)
	if err != nil {
		return Options{}, err
	}
	var o Options
	o.Name, _ = conf.Get("hostname")
	text, _ := conf.Get("memory")
	if mib, err := strconv.ParseInt(text, 10, 64); err == nil {
		o.Memory = mib << 20
	}
	for i := 0; ; i++ {
		text, ok := conf.Get(fmt.Sprintf("net%d", i))
		if !ok {
			return o, nil
		}
		n, err := pve.ParseNet(text, i)
		if err != nil {
			return Options{}, fmt.Errorf("net%d of template %d: %w", i, vmid, err)
		}
		o.Nets = append(o.Nets, n)
	}
}

// Validate says whether a template is whole and would boot. Errors: NotFound.
func (s *Store) Validate(ctx context.Context, vmid int) ([]Finding, error) {
	t, conf, err := s.find(ctx, vmid)
	if err != nil {
		return nil, err
	}
	dataset, snapshot, err := s.kept(ctx, vmid)
	if err != nil {
		return nil, err
	}
	var all []Finding
	is := func(name string, ok bool, good, bad string) bool {
		detail := good
		if !ok {
			detail = bad
		}
		all = append(all, Finding{name, ok, detail})
		return ok
	}
	is("conf", !t.Unfinished, "whole", fmt.Sprintf("it was not finished: `containerd-pve template rm %d`", vmid))
	if !is("dataset", dataset != nil, t.Dataset, s.dataset(vmid)+" does not exist") {
		return all, nil
	}
	rootfs, _ := conf.Get("rootfs")
	of := s.Storage.Name + ":" + volume(vmid)
	is("rootfs", rootfs == of || strings.HasPrefix(rootfs, of+","), rootfs, fmt.Sprintf("the conf says %s, not %s", rootfs, of))
	is("layer", dataset.Origin != "", dataset.Origin, "it is no clone of a layer any more: what it shared is its own now")
	is("snapshot", snapshot != nil, t.Dataset+"@"+base, "Proxmox has nothing to clone: "+t.Dataset+"@"+base+" does not exist")
	is("digest", t.Digest != "" && strings.Contains(conf.Description(), t.Digest), t.Digest, fmt.Sprintf("the dataset says %q, the conf's notes another", t.Digest))
	i := Image{Name: t.Image, Layer: t.Dataset + "@" + base}
	blob, err := record.Decode(propConfig, dataset.Own)
	if err == nil {
		err = json.Unmarshal(blob, &i.Config)
	}
	if want, got := dataset.Own[propConfigDigest], digest.FromBytes(blob).String(); err == nil && got != want {
		err = fmt.Errorf("its digest is %s, not %s", got, want)
	}
	if !is("config", err == nil, dataset.Own[propConfigDigest], fmt.Sprintf("the image's config: %v", err)) || snapshot == nil {
		return all, nil
	}
	if p, err := s.process(ctx, i); err != nil {
		is("process", false, "", err.Error())
	} else {
		is("process", true, fmt.Sprintf("%q", p.Args), "")
	}
	return all, nil
}

// Prune removes the templates that nothing was cloned of, that are older than
// before and of which there are keep newer ones of the same image; the unfinished ones always.
// Nobody makes one meanwhile. With dry it only says which those are.
func (s *Store) Prune(ctx context.Context, keep int, before time.Time, dry bool) ([]Template, error) {
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(all, func(a, b Template) int { return b.Created.Compare(a.Created) })
	newer := map[string]int{}
	victims := []Template{}
	for _, t := range all {
		if t.Unfinished || t.Dataset == "" {
			if len(t.Clones) == 0 {
				victims = append(victims, t)
			}
			continue
		}
		newer[t.Image]++
		if len(t.Clones) == 0 && newer[t.Image] > keep && t.Created.Before(before) {
			victims = append(victims, t)
		}
	}
	slices.SortFunc(victims, func(a, b Template) int { return cmp.Compare(a.VMID, b.VMID) })
	for _, t := range victims {
		if dry {
			break
		}
		if err := s.remove(ctx, t.VMID); err != nil {
			return victims, fmt.Errorf("template %d: %w", t.VMID, err)
		}
	}
	return victims, nil
}
