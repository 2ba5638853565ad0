//go:build bed

package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/continuity/sysx"
	"github.com/google/go-cmp/cmp"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/detached"
)

// filesOf is all that there is to the files below dir, but for their sockets and what containerd-pve put there.
func filesOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	all, first := map[string]string{}, map[uint64]string{}
	must(t, filepath.WalkDir(dir+"/.", func(p string, _ fs.DirEntry, err error) error {
		must(t, err)
		name := strings.TrimPrefix(p, dir)
		info, err := os.Lstat(p)
		must(t, err)
		if name == "/.containerd-pve" {
			return fs.SkipDir
		}
		if info.Mode().Type() == fs.ModeSocket {
			return nil
		}
		st := info.Sys().(*syscall.Stat_t)
		text := fmt.Sprintf("%o %d:%d time %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		if !info.IsDir() {
			text += fmt.Sprintf(" device %x size %d links %d", st.Rdev, st.Size, st.Nlink)
			if f, ok := first[st.Ino]; ok {
				text += " is " + f
			} else {
				first[st.Ino] = name
			}
		}
		names, err := sysx.LListxattr(p)
		must(t, err)
		slices.Sort(names)
		for _, n := range names {
			v, err := sysx.LGetxattr(p, n)
			must(t, err)
			text += fmt.Sprintf(" %s=%x", n, v)
		}
		switch info.Mode().Type() {
		case 0:
			f, err := os.Open(p)
			must(t, err)
			d, err := digest.FromReader(f)
			must(t, errors.Join(err, f.Close()))
			text += " " + d.String()
		case fs.ModeSymlink:
			to, err := os.Readlink(p)
			must(t, err)
			text += fmt.Sprintf(" to %q", to)
		}
		all[name] = text
		return nil
	}))
	return all
}

// files are those that a template's clones have.
func (made templateOf) files(t *testing.T) map[string]string {
	t.Helper()
	root, err := detached.Mount(t.Context(), made.Dataset+"@__base__", true)
	must(t, err)
	defer root.Close()
	return filesOf(t, fmt.Sprintf("/proc/self/fd/%d", root.Fd()))
}

