//go:build bed

package install

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/integration/pmxcfs"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

const (
	image   = "localhost:5000/busybox:latest"
	dataset = "tank/containerd-pve"
	config  = "/etc/containerd/config.toml"
	dropIn  = "/etc/containerd/conf.d/containerd-pve.toml"
)

// admin is a configuration of containerd that is there before.
const admin = "# an administrator's\nversion = 3\ndisabled_plugins = [\"io.containerd.cri.v1.runtime\", \"io.containerd.cri.v1.images\", \"io.containerd.grpc.v1.cri\", \"io.containerd.nri.v1.nri\"]\n"

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// try runs a shell command and gives its output and status.
func try(t *testing.T, command string) (string, int) {
	t.Helper()
	out, err := exec.Command("bash", "-c", command).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	t.Logf("$ %s\n%s", command, out)
	if exit != nil {
		return string(out), exit.ExitCode()
	}
	return string(out), 0
}

// ok runs one that has to succeed.
func ok(t *testing.T, command string) string {
	t.Helper()
	out, code := try(t, command)
	if code != 0 {
		t.Fatalf("%s: status %d", command, code)
	}
	return strings.TrimSpace(out)
}

// fails runs one that has to end with a status and say something.
func fails(t *testing.T, status int, says, command string) {
	t.Helper()
	if out, code := try(t, command); code != status || !strings.Contains(out, says) {
		t.Errorf("%s: status %d, want %d and %q", command, code, status, says)
	}
}

func is(t *testing.T, want, command string) {
	t.Helper()
	if out, _ := try(t, command); strings.TrimSpace(out) != want {
		t.Errorf("%s: %q, want %q", command, out, want)
	}
}

