package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	leaseproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	snapshotproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
	"github.com/containerd-pve/containerd-pve/template"
	"github.com/containerd-pve/containerd-pve/template/archive"
)

const (
	// labelImport is on the leases of imports: of which source.
	labelImport = "io.containerd.pve.import"
	// importKept is how long an interrupted import can be gone on with.
	importKept = 24 * time.Hour
)

// importOptions are the flags that only import has.
type importOptions struct {
	name, choice, maxSize string
	maxEntries, maxRatio  int64
	imageOnly             bool
}

// imported is what came of an import. Its JSON is what other programs read: no field
// is renamed or removed.
type imported struct {
	Image  string             `json:"image"`
	Digest digest.Digest      `json:"digest"`
	Format archive.Kind       `json:"format"`
	Again  bool               `json:"again"`    // it was there, from an import before
	Made   *template.Template `json:"template"` // nil: the image alone
}

func importCommand(t *templateTool, format func(func(*cobra.Command, []string) error) func(*cobra.Command, []string) error) *cobra.Command {
	var o importOptions
	c := &cobra.Command{
		Use: "import SOURCE [METADATA]", Short: "bring an image in from a file or directory, and make a template of it", Args: cobra.RangeArgs(1, 2),
		Long: "Brings an image into containerd's store, unpacks it for " + snapshotterName + ", and makes a template of it. SOURCE is an OCI layout (directory\n" +
			"or tar), what `docker save` writes, a vztmpl or another tarball of a root, an image of LXC or Incus or a squashfs; METADATA the other half of a split\n" +
			"image. What it is its content says, not its name. An import that was interrupted goes on where it was, for a day.",
		RunE: format(func(c *cobra.Command, args []string) error {
			return t.importImage(c.Context(), c.Flags().Changed("config"), o, args, c.OutOrStdout())
		}),
	}
	f := c.Flags()
	f.StringVar(&o.name, "name", "", "the image's `name`; the archive's own, or localhost/FILE:latest, if not said")
	f.StringVar(&o.choice, "select", "", "which `image` of an archive of several, by name or digest")
	f.BoolVar(&o.imageOnly, "image-only", false, "make no template")
	f.StringVar(&o.maxSize, "max-size", "64G", "how large all files may be, unpacked; never more than is free in the pool")
	f.Int64Var(&o.maxEntries, "max-entries", 2_000_000, "how many files and directories there may be")
	f.Int64Var(&o.maxRatio, "max-ratio", 250, "how many times larger than the source its content may be")
	f.IntVar(&t.vmid, "vmid", 0, "the template's `VMID`; any that is free if not said")
	f.StringVar(&t.memory, "memory", "512M", "memory of what is cloned of it, and swap as much")
	f.StringVar(&t.size, "size", "", "`size` of the disk, as 8G")
	f.StringArrayVar(&t.nets, "net", nil, "a network interface as Proxmox writes it, as name=eth0,bridge=vmbr0,ip=dhcp; may be repeated")
	return c
}

// limits are the flags', and what is free.
func (o importOptions) limits(ctx context.Context, conf config) (l archive.Limits, err error) {
	l = archive.Limits{Entries: o.maxEntries, Ratio: o.maxRatio}
	if l.Bytes, err = units.RAMInBytes(o.maxSize); err != nil || l.Bytes <= 0 {
		return l, fmt.Errorf("--max-size %q is no size, as 64G: %w", o.maxSize, errdefs.ErrInvalidArgument)
	}
	if l.Entries <= 0 || l.Ratio <= 0 {
		return l, fmt.Errorf("--max-entries %d, --max-ratio %d: nothing holds by that: %w", l.Entries, l.Ratio, errdefs.ErrInvalidArgument)
	}
	z, err := zfs.New(ctx, conf.ZFS)
	if err != nil {
		return l, err
	}
	defer z.Close()
	free, err := z.Available(ctx, conf.Dataset)
	l.Bytes = min(l.Bytes, free)
	return l, err
}

