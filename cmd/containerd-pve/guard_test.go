package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestGuard(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "default--web"), []byte(`{"namespace": "default", "id": "web", "vmid": 100}`), 0o600); err != nil {
		t.Fatal(err)
	}
	err := guard(dir, "default", "web", "100")
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "nerdctl -n default start web") {
		t.Errorf("ours: %v", err)
	}
	for _, restored := range [][3]string{{"default", "web", "101"}, {"default", "db", "100"}, {"k8s.io", "web", "100"}} {
		if err := guard(dir, restored[0], restored[1], restored[2]); err != nil {
			t.Errorf("%v: %v", restored, err)
		}
	}
	warn(dir, "100", err)
	warn(filepath.Join(dir, "none"), "100", err)
	if text, err := os.ReadFile(filepath.Join(dir, "ct-100.warnings")); err != nil || !strings.HasPrefix(string(text), "containerd-pve: container 100 belongs to containerd") || !strings.HasSuffix(string(text), "\n") {
		t.Errorf("%q, %v", text, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "default--bad"), []byte(`{`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := guard(dir, "default", "bad", "100"); err == nil {
		t.Error("a record that cannot be read")
	}
}

func TestParseVMIDs(t *testing.T) {
	if r, err := parseVMIDs("1000-1999"); err != nil || r.Lower != 1000 || r.Upper != 2000 {
		t.Errorf("%v, %v", r, err)
	}
	for _, bad := range []string{"1000", "a-b", "1-", "-1"} {
		if _, err := parseVMIDs(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
