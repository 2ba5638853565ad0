package zfs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

// Entry is a filesystem or a snapshot as a list shows it.
type Entry struct {
	Name     string
	Snapshot bool
	Origin   string // the snapshot that a clone was made of
	// Clones are the filesystems that were made of a snapshot.
	Clones  []string
	Created time.Time
	// Txg is the transaction group it was made in: it sorts what one second made.
	Txg              uint64
	Used, Referenced int64
	// Own are those of the properties asked for that are set on the entry itself,
	// and not inherited from its parent.
	Own Properties
}

// Lister lists in few calls what there is, for people.
type Lister interface {
	// Contents are the filesystems directly below parent and their snapshots.
	Contents(ctx context.Context, parent string, properties []string) ([]Entry, error)
	// Available are the bytes that may still be written into a filesystem.
	Available(ctx context.Context, name string) (int64, error)
	// Property is the value of a property, or Unset.
	Property(ctx context.Context, name, property string) (string, error)
	// Close gives back what the others use.
	Close() error
}

// own says whether a property is set on the dataset itself: received counts.
func own(d *Dataset, name string) bool {
	entry, _ := d.properties[name].(nvlist.List)
	source, _ := entry["source"].(string)
	return source == d.Name || source == "$recvd"
}

// Contents are the filesystems directly below parent and their snapshots.
func (n *Native) Contents(ctx context.Context, parent string, properties []string) ([]Entry, error) {
	var all []Entry
	add := func(d *Dataset) error {
		e, err := listed(d, properties)
		all = append(all, e)
		return err
	}
	err := n.List(ctx, parent, true, func(d *Dataset) error {
		if !d.Filesystem {
			return nil
		}
		if err := add(d); err != nil {
			return err
		}
		err := n.ListSnapshots(ctx, d.Name, true, add)
		if errdefs.IsNotFound(err) {
			return nil // destroyed in between
		}
		return err
	})
	return all, err
}

// listed is what a list shows of a dataset.
func listed(d *Dataset, properties []string) (Entry, error) {
	e, err := entry(d.Name, d.Property)
	if err != nil {
		return e, err
	}
	e.Snapshot, e.Origin, e.Clones = d.Snapshot, d.Origin, d.clones()
	for _, p := range properties {
		if own(d, p) {
			e.Own[p] = d.Property(p)
		}
	}
	return e, nil
}

// Taken are the snapshots of a filesystem, oldest first.
func (n *Native) Taken(ctx context.Context, name string, properties []string) ([]Entry, error) {
	var all []Entry
	err := n.ListSnapshots(ctx, name, true, func(d *Dataset) error {
		e, err := listed(d, properties)
		all = append(all, e)
		return err
	})
	slices.SortFunc(all, inTime)
	return all, err
}

func inTime(a, b Entry) int { return cmp.Compare(a.Txg, b.Txg) }

// Available are the bytes that may still be written into a filesystem.
func (n *Native) Available(ctx context.Context, name string) (int64, error) {
	v, err := n.Property(ctx, name, "available")
	if err != nil {
		return 0, err
	}
	return number("available", name, v)
}

// numeric are the properties that each entry has.
const numeric = "creation,createtxg,used,referenced"

// entry reads what each entry has; get gives a property's value.
func entry(name string, get func(property string) string) (Entry, error) {
	e := Entry{Name: name, Own: Properties{}}
	var created, txg int64
	for property, to := range map[string]*int64{
		"creation": &created, "createtxg": &txg, "used": &e.Used, "referenced": &e.Referenced,
	} {
		var err error
		if *to, err = number(property, name, get(property)); err != nil {
			return e, err
		}
	}
	e.Created, e.Txg = time.Unix(created, 0).UTC(), uint64(txg)
	return e, nil
}

func number(property, name, value string) (int64, error) {
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s of %s: %w: %w", property, name, err, errdefs.ErrInternal)
	}
	return n, nil
}

// Available are the bytes that may still be written into a filesystem.
func (goZFS) Available(ctx context.Context, name string) (int64, error) {
	d, err := get(ctx, name)
	if err != nil {
		return 0, err
	}
	return int64(d.Avail), nil
}

// Contents runs the zfs program once: go-zfs's own list knows neither properties
// of users nor where a value comes from.
func (goZFS) Contents(ctx context.Context, parent string, properties []string) ([]Entry, error) {
	out, err := getBelow(ctx, parent, "-d2", "filesystem,snapshot", properties)
	if err != nil {
		return nil, err
	}
	return parseGet(out, parent, "/", properties)
}

// Taken runs the zfs program once, as Contents.
func (goZFS) Taken(ctx context.Context, name string, properties []string) ([]Entry, error) {
	out, err := getBelow(ctx, name, "-d1", "snapshot", properties)
	if err != nil {
		return nil, err
	}
	all, err := parseGet(out, name, "@", properties)
	slices.SortFunc(all, inTime)
	return all, err
}

func getBelow(ctx context.Context, parent, depth, types string, properties []string) (string, error) {
	asked := append(strings.Split("type,origin,clones,"+numeric, ","), properties...)
	cmd := exec.CommandContext(ctx, "zfs", "get", "-Hp", depth, "-t", types,
		"-o", "name,property,source,value", strings.Join(asked, ","), parent)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	processes.Add(1)
	out, err := cmd.Output()
	if err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return "", notInstalled("zfs")
		}
		if ctx.Err() != nil {
			return "", fmt.Errorf("list below %s: %w", parent, ctx.Err())
		}
		return "", missing(ctx, fmt.Errorf("list below %s: %s (%w)", parent, strings.TrimSpace(stderr.String()), err), parent)
	}
	return string(out), nil
}

// parseGet reads `zfs get -Hp -o name,property,source,value` of parent: what is
// directly below it, after a slash, or its snapshots, after an @.
func parseGet(out, parent, mark string, properties []string) ([]Entry, error) {
	type value struct{ value, source string }
	var order []string
	found := map[string]map[string]value{}
	var last *struct{ name, property string }
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(line, "\n")
		f := strings.SplitN(line, "\t", 4)
		if len(f) != 4 || f[0] != parent && !strings.HasPrefix(f[0], parent+"/") && !strings.HasPrefix(f[0], parent+"@") {
			// The value before this line has a line break in it.
			if last == nil {
				return nil, fmt.Errorf("`zfs get` printed %.100q: %w", line, errdefs.ErrInternal)
			}
			v := found[last.name][last.property]
			v.value += "\n" + line
			found[last.name][last.property] = v
			continue
		}
		if found[f[0]] == nil {
			found[f[0]] = map[string]value{}
			order = append(order, f[0])
		}
		last = &struct{ name, property string }{f[0], f[1]}
		found[f[0]][f[1]] = value{f[3], f[2]}
	}
	var all []Entry
	for _, name := range order {
		below, ok := strings.CutPrefix(name, parent+mark)
		if !ok || strings.Contains(below, "/") {
			continue
		}
		e, err := entry(name, func(p string) string { return found[name][p].value })
		if err != nil {
			return nil, err
		}
		e.Snapshot = found[name]["type"].value == "snapshot"
		if o := found[name]["origin"].value; o != Unset {
			e.Origin = o
		}
		if c := found[name]["clones"].value; c != "" && c != Unset {
			e.Clones = strings.Split(c, ",")
			slices.Sort(e.Clones)
		}
		for _, p := range properties {
			if v := found[name][p]; slices.Contains([]string{"local", "received"}, v.source) {
				e.Own[p] = v.value
			}
		}
		all = append(all, e)
	}
	return all, nil
}
