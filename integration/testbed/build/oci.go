package build

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// imageFormat changes when writeImages writes something else from the same trees.
const imageFormat = "1"

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
}

type imageConfig struct {
	Env          []string            `json:",omitempty"`
	Entrypoint   []string            `json:",omitempty"`
	Cmd          []string            `json:",omitempty"`
	StopSignal   string              `json:",omitempty"`
	ExposedPorts map[string]struct{} `json:",omitempty"`
}

type layer struct {
	descriptor
	diffID string
}

const imagePath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// writeImages makes the registry's blobs and manifests of the trees the recipe left in out, and removes the trees.
func writeImages(ctx context.Context, out string) error {
	blobs := filepath.Join(out, "registry", "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	debian, err := writeLayer(ctx, blobs, filepath.Join(out, "debian"), "")
	if err != nil {
		return fmt.Errorf("debian layer: %w", err)
	}
	nginx, err := writeLayer(ctx, blobs, filepath.Join(out, "nginx"), filepath.Join(out, "debian"))
	if err != nil {
		return fmt.Errorf("nginx layer: %w", err)
	}
	busybox, err := writeLayer(ctx, blobs, filepath.Join(out, "busybox"), "")
	if err != nil {
		return fmt.Errorf("busybox layer: %w", err)
	}
	for _, im := range []struct {
		repo, tag string
		layers    []layer
		config    imageConfig
	}{
		{"debian", "13", []layer{debian}, imageConfig{Env: []string{imagePath}, Cmd: []string{"bash"}}},
		{"nginx", "latest", []layer{debian, nginx}, imageConfig{Env: []string{imagePath}, Cmd: []string{"nginx", "-g", "daemon off;"},
			StopSignal: "SIGQUIT", ExposedPorts: map[string]struct{}{"80/tcp": {}}}},
		{"busybox", "latest", []layer{busybox}, imageConfig{Env: []string{imagePath}, Cmd: []string{"sh"}}},
	} {
		m, err := manifest(blobs, im.layers, im.config)
		if err != nil {
			return err
		}
		dir := filepath.Join(out, "registry", "manifests", im.repo)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, im.tag), m, 0o644); err != nil {
			return err
		}
	}
	for _, d := range []string{"debian", "nginx", "busybox"} {
		if err := os.RemoveAll(filepath.Join(out, d)); err != nil {
			return err
		}
	}
	return nil
}

func manifest(blobs string, layers []layer, config imageConfig) ([]byte, error) {
	var diffIDs []string
	var descriptors []descriptor
	for _, l := range layers {
		diffIDs, descriptors = append(diffIDs, l.diffID), append(descriptors, l.descriptor)
	}
	c, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(c)
	name := hex.EncodeToString(sum[:])
	if err := os.WriteFile(filepath.Join(blobs, name), c, 0o644); err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": descriptor{"application/vnd.oci.image.config.v1+json", "sha256:" + name, int64(len(c))},
		"layers": descriptors,
	})
}

// writeLayer writes what tree has and base has not (all of it without a base) as a gzipped layer.
func writeLayer(ctx context.Context, blobs, tree, base string) (layer, error) {
	f, err := os.CreateTemp(blobs, "layer-")
	if err != nil {
		return layer{}, err
	}
	defer f.Close()
	whole, plain := sha256.New(), sha256.New()
	z := gzip.NewWriter(io.MultiWriter(f, whole))
	t := tar.NewWriter(io.MultiWriter(z, plain))
	err = diff(ctx, t, tree, base)
	if err := errors.Join(err, t.Close(), z.Close(), f.Chmod(0o644)); err != nil {
		return layer{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return layer{}, err
	}
	name := hex.EncodeToString(whole.Sum(nil))
	if err := os.Rename(f.Name(), filepath.Join(blobs, name)); err != nil {
		return layer{}, err
	}
	return layer{
		descriptor: descriptor{"application/vnd.oci.image.layer.v1.tar+gzip", "sha256:" + name, info.Size()},
		diffID:     "sha256:" + hex.EncodeToString(plain.Sum(nil)),
	}, nil
}

func diff(ctx context.Context, t *tar.Writer, tree, base string) error {
	links := map[uint64]string{}
	err := filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(tree, p)
		if err != nil || rel == "." {
			return err
		}
		if filepath.Dir(rel) == "dev" { // the runtime's
			return skip(d)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if base != "" {
			same, err := unchanged(p, info, filepath.Join(base, rel))
			if err != nil || same {
				return err
			}
		}
		return addEntry(t, p, rel, info, links)
	})
	if err != nil || base == "" {
		return err
	}
	return filepath.WalkDir(base, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(base, p)
		if err != nil {
			return err
		}
		if filepath.Dir(rel) == "dev" {
			return skip(d)
		}
		if _, err := os.Lstat(filepath.Join(tree, rel)); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := t.WriteHeader(&tar.Header{Name: filepath.Join(filepath.Dir(rel), ".wh."+filepath.Base(rel)), Mode: 0o644}); err != nil {
			return err
		}
		return skip(d)
	})
}

func skip(d fs.DirEntry) error {
	if d.IsDir() {
		return fs.SkipDir
	}
	return nil
}

func unchanged(p string, a fs.FileInfo, other string) (bool, error) {
	b, err := os.Lstat(other)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	sa, sb := a.Sys().(*syscall.Stat_t), b.Sys().(*syscall.Stat_t)
	if a.Mode() != b.Mode() || sa.Uid != sb.Uid || sa.Gid != sb.Gid {
		return false, nil
	}
	switch {
	case a.IsDir():
		return true, nil
	case a.Mode()&fs.ModeSymlink != 0:
		la, err := os.Readlink(p)
		if err != nil {
			return false, err
		}
		lb, err := os.Readlink(other)
		return la == lb, err
	case a.Mode().IsRegular():
		if a.Size() != b.Size() {
			return false, nil
		}
		if a.ModTime().Equal(b.ModTime()) {
			return true, nil
		}
		ba, err := os.ReadFile(p)
		if err != nil {
			return false, err
		}
		bb, err := os.ReadFile(other)
		return bytes.Equal(ba, bb), err
	}
	return false, nil
}

func addEntry(t *tar.Writer, p, rel string, info fs.FileInfo, links map[uint64]string) error {
	link := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if link, err = os.Readlink(p); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name, h.Uname, h.Gname = rel, "", ""
	if info.IsDir() {
		h.Name = strings.TrimSuffix(rel, "/") + "/"
	}
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode().IsRegular() && st.Nlink > 1 {
		if first, ok := links[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return t.WriteHeader(h)
		}
		links[st.Ino] = rel
	}
	if err := t.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(t, f)
	return err
}
