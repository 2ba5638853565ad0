package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
	"github.com/containerd-pve/containerd-pve/template"
)

// templateTool is what the commands on templates work with.
type templateTool struct {
	path, address, namespace, format string
	name, memory, size               string
	vmid                             int
	nets                             []string
}

// imageOf finds an image of containerd's, for this platform. Errors: NotFound.
func imageOf(ctx context.Context, conn *grpc.ClientConn, name string) (_ template.Image, chain digest.Digest, err error) {
	fail := func(err error) (template.Image, digest.Digest, error) {
		return template.Image{}, "", fmt.Errorf("image %s: %w", name, errgrpc.ToNative(err))
	}
	a, err := imagesapi.NewImagesClient(conn).Get(ctx, &imagesapi.GetImageRequest{Name: name})
	if err != nil {
		return fail(fmt.Errorf("%w (`ctr images ls` lists those that there are; -n says of which namespace)", errgrpc.ToNative(err)))
	}
	t := a.Image.Target
	store := proxy.NewContentStore(contentapi.NewContentClient(conn))
	of := images.Image{Name: name, Target: ocispec.Descriptor{MediaType: t.MediaType, Digest: digest.Digest(t.Digest), Size: t.Size}}
	d, err := of.Config(ctx, store, platforms.Default())
	if err != nil {
		return fail(err)
	}
	i := template.Image{Name: name, Digest: of.Target.Digest}
	if i.Blob, err = content.ReadBlob(ctx, store, d); err != nil {
		return fail(err)
	}
	if err := json.Unmarshal(i.Blob, &i.Config); err != nil {
		return fail(fmt.Errorf("its config %s: %w: %w", d.Digest, err, errdefs.ErrInvalidArgument))
	}
	return i, identity.ChainID(i.Config.RootFS.DiffIDs), nil
}

// open is this node's store of templates. Errors: FailedPrecondition, this is no node of Proxmox.
func (t *templateTool) open(ctx context.Context, set bool) (conf config, node *pve.Node, _ *template.Store, z zfs.Way, err error) {
	fail := func(err error) (config, *pve.Node, *template.Store, zfs.Way, error) {
		return config{}, nil, nil, nil, err
	}
	if conf, err = readConfig(t.path, set); err != nil {
		return fail(err)
	}
	if err := conf.complete(); err != nil {
		return fail(err)
	}
	if node, err = thisNode(conf); err != nil {
		return fail(err)
	}
	if node == nil {
		return fail(fmt.Errorf("this is no node of Proxmox VE: there are no templates: %w", errdefs.ErrFailedPrecondition))
	}
	self, err := node.Name()
	if err != nil {
		return fail(err)
	}
	s := &template.Store{Node: node}
	if s.Storage, err = node.Storage(self, conf.Storage, conf.Dataset); err != nil {
		return fail(err)
	}
	s.Host.Env = pve.KnowsEnv(thisProxmox.version("pve-container"), thisProxmox.version("lxc-pve"))
	if z, err = zfs.New(ctx, conf.ZFS); err != nil {
		return fail(err)
	}
	s.ZFS = z
	return conf, node, s, z, nil
}

func (t *templateTool) options() (o template.Options, err error) {
	o = template.Options{VMID: t.vmid, Name: t.name}
	for _, s := range []struct {
		flag, text string
		bytes      *int64
	}{{"memory", t.memory, &o.Memory}, {"size", t.size, &o.Size}} {
		if s.text == "" {
			continue
		}
		if *s.bytes, err = units.RAMInBytes(s.text); err != nil || *s.bytes <= 0 {
			return o, fmt.Errorf("--%s %q is no size, as 512M or 8G: %w", s.flag, s.text, errdefs.ErrInvalidArgument)
		}
	}
	for i, text := range t.nets {
		n, err := pve.ParseNet(text, i)
		if err != nil {
			return o, fmt.Errorf("--net %w", err)
		}
		o.Nets = append(o.Nets, n)
	}
	return o, nil
}

