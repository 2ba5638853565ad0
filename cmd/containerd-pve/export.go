package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	leasesproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter/detached"
	"github.com/containerd-pve/containerd-pve/template"
	"github.com/containerd-pve/containerd-pve/template/export"
)

// The formats of an export.
const (
	asOCI     = "oci"
	asVztmpl  = "vztmpl"
	streaming = "-"
)

// exportHold is how long containerd keeps an image for an export that was killed.
const exportHold = 24 * time.Hour

// exporter is `template export`.
type exporter struct {
	templateTool
	as     string
	force  bool
	stdout *os.File
	stderr io.Writer
}

func exportCommand() *cobra.Command {
	e := exporter{stdout: os.Stdout}
	c := &cobra.Command{
		Use: "export VMID FILE", Short: "write a template as an OCI archive or a tarball of its root", Args: cobra.ExactArgs(2),
		Long: "Writes a template as a FILE, or - for the standard output, which other programs take:\n" +
			"  oci     an OCI archive, as `ctr images import` and `skopeo copy oci-archive:` read it: the image byte by byte as long as containerd has it,\n" +
			"          one layer of the template's files otherwise\n" +
			"  vztmpl  a tarball of the template's root, as `pct create` and Proxmox's storage of templates take it, compressed as its name says:\n" +
			"          .tar.zst, .tar.gz or .tar; - is not compressed\n" +
			"Without --as, what ends in .tar.zst or .tar.gz is vztmpl, all else oci. An image is exported by `ctr images export`.",
		RunE: func(c *cobra.Command, args []string) error {
			e.stderr = c.ErrOrStderr()
			return e.run(c.Context(), c.Flags().Changed("config"), args[0], args[1])
		},
	}
	f := c.Flags()
	f.StringVar(&e.as, "as", "", "oci or vztmpl")
	f.BoolVar(&e.force, "force", false, "replace a file that is there")
	f.StringVarP(&e.path, "config", "c", defaultConfig, "configuration `file`")
	f.StringVar(&e.address, "containerd-address", defaultContainerd, "containerd's `socket`")
	return c
}

// exportFormat is what a file is to become. Errors: InvalidArgument.
func exportFormat(as, file string) (string, compression.Compression, error) {
	name := strings.ToLower(file)
	kind, known := compression.Uncompressed, true
	switch {
	case strings.HasSuffix(name, ".tar.zst"):
		kind = compression.Zstd
	case strings.HasSuffix(name, ".tar.gz"):
		kind = compression.Gzip
	default:
		known = file == streaming || strings.HasSuffix(name, ".tar")
	}
	switch {
	case as == "" && kind != compression.Uncompressed:
		as = asVztmpl
	case as == "":
		as = asOCI
	}
	switch {
	case as == asOCI:
		return asOCI, compression.Uncompressed, nil
	case as != asVztmpl:
		return "", 0, fmt.Errorf("--as %q is neither %s nor %s: %w", as, asOCI, asVztmpl, errdefs.ErrInvalidArgument)
	case !known:
		return "", 0, fmt.Errorf("%s: Proxmox takes a template whose name ends in .tar.zst, .tar.gz or .tar: %w", file, errdefs.ErrInvalidArgument)
	}
	return asVztmpl, kind, nil
}

func (e *exporter) run(ctx context.Context, set bool, id, file string) error {
	vmids, err := vmidsOf([]string{id})
	if err != nil {
		return err
	}
	as, kind, err := exportFormat(e.as, file)
	if err != nil {
		return err
	}
	_, store, z, err := e.open(ctx, set)
	if err != nil {
		return err
	}
	defer z.Close()
	d, err := store.Inspect(ctx, vmids[0])
	if err != nil {
		return err
	}
	if d.Unfinished || d.Dataset == "" {
		return fmt.Errorf("template %d is not whole: `containerd-pve template validate %[1]d` says what it lacks: %w", d.VMID, errdefs.ErrFailedPrecondition)
	}
	var said string
	var written int64
	write := func(w io.Writer) error {
		p := &counted{Writer: w, told: newProgress(e.stderr)}
		defer p.told.end()
		if as == asVztmpl {
			err = e.rootfs(ctx, d, p, kind)
			said = bootText(d, file)
		} else {
			said, err = e.image(ctx, d, p, file)
		}
		written = p.written
		return err
	}
	if file == streaming {
		err = export.ToStream(ctx, e.stdout, write)
	} else {
		err = export.ToFile(ctx, file, e.force, write)
	}
	if err != nil {
		return fmt.Errorf("exporting template %d: %w", d.VMID, err)
	}
	_, err = fmt.Fprintf(e.stderr, "template %d, %s: %s\n%s", d.VMID, as, units.BytesSize(float64(written)), said)
	return err
}

// files are the template's, until they are closed. Nobody else sees them mounted.
func (e *exporter) files(ctx context.Context, d template.Details) (*os.File, error) {
	root, err := detached.Mount(ctx, d.Base(), true)
	if err != nil {
		return nil, fmt.Errorf("%w (`containerd-pve template validate %d` says what is wrong)", err, d.VMID)
	}
	return root, nil
}

