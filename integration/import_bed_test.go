//go:build bed

package integration

import (
	"encoding/json"
	"fmt"
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

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	gocmp "github.com/google/go-cmp/cmp"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"
)

// program runs one of the guest's, which must succeed.
func program(t *testing.T, argv ...string) string {
	t.Helper()
	out, code := command(argv...)
	if code != 0 {
		t.Fatalf("%q: %d, %s", argv, code, out)
	}
	return out
}

// importedImage is what `template import --format json` says.
type importedImage struct {
	Image, Digest, Format string
	Again                 bool
	Template              *templateOf
}

// takeIn imports a source, until the test ends.
func takeIn(t *testing.T, args ...string) (is importedImage) {
	t.Helper()
	out := templateRun(t, 0, append([]string{"import", "--format", "json"}, args...)...)
	must(t, json.Unmarshal([]byte(out), &is))
	t.Cleanup(func() { command("ctr", "images", "rm", "--sync", is.Image) })
	return is
}

// treeOf is filesOf without the root directory itself, of which an image knows nothing.
func treeOf(t *testing.T, root string) map[string]string {
	t.Helper()
	all := filesOf(t, root)
	delete(all, "/.")
	return all
}

// unpacked is the tree of an image as our snapshotter has it.
func unpacked(t *testing.T, name string) map[string]string {
	t.Helper()
	ctx, c := background(t), connect(t)
	image, err := c.GetImage(ctx, name)
	must(t, err)
	diffs, err := image.RootFS(ctx)
	must(t, err)
	sn, key, dir := c.SnapshotService(zfs), fmt.Sprintf("seen%d", counter.Add(1)), t.TempDir()
	mounts, err := sn.View(ctx, key, identity.ChainID(diffs).String())
	must(t, err)
	defer sn.Remove(ctx, key)
	must(t, mount.All(mounts, dir))
	defer mount.UnmountRecursive(dir, 0)
	return treeOf(t, dir)
}

