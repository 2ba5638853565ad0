//go:build bed

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	shimoptions "github.com/containerd-pve/containerd-pve/shim/options"
)

// programs are those that were executed since, as the kernel traces them.
func programs(t *testing.T) (executed func() []string) {
	t.Helper()
	const root = "/sys/kernel/tracing"
	if _, err := os.Stat(root + "/instances"); err != nil {
		must(t, (&mount.Mount{Type: "tracefs", Source: "tracefs"}).Mount(root))
		t.Cleanup(func() { _ = mount.Unmount(root, 0) })
	}
	dir := fmt.Sprintf("%s/instances/programs-%d", root, os.Getpid())
	must(t, os.Mkdir(dir, 0o700))
	t.Cleanup(func() { _ = os.Remove(dir) })
	must(t, os.WriteFile(dir+"/events/sched/sched_process_exec/enable", []byte("1"), 0o600))
	filename := regexp.MustCompile(`sched_process_exec: filename=(\S+)`)
	return func() []string {
		text, err := os.ReadFile(dir + "/trace")
		must(t, err)
		must(t, os.WriteFile(dir+"/trace", nil, 0o600)) // opening it so empties it
		var names []string
		for _, m := range filename.FindAllStringSubmatch(string(text), -1) {
			names = append(names, m[1])
		}
		return names
	}
}

// TestProxmoxCost: what a container's life costs: its conf is written once when it is created, which is a file made, written and
// renamed, and removed once; and no program but ours, LXC's and the container's.
func TestProxmoxCost(t *testing.T) {
	n := proxmox(t)
	executed := programs(t)
	var b *box
	task := func() { // without the output's FIFOs, of which containerd's client makes files
		var err error
		b.task, err = b.container.NewTask(b.ctx, cio.NullIO)
		must(t, err)
	}
	end := func() {
		must(t, b.task.Kill(b.ctx, syscall.SIGKILL))
		if _, err := b.task.Delete(b.ctx, client.WithProcessKill); err != nil {
			t.Error(err)
		}
		b.task = nil
	}
	for _, step := range []struct {
		name     string
		messages int // to the nodes of the cluster
		do       func()
	}{
		{"create", 3, func() {
			var err error
			b, err = create(t, options{id: "cost", args: []string{"sleep", "1000"}, edit: limitMemory(64 << 20)})
			must(t, err)
		}},
		{"start", 0, func() { must(t, b.task.Start(b.ctx)) }},
		{"exec", 0, func() {
			if _, code, err := b.execIn([]string{"true"}, nil); err != nil || code != 0 {
				t.Errorf("exec: %d, %v", code, err)
			}
		}},
		{"pause and resume", 0, func() { must(t, b.task.Pause(b.ctx)); must(t, b.task.Resume(b.ctx)) }},
		{"stats", 0, func() { _, err := b.task.Metrics(b.ctx); must(t, err) }},
		{"update of what Proxmox does not show", 0, func() {
			pids := int64(100)
			must(t, b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &pids}})))
		}},
		{"stop", 0, end},
		{"the next task", 0, func() { task(); must(t, b.task.Start(b.ctx)); end() }},
		{"removal", 1, func() {
			b.remove()
			eventually(t, time.Minute, "the conf is gone", func() bool { return noConf(100) })
		}},
	} {
		before := n.Messages()
		step.do()
		if got := n.Messages() - before; got != step.messages {
			t.Errorf("%s: %d messages of the cluster's filesystem, not %d", step.name, got, step.messages)
		}
	}
	names := executed()
	slices.Sort(names)
	names = slices.Compact(names)
	// A descriptor is pve-init's; liblxc gives its hooks, which are pve-init and test(1), to a shell.
	want := []string{"/bin/sh", "/proc/self/fd/4", "/usr/bin/lxc-start", "/usr/bin/sleep", "/usr/bin/test", "/usr/bin/true", "/usr/local/bin/containerd-shim-pve-v2"}
	if !slices.Equal(names, want) {
		t.Errorf("programs %v, not %v", names, want)
	}
}

// policy is what happens to containers that Proxmox cannot be told of, until the test ends.
func policy(t *testing.T, p shimoptions.Policy) {
	t.Helper()
	must(t, os.WriteFile(shimoptions.File, []byte("Register = '"+string(p)+"'\n"), 0o600))
	t.Cleanup(func() { _ = os.Remove(shimoptions.File) })
}

