//go:build bed

package install

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	image   = "localhost:5000/busybox:latest"
	dataset = "tank/containerd-pve"
	config  = "/etc/containerd/config.toml"
	dropIn  = "/etc/containerd/conf.d/containerd-pve.toml"
)

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

// host is one with containerd of systemd's and none of our programs.
func host(t *testing.T, program, text string) {
	t.Helper()
	for _, p := range []string{"containerd-pve", "containerd-shim-pve-v2", "pve-init"} {
		must(t, os.RemoveAll("/usr/local/bin/"+p))
	}
	for _, p := range []string{"/etc/containerd", "/etc/containerd-pve"} {
		must(t, os.RemoveAll(p))
	}
	must(t, os.MkdirAll("/etc/containerd", 0o755))
	must(t, os.WriteFile(config, []byte(text), 0o640))
	// As containerd's own containerd.service and Debian's are.
	must(t, os.WriteFile("/etc/systemd/system/containerd.service", []byte("[Unit]\nAfter=local-fs.target\n[Service]\nExecStart="+program+"\nType=notify\nDelegate=yes\nKillMode=process\nRestart=always\nRestartSec=5\nLimitNOFILE=infinity\nTasksMax=infinity\nOOMScoreAdjust=-999\n[Install]\nWantedBy=multi-user.target\n"), 0o644))
	ok(t, "bed-registry; systemctl daemon-reload; systemctl restart containerd")
}