// source is a root with all that a file system can tell of files, made of busybox's image.
func source(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	root := filepath.Join(dir, "rootfs")
	must(t, os.Mkdir(root, 0o755))
	program(t, "sh", "-c", "crane export --insecure "+busybox+" - | tar -C "+root+" --numeric-owner -xpf -")
	in := func(name string) string { return filepath.Join(root, name) }
	must(t, os.MkdirAll(in("sbin"), 0o755))
	_ = os.Remove(in("sbin/init"))
	must(t, os.WriteFile(in("sbin/init"), []byte("#!/bin/sh\ntrap 'exit 0' TERM PWR INT\nwhile :; do sleep 1; done\n"), 0o755))
	must(t, os.MkdirAll(in("srv/deep"), 0o755))
	must(t, os.WriteFile(in("srv/a file\nof two lines"), []byte(strings.Repeat("text", 5000)), 0o600))
	must(t, os.Link(in("srv/a file\nof two lines"), in("srv/deep/linked")))
	must(t, os.Symlink("/etc/../a/target/that/is/not", in("srv/symbolic")))
	must(t, os.Symlink("../../../../..", in("srv/up")))
	must(t, unix.Mkfifo(in("srv/fifo"), 0o640))
	must(t, os.MkdirAll(in("dev"), 0o755))
	must(t, unix.Mknod(in("dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, os.WriteFile(in("srv/capable"), []byte("program"), 0o755))
	must(t, unix.Lchown(in("srv/capable"), 1000, 3_000_000_000))
	must(t, unix.Setxattr(in("srv/capable"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	must(t, unix.Setxattr(in("srv/deep"), "user.text", []byte("a\x00b=c\nd"), 0))
	must(t, os.WriteFile(in("srv/setuid"), []byte("program"), 0o755))
	must(t, os.Chmod(in("srv/setuid"), 0o755|fs.ModeSetuid|fs.ModeSetgid))
	must(t, os.Chmod(in("srv"), 0o777|fs.ModeSticky))
	must(t, unix.Lchown(in("srv/symbolic"), 100_000, 200_000))
	sparse, err := os.Create(in("srv/sparse"))
	must(t, err)
	must(t, sparse.Truncate(10<<20))
	_, err = sparse.WriteAt([]byte("end"), 5<<20)
	must(t, err)
	must(t, sparse.Close())
	for n, name := range []string{"srv/setuid", "srv/symbolic", "srv/deep", "srv"} {
		at := []unix.Timespec{{Sec: 1_000_000_000, Nsec: 5}, {Sec: 1_500_000_000 + int64(n), Nsec: 987_654_321}}
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, in(name), at, unix.AT_SYMLINK_NOFOLLOW))
	}
	must(t, os.WriteFile(filepath.Join(dir, "metadata.yaml"), []byte("architecture: x86_64\ncreation_date: 1600000000\nproperties:\n  description: A busybox\n  os: busybox\ntemplates: {}\n"), 0o644))
	return dir
}

// TestImportRoots: each form of a root becomes the same tree, file by file, and runs.
func TestImportRoots(t *testing.T) {
	dir := source(t)
	want, root := treeOf(t, filepath.Join(dir, "rootfs")), filepath.Join(dir, "rootfs")
	const pack = "tar --numeric-owner --xattrs --xattrs-include='*' --format=posix "
	for _, c := range []struct {
		name, script string // of a shell, in dir
		sources      []string
		format       string
		needs        string
	}{
		{"tar", pack + "--sparse -C rootfs -cf tar .", []string{"tar"}, "rootfs tarball", "tar"},
		{"gzip", pack + "-C rootfs -c . | gzip > gz", []string{"gz"}, "rootfs tarball", "gzip"},
		{"vztmpl", pack + "-C rootfs -c . | zstd > vztmpl", []string{"vztmpl"}, "rootfs tarball", "zstd"},
		{"xz", pack + "-C rootfs -c . | xz -T1 > xz", []string{"xz"}, "rootfs tarball", "xz"},
		{"unified", pack + "-c metadata.yaml rootfs | gzip > unified", []string{"unified"}, "LXC image", "gzip"},
		{"split", pack + "-cf meta metadata.yaml; " + pack + "-C rootfs -cf root .", []string{"meta", "root"}, "rootfs tarball", "tar"},
		{"squashfs", pack + "-cf meta metadata.yaml; mksquashfs rootfs squashfs -noappend -no-progress -comp zstd >&2", []string{"meta", "squashfs"}, "squashfs of root", "sqfs2tar"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := exec.LookPath(c.needs); err != nil {
				t.Skip(err)
			}
			program(t, "sh", "-ec", "cd "+dir+"; "+c.script)
			args := []string{"--image-only", "--name", "localhost/imported/" + c.name + ":1"}
			for _, s := range c.sources {
				args = append(args, filepath.Join(dir, s))
			}
			is := takeIn(t, args...)
			if is.Image != "localhost/imported/"+c.name+":1" || is.Format != c.format || is.Template != nil || is.Again {
				t.Errorf("%+v", is)
			}
			expect := want
			if c.name == "squashfs" {
				expect = map[string]string{} // which has seconds only
				for name, text := range want {
					before, after, _ := strings.Cut(text, " time ")
					seconds, _, _ := strings.Cut(after, ".")
					_, rest, _ := strings.Cut(after, " ")
					expect[name] = strings.TrimSpace(before + " time " + seconds + ".000000000 " + rest)
				}
			}
			if d := gocmp.Diff(expect, unpacked(t, is.Image)); d != "" {
				t.Errorf("the tree is another: %s", d)
			}
			out, stderr, code := run(t, options{image: is.Image, args: sh("wc -c < /srv/sparse; cat /srv/deep/linked | wc -c")})
			if code != 0 || out != "10485760\n20000\n" {
				t.Errorf("%d, %q, %q", code, out, stderr)
			}
			if again := takeIn(t, args...); !again.Again || again.Digest != is.Digest {
				t.Errorf("again: %+v", again)
			}
			clean(t)
		})
	}
	t.Run("lxc-busybox", importLXC)
	if out := templateRun(t, 1, "import", root); !strings.Contains(out, "no OCI layout") {
		t.Errorf("a directory of a root: %s", out)
	}
}

// clean wants no lease of an import, no unfinished content and no half of an unpacked layer.
func clean(t *testing.T) {
	t.Helper()
	for _, args := range [][]string{{"leases", "ls"}, {"content", "active"}, {"snapshots", "--snapshotter", zfs, "ls"}} {
		out := program(t, append([]string{"ctr"}, args...)...)
		if strings.Contains(out, "io.containerd.pve.import") || strings.Contains(out, "containerd-pve-import") || strings.Contains(out, "extract-") {
			t.Errorf("%v: %s", args, out)
		}
	}
}

// importLXC: a root that LXC's own template made becomes a template of ours, of which LXC's
// own tools make a container that boots.
func importLXC(t *testing.T) {
	t.Cleanup(func() { command("zfs", "destroy", templates()) })
	file := filepath.Join(t.TempDir(), "by-lxc.tar.xz")
	program(t, "lxc-create", "-n", "by-lxc", "-t", "busybox", "-B", "dir")
	t.Cleanup(func() { command("lxc-destroy", "-n", "by-lxc") })
	want := treeOf(t, "/var/lib/lxc/by-lxc/rootfs")
	program(t, "sh", "-c", "tar -C /var/lib/lxc/by-lxc/rootfs --numeric-owner --xattrs --format=posix -c . | xz -0 > "+file)
	is := takeIn(t, "--name", "localhost/by-lxc:1", file)
	if is.Template == nil || is.Format != "rootfs tarball" {
		t.Fatalf("%+v", is)
	}
	t.Cleanup(func() { templateRun(t, 0, "rm", strconv.Itoa(is.Template.VMID)) })
	if d := gocmp.Diff(want, unpacked(t, is.Image)); d != "" {
		t.Errorf("the tree is another: %s", d)
	}
	lxcCopy(t, *is.Template, "of-by-lxc")
	pid := lxcStart(t, "of-by-lxc")
	if got := procList(t, pid, "cmdline")[0]; got != "/sbin/init" && got != "init" { // as busybox calls itself
		t.Errorf("its init is %q", got)
	}
	if out := program(t, "lxc-attach", "-n", "of-by-lxc", "--", "/bin/sh", "-c", "echo inside"); out != "inside\n" {
		t.Errorf("%q", out)
	}
}

// TestImportImages: what crane, skopeo and umoci write is the image that they wrote, layer by layer.
func TestImportImages(t *testing.T) {
	ctx, c := background(t), connect(t)
	pulled, err := c.GetImage(ctx, busybox)
	must(t, err)
	diffs, err := pulled.RootFS(ctx)
	must(t, err)
	manifest, err := images.Manifest(ctx, c.ContentStore(), pulled.Target(), pulled.Platform())
	must(t, err)
	dir := t.TempDir()
	const from = "skopeo --insecure-policy copy --src-tls-verify=false docker://" + busybox + " "
	for _, s := range []struct {
		name, script, source, image string
		args                        []string
		same                        bool // its config is untouched
	}{
		{"crane-layout", "crane pull --insecure --format=oci " + busybox + " crane-layout", "crane-layout", "localhost/crane-layout:latest", nil, true},
		{"crane-tar", "crane pull --insecure --format=tarball " + busybox + " crane-tar", "crane-tar", busybox, nil, true},
		{"crane-legacy", "crane pull --insecure --format=legacy " + busybox + " crane-legacy", "crane-legacy", busybox, nil, false},
		{"skopeo-layout", from + "oci:skopeo-layout:one-tag", "skopeo-layout", "localhost/skopeo-layout:one-tag", nil, true},
		{"skopeo-oci", from + "oci-archive:skopeo-oci:one-tag; zstd skopeo-oci -o skopeo-oci.zst", "skopeo-oci.zst", "localhost/skopeo-oci:one-tag", nil, true},
		{"skopeo-docker", from + "docker-archive:skopeo-docker:localhost:5000/by-skopeo:1", "skopeo-docker", "localhost:5000/by-skopeo:1", nil, false},
		{"several", from + "oci:several:one; umoci config --image several:one --tag two --config.user www-data", "several", "localhost/several:two", []string{"--select", "two"}, false},
	} {
		t.Run(s.name, func(t *testing.T) {
			ctx := background(t)
			tool, _, _ := strings.Cut(s.script, " ")
			if _, err := exec.LookPath(tool); err != nil {
				t.Skip(err)
			}
			program(t, "sh", "-ec", "cd "+dir+"; "+s.script)
			file := filepath.Join(dir, s.source)
			if s.args != nil {
				if out := templateRun(t, 1, "import", "--image-only", file); !strings.Contains(out, "--select") || !strings.Contains(out, "one (sha256:") {
					t.Errorf("without a choice: %s", out)
				}
			}
			// Its own name, which must not take that of the image that the other tests have.
			name := s.image
			args := slices.Concat([]string{"--image-only", file}, s.args)
			if name == busybox {
				name = "localhost/" + s.name + ":1"
				args = append(args, "--name", name)
			}
			is := takeIn(t, args...)
			if is.Image != name {
				t.Errorf("%+v, not %s", is, name)
			}
			image, err := c.GetImage(ctx, is.Image)
			must(t, err)
			got, err := image.RootFS(ctx)
			if err != nil || !slices.Equal(got, diffs) {
				t.Errorf("layers %v, %v, not %v", got, err, diffs)
			}
			if m, err := images.Manifest(ctx, c.ContentStore(), image.Target(), image.Platform()); err != nil || s.same && m.Config.Digest != manifest.Config.Digest {
				t.Errorf("config %s, %v, not %s", m.Config.Digest, err, manifest.Config.Digest)
			}
			out, stderr, code := run(t, options{image: is.Image, args: []string{"cat", "/etc/passwd"}})
			if code != 0 || !strings.Contains(out, "operator:x:37:") {
				t.Errorf("%d, %q, %q", code, out, stderr)
			}
			clean(t)
		})
	}
}

// TestImportTemplate: what is imported becomes a template at once, whose clone boots.
func TestImportTemplate(t *testing.T) {
	proxmox(t)
	dir := source(t)
	file := filepath.Join(dir, "A Root.vztmpl")
	program(t, "sh", "-ec", "tar -C "+dir+"/rootfs --numeric-owner --xattrs --xattrs-include='*' -c . | gzip > '"+file+"'")
	out := templateRun(t, 0, "import", file, "--vmid", "700", "--memory", "64M")
	t.Log(out)
	t.Cleanup(func() {
		command("containerd-pve", "template", "rm", "700")
		command("ctr", "images", "rm", "--sync", "localhost/a-root.vztmpl:latest")
	})
	if !strings.Contains(out, "localhost/a-root.vztmpl:latest") || !strings.Contains(out, "VMID 700") {
		t.Errorf("%s", out)
	}
	var list []templateOf
	must(t, json.Unmarshal([]byte(templateRun(t, 0, "ls", "--format", "json")), &list))
	if len(list) != 1 || list[0].VMID != 700 || list[0].Unfinished {
		t.Fatalf("%+v", list)
	}
	pid := list[0].clone(t, 701)
	if got := strings.Join(procList(t, pid, "cmdline"), " "); !strings.Contains(got, "/sbin/init") {
		t.Errorf("its init is %q", got)
	}
	// The same source is the template that there is.
	if is := takeIn(t, file, "--vmid", "700"); !is.Again || is.Template == nil || is.Template.VMID != 700 {
		t.Errorf("again: %+v", is)
	}
	if out, code := command("lxc-stop", "-k", "-n", "701"); code != 0 {
		t.Error(out)
	}
}

// TestImportRefused: what is hostile, damaged or interrupted leaves no image and nothing else.
func TestImportRefused(t *testing.T) {
	dir := t.TempDir()
	count := func() string { return program(t, "ctr", "images", "ls", "-q") }
	before := count()
	write := func(name, script string) string {
		program(t, "sh", "-ec", "cd "+dir+"; mkdir -p x; echo text > x/file; "+script)
		return filepath.Join(dir, name)
	}
	for name, c := range map[string]struct{ file, want string }{
		"leaves":    {write("leaves", "tar -P -cf leaves x/../x/file"), `entry 1 "x/../x/file" at byte 0`},
		"absolute":  {write("absolute", "tar -P -cf absolute /etc/passwd"), `entry 1 "/etc/passwd" at byte 0`},
		"device":    {write("device", "mknod x/disk b 8 0; tar -C x -cf device file disk; rm x/disk"), `entry 2 "disk" at byte 1024: it is a device (b 8:0)`},
		"twice":     {write("twice", "tar -C x -cf twice file; tar -C x -rf twice file"), `entry 2 "file" at byte 1024: it is there twice`},
		"link":      {write("link", "ln -s /etc x/l; tar -C x -cf link l; rm x/l; mkdir x/l; echo a > x/l/passwd; tar -C x -rf link l/passwd; rm -r x/l"), `entry 2 "l/passwd" at byte 512: "l" above it is a symbolic link`},
		"truncated": {write("truncated", "tar -C /bin -c busybox | gzip | head -c 100000 > truncated"), "truncated"},
		"bomb":      {write("bomb", "truncate -s 400M x/zeros; tar -C x -c zeros | gzip > bomb; rm x/zeros"), `entry 1 "zeros" at byte 0`},
		"large":     {write("large", "truncate -s 100G x/zeros; tar --sparse -C x -cf large zeros; rm x/zeros"), `entry 1 "zeros" at byte 0: its 107374182400 bytes`},
		"none":      {write("none", "head -c 100000 /dev/urandom > none"), "none of the formats"},
	} {
		if out := templateRun(t, 1, "import", "--image-only", c.file); !strings.Contains(out, c.want) {
			t.Errorf("%s: %s", name, out)
		} else {
			t.Log(name, out)
		}
	}
	for _, refused := range [][]string{{dir + "/leaves", "--name", "A B"}, {dir + "/none/such"}, {dir + "/leaves", "--max-size", "x"}, {dir + "/leaves", "--image-only", "--vmid", "100"}} {
		t.Log(refused, templateRun(t, 1, append([]string{"import"}, refused...)...))
	}
	clean(t)
	// A whole system takes its time.
	file := filepath.Join(dir, "debian.tar")
	program(t, "sh", "-ec", "crane export --insecure "+debian+" "+file)
	interrupted := 0
	for _, after := range []time.Duration{50 * time.Millisecond, 400 * time.Millisecond, 1200 * time.Millisecond, 2500 * time.Millisecond} {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
			cmd := exec.Command("containerd-pve", "template", "import", "--image-only", "--name", "localhost/interrupted:1", file)
			must(t, cmd.Start())
			time.Sleep(after)
			_ = cmd.Process.Signal(sig)
			if cmd.Wait() == nil {
				continue // it was faster
			}
			interrupted++
			if got := count(); got != before {
				t.Errorf("after %s, %s: images %s", sig, after, got)
			}
			if out := program(t, "ctr", "snapshots", "--snapshotter", zfs, "ls"); sig == syscall.SIGINT && strings.Contains(out, "extract-") {
				t.Errorf("after %s, %s: %s", sig, after, out)
			}
		}
	}
	if interrupted == 0 {
		t.Error("nothing was interrupted")
	}
	is := takeIn(t, "--image-only", "--name", "localhost/interrupted:1", file)
	t.Logf("%d times interrupted, then %+v", interrupted, is)
	collect(t)
	clean(t)
}
