//go:build bed

package integration

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd-pve/containerd-pve/integration/pmxcfs"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
	shimoptions "github.com/containerd-pve/containerd-pve/shim/options"
)

// In these tests the machine is a node of Proxmox, as far as its cluster filesystem goes (package pmxcfs). What Proxmox's own
// tools make of it is in docs/proxmox.md.

const lxcPath = "/var/lib/lxc"

// volumes is the storage's dataset.
func volumes() string { return pool() + "/data" }

// restartDaemon has the daemon look at the machine again.
func restartDaemon(t *testing.T) {
	t.Helper()
	pid, err := os.ReadFile("/run/stack/containerd-pve.pid")
	must(t, err)
	if out, code := command("kill", strings.Fields(string(pid))[0]); code != 0 {
		t.Fatal(out)
	}
	eventually(t, time.Minute, "the daemon has ended", func() bool {
		out, _ := command("stack", "status")
		return strings.Contains(out, "containerd-pve down")
	})
	if out, code := command("stack", "up"); code != 0 {
		t.Fatal(out)
	}
	served(t)
}

// served waits until containerd has found the daemon again.
func served(t *testing.T) {
	t.Helper()
	eventually(t, time.Minute, "containerd has found the daemon again", func() bool {
		_, code := command("ctr", "snapshots", "--snapshotter", zfs, "prepare", "probe")
		return code == 0
	})
	if out, code := command("ctr", "snapshots", "--snapshotter", zfs, "rm", "probe"); code != 0 {
		t.Fatal(out)
	}
}

// pveNode is the machine as a node of Proxmox.
type pveNode struct {
	*pmxcfs.Cluster
	unmount func() error // nil while the cluster's filesystem is down
}

func (n *pveNode) up(t *testing.T, name string) {
	t.Helper()
	unmount, err := n.Mount(name, "/etc/pve")
	must(t, err)
	n.unmount = unmount
}

func (n *pveNode) down(t *testing.T) {
	t.Helper()
	if n.unmount == nil {
		return
	}
	eventually(t, time.Minute, "nobody has a file of /etc/pve open", func() bool { return n.unmount() == nil })
	n.unmount = nil
}

// proxmox makes the machine a node of Proxmox until the test ends.
func proxmox(t *testing.T) *pveNode {
	t.Helper()
	self, err := os.Hostname()
	must(t, err)
	for _, dir := range []string{"/etc/pve", lxcPath, filepath.Dir(pve.Database)} {
		must(t, os.MkdirAll(dir, 0o755))
	}
	// A real node's is not to be touched: with TESTBED=host another directory is there.
	db, err := os.OpenFile(pve.Database, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	must(t, db.Close())
	n := &pveNode{Cluster: pmxcfs.New([]string{self, "other"})}
	n.up(t, self)
	if out, code := command("zfs", "create", "-p", volumes()); code != 0 {
		t.Fatal(out)
	}
	must(t, os.WriteFile("/etc/pve/storage.cfg", []byte("dir: local\n\tpath /var/lib/vz\n\tcontent iso\n\nzfspool: local-zfs\n\tpool "+volumes()+"\n\tcontent rootdir,images\n"), 0o640))
	t.Cleanup(func() {
		collect(t)
		if out, code := command("zfs", "list", "-H", "-o", "name", "-r", volumes()); code != 0 || out != volumes()+"\n" {
			t.Errorf("volumes are left: %s", out)
		}
		n.down(t)
		must(t, os.Remove(pve.Database))
		restartDaemon(t)
		command("zfs", "destroy", volumes())
	})
	restartDaemon(t)
	return n
}

func confOf(t *testing.T, vmid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/etc/pve/lxc/%d.conf", vmid))
	must(t, err)
	return string(text)
}

func noConf(vmid int) bool {
	_, err := os.Stat(fmt.Sprintf("/etc/pve/lxc/%d.conf", vmid))
	return os.IsNotExist(err)
}

func limitMemory(n int64) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &n, Swap: &n} }
}