// left are the files of ours.
func left(t *testing.T) []string {
	t.Helper()
	out := ok(t, `find /etc /usr /run /var /opt -xdev -path /var/log -prune -o -path /var/lib/containerd -prune -o -path /var/lib/dpkg -prune -o \( -name '*containerd-pve*' -o -name '*pve-init*' -o -name '*pve-v2*' \) -print | sort`)
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

const run = "ctr run -d --runtime io.containerd.pve.v2 --snapshotter pve-zfs " + image

// TestInstall: the package's life on a host with containerd 2.4.
func TestInstall(t *testing.T) {
	const admin = "# an administrator's\nversion = 3\ndisabled_plugins = [\"io.containerd.cri.v1.runtime\", \"io.containerd.cri.v1.images\", \"io.containerd.grpc.v1.cri\", \"io.containerd.nri.v1.nri\"]\n"
	host(t, "/usr/local/bin/containerd", admin)
	ok(t, "dpkg -i made/containerd-pve_1.0_*.deb")
	is(t, "disabled", "systemctl is-enabled containerd-pve")
	is(t, "inactive", "systemctl is-active containerd-pve")
	is(t, "", "systemd-analyze verify /usr/lib/systemd/system/containerd-pve.service 2>&1 | grep containerd-pve")
	fails(t, 1, "containerd-pve install", "containerd-pve check")

	// Nothing is changed unless somebody says so, and where something is in the way.
	before := ok(t, "find /etc /var/lib/containerd-pve -type f 2>/dev/null | xargs md5sum")
	fails(t, 0, dropIn, "containerd-pve install --dry-run")
	fails(t, 0, `"action": "restart"`, "containerd-pve install --dry-run --format json")
	fails(t, 3, "--yes", "containerd-pve install </dev/null")
	fails(t, 3, "Go on?", "echo n | script -qec 'containerd-pve install' /dev/null")
	fails(t, 2, "tank", "containerd-pve install --yes --dataset other/x")
	is(t, before, "find /etc /var/lib/containerd-pve -type f 2>/dev/null | xargs md5sum")
	must(t, os.MkdirAll(filepath.Dir(dropIn), 0o755))
	must(t, os.WriteFile(dropIn, []byte("# mine\n"), 0o644))
	fails(t, 2, dropIn, "containerd-pve install --yes")
	must(t, os.RemoveAll(filepath.Dir(dropIn)))

	// A step that fails: all is as before.
	must(t, os.MkdirAll("/etc/systemd/system/containerd.service.d", 0o755))
	must(t, os.WriteFile("/etc/systemd/system/containerd.service.d/fail.conf", []byte("[Service]\nExecStartPre=/usr/bin/test ! -e "+dropIn+"\n"), 0o644))
	fails(t, 1, "is undone", "systemctl daemon-reload; containerd-pve install --yes")
	must(t, os.RemoveAll("/etc/systemd/system/containerd.service.d"))
	is(t, before, "systemctl daemon-reload; find /etc /var/lib/containerd-pve -type f 2>/dev/null | grep -v snapshotter/ | xargs md5sum")
	is(t, "active inactive", "echo $(systemctl is-active containerd containerd-pve)")
	fails(t, 1, "does not exist", "zfs list "+dataset)

	ok(t, "containerd-pve install --yes")
	ok(t, "containerd-pve check")
	fails(t, 0, "set up already", "containerd-pve install")
	is(t, "enabled active active", "echo $(systemctl is-enabled containerd-pve; systemctl is-active containerd-pve containerd)")
	ok(t, "systemd-analyze security containerd-pve --no-pager | tail -1")
	ok(t, "ctr images pull --plain-http --snapshotter pve-zfs "+image)
	for _, id := range []string{"one", "two"} {
		ok(t, run+" "+id+" sh -c 'trap \"exit 7\" TERM; while :; do sleep 0.1; done'")
	}

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
	ok(t, "ctr task kill one; for i in $(seq 100); do ctr task ls | grep -q 'one .*STOPPED' && break; sleep 0.1; done")
	fails(t, 7, "", "ctr task delete one")
	ok(t, "ctr task kill -s KILL three; sleep 1; ctr task delete three; ctr containers delete one three")

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
	ok(t, "ctr images pull --plain-http --snapshotter overlayfs localhost:5000/debian:13 | tail -1")
	fails(t, 0, "zfs destroy -r "+dataset, "dpkg -P containerd-pve")
	if files := left(t); !slices.Equal(files, []string{"/var/lib/containerd-pve"}) {
		t.Errorf("%q", files)
	}

	// Installed again it takes up what is there.
	ok(t, "dpkg -i made/containerd-pve_1.1_*.deb && containerd-pve install --yes && containerd-pve check")
	is(t, "hello", "ctr task exec --exec-id e3 two echo hello")
	ok(t, "ctr task kill -s KILL two; sleep 1; ctr task delete two; ctr containers delete two; ctr images rm --sync $(ctr images ls -q)")
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Second) { // containerd collects
		if out, code := try(t, "containerd-pve uninstall --dry-run"); code == 0 || time.Now().After(end) {
			if !strings.Contains(out, "destroy") {
				t.Errorf("%s", out)
			}
			break
		}
	}
	must(t, os.WriteFile("/etc/containerd-pve/config.toml.d/install.toml", []byte("dataset = \""+dataset+"\"\nlog_level = \"debug\"\n"), 0o644))
	fails(t, 0, "changed since", "containerd-pve uninstall --yes")
	is(t, strings.TrimSpace(admin), "cat "+config)
	fails(t, 1, "does not exist", "zfs list "+dataset)
	is(t, "disabled", "systemctl is-enabled containerd-pve")
	fails(t, 0, "Nothing", "containerd-pve uninstall")
	ok(t, "dpkg -P containerd-pve")
	if files := left(t); len(files) > 0 && !slices.Equal(files, []string{"/var/lib/containerd-pve"}) {
		t.Errorf("%q", files)
	}
	ok(t, "find /var/lib/containerd-pve /etc/containerd -ls 2>&1 || :")
}

// TestInstall17: with Debian's containerd 1.7 and its configuration, and from a
// directory of programs: no package has brought the unit.
func TestInstall17(t *testing.T) {
	text, err := os.ReadFile("/opt/containerd-1.7" + config)
	must(t, err)
	ok(t, "systemctl stop containerd; rm -rf /var/lib/containerd /var/lib/containerd-pve; dpkg-deb -x made/containerd-pve_1.0_*.deb /tmp/programs")
	host(t, "/opt/containerd-1.7/usr/bin/containerd", string(text))
	ok(t, "install /tmp/programs/usr/bin/* /usr/local/bin/")
	ok(t, "containerd-pve install --yes")
	ok(t, "containerd-pve check")
	const ctr = "/opt/containerd-1.7/usr/bin/"
	ok(t, ctr+"ctr images pull --plain-http --snapshotter pve-zfs "+image)
	is(t, "hello", fmt.Sprintf("%s%s", ctr, strings.Replace(run, " -d", " --rm", 1)+" old echo hello"))
	ok(t, "containerd-pve uninstall --yes --force")
	is(t, strings.TrimSpace(string(text)), "cat "+config)
	if files := left(t); slices.Contains(files, "/etc/systemd/system/containerd-pve.service") || slices.Contains(files, dropIn) {
		t.Errorf("%q", files)
	}
}
