// Package compare is containerd's diff.Comparer for snapshots of our snapshotter:
// what changed between two becomes an image's layer in containerd's content store.
// It owns the temporary snapshots it takes and the mounts it makes, which no other
// process sees; it writes to no dataset.
//
// ZFS tells which objects it wrote (`zfs diff`), so a change of one file in an
// image of 100,000 is found without looking at the others. Where that does not
// tell all, and without the native way to ZFS, both trees are walked.
package compare

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/epoch"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	cfs "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/mounts"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

// keep is how long a layer is held for a caller without a lease of its own. One
// that has a lease does not say which: containerd does not pass it on.
const keep = time.Hour

// Differ is ZFS with which changes can be asked for: zfs.Native.
type Differ interface {
	// TemporarySnapshot takes a snapshot that is gone after end, or with this process.
	TemporarySnapshot(ctx context.Context, filesystem, prefix string) (name string, end func() error, err error)
	// Diff calls f for each object that was written between two snapshots.
	Diff(ctx context.Context, from, to string, f func(zfs.Change) error) error
}

var _ Differ = (*zfs.Native)(nil)

// ZFS is what is asked of any way to ZFS.
type ZFS interface {
	Property(ctx context.Context, name, property string) (string, error)
}

// Comparer compares the snapshots of a store.
type Comparer struct {
	zfs    ZFS
	owns   func(dataset string) bool
	store  content.Store
	leases leases.Manager
}

var _ diff.Comparer = (*Comparer)(nil)

// New is a comparer for the snapshots whose datasets owns knows. If z is a Differ
// as well, changes are asked of ZFS. The layers go to store, under a lease.
func New(z ZFS, owns func(dataset string) bool, store content.Store, leases leases.Manager) *Comparer {
	return &Comparer{zfs: z, owns: owns, store: store, leases: leases}
}

