// Package template makes Proxmox templates of images: a clone of the image's top
// layer, its snapshot for the clones of others, and a conf. It owns the confs that bear its
// tag and the datasets that bear its mark. It never touches an image, a layer, or what was
// cloned of a template.
package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/mountinfo"
	"github.com/moby/sys/signal"
	digest "github.com/opencontainers/go-digest"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter/detached"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
	"github.com/containerd-pve/containerd-pve/template/record"
)

const (
	// tag is what the conf of a template bears. It is not pve.Tag, by which a
	// container of containerd's is known: what is cloned of a template has this one too.
	tag = "containerd-template"
	// base is the snapshot that Proxmox clones.
	base = "__base__"

	propDigest = "containerd-pve:template" // of the dataset: the digest that the image had
	propImage  = "containerd-pve:image"    // and its name
	propConfig = "containerd-pve:config"   // and its config, see package record
	propLayer  = "containerd-pve:layer"    // and what containerd calls its top layer
	// propConfigDigest is the digest of that.
	propConfigDigest = "containerd-pve:config-digest"
)

// ZFS is what is asked of it, see zfs.Way.
type ZFS interface {
	zfs.Lister
	Clone(ctx context.Context, snapshot, name string, props zfs.Properties) error
	Snapshot(ctx context.Context, name string, props zfs.Properties) error
	DestroyAll(ctx context.Context, names []string) (failed map[string]error, err error)
	Space(ctx context.Context, name string) (zfs.Space, error)
}

// Node is Proxmox's, see pve.Node, or a host's that has LXC alone, see package plain.
type Node interface {
	Register(ctx context.Context, want int, of func(vmid int) (*pve.Conf, error)) (int, error)
	Change(ctx context.Context, vmid int, change func(*pve.Conf) error) error
	Remove(ctx context.Context, vmid int, mine func(*pve.Conf) bool, before func(*pve.Conf) error) error
	Guests() ([]int, error)
	Read(vmid int) (*pve.Conf, error)
	Exclusive(ctx context.Context, name string, f func() error) error
}

// Store is of one node.
type Store struct {
	ZFS     ZFS
	Node    Node
	Host    pve.Host
	Storage pve.Storage
	// Init is the path of pve-init, for images whose process a conf cannot express.
	Init string
	// look is process, but in tests.
	look func(context.Context, Image) (plan.Process, error)
}

// Options of a template.
type Options struct {
	VMID   int    // 0: any that is free
	Name   string // its name in the GUI; empty: made of the image's
	Memory int64  // of what is cloned of it, and swap as much, in bytes
	Size   int64  // of the disk, in bytes; 0: room for some GiB more than the image
	Nets   []pve.Net
}

// Template is one of this node's. Its JSON is what other programs read: no field
// is renamed or removed.
type Template struct {
	VMID   int    `json:"vmid"`
	Name   string `json:"name"`
	Image  string `json:"image"`
	Digest string `json:"digest"`
	// Dataset is empty if it is gone.
	Dataset string    `json:"dataset"`
	Created time.Time `json:"created"`
	// Used are the bytes that it has for itself, Referenced those of its files.
	Used       int64 `json:"used"`
	Referenced int64 `json:"referenced"`
	// Layer is containerd's name of the layer that it was made of: namespace/chain id.
	Layer string `json:"layer"`
	// Clones are the datasets that were cloned of it.
	Clones []string `json:"clones"`
	// Unfinished is one whose making was interrupted.
	Unfinished bool `json:"unfinished"`
}

// roomBeside is what a disk has beside the image unless its size is asked for.
const roomBeside = 4 << 30

