package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// TestHostile: what is refused in a root, in a layer, and in both, with its name and place.
func TestHostile(t *testing.T) {
	type test struct {
		name  string
		files []file
		want  string // empty: it is taken
	}
	both := []test{
		{"a path that leaves", []file{regular("a", ""), regular("../b", "")}, `entry 2 "../b" at byte 512: its name leaves`},
		{"one that comes back", []file{regular("a/../../a/b", "")}, `entry 1 "a/../../a/b" at byte 0`},
		{"below a symbolic link", []file{link(tar.TypeSymlink, "etc", "/etc"), regular("etc/passwd", "x")}, `entry 2 "etc/passwd" at byte 512: "etc" above it is a symbolic link`},
		{"deep below a symbolic link", []file{dir("a"), link(tar.TypeSymlink, "a/b", ".."), regular("a/b/c/d", "x")}, `entry 3 "a/b/c/d"`},
		{"below a file", []file{regular("a", "text"), regular("a/b", "x")}, `entry 2 "a/b" at byte 1024: "a" above it is no directory`},
		{"a link in a directory's place", []file{regular("a/b", ""), link(tar.TypeSymlink, "a", "/")}, `entry 2 "a"`},
		{"a hard link that leaves", []file{link(tar.TypeLink, "a", "../../etc/shadow")}, `entry 1 "a" at byte 0: its target "../../etc/shadow"`},
		{"a hard link below a symbolic link", []file{link(tar.TypeSymlink, "etc", "/etc"), link(tar.TypeLink, "a", "etc/shadow")}, `entry 2 "a"`},
		{"a hard link to a directory", []file{dir("d"), link(tar.TypeLink, "a", "d")}, `entry 2 "a"`},
		{"a disk", []file{device(tar.TypeBlock, "dev/sda", 8, 0)}, `entry 1 "dev/sda" at byte 0: it is a device (b 8:0)`},
		{"memory", []file{device(tar.TypeChar, "dev/null", 1, 1)}, `entry 1 "dev/null"`},
		{"null elsewhere", []file{device(tar.TypeChar, "etc/null", 1, 3)}, `entry 1 "etc/null"`},
		{"a file twice", []file{regular("a", "1"), regular("b", ""), regular("a", "2")}, `entry 3 "a" at byte 1536: it is there twice`},
		{"a file twice by another name", []file{regular("a", "1"), regular(".//a", "2")}, `entry 2 ".//a"`},
		{"a directory after a file", []file{regular("a", "1"), dir("a/")}, `entry 2 "a/"`},
		{"a file after a directory", []file{dir("a/"), regular("a", "1")}, `entry 2 "a"`},
		{"a symbolic link for the root", []file{link(tar.TypeSymlink, "./", "/")}, `entry 1 "./"`},
		{"an owner that is none", []file{{tar.Header{Typeflag: tar.TypeReg, Name: "a", Uid: 1 << 32}, ""}}, `entry 1 "a" at byte 0: its owner`},
		{"a type that is none", []file{{tar.Header{Typeflag: 'V', Name: "a"}, ""}}, `entry 1 "a" at byte 0: it is of type 'V'`},
		{"too many names in one", []file{regular(strings.Repeat("a/", 1500)+"b", "")}, "--max-entries"},
		{"a name that is too long", []file{regular(strings.Repeat("a/", 2500)+"b", "")}, "bytes"},
		{"a file that is too large", []file{{tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: 1 << 40}, ""}}, `entry 1 "a" at byte 0: its 1099511627776 bytes`},
		{"devices that every container has", []file{device(tar.TypeChar, "dev/zero", 1, 5), device(tar.TypeChar, "./dev/pts/ptmx", 5, 2), device(tar.TypeChar, "dev/tty63", 4, 63)}, ""},
		{"links that stay", []file{regular("usr/bin/a", ""), link(tar.TypeLink, "b", "./usr/bin/a"), link(tar.TypeSymlink, "c", "../../.."), link(tar.TypeLink, "d", "c")}, ""},
	}
	ofRoots := []test{
		{"an absolute path", []file{regular("/etc/passwd", "")}, `entry 1 "/etc/passwd" at byte 0: its name is absolute`},
		{"a hard link to nothing", []file{link(tar.TypeLink, "a", "b"), regular("b", "")}, `entry 1 "a" at byte 0: its target "b" is not there`},
		{"a hard link to itself", []file{link(tar.TypeLink, "a", "a")}, `entry 1 "a"`},
		{"a directory twice", []file{dir("a"), dir("a/")}, `entry 2 "a/"`},
		{"a whiteout", []file{regular("etc/.wh.passwd", "")}, `takes "etc/passwd" away`},
	}
	ofLayers := []test{
		{"a whiteout of what is above", []file{regular("etc/.wh...", "")}, `entry 1 "etc/.wh..." at byte 0: it is a whiteout of`},
		{"a whiteout of its directory", []file{regular("etc/.wh.", "")}, `entry 1 "etc/.wh."`},
		{"a whiteout that is a link", []file{link(tar.TypeSymlink, ".wh.a", "/")}, `entry 1 ".wh.a"`},
		{"whiteouts", []file{regular("a/.wh..wh..opq", ""), regular("a/.wh.b", ""), regular("a/b", "")}, ""},
		{"a directory twice", []file{dir("a"), dir("a/")}, ""},
		{"a hard link to what is below", []file{link(tar.TypeLink, "a", "/usr/bin/b")}, ""},
		{"an absolute path", []file{regular("/etc/passwd", "")}, ""},
	}
	pack := func(t *testing.T, files []file) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range files {
			h := f.Header
			h.Size = f.size()
			must(t, w.WriteHeader(&h))
			if int(h.Size) == len(f.data) {
				_, err := io.WriteString(w, f.data)
				must(t, err)
			}
		}
		_ = w.Close() // a file that is too short is meant
		return b.Bytes()
	}
	for kind, tests := range map[string][]test{"root": append(ofRoots, both...), "layer": append(ofLayers, both...)} {
		for _, c := range tests {
			t.Run(kind+"/"+c.name, func(t *testing.T) {
				i, ctx := newImporter(t)
				data := pack(t, c.files)
				if kind == "layer" {
					b := blobs{}
					data = b.layout(t, b.image(t, "amd64", data)).tar(t)
				}
				name := write(t, data)
				// Recognised by its first entry, which is what is hostile here.
				var err error
				if kind == "root" {
					s := openAs(t, name, Rootfs)
					key, kerr := Key(ctx, s, nil, nil)
					must(t, kerr)
					_, err = i.Import(ctx, s, nil, key, "")
				} else {
					_, err = i.take(ctx, t, "", name)
				}
				if c.want == "" {
					must(t, err)
					return
				}
				if err == nil || !strings.Contains(err.Error(), c.want) || !errdefs.IsInvalidArgument(err) && !errdefs.IsResourceExhausted(err) {
					t.Errorf("%v, which lacks %q", err, c.want)
				}
				var kept int
				must(t, i.Store.Walk(ctx, func(info content.Info) error {
					if info.Labels["containerd.io/uncompressed"] != "" {
						kept++
					}
					return nil
				}))
				if all, err := i.Store.ListStatuses(ctx); err != nil || len(all) != 0 || kept != 0 {
					t.Errorf("a layer is left: %d, %v, %v", kept, all, err)
				}
			})
		}
	}
}