func (t *templateTool) importImage(ctx context.Context, set bool, o importOptions, args []string, w io.Writer) error {
	of, err := t.options()
	if err != nil {
		return err
	}
	conf, err := readConfig(t.path, set)
	if err != nil {
		return err
	}
	if err := conf.complete(); err != nil {
		return err
	}
	if o.imageOnly && t.vmid != 0 {
		return fmt.Errorf("--vmid %d is for a template, and none is made: %w", t.vmid, errdefs.ErrInvalidArgument)
	}
	limits, err := o.limits(ctx, conf)
	if err != nil {
		return err
	}
	conn, err := dialContainerd(t.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	p := newProgress(os.Stderr)
	i := &imageImport{conn: conn, archive: &archive.Importer{
		Store: proxy.NewContentStore(contentapi.NewContentClient(conn)), Limits: limits, Platform: platforms.Default(), Progress: p.show,
	}}
	is, err := i.sources(namespaces.WithNamespace(ctx, t.namespace), args, o)
	p.end()
	if err != nil {
		return err
	}
	if o.imageOnly {
		if t.format == "json" {
			return printJSON(w, is)
		}
		return is.say(w)
	}
	m, err := t.connect(ctx, set)
	if err != nil {
		return is.without(err)
	}
	defer m.Close()
	return m.store.Node.Exclusive(ctx, "template", func() error {
		image, err := m.image(ctx, is.Image)
		if err != nil {
			return is.without(err)
		}
		made, fresh, err := m.create(ctx, image, of)
		if err != nil {
			return is.without(err)
		}
		if is.Made = &made; t.format == "json" {
			return printJSON(w, is)
		}
		return errors.Join(is.say(w), m.sayMade(w, made, fresh))
	})
}

func (is imported) say(w io.Writer) error {
	_, err := fmt.Fprintf(w, "%s (%s), of a %s\n", is.Image, shortDigest(is.Digest.String()), is.Format)
	return err
}

func (is imported) without(err error) error {
	return fmt.Errorf("the image is imported as %s, but there is no template of it: %w", is.Image, err)
}

// imageImport brings images into containerd's store.
type imageImport struct {
	conn    *grpc.ClientConn
	archive *archive.Importer
}

// sources imports what one or two files hold.
func (i *imageImport) sources(ctx context.Context, args []string, o importOptions) (is imported, err error) {
	var of [2]*archive.Source
	for n, name := range args {
		if of[n], err = archive.Open(name); err != nil {
			return is, err
		}
		defer of[n].Close()
	}
	// Of a split image either half may come first.
	if of[1] != nil && of[0].Kind == archive.LXC && of[1].Kind != archive.LXC {
		of[0], of[1] = of[1], of[0]
	}
	is.Format = of[0].Kind
	if err := of[0].Lock(); err != nil {
		return is, err
	}
	// What is asked for is checked before the work.
	if o.name != "" {
		if is.Image, err = archive.Reference(o.name, "", ""); err != nil {
			return is, fmt.Errorf("--name %w", err)
		}
	}
	key, err := archive.Key(ctx, of[0], of[1], i.archive.Progress)
	if err != nil {
		return is, err
	}
	manager := leaseproxy.NewLeaseManager(leasesapi.NewLeasesClient(i.conn))
	lease, err := manager.Create(ctx, leases.WithRandomID(), leases.WithExpiration(importKept), leases.WithLabel(labelImport, key.String()))
	if err != nil {
		return is, fmt.Errorf("a lease of containerd's: %w", err)
	}
	defer func() {
		// What was interrupted is held for another try, what failed or is done is not.
		if err == nil || ctx.Err() == nil {
			err = errors.Join(err, i.release(context.WithoutCancel(ctx), manager, key))
			return
		}
		err = fmt.Errorf("%w (for a day the same command goes on from there)", err)
	}()
	ctx = leases.WithLease(ctx, lease.ID)
	image, err := i.archive.Import(ctx, of[0], of[1], key, o.choice)
	if err != nil {
		return is, err
	}
	if is.Image == "" {
		if is.Image, err = archive.Reference("", image.Name, of[0].Path); err != nil {
			return is, err
		}
	}
	if i.archive.Progress != nil {
		i.archive.Progress("unpack", 0, 0)
	}
	if err := i.unpack(ctx, image.Target); err != nil {
		return is, fmt.Errorf("%s: %w", of[0].Path, err)
	}
	is.Digest, is.Again = image.Target.Digest, image.Found
	return is, i.record(ctx, is.Image, image.Target)
}

// release drops the leases on a source's, and what was not written to its end.
func (i *imageImport) release(ctx context.Context, m leases.Manager, key digest.Digest) error {
	ctx, cancel := context.WithTimeout(ctx, containerdLimit)
	defer cancel()
	err := archive.Abandon(ctx, i.archive.Store, key)
	all, lerr := m.List(ctx, fmt.Sprintf("labels.%q==%s", labelImport, key))
	for _, l := range all {
		if derr := m.Delete(ctx, l); derr != nil && !errdefs.IsNotFound(derr) {
			lerr = errors.Join(lerr, derr)
		}
	}
	if err = errors.Join(err, lerr); err != nil {
		return fmt.Errorf("what the import has left in containerd's store goes within a day: %w", err)
	}
	return nil
}

// unpack makes the snapshots of an image's layers, as `ctr images pull` does.
func (i *imageImport) unpack(ctx context.Context, target ocispec.Descriptor) error {
	store := i.archive.Store
	manifest, err := images.Manifest(ctx, store, target, i.archive.Platform)
	if err != nil {
		return err
	}
	diffs, err := images.RootFS(ctx, store, manifest.Config)
	if err != nil {
		return err
	}
	sn := removing{snapshotproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(i.conn), snapshotterName)}
	applier, ok := diffproxy.NewDiffApplier(diffapi.NewDiffClient(i.conn)).(diff.Applier)
	if !ok {
		return fmt.Errorf("containerd's differ applies nothing: %w", errdefs.ErrNotImplemented)
	}
	for n, l := range manifest.Layers {
		made, err := rootfs.ApplyLayerWithOpts(ctx, rootfs.Layer{Diff: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: diffs[n]}, Blob: l}, diffs[:n:n], sn, applier, nil, nil)
		if err != nil {
			return fmt.Errorf("layer %d %s: %w", n+1, l.Digest, err)
		}
		if made {
			if _, err := store.Update(ctx, content.Info{Digest: l.Digest, Labels: map[string]string{labels.LabelUncompressed: diffs[n].String()}}, "labels."+labels.LabelUncompressed); err != nil {
				return fmt.Errorf("layer %d %s: %w", n+1, l.Digest, err)
			}
		}
	}
	ref := "containerd.io/gc.ref.snapshot." + snapshotterName
	_, err = store.Update(ctx, content.Info{Digest: manifest.Config.Digest, Labels: map[string]string{ref: identity.ChainID(diffs).String()}}, "labels."+ref)
	return err
}

// removing removes what was half unpacked after an interruption as well.
type removing struct{ snapshots.Snapshotter }

func (r removing) Remove(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), containerdLimit)
	defer cancel()
	return r.Snapshotter.Remove(ctx, key)
}

// record names the image, or has the name stand for it from now on.
func (i *imageImport) record(ctx context.Context, name string, target ocispec.Descriptor) error {
	client := imagesapi.NewImagesClient(i.conn)
	of := &imagesapi.Image{Name: name, Target: &types.Descriptor{MediaType: target.MediaType, Digest: target.Digest.String(), Size: target.Size}}
	_, err := client.Create(ctx, &imagesapi.CreateImageRequest{Image: of})
	if err = errgrpc.ToNative(err); errdefs.IsAlreadyExists(err) {
		_, err = client.Update(ctx, &imagesapi.UpdateImageRequest{Image: of, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"target"}}})
		err = errgrpc.ToNative(err)
	}
	if err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	return nil
}