// Create makes a template of an image, or finds the one of the same digest.
// Errors: FailedPrecondition, InvalidArgument, what of the image would not boot; AlreadyExists,
// the VMID is taken; those of ZFS and of Node. Nothing is left then.
func (s *Store) Create(ctx context.Context, i Image, o Options) (_ Template, made bool, err error) {
	all, err := s.List(ctx)
	if err != nil {
		return Template{}, false, err
	}
	for _, t := range all {
		if t.Digest == i.Digest.String() && t.Dataset != "" && !t.Unfinished && (o.VMID == 0 || o.VMID == t.VMID) {
			return t, false, nil
		}
	}
	fail := func(err error) (Template, bool, error) {
		return Template{}, false, fmt.Errorf("template of image %s: %w", i.Name, err)
	}
	props, err := record.Encode(propConfig, i.Blob)
	if err != nil {
		return fail(err)
	}
	props[propDigest], props[propImage], props[propConfigDigest] = i.Digest.String(), i.Name, digest.FromBytes(i.Blob).String()
	props[propLayer] = i.Chain
	p, err := s.process(ctx, i)
	if err != nil {
		return fail(err)
	}
	space, err := s.ZFS.Space(ctx, i.Layer)
	if err != nil {
		return fail(err)
	}
	if o.Size == 0 {
		o.Size = space.Referenced + roomBeside
	}
	if o.Size < space.Referenced {
		return fail(fmt.Errorf("a disk of %d bytes is smaller than the image's files (%d): %w", o.Size, space.Referenced, errdefs.ErrInvalidArgument))
	}
	const gib = 1 << 30
	gibs := (o.Size + gib - 1) / gib
	props["refquota"] = strconv.FormatInt(gibs*gib, 10)
	for name, v := range map[string]string{"acltype": "posix", "xattr": "sa"} {
		props[name] = v
	}
	var expressed bool
	vmid, err := s.Node.Register(ctx, o.VMID, func(vmid int) (*pve.Conf, error) {
		conf, all, err := s.conf(i, o, p, vmid, gibs)
		expressed = all
		return conf, err
	})
	if err != nil {
		return fail(err)
	}
	dataset := s.dataset(vmid)
	err = s.fill(ctx, i.Layer, dataset, props, p, expressed)
	if err == nil {
		err = s.Node.Change(ctx, vmid, func(c *pve.Conf) error { return c.SetLock("") })
	}
	if err != nil {
		ctx := context.WithoutCancel(ctx)
		return fail(errors.Join(err, s.remove(ctx, vmid)))
	}
	all, err = s.List(ctx)
	if err != nil {
		return fail(err)
	}
	at := slices.IndexFunc(all, func(t Template) bool { return t.VMID == vmid })
	if at < 0 {
		return fail(fmt.Errorf("somebody removed VMID %d in this moment: %w", vmid, errdefs.ErrNotFound))
	}
	return all[at], true, nil
}

// process looks into the image for what is to run.
func (s *Store) process(ctx context.Context, i Image) (plan.Process, error) {
	if s.look != nil {
		return s.look(ctx, i)
	}
	root, err := detached.Mount(ctx, i.Layer, true)
	if err != nil {
		return plan.Process{}, err
	}
	defer root.Close()
	p, err := i.process(root)
	if err != nil {
		return p, err
	}
	if why := missing(root, p); why != "" {
		return p, fmt.Errorf("it would not boot: %s: %w", why, errdefs.ErrFailedPrecondition)
	}
	return p, nil
}

// volume is a template's, as Proxmox names it.
func volume(vmid int) string { return fmt.Sprintf("basevol-%d-disk-0", vmid) }

func (s *Store) dataset(vmid int) string { return path.Join(s.Storage.Pool, volume(vmid)) }

