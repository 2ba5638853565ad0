package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
	"github.com/spf13/cobra"
)

type snapshotOptions struct {
	dataset string
	daemon  string
	counts  []int
	runs    int
	layers  int
	images  []string
	format  string
}

func snapshotsCommand() *cobra.Command {
	var o snapshotOptions
	c := &cobra.Command{
		Use:   "snapshots --dataset POOL/NAME",
		Short: "time the calls of three snapshotters, in turns",
		Long: `Times the calls of our snapshotter against containerd's own zfs snapshotter and overlayfs, all three on one pool, with few
snapshots there and with many, and the unpacking of images, for ours by its own differ and by containerd's. Ours is a daemon, met
through its socket; the other two run within this process, as they do within containerd. Needs root; the dataset is made and destroyed.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.runs < 1 || o.layers < 1 || !slices.IsSorted(o.counts) || o.dataset == "" {
				return errors.New("give --dataset, at least one run and one layer, and --counts in ascending order")
			}
			if err := checkFormat(o.format); err != nil {
				return err
			}
			var images []image
			for _, text := range o.images {
				i, err := parseImage(text)
				if err != nil {
					return err
				}
				images = append(images, i)
			}
			// What the others log of their own failures is in the errors too.
			_ = log.SetLevel("error")
			subjects, remove, err := makeSubjects(c.Context(), o)
			if err != nil {
				return err
			}
			say := progress(c.ErrOrStderr())
			report, err := measureSnapshots(c.Context(), o, subjects, images, say)
			// Hours may be in what was measured before it failed or was interrupted, and
			// thousands of datasets are not destroyed at once.
			err = errors.Join(err, report.write(c.OutOrStdout(), o.format))
			say("destroying %s", o.dataset)
			err = errors.Join(err, remove())
			say("")
			return err
		},
	}
	c.Flags().StringVar(&o.dataset, "dataset", "", "`dataset` to work in; it must not exist")
	c.Flags().StringVar(&o.daemon, "daemon", "containerd-pve", "our `program`")
	c.Flags().IntSliceVar(&o.counts, "counts", []int{10, 1000}, "snapshots that are there, in ascending order")
	c.Flags().IntVarP(&o.runs, "runs", "n", 10, "runs of each call")
	c.Flags().IntVar(&o.layers, "layers", 50, "layers of each image that the snapshots belong to")
	c.Flags().StringSliceVar(&o.images, "unpack", nil, "images to unpack: `LAYERSxFILESxBYTES`, as 60x20x4096")
	formatFlag(c, &o.format)
	return c
}

// image is one to be unpacked: so many layers of so many files of so many bytes.
type image struct{ layers, files, bytes int }

func (i image) String() string { return fmt.Sprintf("%dx%dx%d", i.layers, i.files, i.bytes) }

func parseImage(text string) (image, error) {
	fields := strings.Split(text, "x")
	var n [3]int
	ok := len(fields) == len(n)
	for i := range min(len(fields), len(n)) {
		var err error
		n[i], err = strconv.Atoi(fields[i])
		ok = ok && err == nil && n[i] > 0
	}
	if !ok {
		return image{}, fmt.Errorf("--unpack %q is not LAYERSxFILESxBYTES", text)
	}
	return image{n[0], n[1], n[2]}, nil
}

// step is a call that is timed. The key names a snapshot of this run alone.
type step struct {
	name string
	do   func(ctx context.Context, s snapshots.Snapshotter, key, parent string) error
}

// standing is the key of a snapshot that is there all the time, as a running container's.
const standing = "standing"

var steps = []step{
	// Of a container's root: ours was cloned before, if the one before is some time ago.
	{"Prepare", func(ctx context.Context, s snapshots.Snapshotter, key, parent string) error {
		_, err := s.Prepare(ctx, key, parent)
		return err
	}},
	{"Mounts", func(ctx context.Context, s snapshots.Snapshotter, key, _ string) error {
		_, err := s.Mounts(ctx, key)
		return err
	}},
	{"Stat", func(ctx context.Context, s snapshots.Snapshotter, key, _ string) error {
		_, err := s.Stat(ctx, key)
		return err
	}},
	{"Commit", func(ctx context.Context, s snapshots.Snapshotter, key, _ string) error {
		return s.Commit(ctx, key+"-committed", key)
	}},
	{"Walk", func(ctx context.Context, s snapshots.Snapshotter, _, _ string) error {
		return s.Walk(ctx, func(context.Context, snapshots.Info) error { return nil })
	}},
	// As the CRI plugin asks for each running container, every ten seconds. Just after a Prepare the pool is being written.
	{"Usage", func(ctx context.Context, s snapshots.Snapshotter, _, _ string) error {
		_, err := s.Usage(ctx, standing)
		return err
	}},
	{"Remove", func(ctx context.Context, s snapshots.Snapshotter, key, _ string) error {
		return s.Remove(ctx, key+"-committed")
	}},
	// containerd calls it after a garbage collection; the others have nothing left to do.
	{"Cleanup", func(ctx context.Context, s snapshots.Snapshotter, _, _ string) error { return cleanup(ctx, s) }},
}

// cleanup is of a snapshotter that has one.
func cleanup(ctx context.Context, s snapshots.Snapshotter) error {
	if c, ok := s.(snapshots.Cleaner); ok {
		return c.Cleanup(ctx)
	}
	return nil
}

// measureSnapshots times the subjects at each count. Of what failed it answers what was measured before.
func measureSnapshots(ctx context.Context, o snapshotOptions, subjects []*subject, images []image, say func(string, ...any)) (*report, error) {
	r := &report{}
	for _, count := range o.counts {
		for _, s := range subjects {
			say("%s: up to %d snapshots", s.name, count)
			if err := s.stop(); err != nil {
				return r, err
			}
			if err := s.fill(ctx, count, o.layers); err != nil {
				return r, fmt.Errorf("filling %s up to %d: %w", s.name, count, err)
			}
			begin := time.Now()
			if err := s.start(ctx); err != nil {
				return r, fmt.Errorf("starting %s: %w", s.name, err)
			}
			r.add(count, "start", s.name, time.Since(begin))
			// Our daemon lists all datasets once after its start, minutes of ten thousand in an emulated machine: that is no
			// part of the calls.
			if err := cleanup(ctx, s.snapshotter); err != nil {
				return r, fmt.Errorf("cleaning %s up: %w", s.name, err)
			}
			if err := s.stand(ctx); err != nil {
				return r, err
			}
		}
		for n := range o.runs + 1 { // the first fills caches
			for _, s := range subjects {
				say("%d snapshots, round %d of %d: %s", count, n, o.runs, s.name)
				key := fmt.Sprintf("run-%d-%d", count, n)
				for _, step := range steps {
					begin := time.Now()
					if err := step.do(ctx, s.snapshotter, key, s.top()); err != nil {
						return r, fmt.Errorf("%s of %s with %d snapshots: %w", step.name, s.name, count, err)
					}
					if n > 0 {
						r.add(count, step.name, s.name, time.Since(begin))
					}
				}
			}
		}
		for _, s := range subjects {
			if kb := s.memory(); kb > 0 {
				r.Memory = append(r.Memory, memory{Snapshots: count, KiB: kb})
			}
		}
	}
	for _, i := range images {
		if err := unpack(ctx, r, subjects, i, o.runs, say); err != nil {
			return r, fmt.Errorf("unpacking %s: %w", i, err)
		}
	}
	say("")
	return r, nil
}
