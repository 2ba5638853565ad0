package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// entries are a tar's, by name; each name once.
func entries(t *testing.T, r io.Reader) (names []string, content map[string][]byte, headers map[string]*tar.Header) {
	t.Helper()
	content, headers = map[string][]byte{}, map[string]*tar.Header{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return names, content, headers
		}
		must(t, err)
		names, headers[h.Name] = append(names, h.Name), h
		content[h.Name], err = io.ReadAll(tr)
		must(t, err)
	}
}

// TestImage: what is named is in it, all digests agree, and the same files give the same bytes.
func TestImage(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	dir := t.TempDir()
	program, text := filepath.Join(dir, "program"), filepath.Join(dir, "text")
	must(t, os.WriteFile(program, []byte("ELF"), 0o755))
	must(t, os.WriteFile(text, []byte("licence"), 0o644))
	files := []string{program + "=usr/bin/containerd-pve", text + "=/usr/share/doc/LICENSE"}
	out := filepath.Join(dir, "image.tar")
	must(t, run(out, "localhost:5000/a/b:1.0", "v1", files))
	archive, err := os.ReadFile(out)
	must(t, err)
	_, blobs, _ := entries(t, bytes.NewReader(archive))
	read := func(d v1.Descriptor, v any) []byte {
		t.Helper()
		b := blobs["blobs/sha256/"+d.Digest.Encoded()]
		if digest.FromBytes(b) != d.Digest || int64(len(b)) != d.Size {
			t.Fatalf("%s: %d bytes, %s", d.Digest, len(b), d.MediaType)
		}
		if v != nil {
			must(t, json.Unmarshal(b, v))
		}
		return b
	}
	var index v1.Index
	must(t, json.Unmarshal(blobs["index.json"], &index))
	var manifest v1.Manifest
	read(index.Manifests[0], &manifest)
	if d := cmp.Diff(map[string]string{"io.containerd.image.name": "localhost:5000/a/b:1.0", v1.AnnotationRefName: "1.0"}, index.Manifests[0].Annotations); d != "" {
		t.Error(d)
	}
	var config v1.Image
	read(manifest.Config, &config)
	if !slices.Equal(config.Config.Entrypoint, []string{"/usr/bin/containerd-pve"}) || config.OS != "linux" || config.Config.Labels[v1.AnnotationVersion] != "v1" {
		t.Errorf("%+v", config)
	}
	z, err := gzip.NewReader(bytes.NewReader(read(manifest.Layers[0], nil)))
	must(t, err)
	layer, err := io.ReadAll(z)
	must(t, err)
	if digest.FromBytes(layer) != config.RootFS.DiffIDs[0] {
		t.Error("another diff id")
	}
	names, content, headers := entries(t, bytes.NewReader(layer))
	if !slices.Equal(names, []string{"usr/", "usr/bin/", "usr/bin/containerd-pve", "usr/share/", "usr/share/doc/", "usr/share/doc/LICENSE"}) {
		t.Errorf("%q", names)
	}
	h := headers["usr/bin/containerd-pve"]
	if string(content[h.Name]) != "ELF" || h.Mode != 0o755 || h.Uid != 0 || h.ModTime.Unix() != 1700000000 {
		t.Errorf("%+v", h)
	}
	must(t, run(out, "localhost:5000/a/b:1.0", "v1", files))
	if again, err := os.ReadFile(out); err != nil || !bytes.Equal(again, archive) {
		t.Errorf("not the same bytes: %v", err)
	}
}

// TestRefused: bad arguments are named, and leave no file.
func TestRefused(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "image.tar")
	for _, c := range []struct {
		name, says string
		files      []string
	}{
		{"a", "TAG", []string{"x=y"}}, {"localhost:5000/a", "TAG", []string{"x=y"}}, {"a:1", "SOURCE", nil},
		{"a:1", `"x"`, []string{"x"}}, {"a:1", "no such file", []string{dir + "/none=y"}}, {"a:1", `"x="`, []string{"x="}},
	} {
		if err := run(out, c.name, "", c.files); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v", c, err)
		}
		if _, err := os.Stat(out); err == nil {
			t.Errorf("%+v: a file is left", c)
		}
	}
}