// TestProxmoxLife: a container is one of Proxmox's from its first task to its removal.
func TestProxmoxLife(t *testing.T) {
	proxmox(t)
	b := start(t, options{id: "web_1", args: []string{"sleep", "1000"}, edit: limitMemory(64 << 20)})
	conf := confOf(t, 100)
	for _, want := range []string{
		`(?m)^arch: amd64$`, `(?m)^ostype: unmanaged$`, `(?m)^memory: 64$`, `(?m)^swap: 0$`, `(?m)^hostname: web-1-[0-9a-f]{8}$`, `(?m)^tags: containerd;ns-default$`,
		`(?m)^rootfs: local-zfs:subvol-100-disk-0,size=[1-9][0-9]*G$`, `(?m)^entrypoint: sleep 1000$`, `(?m)^lxc\.environment\.runtime: PATH=`,
		`#container%3A default/web_1`, `#image%3A localhost%3A5000/debian%3A13`, `#digest%3A sha256%3A`,
	} {
		if !regexp.MustCompile(want).MatchString(conf) {
			t.Errorf("the conf lacks %s:\n%s", want, conf)
		}
	}
	// Where Proxmox looks whether it runs, and for its figures.
	sockets, err := os.ReadFile("/proc/net/unix")
	must(t, err)
	if !strings.Contains(string(sockets), "@"+lxcPath+"/100/command") {
		t.Error("no command socket of that name")
	}
	if out, code := command("lxc-info", "-P", lxcPath, "-n", "100", "-s", "-p"); code != 0 || !strings.Contains(out, "RUNNING") || !strings.Contains(out, fmt.Sprint(b.task.Pid())) {
		t.Errorf("lxc-info: %s", out)
	}
	for _, file := range []string{"memory.current", "memory.swap.current", "memory.max", "cpu.stat", "pids.current", "io.stat"} {
		if out, code := command("lxc-cgroup", "-P", lxcPath, "-n", "100", file); code != 0 {
			t.Errorf("%s: %s", file, out)
		}
	}
	volume := volumes() + "/subvol-100-disk-0"
	out, code := command("zfs", "get", "-Hp", "-o", "value", "refquota,mountpoint", volume)
	parent, _ := command("zfs", "get", "-H", "-o", "value", "mountpoint", volumes())
	if f := strings.Fields(out); code != 0 || len(f) != 2 || f[0] == "0" || f[1] != strings.TrimSpace(parent)+"/subvol-100-disk-0" {
		t.Errorf("the volume: %s", out)
	}
	dir := strings.TrimSpace(parent) + "/subvol-100-disk-0"
	if _, err := os.Stat(dir + "/etc/passwd"); err != nil {
		t.Errorf("Proxmox's tools do not see its files: %v", err)
	}
	if out, _, err := b.execIn(sh("findmnt -no SOURCE / || grep ' / ' /proc/mounts; echo kept >/kept"), nil); err != nil || !strings.Contains(out, volume) {
		t.Errorf("the root is %s, %v", out, err)
	}
	list, code := command("containerd-pve", "snapshots")
	if code != 0 || !strings.Contains(list, volume) || !strings.Contains(list, "web_1") {
		t.Errorf("snapshots: %s", list)
	}
	list, code = command("containerd-pve", "container", "ls")
	if code != 0 || !regexp.MustCompile(`(?m)^100 +default +web_1 +- +running +\S+B +\S+B +localhost:5000/debian:13$`).MatchString(list) {
		t.Errorf("containers: %s", list)
	}

	list, _ = command("containerd-pve", "check") // it may lack what is none of Proxmox's
	for _, want := range []string{`ok +proxmox +node `, `ok +quorum `, `ok +storage +local-zfs, ` + volumes(), `ok +vmids +100 to 999999, 1 of them taken`, `ok +memory `, `ok +subids `, `ok +register `} {
		if !regexp.MustCompile(`(?m)^` + want).MatchString(list) {
			t.Errorf("check lacks %s:\n%s", want, list)
		}
	}

	memory := int64(128 << 20)
	must(t, b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory, Swap: &memory}})))
	if conf := confOf(t, 100); !strings.Contains(conf, "\nmemory: 128\n") {
		t.Errorf("after the update:\n%s", conf)
	}

	// pct set: more than the spec gave.
	if out, code := command("lxc-cgroup", "-P", lxcPath, "-n", "100", "memory.max", fmt.Sprint(256<<20)); code != 0 {
		t.Error(out)
	}
	if got, err := os.ReadFile("/sys/fs/cgroup/default/web_1/memory.max"); err != nil || string(got) != "max\n" {
		t.Errorf("the limit above it is %q, %v", got, err)
	}
	limits := func(what, memory, cpu string) {
		t.Helper()
		for file, want := range map[string]string{"memory.max": memory, "cpu.max": cpu} {
			if got, err := os.ReadFile("/sys/fs/cgroup/default/web_1/payload/" + file); err != nil || strings.TrimSpace(string(got)) != want {
				t.Errorf("%s: %s is %q, not %s, %v", what, file, got, want, err)
			}
		}
	}
	limits("pct set", fmt.Sprint(256<<20), "max 100000")
	text := confOf(t, 100)
	must(t, os.WriteFile("/etc/pve/lxc/100.conf", []byte(strings.Replace(text, "\nmemory: 128\n", "\nmemory: 256\ncores: 1\n", 1)), 0o640))

	// pct exec, pct suspend and resume.
	if out, code := command("lxc-attach", "-P", lxcPath, "-n", "100", "--clear-env", "--", "/bin/cat", "/kept"); code != 0 || out != "kept\n" {
		t.Errorf("lxc-attach: %d, %s", code, out)
	}
	for _, verb := range []struct {
		program, state string
		status         client.ProcessStatus
	}{{"lxc-freeze", "FROZEN", client.Paused}, {"lxc-unfreeze", "RUNNING", client.Running}} {
		out, code := command(verb.program, "-P", lxcPath, "-n", "100")
		state, _ := command("lxc-info", "-P", lxcPath, "-n", "100", "-s")
		if code != 0 || !strings.Contains(state, verb.state) {
			t.Errorf("%s: %s, %s", verb.program, out, state)
		}
		if st, err := b.task.Status(b.ctx); err != nil || st.Status != verb.status {
			t.Errorf("%s: containerd says %v, %v", verb.program, st, err)
		}
	}

	// pct stop.
	if out, code := command("lxc-stop", "-P", lxcPath, "-n", "100", "--kill"); code != 0 {
		t.Fatal(out)
	}
	if code := b.ended(time.Minute); code != 137 {
		t.Errorf("exit code %d", code)
	}
	_, err = b.task.Delete(b.ctx)
	must(t, err)
	b.task = nil
	if noConf(100) {
		t.Error("the conf went with the task")
	}
	// What its conf has LXC run before a start by the GUI.
	if out, code := command("env", "LXC_NAME=100", "containerd-pve", "guard", "default", "web_1", "100", "100", "lxc", "pre-start"); code == 0 || !strings.Contains(out, "start web_1") {
		t.Errorf("the guard: %d, %s", code, out)
	}

	// The next task has the same VMID, and its data.
	task, err := b.container.NewTask(b.ctx, cio.NullIO)
	must(t, err)
	b.task = task
	must(t, task.Start(b.ctx))
	if out, _, err := b.execIn([]string{"cat", "/kept"}, nil); err != nil || out != "kept\n" {
		t.Errorf("the data: %q, %v", out, err)
	}
	if noConf(100) || !noConf(101) {
		t.Error("it has another VMID")
	}
	limits("the next task", fmt.Sprint(256<<20), "100000 100000")
	if conf := confOf(t, 100); !strings.Contains(conf, "\nmemory: 256\n") || !strings.Contains(conf, "\ncores: 1\n") {
		t.Errorf("an administrator's limits are gone:\n%s", conf)
	}
	memory = 192 << 20
	must(t, b.task.Update(b.ctx, client.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory, Swap: &memory}})))
	limits("an update", fmt.Sprint(192<<20), "100000 100000")
	if conf := confOf(t, 100); !strings.Contains(conf, "\nmemory: 192\n") || !strings.Contains(conf, "\ncores: 1\n") {
		t.Errorf("after an update of the memory:\n%s", conf)
	}
	b.remove()
	eventually(t, time.Minute, "the conf is gone", func() bool { return noConf(100) })
	collect(t)
	if out, code := command("zfs", "list", volume); code == 0 {
		t.Errorf("the volume is left: %s", out)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("its directory is left: %v", err)
	}
}

