//go:build bed

package integration

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// templates is the dataset that has a plain host's.
func templates() string { return pool() + "/containerd-pve-templates" }

// lxcCopy clones a template by LXC's own tool; it is destroyed by that too.
func lxcCopy(t *testing.T, made templateOf, name string) {
	t.Helper()
	if out, code := command("lxc-copy", "-n", strconv.Itoa(made.VMID), "-N", name, "-s"); code != 0 {
		t.Fatalf("lxc-copy: %s", out)
	}
	t.Cleanup(func() { command("lxc-destroy", "-f", "-n", name) })
	// Debian's defaults without their network: the bed has no bridge of LXC's.
	config := "/var/lib/lxc/" + name + "/config"
	text, err := os.ReadFile(config)
	must(t, err)
	var lines []string
	for line := range strings.Lines(string(text)) {
		if !strings.Contains(line, "/etc/lxc/default.conf") {
			lines = append(lines, line)
			continue
		}
		defaults, err := os.ReadFile("/etc/lxc/default.conf")
		must(t, err)
		for line := range strings.Lines(string(defaults)) {
			if !strings.HasPrefix(line, "lxc.net.") {
				lines = append(lines, line)
			}
		}
	}
	must(t, os.WriteFile(config, []byte(strings.Join(append(lines, "lxc.net.0.type = empty\nlxc.console.logfile = /tmp/console-"+name+"\n"), "")), 0o640))
}

// lxcStart gives the pid of its init.
func lxcStart(t *testing.T, name string) int {
	t.Helper()
	if out, code := command("lxc-start", "-n", name, "-l", "debug", "-o", "/tmp/log-"+name); code != 0 {
		log, _ := os.ReadFile("/tmp/log-" + name)
		t.Fatalf("lxc-start: %s\n%s", out, log)
	}
	out, _ := command("lxc-info", "-n", name, "-p", "-H")
	pid, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		console, _ := os.ReadFile("/tmp/console-" + name)
		t.Fatalf("it has ended: %s", console)
	}
	return pid
}

// TestTemplatePlain: without Proxmox a template is cloned, started and destroyed by LXC's tools.
func TestTemplatePlain(t *testing.T) {
	t.Cleanup(func() {
		if out, code := command("zfs", "destroy", templates()); code != 0 {
			t.Errorf("datasets are left: %s", out)
		}
	})
	layers := func() string { return strings.Join(datasetsBelow(pool()+"/containerd-pve"), "\n") }
	made := makeTemplate(t, nginx, "--memory", "256M")
	if made.VMID != 100 || made.Dataset != templates()+"/basevol-100-disk-0" || made.Used > 1<<20 {
		t.Errorf("%+v", made)
	}
	before := layers()
	if out := templateRun(t, 0, "create", nginx); !strings.Contains(out, "already") {
		t.Errorf("again: %s", out)
	}
	lxcCopy(t, made, "web")
	pid := lxcStart(t, "web")
	eventually(t, time.Minute, "nginx runs", func() bool {
		return strings.HasPrefix(procList(t, pid, "cmdline")[0], "nginx: master process nginx -g daemon off;")
	})
	// The template is not for starting, and LXC's own destruction would take the image's layer with it.
	for _, args := range [][]string{{"lxc-start", "-n", "100"}, {"lxc-destroy", "-n", "100"}, {"lxc-destroy", "-n", "100", "-s"}} {
		if out, code := command(args...); code == 0 {
			t.Errorf("%v: %s", args, out)
		}
	}
	if out := templateRun(t, 1, "rm", "100"); !strings.Contains(out, templates()+"/web") {
		t.Errorf("one that is in use: %s", out)
	}
	if out := templateRun(t, 0, "validate", "100"); strings.Contains(out, "FAIL") {
		t.Error(out)
	}
	t.Log(templateRun(t, 0, "ls"))
	if out, code := command("lxc-stop", "-n", "web", "-t", "60", "--nokill"); code != 0 {
		t.Errorf("the stop signal: %d, %s", code, out)
	}
	if out, code := command("lxc-destroy", "-n", "web"); code != 0 {
		t.Errorf("lxc-destroy: %s", out)
	}
	templateRun(t, 0, "rm", "100")
	if after := layers(); after != before {
		t.Errorf("the layers:\n%s\nnot\n%s", after, before)
	}
	for _, refused := range [][]string{{"create", nginx, "--net", "name=eth0,bridge=vmbr0"}, {"rm", "100"}, {"inspect", "100"}} {
		t.Log(refused, templateRun(t, 1, refused...))
	}
}

// TestTemplateScratch: an image of one static program boots, as root and as a user that
// no file of the image knows.
func TestTemplateScratch(t *testing.T) {
	const pause = "localhost:5000/pause:3.10.2"
	if out, code := command("ctr", "images", "pull", "--plain-http", "--snapshotter", zfs, pause); code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() { command("zfs", "destroy", templates()) })
	made := makeTemplate(t, pause)
	lxcCopy(t, made, "alone")
	pid := lxcStart(t, "alone")
	t.Log(procList(t, pid, "cmdline"))
	time.Sleep(time.Second)
	if out, _ := command("lxc-info", "-n", "alone", "-s", "-H"); strings.TrimSpace(out) != "RUNNING" {
		t.Errorf("it is %s", out)
	}
}

// TestTemplateSystemd: an image that holds a whole system boots it, and is shut down by
// the signal that the image names.
func TestTemplateSystemd(t *testing.T) {
	const image = "localhost:5000/debian:systemd"
	t.Cleanup(func() { command("zfs", "destroy", templates()) })
	made := makeTemplate(t, image, "--pull", "--plain-http", "--memory", "1G")
	t.Cleanup(func() { command("ctr", "images", "rm", image) })
	lxcCopy(t, made, "sys")
	pid := lxcStart(t, "sys")
	if got := procList(t, pid, "cmdline")[0]; got != "/sbin/init" {
		t.Errorf("its init is %q", got)
	}
	inside := func(args ...string) string {
		out, _ := command(append([]string{"lxc-attach", "-n", "sys", "--"}, args...)...)
		return strings.TrimSpace(out)
	}
	eventually(t, 5*time.Minute, "the system is up", func() bool {
		return slices.Contains([]string{"running", "degraded"}, inside("systemctl", "is-system-running"))
	})
	t.Log(inside("systemctl", "--failed", "--no-legend"), inside("cat", "/proc/sys/kernel/hostname"))
	if out := inside("systemctl", "is-active", "multi-user.target", "systemd-journald"); out != "active\nactive" {
		t.Errorf("what systemd runs is %q", out)
	}
	if out, code := command("lxc-stop", "-n", "sys", "-t", "120", "--nokill"); code != 0 {
		t.Errorf("the shutdown: %d, %s", code, out)
	}
}