func TestTooMuch(t *testing.T) {
	defer func(was int64) { ratioFrom = was }(ratioFrom)
	ratioFrom = 4 << 20
	i, ctx := newImporter(t)
	var many []file
	for n := range 1001 {
		many = append(many, regular(fmt.Sprint("f", n), ""))
	}
	whole := tarOf(t, root()...)
	zeros := func(head []byte) []byte {
		var b bytes.Buffer
		w, err := zstd.NewWriter(&b)
		must(t, err)
		_, err = w.Write(head)
		must(t, err)
		for range (ratioFrom >> 20) + 2 {
			_, err = w.Write(make([]byte, 1<<20))
			must(t, err)
		}
		must(t, w.Close())
		return b.Bytes()
	}
	var head bytes.Buffer
	must(t, tar.NewWriter(&head).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: ratioFrom + 1<<20}))
	garbled := pack(t, "gzip", whole)
	garbled[len(garbled)-6] ^= 1
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"entries":                      {tarOf(t, many...), `entry 1001 "f1000" at byte 512000: there are more than 1000`},
		"a bomb":                       {zeros(head.Bytes()), `entry 1 "zeros" at byte 0: it is`},
		"a bomb after the end":         {zeros(whole), "after the last entry"},
		"truncated in a file":          {whole[:4*512+10], `truncated`},
		"truncated between files":      {whole[:3*512], "truncated"},
		"truncated before the end":     {whole[:len(whole)-1024], "truncated"},
		"truncated when compressed":    {pack(t, "zstd", whole)[:200], "truncated"},
		"an end that is not confirmed": {garbled, "checksum"},
	} {
		if _, err := i.take(ctx, t, "", write(t, c.data)); err == nil || !strings.Contains(err.Error(), c.want) || !errdefs.IsInvalidArgument(err) && !errdefs.IsResourceExhausted(err) {
			t.Errorf("%s: %v", name, err)
		} else {
			t.Log(name, err)
		}
	}
	i.Limits.Bytes = 4000
	if _, err := i.take(ctx, t, "", write(t, whole)); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "--max-size") {
		t.Errorf("size: %v", err)
	}
	b := blobs{}
	i.Limits = Limits{Bytes: 1 << 20, Entries: 100, Ratio: 250}
	if _, err := i.take(ctx, t, "", write(t, b.layout(t, b.image(t, "amd64", tarOf(t, file{tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: 2 << 20}, strings.Repeat("\x00", 2<<20)}))).tar(t))); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "layer 1 sha256:") {
		t.Errorf("a layer's size: %v", err)
	}
}