// TestProxmoxDown: the cluster's filesystem is stuck, or down, and back.
func TestProxmoxDown(t *testing.T) {
	n := proxmox(t)
	self, err := os.Hostname()
	must(t, err)
	refused := func(id, says string) {
		t.Helper()
		began := time.Now()
		b, err := create(t, options{id: id, args: []string{"true"}})
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", id, err)
		}
		t.Logf("after %s: %v", time.Since(began).Round(time.Second), err)
		b.remove()
	}
	b := start(t, options{id: "before", args: []string{"sleep", "1000"}})

	resume := n.Stall()
	refused("stuck", "did not answer in time")
	policy(t, shimoptions.BestEffort)
	if out, _, code := run(t, options{id: "goes-on", args: []string{"echo", "here"}}); code != 0 || out != "here\n" {
		t.Errorf("best effort: %d, %q", code, out)
	}
	resume()
	must(t, os.Remove(shimoptions.File))
	eventually(t, time.Minute, "what came too late is taken back", func() bool { return !noConf(100) && noConf(101) && noConf(102) })

	n.down(t)
	refused("down", "systemctl status pve-cluster")
	// Its exec and the rest do not need it, nor does the daemon to start.
	if out, code, err := b.execIn([]string{"echo", "alive"}, nil); err != nil || code != 0 || out != "alive\n" {
		t.Errorf("exec: %q, %d, %v", out, code, err)
	}
	restartDaemon(t)
	refused("down-2", "systemctl status pve-cluster")
	list, code := command("containerd-pve", "container", "ls")
	if code != 0 || !regexp.MustCompile(`(?m)^100 +default +before `).MatchString(list) || !strings.Contains(list, "pve-cluster") {
		t.Errorf("containers: %s", list)
	}
	b.remove() // its conf stays until it can be removed
	n.up(t, self)
	// The next one may have the number already.
	o := start(t, options{id: "after", args: []string{"sleep", "1000"}})
	eventually(t, 3*time.Minute, "the conf of the one that was removed meanwhile is gone", func() bool {
		list, code := command("containerd-pve", "container", "ls")
		return code == 0 && strings.Contains(list, " after ") && !strings.Contains(list, " before ") && (noConf(100) || noConf(101))
	})
	o.remove()
	eventually(t, time.Minute, "the conf is gone", func() bool { return noConf(100) && noConf(101) })
}

