package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
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

// unpack times the unpacking of an image as containerd's client and its transfer service do it: Prepare, mount,
// write, Commit.
func unpack(ctx context.Context, r *report, subjects []*subject, i image, runs int, say func(string, ...any)) (err error) {
	ctx = namespaces.WithNamespace(ctx, "bench")
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
	for _, s := range subjects {
		if s.content == "" {
			continue
		}
		stop, err := serveContent(store, s.content)
		if err != nil {
			return err
		}
		defer stop()
	}
	own := apply.NewFileSystemApplier(store)
	for n := range runs + 1 {
		for _, s := range subjects {
			for _, w := range s.ways("unpack of "+i.String(), own) {
				say("%s, round %d of %d: %s", w.call, n, runs, s.name)
				begin := time.Now()
				names, err := unpackOnce(ctx, s.snapshotter, w.applier, layers, fmt.Sprintf("unpack-%s-%d", i, n))
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				if n > 0 {
					r.add(s.filled, w.call, s.name, time.Since(begin))
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
	}
	return nil
}

// way is how a snapshotter's layers are unpacked.
type way struct {
	call    string
	applier diff.Applier
}

// ways are how a snapshotter's layers may be unpacked: by containerd's own differ, and ours by our daemon's.
func (s *subject) ways(call string, own diff.Applier) []way {
	if s.conn == nil {
		return []way{{call, own}}
	}
	ours := diffproxy.NewDiffApplier(diffapi.NewDiffClient(s.conn)).(diff.Applier)
	return []way{{call, ours}, {call + ", containerd's differ", own}}
}

// serveContent answers our daemon's differ as containerd does, until stop is called.
func serveContent(store content.Store, address string) (stop func(), err error) {
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer()
	contentapi.RegisterContentServer(server, contentserver.New(store))
	go func() { _ = server.Serve(l) }() // an error of it is seen by the daemon
	return server.Stop, nil
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