// TestOuterArchive: an archive of images is no place for what belongs into a layer.
func TestOuterArchive(t *testing.T) {
	i, ctx := newImporter(t)
	b := blobs{}
	good := b.layout(t, b.image(t, "amd64", tarOf(t, root()...)))
	for name, c := range map[string]struct {
		more file
		want string
	}{
		"leaves":    {regular("../x", ""), `"../x" at byte`},
		"hard link": {link(tar.TypeLink, "x", "index.json"), `"x" at byte`},
		"device":    {device(tar.TypeChar, "dev/null", 1, 3), `"dev/null" at byte`},
		"twice":     {regular("index.json", "{}"), `"index.json" at byte`},
	} {
		files := []file{}
		for n, data := range good {
			files = append(files, regular(n, string(data)))
		}
		if _, err := i.take(ctx, t, "", write(t, tarOf(t, append(files, c.more)...))); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	data := good.tar(t)
	if _, err := i.take(ctx, t, "", write(t, data[:len(data)/2])); !errdefs.IsInvalidArgument(err) {
		t.Errorf("half of it: %v", err)
	}
}

func openAs(t testing.TB, name string, kind Kind) *Source {
	f, err := os.Open(name)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return &Source{Kind: kind, Path: name, file: f}
}

// The seeds are small: Go's fuzzing shortens what it finds, byte by byte.

func FuzzRecognise(f *testing.F) {
	f.Add([]byte("hsqs"))
	for _, how := range []string{"", "gzip", "zstd"} {
		f.Add(pack(f, how, tarOf(f, root()[:5]...)))
	}
	f.Add(tarOf(f, regular("metadata.yaml", yamlText)))
	f.Fuzz(func(t *testing.T, data []byte) {
		if kind, err := Recognise(bytes.NewReader(data)); (kind == "") != (err != nil) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q, %v", kind, err)
		}
	})
}

// FuzzCheck: what holds by the rules never has a name that leaves, nor one twice.
func FuzzCheck(f *testing.F) {
	for _, how := range []string{"", "gzip", "zstd"} {
		f.Add(pack(f, how, tarOf(f, root()[:5]...)), byte(0))
	}
	f.Add(tarOf(f, regular("a/.wh.b", ""), link(tar.TypeLink, "c", "/d")), byte(1))
	f.Fuzz(func(t *testing.T, data []byte, by byte) {
		in := &meter{ctx: context.Background(), r: bytes.NewReader(data)}
		b := &budget{Limits: Limits{Bytes: 1 << 24, Entries: 1000, Ratio: 100}}
		s, err := newStream(context.Background(), in, func() int64 { return in.n }, b)
		if err != nil {
			return
		}
		defer s.done()
		tr, names := newTree(rules(by%3), b), map[string]byte{}
		err = s.walk(true, func(h *tar.Header, _ io.Reader) error {
			name, err := tr.add(h)
			if err != nil {
				return err
			}
			if was, ok := names[name]; ok && (was != tar.TypeDir || h.Typeflag != tar.TypeDir || by%3 == 0) && name != "." {
				t.Errorf("%q twice", name)
			}
			names[name] = h.Typeflag
			for part := range strings.SplitSeq(name, "/") {
				if part == ".." || part == "" {
					t.Errorf("%q", name)
				}
			}
			return nil
		})
		if err != nil && !kinded(err) {
			t.Errorf("an error of no kind: %v", err)
		}
		if len(names) > 1000 || b.bytes > 1<<24 {
			t.Errorf("%d names, %d bytes", len(names), b.bytes)
		}
	})
}

// FuzzMetadata: any text is metadata or is refused, and its platform is one.
func FuzzMetadata(f *testing.F) {
	f.Add([]byte(yamlText))
	f.Add([]byte("architecture: armv7l\nproperties: {a: b}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := parseMetadata(text)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v", err)
			}
			return
		}
		if p, err := m.platform(); err != nil || p.OS != "" && p.Architecture == "" {
			t.Errorf("%+v, %v", p, err)
		}
		if c := m.created(); c != nil {
			if _, err := c.MarshalJSON(); err != nil {
				t.Error(err)
			}
		}
	})
}