// TestProxmoxShutdown: `pct shutdown` sends the container's stop signal, and containerd is told the true exit.
func TestProxmoxShutdown(t *testing.T) {
	proxmox(t)
	vmid := 500 // one each: the volume of a number may be there for a while after its conf
	for signal, label := range map[string]string{"USR1": "SIGUSR1", "TERM": ""} {
		vmid++
		number := strconv.Itoa(vmid)
		b := start(t, options{
			id: "down", edit: func(s *specs.Spec) { s.Annotations = map[string]string{"io.containerd.pve.vmid": number} },
			args: sh("trap 'exit 7' " + signal + "; touch /ready; while :; do sleep 0.2; done"),
			snapshot: func(id string, image client.Image) client.NewContainerOpts {
				return func(ctx context.Context, c *client.Client, r *containers.Container) error {
					if label != "" { // `ctr run` takes it from the image
						r.Labels = map[string]string{"io.containerd.image.config.stop-signal": label}
					}
					return client.WithNewSnapshot(id, image)(ctx, c, r)
				}
			},
		})
		eventually(t, time.Minute, "it listens to the signal", func() bool {
			_, code, err := b.execIn([]string{"test", "-e", "/ready"}, nil)
			return err == nil && code == 0
		})
		if out, code := command("lxc-stop", "-P", lxcPath, "-n", number, "--nokill", "-t", "30"); code != 0 {
			t.Fatal(out)
		}
		if code := b.ended(time.Minute); code != 7 {
			t.Errorf("%s: exit code %d", signal, code)
		}
		b.remove()
		eventually(t, time.Minute, "the conf is gone", func() bool { return noConf(vmid) })
	}
}