func (e *exporter) rootfs(ctx context.Context, d template.Details, w io.Writer, kind compression.Compression) error {
	root, err := e.files(ctx, d)
	if err != nil {
		return err
	}
	defer root.Close()
	return export.Rootfs(ctx, w, root, kind)
}

// image writes an OCI archive, and says which of both it is.
func (e *exporter) image(ctx context.Context, d template.Details, w io.Writer, file string) (said string, err error) {
	if d.Config == nil {
		return "", fmt.Errorf("the image's config, which the template keeps, cannot be read: --as %s does without: %w", asVztmpl, errdefs.ErrDataLoss)
	}
	i := export.Image{Name: d.Image, Digest: digest.Digest(d.Digest), Config: d.Config}
	if err := i.Digest.Validate(); err != nil {
		return "", fmt.Errorf("the image's digest %q, which the template keeps: %w: %w", i.Digest, err, errdefs.ErrDataLoss)
	}
	conn, err := dialContainerd(e.address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	namespace, _, _ := strings.Cut(d.Layer, "/")
	if namespace == "" {
		namespace = namespaces.Default
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	release, err := holdContent(ctx, conn, i.Digest)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, release()) }()
	store := proxy.NewContentStore(contentapi.NewContentClient(conn))
	manifest, gone := export.Find(ctx, store, i)
	if gone == nil {
		if err := export.Archive(ctx, w, store, manifest, i.Name); err != nil {
			return "", err
		}
		return fmt.Sprintf("the image as containerd has it, manifest %s\n", manifest.Digest), nil
	}
	if !errdefs.IsNotFound(gone) {
		return "", gone
	}
	root, err := e.files(ctx, d)
	if err != nil {
		return "", err
	}
	defer root.Close()
	dir := os.TempDir()
	if file != streaming {
		dir = filepath.Dir(file)
	}
	if manifest, err = export.Flat(ctx, w, root, dir, i); err != nil {
		return "", err
	}
	return fmt.Sprintf("one layer of the template's files with the image's config, manifest %s: containerd does not have the whole image any more (%v)\n", manifest.Digest, gone), nil
}

// holdContent keeps what is there of an image until release, whoever removes it.
func holdContent(ctx context.Context, conn *grpc.ClientConn, image digest.Digest) (release func() error, err error) {
	fail := func(err error) (func() error, error) { return nil, fmt.Errorf("a lease on %s: %w", image, err) }
	manager := leasesproxy.NewLeaseManager(leasesapi.NewLeasesClient(conn))
	l, err := manager.Create(ctx, leases.WithRandomID(), leases.WithExpiration(exportHold))
	if err != nil {
		return fail(err)
	}
	release = func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), containerdLimit)
		defer cancel()
		if err := manager.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("lease %s: %w", l.ID, err)
		}
		return nil
	}
	if err := manager.AddResource(ctx, l, leases.Resource{ID: image.String(), Type: "content"}); err != nil {
		return fail(errors.Join(err, release()))
	}
	return release, nil
}

// plainWord needs no quotes in a shell.
var plainWord = regexp.MustCompile(`^[A-Za-z0-9_./:=,@%+-]+$`)

func shellWord(s string) string {
	if plainWord.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// bootText is what Proxmox is to be told so that what is made of the tarball boots
// as what is cloned of the template. It may be another node, with storages of its own.
func bootText(d template.Details, file string) string {
	conf := pve.Parse([]byte(d.Conf))
	if file == streaming {
		file = "FILE"
	} else if abs, err := filepath.Abs(file); err == nil {
		file = abs
	}
	words := []string{"pct", "create", "VMID", shellWord(file)}
	for _, key := range []string{"arch", "cmode", "entrypoint", "features", "hostname", "memory", "ostype", "swap", "unprivileged"} {
		if v, ok := conf.Get(key); ok {
			words = append(words, "--"+key, shellWord(v))
		}
	}
	if rootfs, ok := conf.Get("rootfs"); ok {
		for o := range strings.SplitSeq(rootfs, ",") {
			if size, ok := strings.CutPrefix(o, "size="); ok {
				words = append(words, "--rootfs", shellWord("STORAGE:"+strings.TrimSuffix(size, "G")))
			}
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "it boots as the image says with:\n  %s\n", strings.Join(words, " "))
	if entries := conf.LXC(); len(entries) > 0 {
		b.WriteString("and in /etc/pve/lxc/VMID.conf then:\n")
		for _, l := range entries {
			fmt.Fprintf(&b, "  %s: %s\n", l.Key, l.Value)
		}
	}
	return b.String()
}

// counted counts what is written, and says it.
type counted struct {
	io.Writer
	written int64
	told    *progress
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.written += int64(n)
	c.told.show("written:", c.written, allOf)
	return n, err
}