// TestProxmoxBehind: what somebody does to conf and disk behind containerd's back.
func TestProxmoxBehind(t *testing.T) {
	n := proxmox(t)
	const conf = "/etc/pve/lxc/100.conf"
	volume := volumes() + "/subvol-100-disk-0"
	b := start(t, options{id: "web", args: []string{"sleep", "1000"}})
	text := confOf(t, 100)

	// Edited, then removed: it is written again as it was.
	edited := "#a note\n" + text + "onboot: 1\n"
	must(t, os.WriteFile(conf, []byte(edited), 0o640))
	memory := int64(128 << 20)
	must(t, b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory, Swap: &memory}})))
	if got := confOf(t, 100); !strings.HasPrefix(got, "#a note\n") || !strings.Contains(got, "\nonboot: 1\n") || !strings.Contains(got, "\nmemory: 128\n") {
		t.Errorf("after the update:\n%s", got)
	}
	edited = confOf(t, 100)
	must(t, os.Remove(conf))
	eventually(t, 3*time.Minute, "the conf is written again", func() bool { return !noConf(100) })
	if got := confOf(t, 100); got != edited {
		t.Errorf("it is not as it was:\n%s", got)
	}

	// The power fails.
	pids, err := b.task.Pids(b.ctx)
	must(t, err)
	for _, p := range append(shims(t, "web"), pids[0].Pid) {
		must(t, syscall.Kill(int(p), syscall.SIGKILL))
	}
	eventually(t, time.Minute, "containerd sees that the task is gone", func() bool {
		_, err := b.container.Task(b.ctx, nil)
		return errdefs.IsNotFound(err)
	})
	// The node gets another name.
	self, err := os.Hostname()
	must(t, err)
	n.down(t)
	n.Leave(self)
	n.up(t, "renamed")
	restartDaemon(t)
	eventually(t, time.Minute, "containerd has cleared up after the shim", func() bool {
		b.task, err = b.container.NewTask(b.ctx, cio.NullIO)
		return !errdefs.IsAlreadyExists(err) && (err == nil || !strings.Contains(err.Error(), "file exists"))
	})
	must(t, err)
	must(t, b.task.Start(b.ctx))
	if noConf(100) || !noConf(101) {
		t.Error("it has another VMID")
	}
	if got := confOf(t, 100); !strings.HasPrefix(got, "#a note\n") {
		t.Errorf("the conf:\n%s", got)
	}
	if _, err := b.task.Delete(b.ctx, client.WithProcessKill); err != nil {
		t.Fatal(err)
	}
	b.task = nil

	// A job of Proxmox's has it.
	must(t, os.WriteFile(conf, []byte(confOf(t, 100)+"lock: rollback\n"), 0o640))
	if _, err = b.container.NewTask(b.ctx, cio.NullIO); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pct unlock 100") {
		t.Errorf("locked: %v", err)
	}
	t.Log(err)
	must(t, os.WriteFile(conf, []byte(strings.ReplaceAll(confOf(t, 100), "lock: rollback\n", "")), 0o640))

	// pct destroy.
	if out, code := command("zfs", "destroy", "-r", volume); code != 0 {
		t.Fatal(out)
	}
	must(t, os.Remove(conf))
	_, err = b.container.NewTask(b.ctx, cio.NullIO)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "remove the container") {
		t.Errorf("without its disk: %v", err)
	}
	b.remove()
	eventually(t, time.Minute, "nothing is left", func() bool {
		records, err := os.ReadDir("/var/lib/containerd-pve/proxmox")
		return err == nil && len(records) == 0 && noConf(100)
	})

	// A container with a snapshot of Proxmox's is removed.
	o := start(t, options{id: "snap", args: []string{"sleep", "1000"}})
	if out, code := command("zfs", "snapshot", volume+"@before"); code != 0 {
		t.Fatal(out)
	}
	must(t, os.WriteFile(conf, []byte(confOf(t, 100)+"\n[before]\nmemory: 64\n"), 0o640))
	o.remove()
	eventually(t, time.Minute, "the volume is gone with its snapshot", func() bool {
		collect(t)
		_, code := command("zfs", "list", volume)
		return code != 0 && noConf(100)
	})
	// One that is not in the conf is somebody else's, and holds the volume.
	o = start(t, options{id: "snap2", args: []string{"sleep", "1000"}})
	if out, code := command("zfs", "snapshot", volume+"@mine"); code != 0 {
		t.Fatal(out)
	}
	o.remove()
	eventually(t, time.Minute, "the conf is gone", func() bool { return noConf(100) })
	collect(t)
	if out, code := command("zfs", "list", volume+"@mine"); code != 0 {
		t.Errorf("somebody's snapshot was destroyed: %s", out)
	}
	if out, code := command("zfs", "destroy", volume+"@mine"); code != 0 {
		t.Error(out)
	}
	// It was asked for once; it is tried again when another snapshot is removed.
	served(t)
	eventually(t, time.Minute, "the volume is gone", func() bool {
		collect(t)
		_, code := command("zfs", "list", volume)
		return code != 0
	})

	// pct destroy and pct restore of its backup: conf and volume have the names of ours.
	o = start(t, options{id: "restored", args: []string{"sleep", "1000"}})
	text = confOf(t, 100)
	if _, err := o.task.Delete(o.ctx, client.WithProcessKill); err != nil {
		t.Fatal(err)
	}
	o.task = nil
	for _, args := range [][]string{{"destroy", "-r", volume}, {"create", volume}} {
		if out, code := command(append([]string{"zfs"}, args...)...); code != 0 {
			t.Fatal(out)
		}
	}
	must(t, os.WriteFile(conf, []byte(text), 0o640))
	o.remove()
	eventually(t, time.Minute, "its record is gone", func() bool {
		records, err := os.ReadDir("/var/lib/containerd-pve/proxmox")
		return err == nil && len(records) == 0
	})
	collect(t)
	if out, code := command("zfs", "list", volume); code != 0 || noConf(100) {
		t.Errorf("what was restored is gone with the container: %s", out)
	}
	must(t, os.Remove(conf))
	if out, code := command("zfs", "destroy", volume); code != 0 {
		t.Error(out)
	}
}

// shims are the processes of a container's shim and of its lxc-start.
func shims(t *testing.T, id string) []uint32 {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	must(t, err)
	var pids []uint32
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		var pid uint32
		if _, scan := fmt.Sscan(e.Name(), &pid); err != nil || scan != nil {
			continue
		}
		argv := strings.Split(string(text), "\x00")
		program := filepath.Base(argv[0])
		if program == "containerd-shim-pve-v2" && slices.Contains(argv, id) || program == "lxc-start" {
			pids = append(pids, pid)
		}
	}
	if len(pids) < 2 {
		t.Fatalf("shim and lxc-start: %v", pids)
	}
	return pids
}