// TestProxmoxVMID: asked for, taken, and without a quorum.
func TestProxmoxVMID(t *testing.T) {
	c := proxmox(t)
	must(t, os.WriteFile("/etc/pve/nodes/other/qemu-server/555.conf", []byte("memory: 512\n"), 0o640))
	annotate := func(vmid string) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Annotations = map[string]string{"io.containerd.pve.vmid": vmid} }
	}
	b := start(t, options{id: "asked", args: []string{"sleep", "1000"}, edit: annotate("500")})
	if noConf(500) {
		t.Error("it has another VMID")
	}
	for vmid, is := range map[string]func(error) bool{"500": errdefs.IsAlreadyExists, "555": errdefs.IsAlreadyExists, "99": errdefs.IsInvalidArgument, "x": errdefs.IsInvalidArgument} {
		o, err := create(t, options{id: "refused-" + vmid, args: []string{"true"}, edit: annotate(vmid)})
		if !is(err) || !strings.Contains(err.Error(), vmid) {
			t.Errorf("VMID %s: %v", vmid, err)
		}
		o.remove()
	}
	c.SetQuorum(false)
	o, err := create(t, options{id: "noquorum", args: []string{"true"}})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "quorum") {
		t.Errorf("without a quorum: %v", err)
	}
	t.Log(err)
	o.remove()
	c.SetQuorum(true)

	o = start(t, options{id: "overlay", snapshotter: "overlayfs", args: []string{"sleep", "1000"}})
	if conf := confOf(t, 100); !regexp.MustCompile(`(?m)^rootfs: /\S+/rootfs$`).MatchString(conf) {
		t.Errorf("another snapshotter's:\n%s", conf)
	}
	o.remove()
	b.remove()
	// The volume that it had goes with containerd's next collection, which is waited for.
	b = start(t, options{id: "again", args: []string{"sleep", "1000"}, edit: annotate("500")})
	if noConf(500) {
		t.Error("it has another VMID than that of a removed one")
	}
	b.remove()
	eventually(t, time.Minute, "the confs are gone", func() bool {
		left, err := filepath.Glob("/etc/pve/lxc/*.conf")
		return err == nil && len(left) == 0
	})
}