func (t *templateTool) create(ctx context.Context, set bool, name string, w io.Writer) error {
	o, err := t.options()
	if err != nil {
		return err
	}
	conf, node, store, z, err := t.open(ctx, set)
	if err != nil {
		return err
	}
	defer z.Close()
	if store.Init, err = lxc.InitProgram(""); err != nil {
		return err
	}
	conn, err := dialContainerd(t.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx = namespaces.WithNamespace(ctx, t.namespace)
	image, chain, err := imageOf(ctx, conn, name)
	if err != nil {
		return err
	}
	return node.Exclusive(ctx, "template", func() error {
		layers, err := snapshotter.Datasets(ctx, z, conf.Dataset)
		if err != nil {
			return err
		}
		for _, d := range layers {
			if namespace, key := splitKey(d.Key); namespace == t.namespace && key == chain.String() && d.Committed() != "" {
				image.Layer = d.Committed()
			}
		}
		if image.Layer == "" {
			return fmt.Errorf("image %s is not unpacked for %s: `ctr -n %s images pull --snapshotter %[2]s %[1]s`: %[4]w", name, snapshotterName, t.namespace, errdefs.ErrFailedPrecondition)
		}
		made, is, err := store.Create(ctx, image, o)
		if err != nil {
			return err
		}
		if t.format == "json" {
			return printJSON(w, made)
		}
		if !is {
			fmt.Fprintf(w, "VMID %d is the template of %s (%s) already\n", made.VMID, made.Image, shortDigest(made.Digest))
			return nil
		}
		_, err = fmt.Fprintf(w, "VMID %d, %s, is a template of %s: `pct clone %[1]d <VMID>`\n", made.VMID, made.Name, made.Image)
		return err
	})
}

func templateCommand() *cobra.Command {
	c := &cobra.Command{Use: "template", Aliases: []string{"templates"}, Short: "Proxmox templates of images"}
	var t templateTool
	format := func(f func(c *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
		return func(c *cobra.Command, args []string) error {
			if err := checkFormat(t.format); err != nil {
				return err
			}
			return f(c, args)
		}
	}
	create := &cobra.Command{
		Use: "create IMAGE", Short: "make a template of an image in containerd's store",
		Long: "Makes a template of an image that was pulled for " + snapshotterName + ", without copying it: `pct clone` and the GUI clone that. The command, environment,\n" +
			"working directory, user and stop signal are the image's. Of the digest of which there is a template that one is named.",
		Args: cobra.ExactArgs(1),
		RunE: format(func(c *cobra.Command, args []string) error {
			return t.create(c.Context(), c.Flags().Changed("config"), args[0], c.OutOrStdout())
		}),
	}
	f := create.Flags()
	f.IntVar(&t.vmid, "vmid", 0, "its `VMID`; any that is free if not said")
	f.StringVar(&t.name, "name", "", "its `name` in the GUI")
	f.StringVar(&t.memory, "memory", "512M", "memory of what is cloned of it, and swap as much")
	f.StringVar(&t.size, "size", "", "`size` of the disk, as 8G")
	f.StringArrayVar(&t.nets, "net", nil, "a network interface as Proxmox writes it, as name=eth0,bridge=vmbr0,ip=dhcp; may be repeated")
	f.StringVar(&t.address, "containerd-address", defaultContainerd, "containerd's `socket`")
	f.StringVarP(&t.namespace, "namespace", "n", namespaces.Default, "containerd's namespace")
	ls := &cobra.Command{
		Use: "ls", Short: "list the templates of this node", Args: cobra.NoArgs,
		RunE: format(func(c *cobra.Command, _ []string) error {
			_, _, store, z, err := t.open(c.Context(), c.Flags().Changed("config"))
			if err != nil {
				return err
			}
			defer z.Close()
			all, err := store.List(c.Context())
			if err != nil {
				return err
			}
			return printTemplates(c.OutOrStdout(), t.format, all)
		}),
	}
	rm := &cobra.Command{
		Use: "rm VMID...", Short: "remove templates that nothing was cloned of", Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			_, node, store, z, err := t.open(c.Context(), c.Flags().Changed("config"))
			if err != nil {
				return err
			}
			defer z.Close()
			for _, text := range args {
				vmid, err := strconv.Atoi(text)
				if err != nil {
					return fmt.Errorf("%q is no VMID: %w", text, errdefs.ErrInvalidArgument)
				}
				if err := node.Exclusive(c.Context(), "template", func() error { return store.Remove(c.Context(), vmid) }); err != nil {
					return err
				}
			}
			return nil
		},
	}
	for _, sub := range []*cobra.Command{create, ls, rm} {
		sub.Flags().StringVarP(&t.path, "config", "c", defaultConfig, "configuration `file`")
		if sub != rm {
			sub.Flags().StringVar(&t.format, "format", "table", "table or json")
		}
		c.AddCommand(sub)
	}
	return c
}

func printTemplates(w io.Writer, format string, all []template.Template) error {
	if format == "json" {
		return printJSON(w, all)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "VMID\tNAME\tIMAGE\tDIGEST\tCREATED\tSIZE\tOWN\tCLONES\tSTATE")
	for _, t := range all {
		state := "ready"
		switch {
		case t.Unfinished:
			state = "unfinished"
		case t.Dataset == "":
			state = "no dataset"
		}
		created := zfs.Unset
		if !t.Created.IsZero() {
			created = t.Created.Local().Format(time.DateTime)
		}
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", t.VMID, cell(t.Name), cell(t.Image), cell(shortDigest(t.Digest)), created,
			units.BytesSize(float64(t.Referenced)), units.BytesSize(float64(t.Used)), len(t.Clones), state)
	}
	return tw.Flush()
}
