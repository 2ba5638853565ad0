package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
	"github.com/containerd-pve/containerd-pve/template"
	"github.com/containerd-pve/containerd-pve/template/plain"
)

// templateTool is what the commands on templates work with.
type templateTool struct {
	path, address, namespace, format string
	name, memory, size               string
	vmid                             int
	nets                             []string
	pulling                          pulling
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
	store := proxy.NewContentStore(contentapi.NewContentClient(conn))
	of := imageFrom(a.Image)
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

// open is this host's store of templates.
func (t *templateTool) open(ctx context.Context, set bool) (conf config, s *template.Store, z zfs.Way, err error) {
	fail := func(err error) (config, *template.Store, zfs.Way, error) { return config{}, nil, nil, err }
	if conf, err = readConfig(t.path, set); err != nil {
		return fail(err)
	}
	if err := conf.complete(); err != nil {
		return fail(err)
	}
	if s, err = storeOn(conf); err != nil {
		return fail(err)
	}
	if z, err = zfs.New(ctx, conf.ZFS); err != nil {
		return fail(err)
	}
	s.ZFS = z
	return conf, s, z, nil
}

// storeOn is the node of Proxmox that this host is, or LXC alone.
func storeOn(conf config) (s *template.Store, err error) {
	node, err := thisNode(conf)
	if err != nil {
		return nil, err
	}
	if node == nil {
		numbers, err := parseVMIDs(conf.VMIDRange)
		if err != nil {
			return nil, err
		}
		n := &plain.Node{Path: "/var/lib/lxc", Default: "/etc/lxc/default.conf", Pool: conf.Dataset + "-templates", Range: numbers, Locks: lockDir}
		return &template.Store{Node: n, Host: pve.Host{Env: true}, Storage: pve.Storage{Name: plain.Storage, Pool: n.Pool}}, nil
	}
	self, err := node.Name()
	if err != nil {
		return nil, err
	}
	s = &template.Store{Node: node, Host: pve.Host{Env: thisProxmox.knowsEnv()}}
	s.Storage, err = node.Storage(self, conf.Storage, conf.Dataset)
	return s, err
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

// connect is open for what makes templates of containerd's images.
func (t *templateTool) connect(ctx context.Context, set bool) (_ *templateMaker, err error) {
	m := &templateMaker{namespace: t.namespace}
	if m.conf, m.store, m.zfs, err = t.open(ctx, set); err != nil {
		return nil, err
	}
	m.store.Init, err = lxc.InitProgram("")
	if m.plain() && err == nil {
		err = m.zfs.Create(ctx, m.store.Storage.Pool, zfs.Properties{"mountpoint": "none"})
		if errdefs.IsAlreadyExists(err) {
			err = nil
		}
	}
	if err == nil {
		m.conn, err = dialContainerd(t.address)
	}
	if err != nil {
		return nil, errors.Join(err, m.zfs.Close())
	}
	return m, nil
}

// templateMaker makes templates of a namespace's images.
type templateMaker struct {
	conf      config
	store     *template.Store
	zfs       zfs.Way
	conn      *grpc.ClientConn
	namespace string
}

// plain says whether there is no Proxmox here.
func (m *templateMaker) plain() bool {
	_, is := m.store.Node.(*plain.Node)
	return is
}

func (m *templateMaker) Close() { _ = errors.Join(m.conn.Close(), m.zfs.Close()) }

// image finds an image with its top layer. Errors: NotFound, FailedPrecondition.
func (m *templateMaker) image(ctx context.Context, name string) (template.Image, error) {
	i, chain, err := imageOf(namespaces.WithNamespace(ctx, m.namespace), m.conn, name)
	if err != nil {
		return i, err
	}
	layers, err := snapshotter.Datasets(ctx, m.zfs, m.conf.Dataset)
	if err != nil {
		return i, err
	}
	for _, d := range layers {
		if namespace, key := snapshotter.SplitKey(d.Key); namespace == m.namespace && key == chain.String() && d.Committed() != "" {
			i.Layer = d.Committed()
		}
	}
	i.Chain = m.namespace + "/" + chain.String()
	if i.Layer == "" {
		return i, fmt.Errorf("image %s is not unpacked for %s: `ctr -n %s images pull --snapshotter %[2]s %[1]s`: %[4]w", name, snapshotterName, m.namespace, errdefs.ErrFailedPrecondition)
	}
	return i, nil
}

func (t *templateTool) create(ctx context.Context, set bool, name string, w io.Writer) error {
	o, err := t.options()
	if err != nil {
		return err
	}
	m, err := t.connect(ctx, set)
	if err != nil {
		return err
	}
	defer m.Close()
	if t.pulling.first {
		if name, err = t.pulling.pull(ctx, m.conn, m.namespace, name); err != nil {
			return err
		}
	}
	return m.store.Node.Exclusive(ctx, "template", func() error {
		image, err := m.image(ctx, name)
		if err != nil {
			return err
		}
		made, is, err := m.create(ctx, image, o)
		if err != nil {
			return err
		}
		if t.format == "json" {
			return printJSON(w, made)
		}
		return m.sayMade(w, made, is)
	})
}

// create makes a template, or finds it, with a lease on its layer, which was there before the clone.
func (m *templateMaker) create(ctx context.Context, i template.Image, o template.Options) (template.Template, bool, error) {
	_, chain, _ := strings.Cut(i.Chain, "/")
	if err := holdLayer(ctx, m.conn, m.namespace, chain); err != nil {
		return template.Template{}, false, err
	}
	made, is, err := m.store.Create(ctx, i, o)
	if err != nil {
		ctx := context.WithoutCancel(ctx)
		all, lerr := m.store.List(ctx)
		if lerr == nil {
			lerr = releaseLayers(ctx, m.conn, all)
		}
		err = errors.Join(err, lerr)
	}
	return made, is, err
}

func (m *templateMaker) sayMade(w io.Writer, made template.Template, is bool) error {
	if !is {
		_, err := fmt.Fprintf(w, "VMID %d is the template of %s (%s) already\n", made.VMID, made.Image, shortDigest(made.Digest))
		return err
	}
	clone := "pct clone %d VMID"
	if m.plain() {
		clone = "lxc-copy -n %d -N NAME -s"
	}
	_, err := fmt.Fprintf(w, "VMID %d, %s, is a template of %s (%s): `"+clone+"`\n", made.VMID, made.Name, made.Image, shortDigest(made.Digest), made.VMID)
	return err
}

// refresh makes a template of every image that has one and moved on since. The
// old ones stay for what was cloned of them.
func (t *templateTool) refresh(ctx context.Context, set bool, only []string, w io.Writer) error {
	m, err := t.connect(ctx, set)
	if err != nil {
		return err
	}
	defer m.Close()
	return m.store.Node.Exclusive(ctx, "template", func() error {
		all, err := m.store.List(ctx)
		if err != nil {
			return err
		}
		newest := map[string]template.Template{}
		for _, of := range all {
			if last, ok := newest[of.Image]; of.Image != "" && !of.Unfinished && (!ok || of.Created.After(last.Created)) {
				newest[of.Image] = of
			}
		}
		for _, name := range only {
			if _, ok := newest[name]; !ok {
				return fmt.Errorf("no template is of image %s: %w", name, errdefs.ErrNotFound)
			}
		}
		results := []refreshed{}
		var failed error
		for _, name := range slices.Sorted(maps.Keys(newest)) {
			if len(only) > 0 && !slices.Contains(only, name) {
				continue
			}
			r, err := m.refresh(ctx, newest[name], &t.pulling)
			if err != nil {
				failed = errors.Join(failed, err)
				continue
			}
			results = append(results, r)
			if t.format != "json" {
				if err := m.sayMade(w, r.Template, r.Made); err != nil {
					return err
				}
			}
		}
		if t.format == "json" {
			failed = errors.Join(failed, printJSON(w, results))
		}
		return failed
	})
}

// refreshed is what became of a template: itself, or the one that was made in its place.
type refreshed struct {
	template.Template
	Old  int  `json:"old"`
	Made bool `json:"made"`
}

// refresh gives the new one the memory and the networks of the old.
func (m *templateMaker) refresh(ctx context.Context, old template.Template, p *pulling) (refreshed, error) {
	if p.first {
		if _, err := p.pull(ctx, m.conn, m.namespace, old.Image); err != nil {
			return refreshed{}, err
		}
	}
	image, err := m.image(ctx, old.Image)
	if err != nil {
		return refreshed{}, err
	}
	o, err := m.store.OptionsOf(old.VMID)
	if err != nil {
		return refreshed{}, err
	}
	made, is, err := m.create(ctx, image, o)
	return refreshed{made, old.VMID, is}, err
}

// release gives back what is leased for templates that are gone.
func (t *templateTool) release(ctx context.Context, s *template.Store) error {
	conn, err := dialContainerd(t.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	all, err := s.List(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, containerdLimit)
	defer cancel()
	if err := releaseLayers(ctx, conn, all); err != nil {
		return fmt.Errorf("it is removed, but containerd still holds its layers (the next rm or prune tries again): %w", err)
	}
	return nil
}

// vmidsOf reads arguments.
func vmidsOf(args []string) ([]int, error) {
	var all []int
	for _, text := range args {
		vmid, err := strconv.Atoi(text)
		if err != nil {
			return nil, fmt.Errorf("%q is no VMID: %w", text, errdefs.ErrInvalidArgument)
		}
		all = append(all, vmid)
	}
	return all, nil
}

func templateCommand() *cobra.Command {
	c := &cobra.Command{Use: "template", Aliases: []string{"templates"}, Short: "templates of images, for pct clone or lxc-copy"}
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
		Long: "Makes a template of an image that was pulled for " + snapshotterName + ", without copying it: `pct clone` and the GUI clone that, or\n" +
			"`lxc-copy -s` on a host without Proxmox. The command, environment,\n" +
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
	// with opens the store; those that change it do so one at a time.
	with := func(exclusive bool, f func(ctx context.Context, s *template.Store, args []string, w io.Writer) error) func(*cobra.Command, []string) error {
		return format(func(c *cobra.Command, args []string) error {
			_, store, z, err := t.open(c.Context(), c.Flags().Changed("config"))
			if err != nil {
				return err
			}
			defer z.Close()
			now := func() error { return f(c.Context(), store, args, c.OutOrStdout()) }
			if exclusive {
				return store.Node.Exclusive(c.Context(), "template", now)
			}
			return now()
		})
	}
	ls := &cobra.Command{
		Use: "ls", Short: "list the templates of this node", Args: cobra.NoArgs,
		RunE: with(false, func(ctx context.Context, s *template.Store, _ []string, w io.Writer) error {
			all, err := s.List(ctx)
			if err != nil {
				return err
			}
			return printTemplates(w, t.format, all)
		}),
	}
	inspect := &cobra.Command{
		Use: "inspect VMID", Short: "print all that is known of a template, as JSON", Args: cobra.ExactArgs(1),
		RunE: with(false, func(ctx context.Context, s *template.Store, args []string, w io.Writer) error {
			vmids, err := vmidsOf(args)
			if err != nil {
				return err
			}
			d, err := s.Inspect(ctx, vmids[0])
			if err != nil {
				return err
			}
			return printJSON(w, d)
		}),
	}
	validate := &cobra.Command{
		Use: "validate VMID", Short: "say whether a template is whole and would boot", Args: cobra.ExactArgs(1),
		Long: "Says whether conf, dataset, snapshot, digest and config of a template are there and agree, and whether its process is there to be executed.\nThe exit status is 1 if not.",
		RunE: with(true, func(ctx context.Context, s *template.Store, args []string, w io.Writer) error {
			vmids, err := vmidsOf(args)
			if err != nil {
				return err
			}
			found, err := s.Validate(ctx, vmids[0])
			if err != nil {
				return err
			}
			var all []finding
			for _, f := range found {
				all = append(all, finding{Name: f.Name, OK: f.OK, Detail: f.Detail})
			}
			if err := report(w, t.format, all); err != nil {
				return err
			}
			if slices.ContainsFunc(all, func(f finding) bool { return !f.OK }) {
				return errNotReady
			}
			return nil
		}),
	}
	var keep int
	var age time.Duration
	var force bool
	prune := &cobra.Command{
		Use: "prune", Short: "remove templates that nothing was cloned of", Args: cobra.NoArgs,
		Long: "Lists the templates that nothing was cloned of, older than --older-than, beside the --keep newest of each image, and those that were not finished.\nWith --force they are removed.",
		RunE: with(true, func(ctx context.Context, s *template.Store, _ []string, w io.Writer) error {
			if keep < 0 || age < 0 {
				return fmt.Errorf("--keep %d, --older-than %s: less than nothing: %w", keep, age, errdefs.ErrInvalidArgument)
			}
			all, err := s.Prune(ctx, keep, time.Now().Add(-age), !force)
			if force {
				err = errors.Join(err, t.release(ctx, s))
			}
			if err != nil {
				return err
			}
			if err := printTemplates(w, t.format, all); err != nil || t.format == "json" {
				return err
			}
			done := "would be removed: --force does it"
			if force {
				done = "removed"
			}
			_, err = fmt.Fprintf(w, "%d %s\n", len(all), done)
			return err
		}),
	}
	prune.Flags().IntVar(&keep, "keep", 1, "how many of each image stay, the newest")
	prune.Flags().DurationVar(&age, "older-than", 0, "the `age` from which on they go, as 720h")
	prune.Flags().BoolVar(&force, "force", false, "remove them")
	refresh := &cobra.Command{
		Use: "refresh [IMAGE...]", Short: "make new templates of the images that moved on",
		Long: "Makes a template of each image of which there is one and which is another in containerd's store since (--pull or `ctr images pull` gets it), with\nmemory and networks of the old one. That stays for what was cloned of it; `prune` removes it.",
		RunE: format(func(c *cobra.Command, args []string) error {
			return t.refresh(c.Context(), c.Flags().Changed("config"), args, c.OutOrStdout())
		}),
	}
	rm := &cobra.Command{
		Use: "rm VMID...", Short: "remove templates that nothing was cloned of", Args: cobra.MinimumNArgs(1),
		RunE: with(true, func(ctx context.Context, s *template.Store, args []string, _ io.Writer) error {
			vmids, err := vmidsOf(args)
			if err != nil {
				return err
			}
			for _, vmid := range vmids {
				if err := s.Remove(ctx, vmid); err != nil {
					return err
				}
			}
			return t.release(ctx, s)
		}),
	}
	take := importCommand(&t, format)
	for _, sub := range []*cobra.Command{create, take, refresh, prune, rm} {
		sub.Flags().StringVar(&t.address, "containerd-address", defaultContainerd, "containerd's `socket`")
	}
	for _, sub := range []*cobra.Command{create, refresh} {
		t.pulling.flags(sub)
	}
	for _, sub := range []*cobra.Command{create, take, refresh} {
		sub.Flags().StringVarP(&t.namespace, "namespace", "n", namespaces.Default, "containerd's namespace")
	}
	for _, sub := range []*cobra.Command{create, take, ls, inspect, validate, refresh, prune, rm} {
		sub.Flags().StringVarP(&t.path, "config", "c", defaultConfig, "configuration `file`")
		if sub != rm && sub != inspect {
			sub.Flags().StringVar(&t.format, "format", "table", "table or json")
		}
		c.AddCommand(sub)
	}
	c.AddCommand(exportCommand())
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