// TestProxmoxLeftBehind: containers that were removed while the daemon was down leave nothing.
func TestProxmoxLeftBehind(t *testing.T) {
	proxmox(t)
	b := start(t, options{id: "left", args: []string{"sleep", "1000"}})
	pid, err := os.ReadFile("/run/stack/containerd-pve.pid")
	must(t, err)
	if _, err := b.task.Delete(b.ctx, client.WithProcessKill); err != nil {
		t.Fatal(err)
	}
	b.task = nil
	if out, code := command("kill", "-9", strings.Fields(string(pid))[0]); code != 0 {
		t.Fatal(out)
	}
	must(t, b.container.Delete(b.ctx))
	if out, code := command("stack", "up"); code != 0 {
		t.Fatal(out)
	}
	eventually(t, time.Minute, "the conf is gone", func() bool { return noConf(100) })
	eventually(t, time.Minute, "the snapshot is removed", func() bool {
		err := b.client.SnapshotService(zfs).Remove(b.ctx, "left")
		return err == nil || errdefs.IsNotFound(err)
	})
	// containerd asked for its removal once, of a daemon that was down; it asks again when another snapshot is removed.
	served(t)
	eventually(t, time.Minute, "the volume is gone", func() bool {
		collect(t)
		_, code := command("zfs", "list", volumes()+"/subvol-100-disk-0")
		return code != 0
	})
}

