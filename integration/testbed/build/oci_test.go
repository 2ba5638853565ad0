package build

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
)

func TestDiff(t *testing.T) {
	base, tree := t.TempDir(), t.TempDir()
	write := func(dir, name, text string) {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{base, tree} {
		write(d, "etc/same", "1")
		write(d, "dev/null", "")
	}
	write(base, "etc/changed", "1")
	write(tree, "etc/changed", "22")
	write(base, "gone/a", "1")
	write(base, "dev/gone", "")
	write(tree, "new/file", "1")
	if err := os.Link(filepath.Join(tree, "new/file"), filepath.Join(tree, "new/link")); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(diff(t.Context(), w, tree, base), w.Close()); err != nil {
		t.Fatal(err)
	}
	var got []string
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, h.Name+" "+h.Linkname)
	}
	want := []string{"etc/changed ", "new/ ", "new/file ", "new/link new/file", ".wh.gone "}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestWriteImages reads back what the registry is given: whatever is named is there, as named.
func TestWriteImages(t *testing.T) {
	out := t.TempDir()
	for _, tree := range []string{"debian", "nginx", "systemd", "busybox", "pause"} {
		if err := errors.Join(os.Mkdir(filepath.Join(out, tree), 0o755), os.WriteFile(filepath.Join(out, tree, tree), []byte(tree), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeImages(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	registry := filepath.Join(out, "registry")
	blob := func(d descriptor) []byte {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(registry, "blobs/sha256", strings.TrimPrefix(d.Digest, "sha256:")))
		if err != nil || digest(b) != d.Digest || int64(len(b)) != d.Size {
			t.Errorf("blob %+v: %d bytes, %v", d, len(b), err)
		}
		return b
	}
	type document struct {
		MediaType         string
		Config            descriptor
		Layers, Manifests []descriptor
	}
	read := func(name string) (document, []byte) {
		t.Helper()
		var m document
		b, err := os.ReadFile(filepath.Join(registry, "manifests", name))
		if err == nil {
			err = json.Unmarshal(b, &m)
		}
		if err != nil {
			t.Fatal(err)
		}
		return m, b
	}
	check := func(m document, want platform) {
		t.Helper()
		var config struct {
			platform
			RootFS struct {
				DiffIDs []string `json:"diff_ids"`
			}
		}
		if err := json.Unmarshal(blob(m.Config), &config); err != nil {
			t.Fatal(err)
		}
		if config.platform != want || len(config.RootFS.DiffIDs) != len(m.Layers) || len(m.Layers) == 0 {
			t.Errorf("config %+v of %d layers, want %+v", config, len(m.Layers), want)
		}
		for _, l := range m.Layers {
			blob(l)
		}
	}
	m, _ := read("busybox/latest")
	check(m, native)
	for name, platforms := range map[string]int{"containerd/busybox/1.36": 5, "pause/3.6": 5, "containerd/windows/nanoserver/1809": 1} {
		index, _ := read(name)
		seen := map[platform]bool{}
		for _, d := range index.Manifests {
			child, b := read(filepath.Join(filepath.Dir(name), d.Digest))
			if digest(b) != d.Digest || int64(len(b)) != d.Size || child.MediaType != mediaManifest {
				t.Errorf("%s: manifest %+v is %d bytes of %s", name, d, len(b), child.MediaType)
			}
			check(child, *d.Platform)
			seen[*d.Platform] = true
		}
		if index.MediaType != mediaIndex || len(seen) != platforms {
			t.Errorf("%s: %s of the platforms %v", name, index.MediaType, seen)
		}
	}
	if m, _ := read("containerd/volume-copy-up/2.2"); len(m.Manifests) == 0 {
		t.Error("volume-copy-up is no index")
	} else if amd64, _ := read("containerd/volume-copy-up/" + m.Manifests[0].Digest); len(amd64.Layers) != 4 {
		t.Errorf("volume-copy-up has %d layers", len(amd64.Layers))
	}
}
