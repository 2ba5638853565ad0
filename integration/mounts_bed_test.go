//go:build bed

package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountAdmin lets the container's root mount.
var mountAdmin = oci.WithAddedCapabilities([]string{"CAP_SYS_ADMIN"})

// hostMount mounts on the host until the end of the test.
func hostMount(t *testing.T, source, target, kind string, flags uintptr, data string) {
	t.Helper()
	must(t, os.MkdirAll(target, 0o755))
	must(t, unix.Mount(source, target, kind, flags, data))
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
}

// isMount says whether something is mounted at the host's path.
func isMount(t *testing.T, path string) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	return strings.Contains(string(text), " "+path+" ")
}

// TestPropagation: a bind that is shared carries mounts both ways, a slave one
// into the container, a private one neither.
func TestPropagation(t *testing.T) {
	vol := filepath.Join(t.TempDir(), "vol")
	hostMount(t, "tmpfs", vol, "tmpfs", 0, "")
	must(t, unix.Mount("", vol, "", unix.MS_SHARED, ""))
	hostMount(t, "tmpfs", filepath.Join(vol, "below"), "tmpfs", 0, "")
	bind := func(to string, options ...string) specs.Mount {
		return specs.Mount{Type: "bind", Source: vol, Destination: to, Options: append([]string{"rbind"}, options...)}
	}
	b := start(t, options{args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{mountAdmin, oci.WithMounts([]specs.Mount{
		bind("/shared", "rshared"), bind("/slave", "rslave"), bind("/private", "rprivate"), bind("/default"),
		bind("/unbindable", "unbindable"), {Type: "tmpfs", Source: "tmpfs", Destination: "/scratch/shared", Options: []string{"shared"}},
	})}})
	t.Cleanup(func() {
		for _, d := range []string{"in", "out"} {
			_ = unix.Unmount(filepath.Join(vol, d), unix.MNT_DETACH)
		}
	})
	for _, d := range []string{"in", "out", "slave"} {
		must(t, os.Mkdir(filepath.Join(vol, d), 0o755))
	}
	must(t, unix.Mount("tmpfs", filepath.Join(vol, "out"), "tmpfs", 0, ""))
	out, _, err := b.execIn(sh(`mount -t tmpfs inner /shared/in; mount -t tmpfs inner /slave/slave
for d in shared slave private default; do echo $d $(grep -c " /$d/out " /proc/self/mountinfo) $(grep -c " /$d/in " /proc/self/mountinfo) $(grep -c " /$d/below " /proc/self/mountinfo); done
for d in /shared /slave /private /default /unbindable /scratch/shared /proc; do grep "^[^ ]* [^ ]* [^ ]* [^ ]* $d " /proc/self/mountinfo | cut -d' ' -f7- | sed "s/ -.*//; s/:[0-9]*//g; s/^-.*//"; done`), nil)
	must(t, err)
	wholly(t, "container", out, "shared 1 1 1", "slave 1 1 1", "private 0 0 1", "default 1 1 1",
		"shared", "master", "", "master", "unbindable", "shared", "")
	if !isMount(t, filepath.Join(vol, "in")) {
		t.Error("what the container mounted in a shared directory is not on the host")
	}
	if isMount(t, filepath.Join(vol, "slave")) {
		t.Error("what the container mounted in a slave directory is on the host")
	}
	b.execIn([]string{"umount", "/shared/in"}, nil)
	if isMount(t, filepath.Join(vol, "in")) {
		t.Error("what the container unmounted is still on the host")
	}
}

// TestRootfsPropagation: the root's own propagation type. liblxc makes all shared.
func TestRootfsPropagation(t *testing.T) {
	for value, want := range map[string]string{"": "", "private": "", "rslave": "", "rshared": "shared", "unbindable": "unbindable"} {
		out, stderr, code := run(t, options{image: busybox, args: sh(`grep ' / / ' /proc/self/mountinfo || grep ' / ' /proc/self/mountinfo`), edit: func(s *oci.Spec) { s.Linux.RootfsPropagation = value }})
		fields := strings.Fields(strings.SplitN(out, " - ", 2)[0])
		got := ""
		if len(fields) > 6 {
			got = strings.Join(fields[6:], " ")
		}
		// What is mounted over the root on the host may come in, nothing goes out.
		got, _, _ = strings.Cut(strings.TrimSpace(strings.ReplaceAll(got, "master", "")), ":")
		if code != 0 || got != want {
			t.Errorf("%q: exit code %d, %q %q, want %q", value, code, out, stderr, want)
		}
	}
	_, err := create(t, options{args: []string{"true"}, edit: func(s *oci.Spec) { s.Linux.RootfsPropagation = "sideways" }})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "linux.rootfsPropagation") {
		t.Errorf("unknown value: %v", err)
	}
}