// TestUnprivileged: a container that asks for nothing but to be one has a user namespace, and its files and volumes
// are as root's all the same; on a node of Proxmox its conf says so.
func TestUnprivileged(t *testing.T) {
	proxmox(t)
	volume := t.TempDir()
	must(t, os.WriteFile(filepath.Join(volume, "mine"), nil, 0o600))
	b := start(t, options{id: "unprivileged", args: []string{"sleep", "1000"}, edit: func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.containerd.pve.unprivileged": "true"}
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: volume, Destination: "/volume", Options: []string{"rbind", "rw"}})
	}})
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", b.task.Pid()))
	must(t, err)
	if f := strings.Fields(string(text)); len(f) != 3 || f[0] != "0" || f[1] == "0" || f[2] != "65536" {
		t.Errorf("uid_map %s", text)
	}
	const script = "stat -c '%u:%g %a' /etc/shadow /volume/mine; touch /made /volume/made && stat -c '%u:%g' /made /volume/made"
	out, code, err := b.execIn(sh(script), nil)
	if err != nil || code != 0 {
		t.Fatalf("%v, %d: %s", err, code, out)
	}
	wholly(t, "in the container", out, "0:42 640", "0:0 600", "0:0", "0:0")
	st, err := os.Stat(filepath.Join(volume, "made"))
	must(t, err)
	if uid := st.Sys().(*syscall.Stat_t).Uid; uid != 0 {
		t.Errorf("on the host the volume's new file is of %d", uid)
	}
	if conf := confOf(t, 100); !strings.Contains(conf, "\nunprivileged: 1\n") || strings.Contains(conf, "idmap") {
		t.Errorf("the conf:\n%s", conf)
	}
	// The conf says how the volume is mapped, if that is asked for and if it is.
	must(t, os.WriteFile(shimoptions.File, []byte("IdmapPassthrough = true\n"), 0o600))
	t.Cleanup(func() { _ = os.Remove(shimoptions.File) })
	i := start(t, options{id: "idmap", args: []string{"sleep", "1000"}, edit: func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.containerd.pve.unprivileged": "true"}
	}})
	memory := int64(64 << 20)
	must(t, i.task.Update(i.ctx, client.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory, Swap: &memory}})))
	if conf := confOf(t, 101); !regexp.MustCompile(`(?m)^rootfs: local-zfs:subvol-101-disk-0,size=\d+G,idmap=passthrough$`).MatchString(conf) || !strings.Contains(conf, "\nmemory: 64\n") {
		t.Errorf("the conf with idmap:\n%s", conf)
	}
	if out, code, err := i.execIn(sh("stat -c '%u:%g %a' /etc/shadow"), nil); err != nil || code != 0 || out != "0:42 640\n" {
		t.Errorf("%v, %d: %s", err, code, out)
	}
	p := start(t, options{id: "privileged", args: []string{"sleep", "1000"}})
	if conf := confOf(t, 102); strings.Contains(conf, "idmap") {
		t.Errorf("the conf of a privileged one:\n%s", conf)
	}
	if out, _ := command("containerd-pve", "check"); !strings.Contains(out, "idmap=passthrough") {
		t.Errorf("check: %s", out)
	}
	p.remove()
	i.remove()
	must(t, os.Remove(shimoptions.File))
	o, err := create(t, options{id: "overlay", snapshotter: "overlayfs", args: []string{"true"}, edit: func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.containerd.pve.unprivileged": "true"}
	}})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pve-zfs") {
		t.Errorf("with overlayfs: %v", err)
	}
	o.remove()
	b.remove()
	eventually(t, time.Minute, "the confs are gone", func() bool { return noConf(100) && noConf(101) && noConf(102) })
}

// TestProxmoxNetwork: a container of `ctr run` with an interface at a bridge, by the annotation alone.
func TestProxmoxNetwork(t *testing.T) {
	proxmox(t)
	for _, c := range []string{"link add vmbr9 type bridge", "addr add 10.99.0.1/24 dev vmbr9", "link set vmbr9 up"} {
		if out, code := command(strings.Fields("ip " + c)...); code != 0 {
			t.Fatal(out)
		}
	}
	t.Cleanup(func() { command("ip", "link", "del", "vmbr9") })
	b := start(t, options{id: "net", image: busybox, args: []string{"sleep", "1000"}, edit: func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.containerd.pve.net0": "bridge=vmbr9,ip=10.99.0.5/24,gw=10.99.0.1,mtu=1400"}
	}})
	out, code, err := b.execIn(sh("ip -4 -o addr show eth0; ip link show eth0; ip route; ip link show lo; ping -c 1 -W 20 10.99.0.1; test -s /etc/resolv.conf && echo resolv"), nil)
	if err != nil || code != 0 {
		t.Errorf("%v, %d", err, code)
	}
	for _, want := range []string{"inet 10.99.0.5/24", "mtu 1400", "(?i)ether bc:24:11:", "default via 10.99.0.1 dev eth0", "lo: <LOOPBACK,UP", "1 packets received", "resolv"} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("it lacks %s:\n%s", want, out)
		}
	}
	if out, code := command("ip", "link", "show", "veth100i0"); code != 0 || !strings.Contains(out, "master vmbr9") {
		t.Errorf("the host's end: %s", out)
	}
	if conf := confOf(t, 100); !regexp.MustCompile(`(?m)^net0: name=eth0,bridge=vmbr9,gw=10\.99\.0\.1,hwaddr=BC:24:11:[0-9A-F:]{8},ip=10\.99\.0\.5/24,mtu=1400,type=veth$`).MatchString(conf) {
		t.Errorf("the conf:\n%s", conf)
	}
	for net, is := range map[string]func(error) bool{"bridge=none9,ip=10.99.0.6/24": errdefs.IsFailedPrecondition, "bridge=vmbr9,ip=10.99.0.6": errdefs.IsInvalidArgument} {
		o, err := create(t, options{id: "refused", image: busybox, args: []string{"true"}, edit: func(s *specs.Spec) {
			s.Annotations = map[string]string{"io.containerd.pve.net0": net}
		}})
		if !is(err) {
			t.Errorf("%s: %v", net, err)
		}
		t.Log(err)
		o.remove()
	}
	b.remove()
	eventually(t, time.Minute, "the host's end is gone", func() bool {
		_, code := command("ip", "link", "show", "veth100i0")
		return code != 0
	})
	eventually(t, time.Minute, "the conf is gone", func() bool { return noConf(100) })
}

