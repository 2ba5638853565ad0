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
const imageFormat = "3"

type descriptor struct {
	MediaType string    `json:"mediaType"`
	Digest    string    `json:"digest"`
	Size      int64     `json:"size"`
	Platform  *platform `json:"platform,omitempty"` // of a manifest in an index
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

var native = platform{Architecture: "amd64", OS: "linux"}

// foreign are the other platforms of the images that have an index. Nothing of theirs can be run here.
var foreign = []platform{
	{Architecture: "arm", OS: "linux", Variant: "v7"}, {Architecture: "arm64", OS: "linux", Variant: "v8"},
	{Architecture: "ppc64le", OS: "linux"}, {Architecture: "s390x", OS: "linux"},
}

type imageConfig struct {
	Env          []string            `json:",omitempty"`
	Entrypoint   []string            `json:",omitempty"`
	Cmd          []string            `json:",omitempty"`
	StopSignal   string              `json:",omitempty"`
	ExposedPorts map[string]struct{} `json:",omitempty"`
	Volumes      map[string]struct{} `json:",omitempty"`
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
	systemd, err := writeLayer(ctx, blobs, filepath.Join(out, "systemd"), filepath.Join(out, "debian"))
	if err != nil {
		return fmt.Errorf("systemd layer: %w", err)
	}
	busybox, err := writeLayer(ctx, blobs, filepath.Join(out, "busybox"), "")
	if err != nil {
		return fmt.Errorf("busybox layer: %w", err)
	}
	pause, err := writeLayer(ctx, blobs, filepath.Join(out, "pause"), "")
	if err != nil {
		return fmt.Errorf("pause layer: %w", err)
	}
	volumes := []layer{busybox}
	for _, f := range []struct{ dir, file string }{
		{"test_dir", "test_file"}, {"C:/weird_test_dir", "weird_test_file"}, {":colon_prefixed", "colon_prefixed_file"},
	} {
		l, err := writeText(blobs, f.dir+"/"+f.file, "test_content\n", 0)
		if err != nil {
			return err
		}
		volumes = append(volumes, l)
	}
	owned, err := writeText(blobs, "test_dir/test_file", "test_content\n", 65534)
	if err != nil {
		return err
	}
	shell := imageConfig{Env: []string{imagePath}, Cmd: []string{"sh"}}
	with := func(c imageConfig, env string) imageConfig {
		c.Env = []string{imagePath, env}
		return c
	}
	sleep := imageConfig{Entrypoint: []string{"/bin/sleep", "infinity"}}
	for _, im := range []struct {
		repo, tag string
		layers    []layer
		config    imageConfig
		others    []platform // with them the image is an index
	}{
		{repo: "debian", tag: "13", layers: []layer{debian}, config: imageConfig{Env: []string{imagePath}, Cmd: []string{"bash"}}},
		{repo: "nginx", tag: "latest", layers: []layer{debian, nginx}, config: imageConfig{
			Env: []string{imagePath}, Cmd: []string{"nginx", "-g", "daemon off;"},
			StopSignal: "SIGQUIT", ExposedPorts: map[string]struct{}{"80/tcp": {}},
		}},
		// It names no command: what boots it is its own /sbin/init.
		{repo: "debian", tag: "systemd", layers: []layer{debian, systemd}, config: imageConfig{Env: []string{imagePath}, StopSignal: "SIGRTMIN+3"}},
		{repo: "busybox", tag: "latest", layers: []layer{busybox}, config: shell},
		// What containerd's client suite pulls, with the names it has there.
		{repo: "containerd/busybox", tag: "1.36", layers: []layer{busybox}, config: shell, others: foreign},
		{repo: "e2e-test-images/busybox", tag: "1.29-2", layers: []layer{busybox}, config: with(shell, "E2E=1"), others: foreign},
		{repo: "pause", tag: "3.10.2", layers: []layer{pause}, config: with(sleep, "VERSION=3.10.2"), others: foreign},
		{repo: "pause", tag: "3.6", layers: []layer{pause}, config: with(sleep, "VERSION=3.6"), others: foreign},
		{repo: "containerd/volume-copy-up", tag: "2.2", layers: volumes, others: foreign, config: imageConfig{
			Env: []string{imagePath}, Cmd: []string{"sh"},
			Volumes: map[string]struct{}{"/test_dir": {}, "C:/weird_test_dir": {}, "/:colon_prefixed": {}},
		}},
		{repo: "containerd/volume-ownership", tag: "2.1", layers: []layer{debian, owned}, others: foreign, config: imageConfig{
			Env: []string{imagePath}, Cmd: []string{"bash"}, Volumes: map[string]struct{}{"/test_dir": {}},
		}},
		{repo: "containerd/windows/nanoserver", tag: "1809", others: []platform{{Architecture: "amd64", OS: "windows"}}},
	} {
		dir := filepath.Join(out, "registry", "manifests", im.repo)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		var m []byte
		var manifests []descriptor
		add := func(layers []layer, config imageConfig, p platform) error {
			m, err = manifest(blobs, layers, config, p)
			if err != nil || len(im.others) == 0 {
				return err
			}
			d := digest(m)
			manifests = append(manifests, descriptor{mediaManifest, d, int64(len(m)), &p})
			return os.WriteFile(filepath.Join(dir, d), m, 0o644)
		}
		if len(im.layers) > 0 {
			if err := add(im.layers, im.config, native); err != nil {
				return err
			}
		}
		for _, p := range im.others {
			// of its own in each image, as real ones are: a test tells by it what was pulled
			l, err := writeText(blobs, "platform", fmt.Sprintf("%s:%s %s/%s%s\n", im.repo, im.tag, p.OS, p.Architecture, p.Variant), 0)
			if err == nil {
				err = add([]layer{l}, im.config, p)
			}
			if err != nil {
				return err
			}
		}
		if len(im.others) > 0 {
			m, err = json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": mediaIndex, "manifests": manifests})
			if err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(dir, im.tag), m, 0o644); err != nil {
			return err
		}
	}
	for _, d := range []string{"debian", "nginx", "systemd", "busybox", "pause"} {
		if err := os.RemoveAll(filepath.Join(out, d)); err != nil {
			return err
		}
	}
	return nil
}

const (
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaIndex    = "application/vnd.oci.image.index.v1+json"
)

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func manifest(blobs string, layers []layer, config imageConfig, p platform) ([]byte, error) {
	var diffIDs []string
	var descriptors []descriptor
	for _, l := range layers {
		diffIDs, descriptors = append(diffIDs, l.diffID), append(descriptors, l.descriptor)
	}
	of := map[string]any{
		"architecture": p.Architecture, "os": p.OS, "config": config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	}
	if p.Variant != "" {
		of["variant"] = p.Variant
	}
	c, err := json.Marshal(of)
	if err != nil {
		return nil, err
	}
	d := digest(c)
	if err := os.WriteFile(filepath.Join(blobs, strings.TrimPrefix(d, "sha256:")), c, 0o644); err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": mediaManifest,
		"config": descriptor{MediaType: "application/vnd.oci.image.config.v1+json", Digest: d, Size: int64(len(c))},
		"layers": descriptors,
	})
}