// TestMountOptions: each option of the spec that is seen in mountinfo or by what
// can be done there.
func TestMountOptions(t *testing.T) {
	dir := t.TempDir()
	nested := filepath.Join(dir, "nested")
	hostMount(t, "tmpfs", nested, "tmpfs", 0, "")
	hostMount(t, "tmpfs", filepath.Join(nested, "sub"), "tmpfs", 0, "")
	plain := filepath.Join(dir, "plain")
	must(t, os.Mkdir(plain, 0o755))
	must(t, os.WriteFile(filepath.Join(plain, "file"), []byte("content\n"), 0o600))
	must(t, os.Symlink("file", filepath.Join(plain, "link")))
	for _, d := range []string{"lower", "upper", "work"} {
		must(t, os.Mkdir(filepath.Join(nested, d), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(nested, "lower/x"), []byte("lower\n"), 0o644))
	bind := func(source, to, options string) specs.Mount {
		return specs.Mount{Type: "bind", Source: source, Destination: to, Options: strings.Fields(options)}
	}
	tmpfs := func(to, options string) specs.Mount {
		return specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: to, Options: strings.Fields(options)}
	}
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 4000, Size: 1000}}
	mapped := bind(plain, "/m/mapped", "bind ro")
	mapped.UIDMappings, mapped.GIDMappings = ids, ids
	b := start(t, options{args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{mountAdmin, oci.WithMounts([]specs.Mount{
		bind(nested, "/m/ro", "rbind ro"), bind(nested, "/m/rro", "rbind rro"), bind(nested, "/m/rmixed", "rbind rnosuid rnodev rnoexec nodiratime"),
		bind(plain, "/m/nosymfollow", "bind nosymfollow"), bind(filepath.Join(plain, "file"), "/m/file", "bind ro"),
		bind(plain, "/m/noatime", "bind noatime"), bind(plain, "/m/strictatime", "bind strictatime"),
		tmpfs("/m/tmpfs", "nosuid noexec nodev size=1m nr_inodes=100 mode=1750 uid=3 gid=4"), tmpfs("/m/tmpfsro", "ro"),
		tmpfs("/usr/share/doc", "tmpcopyup"), tmpfs("/usr/share/man", "tmpcopyup ro"),
		{Type: "mqueue", Source: "mqueue", Destination: "/m/mqueue"},
		{Type: "overlay", Source: "overlay", Destination: "/m/overlay", Options: []string{"lowerdir=" + nested + "/lower", "upperdir=" + nested + "/upper", "workdir=" + nested + "/work"}},
		{Type: "devpts", Source: "devpts", Destination: "/m/pts", Options: []string{"newinstance", "ptmxmode=0600", "mode=0640", "gid=9"}},
		mapped, bind(plain, "/var/run/linked", "bind"), bind(plain, "/m/a b\tc", "bind ro"),
		tmpfs("/m/remounted", "size=1m"), {Type: "tmpfs", Destination: "/m/remounted", Options: []string{"remount", "ro", "size=2m"}},
		bind(nested, "/m/boundagain", "rbind"), {Destination: "/m/boundagain/sub", Options: []string{"bind", "remount", "ro", "nosuid"}},
	})}})
	for _, c := range []struct{ name, script, want string }{
		{"ro", "touch /m/ro/x 2>/dev/null || echo ro; touch /m/ro/sub/x && echo rw below", "ro\nrw below"},
		{"rro", "touch /m/rro/x 2>/dev/null || echo ro; touch /m/rro/sub/x 2>/dev/null || echo ro below", "ro\nro below"},
		{"rnosuid and more", "grep ' /m/rmixed/sub ' /proc/self/mountinfo | cut -d' ' -f6", "rw,nosuid,nodev,noexec,relatime"},
		{"nodiratime", "grep ' /m/rmixed ' /proc/self/mountinfo | cut -d' ' -f6", "rw,nosuid,nodev,noexec,nodiratime,relatime"},
		{"nosymfollow", "cat /m/nosymfollow/file; cat /m/nosymfollow/link 2>/dev/null || echo not followed", "content\nnot followed"},
		{"file", "cat /m/file; echo x 2>/dev/null >/m/file || echo ro", "content\nro"},
		{"noatime", "grep ' /m/noatime ' /proc/self/mountinfo | cut -d' ' -f6", "rw,noatime"},
		{"strictatime", "grep ' /m/strictatime ' /proc/self/mountinfo | cut -d' ' -f6", "rw"},
		{"tmpfs", "grep ' /m/tmpfs ' /proc/self/mountinfo | sed 's/.*- //; s/,inode64//'; stat -c '%a %u %g' /m/tmpfs", "tmpfs tmpfs rw,size=1024k,nr_inodes=100,mode=1750,uid=3,gid=4\n1750 3 4"},
		{"read-only tmpfs", "touch /m/tmpfsro/x 2>/dev/null || echo ro", "ro"},
		{"tmpcopyup", "test $(ls /usr/share/doc | wc -l) -gt 10 && stat -f -c %T /usr/share/doc; touch /usr/share/man/x 2>/dev/null || ls -d /usr/share/man", "tmpfs\n/usr/share/man"},
		{"mqueue", "stat -f -c %T /m/mqueue", "mqueue"},
		{"overlay", "cat /m/overlay/x; echo upper >/m/overlay/x; cat /m/overlay/x", "lower\nupper"},
		{"devpts", "stat -c %a /m/pts/ptmx; grep ' /m/pts ' /proc/self/mountinfo | sed 's/.*- //'", "600\ndevpts devpts rw,gid=9,mode=640,ptmxmode=600"},
		{"idmapped", "stat -c '%u %g' /m/mapped/file", "4000 4000"},
		{"through a link of the image", "readlink /var/run; cat /run/linked/file", "/run\ncontent"},
		{"a path with blanks", "cat '/m/a b\tc/file'", "content"},
		{"remount", "grep ' /m/remounted ' /proc/self/mountinfo | sed 's/^.* \\(r[ow],[^ ]*\\) .*- /\\1 /; s/,inode64//'", "ro,relatime tmpfs tmpfs rw,size=2048k"},
		{"remount of a nested bind", "touch /m/boundagain/x && echo rw; grep ' /m/boundagain/sub ' /proc/self/mountinfo | cut -d' ' -f6", "rw\nro,nosuid,relatime"},
	} {
		out, _, err := b.execIn(sh(c.script), nil)
		if err != nil || out != c.want+"\n" {
			t.Errorf("%s: %v\n%swant\n%s", c.name, err, out, c.want)
		}
	}
	if text, err := os.ReadFile(filepath.Join(nested, "lower/x")); err != nil || string(text) != "lower\n" {
		t.Errorf("lower layer: %q, %v", text, err)
	}
}