// TestProxmoxDHCP: an address, a route and a name server from the bridge's DHCP server, renewed.
func TestProxmoxDHCP(t *testing.T) {
	for _, c := range []string{"link add vmbr9 type bridge", "addr add 10.98.0.1/24 dev vmbr9", "link set vmbr9 up"} {
		if out, code := command(strings.Fields("ip " + c)...); code != 0 {
			t.Fatal(out)
		}
	}
	t.Cleanup(func() { command("ip", "link", "del", "vmbr9") })
	ask := func(id string) (*box, error) {
		return create(t, options{id: id, image: busybox, args: []string{"sleep", "1000"}, edit: func(s *specs.Spec) {
			s.Annotations = map[string]string{"io.containerd.pve.net0": "bridge=vmbr9,ip=dhcp"}
		}})
	}
	o, err := ask("nobody")
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a server: %v", err)
	}
	t.Log(err)
	o.remove()

	var mu sync.Mutex
	told := map[dhcpv4.MessageType]int{}
	gateway := net.IPv4(10, 98, 0, 1)
	server, err := server4.NewServer("vmbr9", nil, func(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
		mu.Lock()
		told[m.MessageType()]++
		mu.Unlock()
		answer := map[dhcpv4.MessageType]dhcpv4.MessageType{dhcpv4.MessageTypeDiscover: dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeRequest: dhcpv4.MessageTypeAck}[m.MessageType()]
		if answer == dhcpv4.MessageTypeNone {
			return
		}
		reply, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(answer), dhcpv4.WithYourIP(net.IPv4(10, 98, 0, 7)), dhcpv4.WithServerIP(gateway),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(gateway)), dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithRouter(gateway), dhcpv4.WithDNS(gateway), dhcpv4.WithLeaseTime(20))
		if err == nil {
			_, _ = conn.WriteTo(reply.ToBytes(), peer)
		}
	})
	must(t, err)
	go func() { _ = server.Serve() }()
	t.Cleanup(func() { server.Close() })
	count := func(kind dhcpv4.MessageType) int {
		mu.Lock()
		defer mu.Unlock()
		return told[kind]
	}
	b, err := ask("asks")
	must(t, err)
	must(t, b.task.Start(b.ctx))
	out, code, err := b.execIn(sh("ip -4 -o addr show eth0; ip route; cat /etc/resolv.conf; ping -c 1 -W 20 10.98.0.1"), nil)
	if err != nil || code != 0 {
		t.Errorf("%v, %d", err, code)
	}
	for _, want := range []string{"inet 10.98.0.7/24", "default via 10.98.0.1 dev eth0", "nameserver 10.98.0.1", "1 packets received"} {
		if !strings.Contains(out, want) {
			t.Errorf("it lacks %s:\n%s", want, out)
		}
	}
	first := count(dhcpv4.MessageTypeRequest)
	eventually(t, time.Minute, "the lease is renewed", func() bool { return count(dhcpv4.MessageTypeRequest) > first })
	b.remove()
	eventually(t, time.Minute, "no end is left at the bridge", func() bool {
		out, _ := command("ip", "link", "show", "master", "vmbr9")
		return out == ""
	})
}
