package build

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
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