// TestReadonlyRootWithMounts: the root alone is read-only, what is mounted in it
// is not; targets that are missing are made all the same.
func TestReadonlyRootWithMounts(t *testing.T) {
	dir := t.TempDir()
	out, stderr, code := run(t, options{args: sh("touch /x 2>/dev/null || echo ro; touch /made/for/it/x && touch /tmp/x && touch /dev/x && echo rw; cat /masked 2>/dev/null | wc -c; test -d /usr/share/doc && ls /usr/share/doc | wc -l; touch /var/x 2>/dev/null || echo ro"),
		spec: []oci.SpecOpts{oci.WithRootFSReadonly(), oci.WithMounts([]specs.Mount{
			{Type: "bind", Source: dir, Destination: "/made/for/it", Options: []string{"rbind"}}, {Type: "tmpfs", Destination: "/tmp"}})},
		edit: func(s *oci.Spec) {
			s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "/etc/hostname", "/usr/share/doc", "/not/there")
			s.Linux.ReadonlyPaths = append(s.Linux.ReadonlyPaths, "/var", "/not/there")
		}})
	if want := "ro\nrw\n0\n0\nro\n"; code != 0 || out != want {
		t.Errorf("exit code %d, %q, %q; want %q", code, out, stderr, want)
	}
}

// TestDevOfTheHost: somebody else's /dev is taken as it is.
func TestDevOfTheHost(t *testing.T) {
	out, stderr, code := run(t, options{args: sh("test -e /dev/vda && echo vda; echo x >/dev/null && echo null"), edit: func(s *oci.Spec) {
		s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return strings.HasPrefix(m.Destination, "/dev") })
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/dev", Destination: "/dev", Options: []string{"rbind", "rslave"}})
	}})
	if want := "vda\nnull\n"; code != 0 || out != want {
		t.Errorf("exit code %d, %q, %q; want %q", code, out, stderr, want)
	}
}

