package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// build makes the layers of an image, half of which can be compressed away.
func build(ctx context.Context, store content.Store, i image) ([]ocispec.Descriptor, error) {
	var layers []ocispec.Descriptor
	random := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, i.bytes)
	for l := range i.layers {
		var blob bytes.Buffer
		z := gzip.NewWriter(&blob)
		t := tar.NewWriter(z)
		for f := range i.files {
			for n := 0; n+8 <= len(data)/2; n += 8 {
				v := random.Uint64()
				for b := range 8 {
					data[n+b] = byte(v >> (8 * b))
				}
			}
			h := &tar.Header{Name: fmt.Sprintf("dir-%d/file-%d", l, f), Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(1e9, 0)}
			if err := t.WriteHeader(h); err != nil {
				return nil, err
			}
			if _, err := t.Write(data); err != nil {
				return nil, err
			}
		}
		if err := errors.Join(t.Close(), z.Close()); err != nil {
			return nil, err
		}
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob.Bytes()), Size: int64(blob.Len())}
		if err := content.WriteBlob(ctx, store, d.Digest.String(), &blob, d); err != nil {
			return nil, err
		}
		layers = append(layers, d)
	}
	return layers, nil
}

// unpack times the unpacking of an image by containerd's own applier, as its
// client and its transfer service do it: Prepare, mount, write, Commit.
func unpack(ctx context.Context, r *report, subjects []*subject, i image, runs int, say func(string, ...any)) (err error) {
	dir, err := os.MkdirTemp("", "snapshots-content-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	store, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		return err
	}
	say("making the image %s", i)
	layers, err := build(ctx, store, i)
	if err != nil {
		return err
	}
	applier := apply.NewFileSystemApplier(store)
	for n := range runs + 1 {
		for _, s := range subjects {
			say("unpacking %s, round %d of %d: %s", i, n, runs, s.name)
			begin := time.Now()
			names, err := unpackOnce(ctx, s.snapshotter, applier, layers, fmt.Sprintf("unpack-%s-%d", i, n))
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			if n > 0 {
				r.add(s.filled, "unpack of "+i.String(), s.name, time.Since(begin))
			}
			for n := len(names) - 1; n >= 0; n-- {
				if err := s.snapshotter.Remove(ctx, names[n]); err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
			}
			if err := cleanup(ctx, s.snapshotter); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	return nil
}

func unpackOnce(ctx context.Context, s snapshots.Snapshotter, applier diff.Applier, layers []ocispec.Descriptor, prefix string) (names []string, err error) {
	parent := ""
	for n, d := range layers {
		key := fmt.Sprintf("%s-%d", prefix, n)
		mounts, err := s.Prepare(ctx, key+"-key", parent, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: key}))
		if err != nil {
			return nil, err
		}
		if _, err := applier.Apply(ctx, d, mounts); err != nil {
			return nil, err
		}
		if err := s.Commit(ctx, key, key+"-key"); err != nil {
			return nil, err
		}
		names, parent = append(names, key), key
	}
	return names, nil
}