// host is one with containerd of systemd's and nothing of ours.
func host(t *testing.T, program, text string) {
	t.Helper()
	try(t, "systemctl stop containerd containerd-pve; zfs destroy -r "+dataset+"; rm -rf /var/lib/containerd /var/lib/containerd-pve")
	for _, p := range []string{"containerd-pve", "containerd-shim-pve-v2", "pve-init"} {
		must(t, os.RemoveAll("/usr/local/bin/"+p))
	}
	for _, p := range []string{"/etc/containerd", "/etc/containerd-pve"} {
		must(t, os.RemoveAll(p))
	}
	must(t, os.MkdirAll("/etc/containerd", 0o755))
	must(t, os.WriteFile(config, []byte(text), 0o640))
	// As containerd's own containerd.service and Debian's are; its own shims are beside it.
	must(t, os.WriteFile("/etc/systemd/system/containerd.service", []byte("[Unit]\nAfter=local-fs.target\n[Service]\nEnvironment=PATH="+filepath.Dir(program)+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nExecStart="+program+"\nType=notify\nDelegate=yes\nKillMode=process\nRestart=always\nRestartSec=5\nLimitNOFILE=infinity\nTasksMax=infinity\nOOMScoreAdjust=-999\n[Install]\nWantedBy=multi-user.target\n"), 0o644))
	ok(t, "bed-registry; systemctl daemon-reload; systemctl restart containerd")
}

// left are the files of ours.
func left(t *testing.T) []string {
	t.Helper()
	out := ok(t, `find /etc /usr /run /var /opt -xdev -path /var/log -prune -o -path /run/lxc -prune -o -path /var/lib/containerd -prune -o -path /var/lib/dpkg -prune -o \( -name '*containerd-pve*' -o -name '*pve-init*' -o -name '*pve-v2*' \) -print | sort`)
	return strings.Fields(out)
}

func shim(t *testing.T, id string) string {
	t.Helper()
	pid := ok(t, "pgrep -f 'containerd-shim-pve-v2.* -id "+id+"( |$)'")
	if _, err := strconv.Atoi(pid); err != nil {
		t.Fatalf("shim of %s: %q", id, pid)
	}
	return pid
}

// collected waits until nothing of ours is in use any more.
func collected(t *testing.T) {
	t.Helper()
	for range 60 {
		if _, code := try(t, "containerd-pve uninstall --dry-run"); code == 0 {
			return
		}
		time.Sleep(time.Second)
	}
	t.Error("there are snapshots still")
}

// ended waits for the end of a task.
func ended(id string) string {
	return "for i in $(seq 600); do ctr task ls | grep -q '^" + id + " .*STOPPED' && break; sleep 0.1; done"
}

func killed(id string) string {
	return "ctr task kill -s KILL " + id + "; " + ended(id) + "; ctr task delete " + id
}

const run = "ctr run -d --runtime io.containerd.pve.v2 --snapshotter pve-zfs " + image

// netBind is security.capability with cap_net_bind_service permitted and effective.
const netBind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// oddImage is an archive of an image, odd:1, with what a service may be forbidden to make. A directory for a mount is beside it.
func oddImage(t *testing.T) string {
	t.Helper()
	type file struct {
		tar.Header
		data string
	}
	archive := func(files ...file) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range files {
			f.Size = int64(len(f.data))
			must(t, w.WriteHeader(&f.Header))
			_, err := w.Write([]byte(f.data))
			must(t, err)
		}
		must(t, w.Close())
		return b.Bytes()
	}
	layer := archive(
		file{Header: tar.Header{Name: "setuid", Mode: 0o6755, Uid: 1000, Gid: 1001}},
		file{Header: tar.Header{Name: "capable", Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": netBind}}},
		file{Header: tar.Header{Name: "null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}},
		file{Header: tar.Header{Name: "loop", Typeflag: tar.TypeBlock, Mode: 0o660, Devmajor: 7}},
	)
	config := fmt.Sprintf(`{"architecture":%q,"os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, runtime.GOARCH, sha256.Sum256(layer))
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "at"), 0o755))
	name := filepath.Join(dir, "odd.tar")
	must(t, os.WriteFile(name, archive(
		file{tar.Header{Name: "manifest.json", Mode: 0o644}, `[{"Config":"config.json","RepoTags":["odd:1"],"Layers":["layer.tar"]}]`},
		file{tar.Header{Name: "config.json", Mode: 0o644}, config},
		file{tar.Header{Name: "layer.tar", Mode: 0o644}, string(layer)},
	), 0o644))
	return name
}

// seenOdd looks for what is in oddImage.
func seenOdd(t *testing.T, dir string) {
	t.Helper()
	for name, want := range map[string]unix.Stat_t{
		"setuid": {Mode: unix.S_IFREG | 0o6755, Uid: 1000, Gid: 1001}, "capable": {Mode: unix.S_IFREG | 0o755},
		"null": {Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)}, "loop": {Mode: unix.S_IFBLK | 0o660, Rdev: unix.Mkdev(7, 0)},
	} {
		var got unix.Stat_t
		must(t, unix.Lstat(filepath.Join(dir, name), &got))
		if got.Mode != want.Mode || got.Uid != want.Uid || got.Gid != want.Gid || got.Rdev != want.Rdev {
			t.Errorf("%s: mode %o, owner %d:%d, device %x", name, got.Mode, got.Uid, got.Gid, got.Rdev)
		}
	}
	value := make([]byte, 64)
	if n, err := unix.Lgetxattr(filepath.Join(dir, "capable"), "security.capability", value); err != nil || string(value[:n]) != netBind {
		t.Errorf("capabilities: %q, %v", value[:max(n, 0)], err)
	}
}

// TestInstall: the package's life on a host with containerd 2.4.
func TestInstall(t *testing.T) {
	host(t, "/usr/local/bin/containerd", admin)
	ok(t, "dpkg -i made/containerd-pve_1.0_*.deb")
	is(t, "disabled", "systemctl is-enabled containerd-pve")
	is(t, "inactive", "systemctl is-active containerd-pve")
	is(t, "", "systemd-analyze verify --man=no /usr/lib/systemd/system/containerd-pve.service 2>&1 | grep containerd-pve")
	fails(t, 1, "containerd-pve install", "containerd-pve check")

	// Nothing is changed unless somebody says so, and where something is in the way.
	const sums = "find /etc /var/lib/containerd-pve -type f 2>/dev/null | grep -v snapshotter/ | sort | xargs md5sum | md5sum"
	before := ok(t, sums)
	fails(t, 0, dropIn, "containerd-pve install --dry-run")
	fails(t, 0, `"action": "restart"`, "containerd-pve install --dry-run --format json")
	fails(t, 3, "--yes", "containerd-pve install </dev/null")
	fails(t, 3, "Go on?", "echo n | script -qec 'containerd-pve install' /dev/null")
	fails(t, 2, "tank", "containerd-pve install --yes --dataset other/x")
	is(t, before, sums)
	must(t, os.MkdirAll(filepath.Dir(dropIn), 0o755))
	must(t, os.WriteFile(dropIn, []byte("# mine\n"), 0o644))
	fails(t, 2, dropIn, "containerd-pve install --yes")
	must(t, os.RemoveAll(filepath.Dir(dropIn)))

	// A step that fails: all is as before.
	must(t, os.MkdirAll("/etc/systemd/system/containerd.service.d", 0o755))
	must(t, os.WriteFile("/etc/systemd/system/containerd.service.d/fail.conf", []byte("[Service]\nExecStartPre=/usr/bin/test ! -e "+dropIn+"\n"), 0o644))
	fails(t, 1, "is undone", "systemctl daemon-reload; containerd-pve install --yes")
	must(t, os.RemoveAll("/etc/systemd/system/containerd.service.d"))
	ok(t, "systemctl daemon-reload")
	is(t, before, sums)
	is(t, "active inactive", "echo $(systemctl is-active containerd containerd-pve)")
	fails(t, 1, "does not exist", "zfs list "+dataset)

	ok(t, "containerd-pve install --yes")
	ok(t, "containerd-pve check")
	fails(t, 0, "set up already", "containerd-pve install")
	is(t, "enabled active active", "echo $(systemctl is-enabled containerd-pve; systemctl is-active containerd-pve containerd)")
	ok(t, "systemd-analyze security containerd-pve --no-pager | tail -1")
	ok(t, "ctr images pull --plain-http --snapshotter pve-zfs "+image+" | tail -1")
	for _, id := range []string{"one", "two"} {
		ok(t, run+" "+id+" sh -c 'trap \"exit 7\" TERM; while :; do sleep 0.1; done'")
	}

	// The differ, as the unit lets the daemon work.
	odd := oddImage(t)
	ok(t, "ctr images import --snapshotter pve-zfs "+odd+" && ctr images mount --snapshotter pve-zfs docker.io/library/odd:1 "+filepath.Dir(odd)+"/at")
	seenOdd(t, filepath.Dir(odd)+"/at")
	ok(t, "ctr images unmount --rm --snapshotter pve-zfs "+filepath.Dir(odd)+"/at; ctr images rm --sync docker.io/library/odd:1")
	is(t, "made", "ctr task exec --exec-id e0 two touch /made && ctr snapshots --snapshotter pve-zfs diff two | tar -tz | grep made")

	// An upgrade: the shims go on as what they were, the daemon is the new one.
	old, daemon := shim(t, "one"), ok(t, "systemctl show -P MainPID containerd-pve")
	ok(t, "dpkg -i made/containerd-pve_1.1_*.deb")
	is(t, "1.1 active", "echo $(dpkg-query -W -f '${Version}' containerd-pve) $(systemctl is-active containerd-pve)")
	if now := ok(t, "systemctl show -P MainPID containerd-pve"); now == daemon {
		t.Error("the daemon is still the old one")
	}
	is(t, "/usr/bin/containerd-shim-pve-v2 (deleted)", "readlink /proc/"+shim(t, "one")+"/exe")
	if now := shim(t, "one"); now != old {
		t.Errorf("another shim: %s, was %s", now, old)
	}
	is(t, "hello", "ctr task exec --exec-id e1 one echo hello")
	ok(t, run+" three sleep 1000")
	is(t, "hello", "ctr task exec --exec-id e1 three echo hello")
	ok(t, "ctr task kill one; "+ended("one"))
	fails(t, 0, "exit code 7", "ctr task delete one")
	ok(t, killed("three")+"; ctr containers delete one three")

	// Removed: containerd is as it was, containers go on, configuration and data stay.
	fails(t, 2, "1 containers", "containerd-pve uninstall --yes")
	ok(t, "dpkg -r containerd-pve")
	is(t, strings.TrimSpace(admin), "cat "+config)
	is(t, "640", "stat -c %a "+config)
	is(t, "active", "systemctl is-active containerd")
	is(t, "hello", "ctr task exec --exec-id e2 two echo hello")
	if files := left(t); !slices.Contains(files, "/etc/containerd-pve") || slices.Contains(files, dropIn) {
		t.Errorf("%q", files)
	}
	ok(t, "ctr images pull --plain-http --snapshotter overlayfs "+image+" | tail -1")
	fails(t, 0, "zfs destroy -r "+dataset, "dpkg -P containerd-pve")
	if files := left(t); !slices.Equal(files, []string{"/var/lib/containerd-pve"}) {
		t.Errorf("%q", files)
	}

	// Installed again it takes up what is there.
	ok(t, "dpkg -i made/containerd-pve_1.1_*.deb && containerd-pve install --yes && containerd-pve check")
	is(t, "hello", "ctr task exec --exec-id e3 two echo hello")
	ok(t, killed("two")+"; ctr containers delete two; ctr images rm --sync $(ctr images ls -q)")
	collected(t)
	must(t, os.WriteFile("/etc/containerd-pve/config.toml.d/install.toml", []byte("dataset = \""+dataset+"\"\nlog_level = \"debug\"\n"), 0o644))
	fails(t, 0, "changed since", "containerd-pve uninstall --yes")
	is(t, strings.TrimSpace(admin), "cat "+config)
	ok(t, "zfs list "+dataset) // this installation has found it there
	is(t, "disabled", "systemctl is-enabled containerd-pve")
	fails(t, 0, "Nothing", "containerd-pve uninstall")
	ok(t, "dpkg -P containerd-pve")
	if files := left(t); !slices.Equal(files, []string{"/var/lib/containerd-pve"}) {
		t.Errorf("%q", files)
	}
}

// TestLongInstall17: with Debian's containerd 1.7 and its configuration, and from a
// directory of programs: no package has brought the unit.
func TestLongInstall17(t *testing.T) {
	text, err := os.ReadFile("/opt/containerd-1.7" + config)
	must(t, err)
	ok(t, "dpkg-deb -x made/containerd-pve_1.0_*.deb /tmp/programs")
	host(t, "/opt/containerd-1.7/usr/bin/containerd", string(text))
	ok(t, "/tmp/programs/usr/bin/containerd-pve install --programs /tmp/programs/usr/bin --yes")
	ok(t, "containerd-pve check")
	const ctr = "/opt/containerd-1.7/usr/bin/"
	ok(t, ctr+"ctr images pull --plain-http --snapshotter pve-zfs "+image+" | tail -1")
	is(t, "hello", fmt.Sprintf("%s%s", ctr, strings.Replace(run, " -d", " --rm", 1)+" old echo hello"))
	ok(t, ctr+"ctr images rm --sync "+image)
	collected(t)
	ok(t, "containerd-pve uninstall --yes")
	is(t, strings.TrimSpace(string(text)), "cat "+config)
	fails(t, 1, "does not exist", "zfs list "+dataset)
	if files := left(t); len(files) > 0 && !slices.Equal(files, []string{"/run/containerd-pve", "/var/lib/containerd-pve"}) {
		t.Errorf("%q", files)
	}
}

// TestLongInstallProxmox: on a node of Proxmox (its cluster's filesystem is the
// stand-in) the storage decides, and the daemon may do what it has to: it
// registers, moves and mounts the disk where the host sees it.
func TestLongInstallProxmox(t *testing.T) {
	self, err := os.Hostname()
	must(t, err)
	host(t, "/usr/local/bin/containerd", admin)
	ok(t, "zfs list -H -o name tank/data 2>/dev/null || zfs create tank/data; mkdir -p /etc/pve /var/lib/lxc "+filepath.Dir(pve.Database)+"; touch "+pve.Database)
	unmount, err := pmxcfs.New([]string{self}).Mount(self, "/etc/pve")
	must(t, err)
	t.Cleanup(func() {
		for range 100 {
			if unmount() == nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		must(t, os.Remove(pve.Database))
	})
	ok(t, "dpkg -i made/containerd-pve_1.1_*.deb")
	fails(t, 2, "Datacenter, Storage", "containerd-pve install --yes")
	must(t, os.WriteFile("/etc/pve/storage.cfg", []byte("zfspool: local-zfs\n\tpool tank/data\n\tcontent rootdir,images\n"), 0o640))
	ok(t, "containerd-pve install --yes && containerd-pve check")
	ok(t, "ctr images pull --plain-http --snapshotter pve-zfs "+image+" | tail -1")
	ok(t, run+" node sleep 1000")
	ok(t, "cat /etc/pve/lxc/100.conf")
	is(t, "zfs", "findmnt -n -o FSTYPE /tank/data/subvol-100-disk-0")
	is(t, "made", "ctr task exec --exec-id e1 node sh -c 'echo made | tee /made'")
	is(t, "made", "cat /tank/data/subvol-100-disk-0/made")
	ok(t, "containerd-pve container snapshot s1 node && containerd-pve container diff s1 node")
	ok(t, "dpkg -i made/containerd-pve_1.0_*.deb")
	is(t, "hello", "ctr task exec --exec-id e2 node echo hello")
	ok(t, killed("node")+"; ctr containers delete node; ctr images rm --sync "+image)
	collected(t)
	fails(t, 2, "No such file", "ls /etc/pve/lxc/100.conf")
	fails(t, 1, "does not exist", "zfs list tank/data/subvol-100-disk-0")
	ok(t, "containerd-pve uninstall --yes && dpkg -P containerd-pve")
}
