package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/containerd-pve/containerd-pve/snapshotter"
	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
)

const (
	defaultContainerd = "/run/containerd/containerd.sock"
	// containerdLimit is how long the list waits for containerd.
	containerdLimit = 30 * time.Second
)

// snapshot is one of the list. Its JSON is what other programs read: no field
// is renamed or removed.
type snapshot struct {
	Dataset string `json:"dataset"`
	Kind    string `json:"kind"` // active, view or committed; spare: ready to be an active one of its parent's
	// Key is what the snapshotter was given: the name of a committed snapshot, the
	// key of another. Empty if the dataset was made by an older version.
	Key string `json:"key"`
	// Namespace and Name are containerd's; without a namespace Name is the key.
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// Parent is the dataset of the parent.
	Parent string `json:"parent"`
	// Images use the snapshot. Null: containerd did not answer.
	Images     []string  `json:"images"`
	Used       int64     `json:"used"`
	Referenced int64     `json:"referenced"`
	Created    time.Time `json:"created"`
}

func snapshotsCommand() *cobra.Command {
	var path, dataset, address, format string
	run := func(c *cobra.Command, _ []string) error {
		if err := checkFormat(format); err != nil {
			return err
		}
		conf, err := readConfig(path, c.Flags().Changed("config"))
		if err != nil {
			return err
		}
		if dataset != "" {
			conf.Dataset = dataset
		}
		if err := conf.complete(); err != nil {
			return err
		}
		list, err := listSnapshots(c.Context(), conf)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context(), containerdLimit)
		defer cancel()
		u, err := usedBy(ctx, address)
		if err != nil {
			fmt.Fprintf(c.ErrOrStderr(), "containerd-pve: images are not shown: %v\n", err)
		} else {
			u.name(list)
		}
		return printSnapshots(c.OutOrStdout(), format, list, time.Now())
	}
	c := &cobra.Command{
		Use:     "snapshots",
		Aliases: []string{"snapshot"},
		Short:   "list the snapshots with their datasets, images and sizes",
		Long: "Lists the snapshots as ZFS holds them, oldest first; neither the daemon nor containerd has to run.\n" +
			"Without containerd the images are not known: their column is empty, images is null in JSON, and a line on standard error says why.\n" +
			"A dataset made by an older version does not bear its key: the name is then shown as -.\n" +
			"A spare is a filesystem that the next container of an image will have, made ahead so that it needs not wait for the pool; one that was given away\n" +
			"is shown as the container's a second later.",
		Args: cobra.NoArgs,
		RunE: run,
	}
	c.AddCommand(&cobra.Command{Use: "ls", Short: "the same", Args: cobra.NoArgs, RunE: run})
	f := c.PersistentFlags()
	f.StringVarP(&path, "config", "c", defaultConfig, "configuration `file`")
	f.StringVar(&dataset, "dataset", "", "parent `dataset` instead of the configured one")
	f.StringVar(&address, "containerd-address", defaultContainerd, "containerd's `socket`")
	f.StringVar(&format, "format", "table", "table or json")
	return c
}

// listSnapshots asks ZFS.
func listSnapshots(ctx context.Context, conf config) ([]snapshot, error) {
	dataset := conf.Dataset
	if err := zfs.Ready(dataset); err != nil {
		return nil, err
	}
	z, err := zfs.OpenLister(conf.ZFS)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	places, err := containerStorages(conf)
	if err != nil {
		return nil, err
	}
	datasets, err := snapshotter.Datasets(ctx, z, dataset, places...)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("dataset %s does not exist: `containerd-pve serve` makes it: %w", dataset, err)
	}
	if err != nil {
		return nil, err
	}
	return named(datasets), nil
}

// named takes the keys apart.
func named(datasets []snapshotter.Dataset) []snapshot {
	list := []snapshot{}
	for _, d := range datasets {
		s := snapshot{
			Dataset: d.Name, Kind: strings.ToLower(d.Kind.String()), Key: d.Key, Parent: d.Parent,
			Used: d.Used, Referenced: d.Referenced, Created: d.Created,
		}
		if d.Spare {
			s.Kind = "spare"
		}
		s.Namespace, s.Name = snapshotter.SplitKey(d.Key)
		list = append(list, s)
	}
	return list
}

func printSnapshots(w io.Writer, format string, list []snapshot, now time.Time) error {
	if format == "json" {
		return printJSON(w, list)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "DATASET\tKIND\tNAMESPACE\tNAME\tPARENT\tUSED\tREFER\tAGE\tIMAGES")
	for _, s := range list {
		images := make([]string, len(s.Images))
		for i, name := range s.Images {
			images[i] = cell(name)
		}
		if s.Images != nil && len(images) == 0 {
			images = []string{cell("")}
		}
		parent := ""
		if s.Parent != "" {
			parent = path.Base(s.Parent)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.Dataset, s.Kind, cell(s.Namespace), cell(shortDigest(s.Name)), cell(parent),
			units.BytesSize(float64(s.Used)), units.BytesSize(float64(s.Referenced)), units.HumanDuration(max(now.Sub(s.Created), 0)), strings.Join(images, ", "))
	}
	return t.Flush()
}

// checkFormat refuses what is no format of a list.
func checkFormat(format string) error {
	if format != "table" && format != "json" {
		return fmt.Errorf("--format %q is neither table nor json: %w", format, errdefs.ErrInvalidArgument)
	}
	return nil
}

// printJSON is what --format json prints.
func printJSON(w io.Writer, list any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(list)
}

// cell is a text that stays in its cell, and a mark where there is none.
func cell(text string) string {
	if text == "" {
		return zfs.Unset
	}
	if q := strconv.Quote(text); q != `"`+text+`"` {
		return q // a line break or an escape sequence in a key
	}
	return text
}

// shortDigest leaves of a sha256 digest what tells it from others.
func shortDigest(name string) string {
	const algorithm, keep = "sha256:", 12
	if hex, ok := strings.CutPrefix(name, algorithm); ok && len(hex) == 64 {
		return algorithm + hex[:keep]
	}
	return name
}