// conf is that of a template that is being made.
func (s *Store) conf(i Image, o Options, p plan.Process, vmid int, gibs int64) (conf *pve.Conf, expressed bool, err error) {
	arch, err := pve.Arch(i.Config.Architecture)
	if err != nil {
		return nil, false, err
	}
	name := o.Name
	if name == "" {
		name = nameOf(i.Name)
	}
	conf = &pve.Conf{}
	memory := strconv.FormatInt(max(o.Memory>>20, 16), 10)
	for _, kv := range [][2]string{
		{"arch", arch}, {"cmode", "shell"}, {"hostname", name}, {"lock", "create"}, {"memory", memory}, {"ostype", "unmanaged"},
		{"rootfs", fmt.Sprintf("%s:%s,size=%dG", s.Storage.Name, volume(vmid), gibs)}, {"swap", memory}, {"tags", tag}, {"template", "1"}, {"unprivileged", "0"},
	} {
		if err := conf.Set(kv[0], kv[1]); err != nil {
			return nil, false, err
		}
	}
	var without []string // interfaces that nobody gives an address
	for n, net := range o.Nets {
		key, text := fmt.Sprintf("net%d", n), net.String()
		// Proxmox leaves the addresses of what it does not know as a distribution to that, unless it is
		// told; it knows the word since it knows entrypoints (pve-container 6.0.15).
		switch addressed := net.DHCP4 || net.IP4.IsValid() || net.IP6.IsValid(); {
		case addressed && s.Host.Env:
			text += ",host-managed=1"
		case addressed:
			without = append(without, key)
		}
		if err := conf.Set(key, text); err != nil {
			return nil, false, err
		}
	}
	if p.Args[0] == systemInit { // systemd mounts, which AppArmor keeps it from otherwise
		if err := conf.Set("features", "nesting=1"); err != nil {
			return nil, false, err
		}
	}
	if stop := i.Config.Config.StopSignal; stop != "" {
		number, err := signal.ParseSignal(stop)
		if err != nil {
			return nil, false, fmt.Errorf("stop signal %q: %w: %w", stop, err, errdefs.ErrInvalidArgument)
		}
		if err := conf.SetLXC([]pve.Entry{{Key: "lxc.signal.halt", Value: strconv.Itoa(int(number))}}); err != nil {
			return nil, false, err
		}
	} else if p.Args[0] != systemInit { // SIGPWR, which LXC sends by itself, is for those
		if err := conf.SetLXC([]pve.Entry{{Key: "lxc.signal.halt", Value: "15"}}); err != nil {
			return nil, false, err
		}
	}
	notes := i.describe()
	if len(without) > 0 {
		notes += fmt.Sprintf("not in effect: the addresses of %s, which Proxmox before pve-container 6.0.15 leaves to what runs in it\n\n", strings.Join(without, ", "))
	}
	if err := conf.SetDescription(notes); err != nil {
		return nil, false, err
	}
	expressed, err = express(conf, s.Host, p)
	return conf, expressed, err
}

// nameOf makes a DNS name of a reference: of docker.io/library/nginx:latest "nginx-latest".
func nameOf(reference string) string {
	name, _, _ := strings.Cut(path.Base(reference), "@")
	return pve.HostnameOf(strings.NewReplacer(":", "-", ".", "-", "_", "-").Replace(name))
}

// mostOfStep is how many characters of a step of the image's history the notes have.
const mostOfStep = 200

// describe is the text of the GUI's notes.
func (i Image) describe() string {
	var b strings.Builder
	line := func(name, value string) {
		if value = strings.Join(strings.Fields(value), " "); value != "" {
			fmt.Fprintf(&b, "%s: %s\n\n", name, value)
		}
	}
	c := i.Config
	b.WriteString("Template made by containerd-pve of an image.\n\n")
	line("image", i.Name)
	line("digest", i.Digest.String())
	line("platform", platforms.Format(c.Platform))
	if c.Created != nil && !c.Created.IsZero() {
		line("created", c.Created.UTC().Format(time.RFC3339))
	}
	list := func(name string, set map[string]struct{}) {
		var all []string
		for v := range set {
			all = append(all, v)
		}
		slices.Sort(all)
		line(name, strings.Join(all, ", "))
	}
	list("ports", c.Config.ExposedPorts)
	list("volumes", c.Config.Volumes)
	for i, h := range c.History {
		// All of it is in the config, see inspect.
		if text := []rune(h.CreatedBy); len(text) > mostOfStep {
			h.CreatedBy = string(text[:mostOfStep]) + " …"
		}
		line(fmt.Sprintf("step %d", i+1), h.CreatedBy)
	}
	const most = 6000 // Proxmox takes 8 KiB, with what it has to escape
	if text := b.String(); len(text) > most {
		return strings.ToValidUTF8(text[:most], "")
	}
	return b.String()
}

// fill makes the dataset and its snapshot.
func (s *Store) fill(ctx context.Context, layer, dataset string, props zfs.Properties, p plan.Process, expressed bool) error {
	if err := s.ZFS.Clone(ctx, layer, dataset, props); err != nil {
		return err
	}
	if !expressed {
		err := mount.WithTempMount(ctx, []mount.Mount{{Type: "zfs", Source: dataset}}, func(dir string) error { return s.addInit(dir, p) })
		if err != nil {
			return fmt.Errorf("adding pve-init: %w", err)
		}
	}
	return s.ZFS.Snapshot(ctx, dataset+"@"+base, nil)
}

