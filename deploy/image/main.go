// Command image writes the container image of the node installer (deploy/kubernetes) as an OCI archive, which `ctr images
// import`, `nerdctl load`, `skopeo` and `podman load` take:
//
//	image -o FILE -name NAME -version VERSION SOURCE=PLACE...
//
// It has nothing but the files named, of root's, with their modes. The same files give the same bytes: the times are
// SOURCE_DATE_EPOCH's, or 1970's.
package main

import (
	"archive/tar"
	"bytes"
	_ "crypto/sha256" // of the digests
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// entrypoint is what the pods' args are for.
const entrypoint = "/usr/bin/containerd-pve"

func main() {
	out := flag.String("o", "", "the archive's `file`")
	name := flag.String("name", "", "the image's `name`, with its tag")
	version := flag.String("version", "", "of the programs")
	flag.Parse()
	if err := run(*out, *name, *version, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(out, name, version string, files []string) error {
	epoch := int64(0)
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		var err error
		if epoch, err = strconv.ParseInt(s, 10, 64); err != nil {
			return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
		}
	}
	colon := strings.LastIndex(name, ":")
	if out == "" || colon <= strings.LastIndex(name, "/") || len(files) == 0 {
		return errors.New("not all is given of -o FILE, -name NAME:TAG, SOURCE=PLACE")
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	err = errors.Join(archive(f, name, name[colon+1:], version, time.Unix(epoch, 0).UTC(), files), f.Close())
	if err != nil {
		os.Remove(out)
	}
	return err
}

// archive writes the OCI layout of one image.
func archive(w io.Writer, name, tag, version string, at time.Time, files []string) error {
	t := tar.NewWriter(w)
	put := func(name string, b []byte) error {
		if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b)), ModTime: at, Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err := t.Write(b)
		return err
	}
	blob := func(mediaType string, b []byte) (v1.Descriptor, error) {
		d := digest.FromBytes(b)
		return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}, put("blobs/sha256/"+d.Encoded(), b)
	}
	text := func(mediaType string, v any) (v1.Descriptor, error) {
		b, err := json.Marshal(v)
		if err != nil {
			return v1.Descriptor{}, err
		}
		return blob(mediaType, b)
	}
	packed, diff, err := layer(at, files)
	if err != nil {
		return err
	}
	root, err := blob(v1.MediaTypeImageLayerGzip, packed)
	if err != nil {
		return err
	}
	platform := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	config, err := text(v1.MediaTypeImageConfig, v1.Image{
		Created: &at, Platform: platform, RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{diff}},
		Config: v1.ImageConfig{Entrypoint: []string{entrypoint}, Labels: map[string]string{v1.AnnotationVersion: version}},
	})
	if err != nil {
		return err
	}
	manifest, err := text(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: config, Layers: []v1.Descriptor{root},
	})
	if err != nil {
		return err
	}
	manifest.Platform = &platform
	manifest.Annotations = map[string]string{"io.containerd.image.name": name, v1.AnnotationRefName: tag}
	index, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{manifest}})
	if err != nil {
		return err
	}
	layout, err := json.Marshal(v1.ImageLayout{Version: v1.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return errors.Join(put(v1.ImageIndexFile, index), put(v1.ImageLayoutFile, layout), t.Close())
}

// layer gives the layer's bytes, and the digest of what they are when unpacked.
func layer(at time.Time, files []string) (packed []byte, diff digest.Digest, err error) {
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	sum := digest.Canonical.Digester()
	t := tar.NewWriter(io.MultiWriter(z, sum.Hash()))
	made := map[string]bool{".": true}
	for _, f := range files {
		source, place, ok := strings.Cut(f, "=")
		place = strings.TrimPrefix(path.Clean("/"+place), "/")
		if !ok || place == "" {
			return nil, "", fmt.Errorf("%q is not SOURCE=PLACE", f)
		}
		info, err := os.Stat(source)
		if err != nil {
			return nil, "", err
		}
		b, err := os.ReadFile(source)
		if err != nil {
			return nil, "", err
		}
		if err := directories(t, made, path.Dir(place), at); err != nil {
			return nil, "", err
		}
		if err := t.WriteHeader(&tar.Header{Name: place, Mode: int64(info.Mode().Perm()), Size: int64(len(b)), ModTime: at, Format: tar.FormatPAX}); err != nil {
			return nil, "", err
		}
		if _, err := t.Write(b); err != nil {
			return nil, "", err
		}
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return nil, "", err
	}
	return buf.Bytes(), sum.Digest(), nil
}

// directories makes those that were not made yet, the outer ones first.
func directories(t *tar.Writer, made map[string]bool, dir string, at time.Time) error {
	if made[dir] {
		return nil
	}
	if err := directories(t, made, path.Dir(dir), at); err != nil {
		return err
	}
	made[dir] = true
	return t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: at, Format: tar.FormatPAX})
}