// TestUserNamespaceMounts: idmapped mounts, and what only the host may mount, in
// a container with a user namespace.
func TestUserNamespaceMounts(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("content\n"), 0o600))
	must(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
	hostMount(t, "tmpfs", filepath.Join(dir, "sub"), "tmpfs", 0, "mode=700")
	image := filepath.Join(t.TempDir(), "image")
	if out, code := command("sh", "-c", "truncate -s 8M "+image+" && mkfs.ext4 -q "+image+" && losetup --find --show "+image); code != 0 {
		t.Fatal(out)
	} else {
		image = strings.TrimSpace(out)
		t.Cleanup(func() { command("losetup", "-d", image) })
	}
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000 + 77, Size: 1}}
	explicit := specs.Mount{Type: "bind", Source: dir, Destination: "/explicit", Options: []string{"bind"}, UIDMappings: ids, GIDMappings: []specs.LinuxIDMapping{{HostID: 200000 + 78, Size: 1}}}
	out, stderr, code := run(t, remapped(options{args: sh(`stat -c '%u %g' /container/file /recursive/file /recursive/sub /explicit/file /host/file
cat /container/file; touch /container/mine && echo written; cat /host/file 2>/dev/null || echo secret
stat -f -c %T /disk; touch /readonly/x 2>/dev/null || echo ro`), spec: []oci.SpecOpts{oci.WithMounts([]specs.Mount{
		{Type: "bind", Source: dir, Destination: "/container", Options: []string{"bind", "idmap"}},
		{Type: "bind", Source: dir, Destination: "/recursive", Options: []string{"rbind", "ridmap"}},
		explicit,
		{Type: "bind", Source: dir, Destination: "/host", Options: []string{"rbind"}},
		{Type: "ext4", Source: image, Destination: "/disk"},
		{Type: "bind", Source: dir, Destination: "/readonly", Options: []string{"rbind", "rro", "idmap"}},
	})}}))
	if code != 0 || stderr != "" {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	wholly(t, "container", out, "0 0", "0 0", "0 0", "77 78", "65534 65534", "content", "written", "secret", "ext2/ext3", "ro")
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "mine"), &st); err != nil || st.Uid != 0 || st.Gid != 0 {
		t.Errorf("what the container's root wrote through the mapping belongs to %d:%d, %v", st.Uid, st.Gid, err)
	}
}

// TestMountsThatFail: each names its mount, and leaves nothing.
func TestMountsThatFail(t *testing.T) {
	for _, c := range []struct {
		name  string
		mount specs.Mount
		edit  func(*oci.Spec)
		want  string
	}{
		{"idmap without a user namespace", specs.Mount{Type: "bind", Source: "/tmp", Destination: "/m", Options: []string{"idmap"}}, nil, "idmap"},
		{"idmap of procfs", specs.Mount{Type: "bind", Source: "/proc", Destination: "/m", UIDMappings: uids, GIDMappings: gids}, nil, "idmapped"},
		{"remount of no mount", specs.Mount{Type: "bind", Destination: "/etc", Options: []string{"remount", "ro"}}, nil, "/etc"},
		{"unknown type", specs.Mount{Type: "nosuchfs", Destination: "/m"}, nil, "nosuchfs"},
		{"unknown option", specs.Mount{Type: "tmpfs", Destination: "/m", Options: []string{"nosuchoption"}}, nil, "nosuchoption"},
	} {
		_, err := create(t, options{args: []string{"true"}, spec: []oci.SpecOpts{oci.WithMounts([]specs.Mount{c.mount})}, edit: c.edit})
		if err == nil || !strings.Contains(err.Error(), "mounts[") || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	_, err := create(t, options{args: []string{"true"}, edit: func(s *oci.Spec) { s.Linux.MountLabel = "system_u:object_r:container_file_t:s0" }})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "linux.mountLabel") {
		t.Errorf("mount label without SELinux: %v", err)
	}
}

// TestMountsOfRunning: a tool reads a running container's files as nerdctl exec --user does, and a task that is
// given such a mount has one of its own all the same.
func TestMountsOfRunning(t *testing.T) {
	b := start(t, options{args: []string{"sleep", "1000"}})
	b.write("/data", "1")
	info, err := b.container.Info(b.ctx)
	must(t, err)
	m, err := b.client.SnapshotService(info.Snapshotter).Mounts(b.ctx, info.SnapshotKey)
	must(t, err)
	must(t, mount.WithReadonlyTempMount(b.ctx, m, func(root string) error {
		got, err := os.ReadFile(filepath.Join(root, "data"))
		if string(got) != "1\n" {
			t.Errorf("%q is read", got)
		}
		return err
	}))
	if _, err := b.task.Delete(b.ctx, client.WithProcessKill); err != nil {
		t.Fatal(err)
	}
	_, err = b.client.TaskService().Create(b.ctx, &tasks.CreateTaskRequest{ContainerID: b.container.ID(), Rootfs: mount.ToProto(m)})
	must(t, err)
	b.task, err = b.container.Task(b.ctx, nil)
	must(t, err)
	must(t, b.task.Start(b.ctx))
	b.isFile("/data", "1")
	b.remove()
}