// writeText writes a layer of one file and the directories above it, all of them owned by id.
func writeText(blobs, name, text string, id int) (layer, error) {
	return writeTar(blobs, func(t *tar.Writer) error {
		for i, c := range name {
			if c != '/' {
				continue
			}
			if err := t.WriteHeader(&tar.Header{Name: name[:i+1], Typeflag: tar.TypeDir, Mode: 0o755, Uid: id, Gid: id}); err != nil {
				return err
			}
		}
		if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text)), Uid: id, Gid: id}); err != nil {
			return err
		}
		_, err := io.WriteString(t, text)
		return err
	})
}

// writeLayer writes what tree has and base has not (all of it without a base) as a gzipped layer.
func writeLayer(ctx context.Context, blobs, tree, base string) (layer, error) {
	return writeTar(blobs, func(t *tar.Writer) error { return diff(ctx, t, tree, base) })
}

func writeTar(blobs string, fill func(*tar.Writer) error) (layer, error) {
	f, err := os.CreateTemp(blobs, "layer-")
	if err != nil {
		return layer{}, err
	}
	defer f.Close()
	whole, plain := sha256.New(), sha256.New()
	z := gzip.NewWriter(io.MultiWriter(f, whole))
	t := tar.NewWriter(io.MultiWriter(z, plain))
	err = fill(t)
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
		descriptor: descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Digest: "sha256:" + name, Size: info.Size()},
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