// leftovers is what an export must not leave: leases, mounts, and files beside its own.
func leftovers(t *testing.T, dir string) string {
	t.Helper()
	out, code := command("ctr", "leases", "ls", "-q")
	if code != 0 {
		t.Fatal(out)
	}
	leases := 0
	for _, id := range strings.Fields(out) {
		if !strings.HasPrefix(id, "containerd-pve-template-") {
			leases++
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	list, err := os.ReadDir(dir)
	must(t, err)
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return fmt.Sprintf("%d leases, %d mounts, files %q", leases, strings.Count(string(mounts), "\n"), names)
}

// TestTemplateExportImage: the image itself as long as containerd has it, one layer then; containerd imports and runs both.
func TestTemplateExportImage(t *testing.T) {
	proxmox(t)
	ctr := func(args ...string) string {
		t.Helper()
		out, code := command(append([]string{"ctr"}, args...)...)
		if code != 0 {
			t.Fatalf("ctr %v: %s", args, out)
		}
		return out
	}
	made := makeTemplate(t, nginx)
	dir := t.TempDir()
	clean := leftovers(t, dir)
	file := filepath.Join(dir, "web.tar")
	vmid := strconv.Itoa(made.VMID)
	said := templateRun(t, 0, "export", vmid, file)
	t.Log(said)
	t.Cleanup(func() {
		command("ctr", "-n", "exported", "images", "rm", "--sync", nginx)
		command("ctr", "namespaces", "rm", "exported")
	})
	ctr("-n", "exported", "images", "import", "--no-unpack", file)
	c := connect(t)
	want, err := c.GetImage(background(t), nginx)
	must(t, err)
	got, err := c.GetImage(namespaces.WithNamespace(background(t), "exported"), nginx)
	must(t, err)
	if got.Target().Digest != want.Target().Digest || !strings.Contains(said, "as containerd has it, manifest "+want.Target().Digest.String()) {
		t.Errorf("%s became %s: %s", want.Target().Digest, got.Target().Digest, said)
	}
	if out := templateRun(t, 1, "export", vmid, file); !strings.Contains(out, "--force") {
		t.Errorf("a file that is there: %s", out)
	}
	t.Cleanup(func() { ctr("images", "pull", "--plain-http", "--snapshotter", zfs, nginx) })
	ctr("images", "rm", "--sync", nginx)
	said = templateRun(t, 0, "export", vmid, file, "--force")
	t.Log(said)
	if !strings.Contains(said, "one layer of the template's files") {
		t.Errorf("after the image was removed: %s", said)
	}
	// It is another image of that name.
	ctr("images", "import", "--local", "--snapshotter", zfs, file)
	flat, err := c.GetImage(background(t), nginx)
	must(t, err)
	if ids, err := flat.RootFS(background(t)); err != nil || len(ids) != 1 || !strings.Contains(said, flat.Target().Digest.String()) {
		t.Errorf("%s has layers %v, %v", flat.Target().Digest, ids, err)
	}
	ctr("run", "-d", "--net-host", "--runtime", ours, "--snapshotter", zfs, nginx, "exported-web")
	stop := func() {
		command("ctr", "task", "rm", "-f", "exported-web")
		command("ctr", "container", "rm", "exported-web")
	}
	t.Cleanup(stop)
	eventually(t, time.Minute, "nginx answers", func() bool {
		out, code := command("curl", "-fsS", "http://localhost/")
		return code == 0 && strings.Contains(out, "nginx")
	})
	stop()
	again := makeTemplate(t, nginx)
	old, now := made.files(t), again.files(t)
	now["/."] = old["/."] // which unpacking leaves to containerd
	if d := cmp.Diff(old, now); d != "" || again.VMID == made.VMID {
		t.Errorf("a template of what was exported, %d, has other files: %s", again.VMID, d)
	}
	var before, after struct{ Config ocispec.Image }
	must(t, json.Unmarshal([]byte(templateRun(t, 0, "inspect", vmid)), &before))
	must(t, json.Unmarshal([]byte(templateRun(t, 0, "inspect", strconv.Itoa(again.VMID))), &after))
	if d := cmp.Diff(before.Config.Config, after.Config.Config); d != "" {
		t.Error(d)
	}
	must(t, os.Remove(file))
	// The container's root is unmounted when containerd collects it.
	eventually(t, time.Minute, "what is left is as before, "+clean, func() bool { return leftovers(t, dir) == clean })
}

// everything puts files of all kinds below dir.
func everything(t *testing.T, dir string) {
	in := func(name string) string { return filepath.Join(dir, "srv", name) }
	must(t, os.MkdirAll(in("sub"), 0o750))
	must(t, os.WriteFile(in("a"), []byte("a"), 0o600))
	must(t, os.Link(in("a"), in("sub/b")))
	must(t, os.Symlink("\xff", in("link")))
	must(t, os.Lchown(in("link"), 70_000, 3_000_000))
	must(t, os.Link(in("link"), in("link2")))
	must(t, os.WriteFile(in("\xff\xfe"), nil, 0o644))
	must(t, os.WriteFile(in(strings.Repeat("n", 255)), nil, 0o644))
	must(t, os.Mkdir(in(" \n"), 0o1777))
	must(t, unix.Mknod(in("null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(in("disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70_000))))
	must(t, unix.Mkfifo(in("fifo"), 0o620))
	must(t, os.WriteFile(in("cap"), []byte("program"), 0o755))
	must(t, os.Chown(in("cap"), 33, 37))
	must(t, unix.Chmod(in("cap"), 0o4755))
	must(t, unix.Lsetxattr(in("cap"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	must(t, unix.Lsetxattr(in("a"), "user.note", []byte("b\x00c\n"), 0))
	acl := []byte("\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x06\x00\x07\x00\x00\x00" + "\x04\x00\x04\x00\xff\xff\xff\xff" + "\x08\x00\x01\x00\x08\x00\x00\x00" + "\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff")
	must(t, unix.Lsetxattr(in("a"), "system.posix_acl_access", acl, 0))
	must(t, unix.Lsetxattr(in("sub"), "system.posix_acl_default", acl, 0))
	f, err := os.Create(in("sparse"))
	must(t, err)
	must(t, errors.Join(f.Truncate(8<<20), f.Close()))
	for i, name := range []string{"a", "link", "fifo", "sub", "sparse"} {
		when := unix.NsecToTimespec(int64(1_000_000_000+i)*1e9 + 123_456_789)
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, in(name), []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

// TestTemplateExportFiles: tar unpacks what was exported to the files that a clone has, and it boots as that.
func TestTemplateExportFiles(t *testing.T) {
	proxmox(t)
	const name = "localhost:5000/everything:1"
	b, err := create(t, options{image: busybox, args: []string{"true"}, root: func(dir string) { everything(t, dir) }})
	must(t, err)
	ctx, done, err := b.client.WithLease(b.ctx)
	must(t, err)
	defer func() { _ = done(ctx) }()
	layer, err := rootfs.CreateDiff(ctx, b.container.ID(), b.client.SnapshotService(zfs), b.client.DiffService(), diff.WithMediaType(ocispec.MediaTypeImageLayer))
	must(t, err)
	b.remove()
	args := []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1 & wait; done", "it's"}
	derived(t, busybox, name, func(c *ocispec.Image) {
		c.Config.Entrypoint, c.Config.Cmd, c.Config.User = nil, args, "www-data"
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, layer.Digest)
	}, layer)
	image, err := b.client.GetImage(b.ctx, name)
	must(t, err)
	must(t, image.Unpack(b.ctx, zfs))
	must(t, done(ctx))
	made := makeTemplate(t, name)
	dataset := pool() + "/unpacked"
	if out, code := command("zfs", "create", "-o", "acltype=posix", "-o", "xattr=sa", dataset); code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() {
		eventually(t, time.Minute, "what was unpacked is destroyed", func() bool {
			_, code := command("zfs", "destroy", "-r", dataset)
			return code == 0
		})
	})
	vmid, dir := strconv.Itoa(made.VMID), t.TempDir()
	clean := leftovers(t, dir)
	in := func(name string) string { return filepath.Join(dir, name) }
	said := templateRun(t, 0, "export", vmid, in("plain.tar"), "--as", "vztmpl")
	t.Log(said)
	for _, want := range []string{"pct create VMID " + in("plain.tar"), "--entrypoint '/.containerd-pve/init boot'", "--ostype unmanaged", "lxc.signal.halt: 15"} {
		if !strings.Contains(said, want) {
			t.Errorf("it does not say %q: %s", want, said)
		}
	}
	plain, err := os.ReadFile(in("plain.tar"))
	must(t, err)
	// The same each time, compressed as well, and into a pipe.
	for _, name := range []string{"a.tar.gz", "a.tar.zst"} {
		templateRun(t, 0, "export", vmid, in(name))
		f, err := os.Open(in(name))
		must(t, err)
		r, err := compression.DecompressStream(f)
		must(t, err)
		got, err := io.ReadAll(r)
		must(t, errors.Join(err, r.Close(), f.Close()))
		if !bytes.Equal(got, plain) || r.GetCompression() == compression.Uncompressed {
			t.Errorf("%s is another", name)
		}
	}
	templateRun(t, 0, "export", vmid, in("again.tar.zst"))
	if out, code := command("cmp", in("a.tar.zst"), in("again.tar.zst")); code != 0 {
		t.Error(out)
	}
	must(t, errors.Join(os.Remove(in("a.tar.gz")), os.Remove(in("a.tar.zst")), os.Remove(in("again.tar.zst"))))
	pipe := exec.Command("containerd-pve", "template", "export", vmid, "-", "--as", "vztmpl")
	if got, err := pipe.Output(); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("into a pipe: %d bytes, %v", len(got), err)
	}

	want := made.files(t)
	if len(want) < 50 || !strings.Contains(want["/srv/cap"], "security.capability") || !strings.Contains(want["/srv/sub/b"]+want["/srv/a"], " is /srv/") {
		t.Errorf("the template lacks what this is about: %q, %q", want["/srv/cap"], want["/srv/sub/b"])
	}
	unpack := func(to string, how ...string) string {
		t.Helper()
		must(t, os.Mkdir(to, 0o755))
		if out, code := command(append([]string{"tar", "-C", to, "-xpf", in("plain.tar")}, how...)...); code != 0 {
			t.Fatalf("tar: %s", out)
		}
		return to
	}
	to := unpack("/"+dataset+"/all", "--numeric-owner", "--xattrs", "--xattrs-include=*")
	if d := cmp.Diff(want, filesOf(t, to)); d != "" {
		t.Errorf("unpacked with all attributes: %s", d)
	}
	// As PVE::LXC::Create does (pve-storage's COMMON_TAR_FLAGS); the directory itself stays as it is.
	to = unpack("/"+dataset+"/proxmox", "--totals", "--one-file-system", "--sparse", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability",
		"--warning=no-file-ignored", "--warning=no-xattr-write", "--skip-old-files", "--anchored", "--exclude", "./dev/*")
	got := filesOf(t, to)
	for name := range want {
		if name == "/." || strings.HasPrefix(name, "/dev/") {
			delete(want, name)
			delete(got, name)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("unpacked as Proxmox does: %s", d)
	}
	pid := made.boot(t, 301, to)
	eventually(t, time.Minute, "the image's process is its init", func() bool {
		return slices.Equal(procList(t, pid, "cmdline"), args)
	})
	must(t, os.Remove(in("plain.tar")))
	if got := leftovers(t, dir); got != clean {
		t.Errorf("it left %s; before there were %s", got, clean)
	}
}

// TestTemplateExportRefused: what cannot be written leaves nothing.
func TestTemplateExportRefused(t *testing.T) {
	proxmox(t)
	made := makeTemplate(t, debian)
	vmid, dir := strconv.Itoa(made.VMID), t.TempDir()
	clean := leftovers(t, dir)
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, refused := range [][]string{
		{"999", in("x.tar")}, {"x", in("x.tar")}, {vmid, in("x"), "--as", "vztmpl"}, {vmid, in("x.tar"), "--as", "docker"}, {vmid, dir}, {vmid, dir, "--force"}, {vmid, in("none/x.tar")},
		{vmid, in("x.tar"), "--containerd-address", in("none.sock")},
	} {
		t.Log(refused, templateRun(t, 1, append([]string{"export"}, refused...)...))
	}
	tty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	must(t, err)
	defer tty.Close()
	c := exec.Command("containerd-pve", "template", "export", vmid, "-")
	var said bytes.Buffer
	c.Stdout, c.Stderr = tty, &said
	if err := c.Run(); err == nil || !strings.Contains(said.String(), "is a terminal") {
		t.Errorf("a terminal: %v, %s", err, said.String())
	}
	// A disk that is full, and an end in the middle.
	must(t, os.Mkdir(in("small"), 0o755))
	must(t, unix.Mount("tmpfs", in("small"), "tmpfs", 0, "size=2m"))
	for _, as := range []string{"oci", "vztmpl"} {
		if out := templateRun(t, 1, "export", vmid, in("small/x.tar"), "--as", as); !strings.Contains(out, "no space left") {
			t.Errorf("a full disk: %s", out)
		}
	}
	if left, err := os.ReadDir(in("small")); err != nil || len(left) > 0 {
		t.Errorf("on the full disk are %v, %v", left, err)
	}
	must(t, errors.Join(unix.Unmount(in("small"), 0), os.Remove(in("small"))))
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		c := exec.Command("containerd-pve", "template", "export", vmid, in("x.tar.gz"))
		must(t, c.Start())
		eventually(t, time.Minute, "it writes", func() bool {
			found, err := filepath.Glob(in(".containerd-pve-export-*"))
			must(t, err)
			for _, f := range found {
				if info, err := os.Stat(f); err == nil && info.Size() > 0 {
					return true
				}
			}
			return false
		})
		must(t, c.Process.Signal(signal))
		if err := c.Wait(); err == nil || c.ProcessState.ExitCode() != 1 {
			t.Errorf("%s: %v", signal, err)
		}
	}
	// Nobody reads what it writes.
	r, w, err := os.Pipe()
	must(t, err)
	c = exec.Command("containerd-pve", "template", "export", vmid, "-")
	c.Stdout = w
	must(t, c.Start())
	must(t, w.Close())
	one := make([]byte, 1)
	_, err = io.ReadFull(r, one)
	must(t, err)
	must(t, c.Process.Signal(syscall.SIGINT))
	if err := c.Wait(); err == nil || c.ProcessState.ExitCode() != 1 {
		t.Errorf("into a pipe that nobody reads: %v", err)
	}
	must(t, r.Close())
	if got := leftovers(t, dir); got != clean {
		t.Errorf("it left %s; before there were %s", got, clean)
	}
}