// Compare writes what upper has more or less than lower into the content store.
// lower may be empty. Errors: NotImplemented for mounts that are not this
// snapshotter's, for unknown media types and for a caller without a namespace, so that containerd asks its next differ.
func (c *Comparer) Compare(ctx context.Context, lower, upper []mount.Mount, opts ...diff.Opt) (_ ocispec.Descriptor, err error) {
	var config diff.Config
	for _, o := range opts {
		if err := o(&config); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	if t := epoch.FromContext(ctx); t != nil && config.SourceDateEpoch == nil {
		config.SourceDateEpoch = t
	}
	if config.MediaType == "" {
		config.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	kind, ok := map[string]compression.Compression{
		ocispec.MediaTypeImageLayer:     compression.Uncompressed,
		ocispec.MediaTypeImageLayerGzip: compression.Gzip,
		ocispec.MediaTypeImageLayerZstd: compression.Zstd,
	}[config.MediaType]
	if !ok || config.Compressor != nil {
		return ocispec.Descriptor{}, fmt.Errorf("media type %s: %w", config.MediaType, errdefs.ErrNotImplemented)
	}
	to, err := c.side(upper)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if _, ok := namespaces.Namespace(ctx); !ok {
		return ocispec.Descriptor{}, fmt.Errorf("exporting %s for a caller that does not say its namespace: %w", to.dataset, errdefs.ErrNotImplemented)
	}
	var from side
	if len(lower) > 0 {
		if from, err = c.side(lower); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	toTree, err := attach(ctx, to)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer func() { err = errors.Join(err, toTree.close()) }()
	var fromTree *mounted
	if from.dataset != "" {
		if fromTree, err = attach(ctx, from); err != nil {
			return ocispec.Descriptor{}, err
		}
		defer func() { err = errors.Join(err, fromTree.close()) }()
	}
	changes, err := c.ask(ctx, from, to, fromTree, toTree)
	if errors.Is(err, errUnclear) {
		log.G(ctx).WithField("dataset", to.dataset).Debugf("both trees are walked: %v", err)
		changes, err = walk(ctx, fromTree, toTree)
	}
	if err == nil && fromTree != nil {
		changes, err = rootToo(changes, fromTree, toTree)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("comparing %s with %s: %w", to.dataset, from.dataset, err)
	}
	return c.upload(ctx, config, kind, func(w io.Writer) error {
		return newLayer(w, toTree.dir(), config.SourceDateEpoch).write(ctx, changes)
	})
}

// side is one of the two that are compared.
type side struct {
	dataset string
	view    bool
}

// side says which snapshot mounts are of. How ids are mapped where it is mounted
// is nothing to its files.
func (c *Comparer) side(m []mount.Mount) (side, error) {
	dataset, err := mounts.Owned(m, c.owns)
	if err != nil {
		return side{}, err
	}
	return side{dataset: dataset, view: slices.Contains(mounts.Anew(m[0]).Options, "ro")}, nil
}

// ask asks ZFS what changed. Errors: errUnclear, the trees have to be walked.
func (c *Comparer) ask(ctx context.Context, from, to side, fromTree, toTree *mounted) ([]change, error) {
	differ, ok := c.zfs.(Differ)
	if !ok || !from.view {
		return nil, errUnclear
	}
	base, err := c.zfs.Property(ctx, from.dataset, "origin")
	if err != nil {
		return nil, err
	}
	child, err := c.descends(ctx, to.dataset, base)
	if err != nil {
		return nil, err
	}
	if !child {
		return nil, fmt.Errorf("%s is no child of %s: %w", to.dataset, base, errUnclear)
	}
	if !to.view {
		return asked(ctx, differ, base, to.dataset, fromTree, toTree)
	}
	after, err := c.zfs.Property(ctx, to.dataset, "origin")
	if err != nil || after == base {
		return nil, err
	}
	return between(ctx, differ, base, after, fromTree, toTree)
}

// asked is what changed in a filesystem since the snapshot base, of it or of what
// it was cloned from. Errors: errUnclear.
func asked(ctx context.Context, differ Differ, base, filesystem string, from, to *mounted) (_ []change, err error) {
	// What programs wrote by mmap is in the kernel's memory still.
	if err := to.sync(); err != nil {
		return nil, fmt.Errorf("syncing %s: %w", filesystem, err)
	}
	after, end, err := differ.TemporarySnapshot(ctx, filesystem, "containerd-pve-diff")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, end()) }()
	return between(ctx, differ, base, after, from, to)
}

func between(ctx context.Context, differ Differ, base, after string, from, to *mounted) ([]change, error) {
	changes, err := collect(ctx, from, to, func(f func(zfs.Change) error) error { return differ.Diff(ctx, base, after, f) })
	if errors.Is(err, unix.ENAMETOOLONG) {
		return nil, fmt.Errorf("%w: %w", errUnclear, err)
	}
	return changes, err
}

// descends says whether the snapshot base is what filesystem was cloned from, at whatever distance.
func (c *Comparer) descends(ctx context.Context, filesystem, base string) (bool, error) {
	for base != zfs.Unset {
		origin, err := c.zfs.Property(ctx, filesystem, "origin")
		if err != nil || origin == zfs.Unset || origin == "" || origin == base {
			return origin == base, err
		}
		filesystem, _, _ = strings.Cut(origin, "@")
	}
	return false, nil
}

// rootToo adds the root, which changes with every name in it, if more of it than its time changed.
func rootToo(changes []change, from, to *mounted) ([]change, error) {
	same, err := sameRoot(from, to)
	if err != nil || same {
		return changes, err
	}
	return slices.Insert(changes, 0, change{path: "/"}), nil
}

func sameRoot(from, to *mounted) (bool, error) {
	var a, b unix.Stat_t
	if err := errors.Join(unix.Fstat(int(from.root.Fd()), &a), unix.Fstat(int(to.root.Fd()), &b)); err != nil {
		return false, err
	}
	old, err := xattrs(from.path("/."))
	if err != nil {
		return false, err
	}
	now, err := xattrs(to.path("/."))
	return a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid && maps.Equal(old, now), err
}

// walk compares all files.
func walk(ctx context.Context, from, to *mounted) ([]change, error) {
	out := map[string]bool{}
	below := ""
	if from != nil {
		below = from.dir() + "/."
	}
	linked := map[uint64][]string{} // unchanged names of files that have several
	other := map[uint64]bool{}      // such files of which a name is new
	err := cfs.Changes(ctx, below, to.dir()+"/.", func(kind cfs.ChangeKind, p string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		if kind == cfs.ChangeKindDelete {
			out[p] = true
			return nil
		}
		f := fileOf(info)
		if kind == cfs.ChangeKindUnmodified {
			linked[f.object] = append(linked[f.object], p)
			return nil
		}
		out[p] = false
		other[f.object] = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	for object := range other {
		for _, p := range linked[object] {
			out[p] = false
		}
	}
	return sorted(out), nil
}

// upload writes a layer into the content store.
func (c *Comparer) upload(ctx context.Context, config diff.Config, kind compression.Compression, write func(io.Writer) error) (_ ocispec.Descriptor, err error) {
	fail := func(err error) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, fmt.Errorf("writing the layer into the content store: %w", err)
	}
	if ctx, err = c.outgoing(ctx); err != nil {
		return fail(err)
	}
	ref := config.Reference
	if ref == "" {
		ref = "containerd-pve-diff-" + rand.Text()
	}
	cw, err := content.OpenWriter(ctx, c.store, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{MediaType: config.MediaType}))
	if err != nil {
		return fail(err)
	}
	defer func() {
		err = errors.Join(err, cw.Close())
		if err != nil && config.Reference == "" {
			if aerr := c.store.Abort(context.WithoutCancel(ctx), ref); aerr != nil && !errdefs.IsNotFound(aerr) {
				log.G(ctx).WithError(aerr).WithField("ref", ref).Warn("what was written of a layer stays until containerd drops it")
			}
		}
	}()
	if err := cw.Truncate(0); err != nil { // the reference may have been begun before
		return fail(err)
	}
	whole := digest.SHA256.Digester()
	compressed, err := compression.CompressStream(cw, kind)
	if err != nil {
		return fail(err)
	}
	if err := errors.Join(write(io.MultiWriter(compressed, whole.Hash())), compressed.Close()); err != nil {
		return fail(err)
	}
	if config.Labels == nil {
		config.Labels = map[string]string{}
	}
	config.Labels[labels.LabelUncompressed] = whole.Digest().String()
	dgst := cw.Digest()
	if err := cw.Commit(ctx, 0, dgst, content.WithLabels(config.Labels)); err != nil && !errdefs.IsAlreadyExists(err) {
		return fail(err)
	}
	info, err := c.store.Info(ctx, dgst)
	if err != nil {
		return fail(err)
	}
	if info.Labels[labels.LabelUncompressed] == "" {
		// It was there, from somebody who did not say so.
		info.Labels = map[string]string{labels.LabelUncompressed: whole.Digest().String()}
		if _, err := c.store.Update(ctx, info, "labels."+labels.LabelUncompressed); err != nil {
			return fail(err)
		}
	}
	return ocispec.Descriptor{MediaType: config.MediaType, Size: info.Size, Digest: info.Digest}, nil
}

// outgoing is the context for calls to containerd: in the caller's namespace, and
// with a lease, without which the layer would be nobody's until an image has it.
func (c *Comparer) outgoing(ctx context.Context) (context.Context, error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	if id, ok := leases.FromContext(ctx); ok {
		return leases.WithLease(ctx, id), nil
	}
	l, err := c.leases.Create(ctx, leases.WithRandomID(), leases.WithExpiration(keep))
	if err != nil {
		return nil, fmt.Errorf("a lease for it: %w", err)
	}
	return leases.WithLease(ctx, l.ID), nil
}
