package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckProxmox: each thing that a node may lack, and what to do.
func TestCheckProxmox(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	put := func(name, text string) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	root := filepath.Join(dir, "pve")
	h := proxmoxHost{
		cgroups:  filepath.Join(dir, "cgroup"),
		packages: put("status", "Package: other\nStatus: install ok installed\nVersion: 1\n\nPackage: pve-container\nStatus: install ok installed\nVersion: 6.1.10\n"),
		subUID:   put("subuid", "root:100000:65536\n"), subGID: put("subgid", "root:100000:65536\n"),
		apparmor: put("profiles", "lxc-start (enforce)\n"),
		runtime:  filepath.Join(dir, "runtime.toml"),
	}
	conf := config{Dataset: "tank/c", ProxmoxRoot: root, ProxmoxDatabase: filepath.Join(dir, "config.db"), Registry: filepath.Join(dir, "socket")}
	if list := h.check(ctx, conf); list != nil {
		t.Errorf("another host: %v", list)
	}
	put("config.db", "")
	if list := h.check(ctx, conf); len(list) != 1 || list[0].OK || !strings.Contains(list[0].Detail, "systemctl status pve-cluster") {
		t.Errorf("the cluster's filesystem is down: %v", list)
	}
	put("pve/.vmlist", `{"ids": {"100": {}, "5000": {}}}`)
	put("pve/storage.cfg", "zfspool: fast\n\tpool tank/data\n\tcontent rootdir\n")
	put("pve/nodes/self/x", "")
	put("cgroup/cgroup.controllers", "cpu memory pids\n")
	put("cgroup/system.slice/memory.swap.current", "0\n")
	if err := os.Symlink("nodes/self", filepath.Join(root, "local")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", conf.Registry)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if list := h.check(ctx, conf); len(list) != 8 || list[0].Detail != "node self, pve-container 6.1.10" || list[2].Detail != "fast, tank/data" || list[3].Detail != "100 to 999999, 2 of them taken" {
		t.Errorf("%+v", list)
	} else {
		for _, f := range list {
			if !f.OK || f.Warning {
				t.Errorf("%+v", f)
			}
		}
	}
	// says checks one finding after something was taken away.
	says := func(name, what string, ok bool) {
		t.Helper()
		for _, f := range h.check(ctx, conf) {
			if f.Name == name {
				if f.OK != ok || !strings.Contains(f.Detail, what) {
					t.Errorf("%+v", f)
				}
				return
			}
		}
		t.Errorf("%s is not there", name)
	}
	put("runtime.toml", "IdmapPassthrough = true\n")
	says("idmap", "every node needs pve-container 6.1.6", true)
	packages := h.packages
	h.packages = put("old", "Package: pve-container\nStatus: install ok installed\nVersion: 6.1.5\n")
	says("idmap", "pve-container 6.1.5 does not read", true)
	h.packages = packages
	put("runtime.toml", "Foo = 1\n")
	says("idmap", "unknown key Foo", false)
	put("runtime.toml", "")
	l.Close()
	says("register", "systemctl restart containerd-pve", false)
	h.apparmor = put("profiles", "lxc-start (enforce)\nlxc-stop (unconfined)\n")
	says("signals", "apparmor_parser -R", true)
	h.subGID = put("empty", "")
	says("subids", "root:100000:65536", true)
	put("cgroup/cgroup.controllers", "cpu\n")
	says("memory", "cgroup_disable", false)
	put("cgroup/cgroup.controllers", "memory\n")
	h.cgroups = filepath.Dir(put("other/cgroup.controllers", "memory\n"))
	says("memory", "swapaccount", false)
	conf.VMIDRange = "100-100"
	says("vmids", "all of 100 to 100 are taken", false)
	conf.Storage = "slow"
	says("storage", "slow", false)
	if err := os.Chmod(filepath.Join(root, "nodes"), 0o500); err != nil {
		t.Fatal(err)
	}
	says("quorum", "pvecm status", false)
	if err := os.Remove(filepath.Join(root, "local")); err != nil {
		t.Fatal(err)
	}
	says("proxmox", "the name of this node", false)
}