// addInit puts pve-init and what it is to become below dir.
func (s *Store) addInit(dir string, p plan.Process) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	// As a runtime does, for a working directory that the image only names.
	if err := pathrs.MkdirAll(dir, p.Cwd, 0o755); err != nil {
		return fmt.Errorf("working directory %s: %w", p.Cwd, err)
	}
	in := func(name string) string { return strings.TrimPrefix(name, "/") }
	// An image that was made of such a container has it already.
	if err := errors.Join(root.RemoveAll(in(plan.BootDir)), root.Mkdir(in(plan.BootDir), 0o755)); err != nil {
		return err
	}
	if err := root.WriteFile(in(plan.BootFile), text, 0o644); err != nil {
		return err
	}
	from, err := os.Open(s.Init)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := root.OpenFile(in(plan.BootInit), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close())
}

// isOurs says whether a conf is of a template of ours.
func isOurs(c *pve.Conf) bool {
	is, _ := c.Get("template")
	return is == "1" && c.Tagged(tag)
}

// List are the templates of this node, by their VMIDs.
func (s *Store) List(ctx context.Context) ([]Template, error) {
	vmids, err := s.Node.Guests()
	if err != nil {
		return nil, err
	}
	all := []Template{}
	if len(vmids) == 0 {
		return all, nil
	}
	entries, err := s.ZFS.Contents(ctx, s.Storage.Pool, []string{propDigest, propImage, propLayer})
	if err != nil {
		return nil, err
	}
	for _, vmid := range vmids {
		conf, err := s.Node.Read(vmid)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if !isOurs(conf) {
			continue
		}
		t := Template{VMID: vmid, Unfinished: conf.Lock() == "create", Clones: []string{}}
		t.Name, _ = conf.Get("hostname")
		dataset := s.dataset(vmid)
		for _, e := range entries {
			switch {
			case e.Name == dataset:
				t.Dataset, t.Image, t.Digest = dataset, e.Own[propImage], e.Own[propDigest]
				t.Layer = e.Own[propLayer]
				t.Created, t.Used, t.Referenced = e.Created, e.Used, e.Referenced
			// lxc-copy clones a snapshot that it takes itself.
			case strings.HasPrefix(e.Origin, dataset+"@"):
				t.Clones = append(t.Clones, e.Name)
			}
		}
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b Template) int { return a.VMID - b.VMID })
	return all, nil
}

// Remove removes a template. Errors: NotFound; FailedPrecondition, clones of it live,
// which it names.
func (s *Store) Remove(ctx context.Context, vmid int) error {
	t, _, err := s.find(ctx, vmid)
	if err != nil {
		return err
	}
	if clones := t.Clones; len(clones) > 0 {
		return fmt.Errorf("template %d is in use by what was cloned of it (%s): remove that first: %w", vmid, strings.Join(clones, ", "), errdefs.ErrFailedPrecondition)
	}
	return s.remove(ctx, vmid)
}

// unmount unmounts a dataset wherever this process sees it.
func unmount(dataset string) error {
	all, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.FSType != "zfs" || i.Source != dataset, false })
	if err != nil {
		return fmt.Errorf("where %s is mounted: %w", dataset, err)
	}
	for _, i := range all {
		if err := mount.Unmount(i.Mountpoint, 0); err != nil {
			return fmt.Errorf("unmounting %s at %s: %w", dataset, i.Mountpoint, err)
		}
	}
	return nil
}

func (s *Store) remove(ctx context.Context, vmid int) error {
	err := s.Node.Change(ctx, vmid, func(c *pve.Conf) error {
		if isOurs(c) && c.Lock() == "create" {
			return c.SetLock("")
		}
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	dataset := s.dataset(vmid)
	// The conf goes last: what a crash leaves is found by it.
	return s.Node.Remove(ctx, vmid, isOurs, func(*pve.Conf) error {
		entries, err := s.ZFS.Contents(ctx, s.Storage.Pool, nil)
		if err != nil {
			return err
		}
		// `pct clone` leaves it mounted on the node, and nobody uses it: nothing is cloned of it.
		if err := unmount(dataset); err != nil {
			return err
		}
		// Whoever took a snapshot of it.
		var victims []string
		for _, e := range entries {
			if strings.HasPrefix(e.Name, dataset+"@") {
				victims = append(victims, e.Name)
			}
		}
		failed, err := s.ZFS.DestroyAll(ctx, append(victims, dataset))
		for name, f := range failed {
			err = errors.Join(err, fmt.Errorf("destroying %s: %w", name, f))
		}
		return err
	})
}
