package main

import (
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/template"
)

func TestExportFormat(t *testing.T) {
	for _, tc := range []struct {
		as, file, want string
		kind           compression.Compression
	}{
		{"", "web.tar.zst", "vztmpl", compression.Zstd}, {"", "/x/WEB.TAR.GZ", "vztmpl", compression.Gzip}, {"", "web.tar", "oci", compression.Uncompressed},
		{"", "-", "oci", compression.Uncompressed}, {"", "web", "oci", compression.Uncompressed}, {"oci", "web.tar.zst", "oci", compression.Uncompressed},
		{"vztmpl", "-", "vztmpl", compression.Uncompressed}, {"vztmpl", "web.tar", "vztmpl", compression.Uncompressed}, {"vztmpl", "a.b.tar.gz", "vztmpl", compression.Gzip},
	} {
		if as, kind, err := exportFormat(tc.as, tc.file); as != tc.want || kind != tc.kind || err != nil {
			t.Errorf("--as %q %s: %s, %v, %v", tc.as, tc.file, as, kind, err)
		}
	}
	for _, tc := range [][2]string{{"vztmpl", "web"}, {"vztmpl", "web.tar.xz"}, {"vztmpl", "web.zst"}, {"docker", "web.tar"}} {
		if as, _, err := exportFormat(tc[0], tc[1]); !errdefs.IsInvalidArgument(err) {
			t.Errorf("--as %q %s: %s, %v", tc[0], tc[1], as, err)
		}
	}
}

func TestBootText(t *testing.T) {
	d := template.Details{Conf: "#notes\narch: amd64\nentrypoint: nginx -g \"it's;\"\nfeatures: nesting=1\nhostname: web\nmemory: 256\nnet0: name=eth0\nostype: unmanaged\nrootfs: local-zfs:basevol-100-disk-0,size=9G\ntemplate: 1\nunprivileged: 0\nlxc.signal.halt: 3\nlxc.environment.runtime: A=b c\n"}
	const want = `it boots as the image says with:
  pct create VMID '/a b.tar' --arch amd64 --entrypoint 'nginx -g "it'\''s;"' --features nesting=1 --hostname web --memory 256 --ostype unmanaged --unprivileged 0 --rootfs STORAGE:9
and in /etc/pve/lxc/VMID.conf then:
  lxc.signal.halt: 3
  lxc.environment.runtime: A=b c
`
	if got := bootText(d, "/a b.tar"); got != want {
		t.Errorf("%s", got)
	}
	if got := bootText(template.Details{}, "-"); got != "it boots as the image says with:\n  pct create VMID FILE\n" {
		t.Errorf("%s", got)
	}
}
