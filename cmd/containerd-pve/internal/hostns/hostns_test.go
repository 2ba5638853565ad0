package hostns

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// TestDistinct: without the host's process ids nothing is entered. What is entered is in integration/install, TestNode.
func TestDistinct(t *testing.T) {
	dir := t.TempDir()
	link := func(name, to string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	self, first, same := link("self", "mnt:[1]"), link("first", "mnt:[2]"), link("same", "mnt:[1]")
	if err := distinct(self, first); err != nil {
		t.Error(err)
	}
	if err := distinct(self, same); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
	if err := distinct(self, filepath.Join(dir, "none")); !errdefs.IsPermissionDenied(err) {
		t.Errorf("%v", err)
	}
}

// TestPath: what it names is the same file.
func TestPath(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a, err := os.Stat(self)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.Stat(Path(self))
	if err != nil || !os.SameFile(a, b) {
		t.Errorf("%s: %v", Path(self), err)
	}
}
