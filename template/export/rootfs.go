package export

import (
	"archive/tar"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/compare"
)

// Rootfs writes the files below root as Proxmox has its templates of containers
// (vztmpl): a tarball whose paths begin with "./". What pve-init and its process are in it stays.
// The holes of a sparse file are zeros in it.
func Rootfs(ctx context.Context, w io.Writer, root *os.File, c compression.Compression) error {
	z, err := compression.CompressStream(w, c)
	if err != nil {
		return err
	}
	return errors.Join(compare.Files(ctx, z, root, "", rootfsHeader), z.Close())
}

// rootfsHeader writes a header as tar does that was called with a dot. Proxmox unpacks
// with --acls, but of the attributes takes user.* and security.capability only.
func rootfsHeader(h *tar.Header) error {
	h.Name = "./" + strings.TrimPrefix(h.Name, "/")
	if h.Typeflag == tar.TypeLink {
		h.Linkname = "./" + h.Linkname
	}
	for of, name := range map[string]string{"SCHILY.xattr.system.posix_acl_access": "SCHILY.acl.access", "SCHILY.xattr.system.posix_acl_default": "SCHILY.acl.default"} {
		value, ok := h.PAXRecords[of]
		if !ok {
			continue
		}
		text, err := aclText([]byte(value))
		if err != nil {
			return fmt.Errorf("its %s: %w", strings.TrimPrefix(of, "SCHILY.xattr."), err)
		}
		h.PAXRecords[name] = text
	}
	return nil
}

// aclText is the text of an access control list (acl(5)) with numbers for names, of
// what the kernel has of it (linux/posix_acl_xattr.h). Errors: InvalidArgument, it is none.
func aclText(value []byte) (string, error) {
	const version, head, size = 2, 4, 8
	if len(value) < head || (len(value)-head)%size != 0 || binary.LittleEndian.Uint32(value) != version {
		return "", fmt.Errorf("%x is no access control list: %w", value, errdefs.ErrInvalidArgument)
	}
	tags := map[uint16]string{0x01: "user", 0x02: "user", 0x04: "group", 0x08: "group", 0x10: "mask", 0x20: "other"}
	const user, group = 0x02, 0x08
	var all []string
	for e := value[head:]; len(e) > 0; e = e[size:] {
		kind, perm, id := binary.LittleEndian.Uint16(e), binary.LittleEndian.Uint16(e[2:]), ""
		name, ok := tags[kind]
		if !ok || perm > 7 {
			return "", fmt.Errorf("%x is no access control list: %w", value, errdefs.ErrInvalidArgument)
		}
		if kind == user || kind == group {
			id = fmt.Sprint(binary.LittleEndian.Uint32(e[4:]))
		}
		text := []byte("rwx")
		for i := range text {
			if perm>>(2-i)&1 == 0 {
				text[i] = '-'
			}
		}
		all = append(all, name+":"+id+":"+string(text))
	}
	return strings.Join(all, ","), nil
}
