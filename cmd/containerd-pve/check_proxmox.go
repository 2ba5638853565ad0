package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/user"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
	"github.com/containerd-pve/containerd-pve/shim/options"
)

// proxmoxHost is where a check of a node of Proxmox looks.
type proxmoxHost struct {
	cgroups        string
	packages       string // dpkg's
	subUID, subGID string
	apparmor       string // the list of profiles
	runtime        string // the runtime's options
}

var thisProxmox = proxmoxHost{"/sys/fs/cgroup", "/var/lib/dpkg/status", "/etc/subuid", "/etc/subgid", "/sys/kernel/security/apparmor/profiles", options.File}

// check says of a node of Proxmox what its containers need; nothing on any other host.
func (h proxmoxHost) check(ctx context.Context, conf config) []finding {
	node, err := thisNode(conf)
	if node == nil && err == nil {
		return nil
	}
	self := ""
	if err == nil {
		self, err = node.Name()
	}
	if err != nil {
		return []finding{result("proxmox", "", err)}
	}
	detail := "node " + self
	if v := h.version("pve-container"); v != "" {
		detail += ", pve-container " + v
	}
	list := []finding{{Name: "proxmox", OK: true, Detail: detail}, quorum(conf.ProxmoxRoot)}
	s, err := node.Storage(self, conf.Storage, conf.Dataset)
	list = append(list, result("storage", s.Name+", "+s.Pool, err))
	r, taken, err := node.VMIDs()
	if err == nil && taken >= r.Upper-r.Lower {
		err = fmt.Errorf("all of %d to %d are taken: give another vmid_range", r.Lower, r.Upper-1)
	}
	list = append(list, result("vmids", fmt.Sprintf("%d to %d, %d of them taken", r.Lower, r.Upper-1, taken), err))
	list = append(list, h.memory(), h.subIDs(), h.signals(), registryAnswers(ctx, conf.Registry))
	return append(list, h.idmap()...)
}

// quorum is told by the modes: without one nothing may be written (pmxcfs.c, cfs_fuse_getattr).
func quorum(root string) finding {
	info, err := os.Stat(filepath.Join(root, "nodes"))
	if err == nil && info.Mode().Perm()&0o200 == 0 {
		err = errors.New("the cluster has none, and nothing can be registered: see `pvecm status`")
	}
	return result("quorum", "the cluster's files can be written", err)
}

// memory: without these files Proxmox's own list of containers fails as a whole.
func (h proxmoxHost) memory() finding {
	controllers, err := os.ReadFile(filepath.Join(h.cgroups, "cgroup.controllers"))
	if err == nil && !strings.Contains(" "+strings.TrimSpace(string(controllers))+" ", " memory ") {
		err = errors.New("the kernel limits no memory: boot without cgroup_disable=memory")
	}
	if err == nil {
		if found, _ := filepath.Glob(filepath.Join(h.cgroups, "*", "memory.swap.current")); len(found) == 0 {
			err = errors.New("the kernel counts no swap: boot with swapaccount=1")
		}
	}
	return result("memory", "limited and counted", err)
}

func (h proxmoxHost) subIDs() finding {
	for _, file := range []string{h.subUID, h.subGID} {
		ranges, err := user.ParseSubIDFileFilter(file, func(s user.SubID) bool { return s.Name == "root" && s.Count >= 65536 })
		if err != nil || len(ranges) == 0 {
			return warning("subids", fmt.Sprintf("unprivileged containers need a line \"root:100000:65536\" in %s", file))
		}
	}
	return finding{Name: "subids", OK: true, Detail: "root has some for unprivileged containers"}
}

// signals: the profiles of containerd and nerdctl for containers take signals from
// unconfined processes, of which one with a profile of that very kind (AppArmor 4's lxc-stop,
// flags=(unconfined)) is none.
func (h proxmoxHost) signals() finding {
	profiles, err := os.ReadFile(h.apparmor)
	if err == nil && strings.Contains("\n"+string(profiles), "\nlxc-stop (") {
		return warning("signals", "AppArmor keeps `pct shutdown` from containers that have a profile (nerdctl's, Kubernetes'): "+
			"`ln -s /etc/apparmor.d/lxc-stop /etc/apparmor.d/disable/` and `apparmor_parser -R /etc/apparmor.d/lxc-stop` let it")
	}
	return finding{Name: "signals", OK: true, Detail: "`pct shutdown` may send them"}
}

// idmap says of the runtime's option IdmapPassthrough whether this Proxmox reads what it writes; nothing if it is off.
func (h proxmoxHost) idmap() []finding {
	o, err := options.Parse(nil, h.runtime)
	if err != nil {
		return []finding{result("idmap", "", err)}
	}
	if !o.IdmapPassthrough {
		return nil
	}
	if v := h.version("pve-container"); !pve.KnowsIdmap(v) {
		return []finding{warning("idmap", fmt.Sprintf("IdmapPassthrough in %s does nothing: pve-container %s does not read idmap=passthrough, 6.1.6 does; upgrade the package on every node and run `systemctl restart containerd-pve`, or take the line away", h.runtime, v))}
	}
	return []finding{{Name: "idmap", OK: true, Detail: "new confs of unprivileged containers have idmap=passthrough; every node needs pve-container 6.1.6"}}
}

func registryAnswers(ctx context.Context, address string) finding {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", address)
	if err != nil {
		return result("register", "", fmt.Errorf("nobody answers on %s: run `systemctl restart containerd-pve`, which looks whether this is a node of Proxmox when it starts", address))
	}
	return result("register", "answers on "+address, c.Close())
}

// knowsEnv says whether this Proxmox knows entrypoint and environment, see pve.KnowsEnv.
func (h proxmoxHost) knowsEnv() bool {
	return pve.KnowsEnv(h.version("pve-container"), h.version("lxc-pve"))
}

// version is an installed package's, or empty.
func (h proxmoxHost) version(name string) string {
	text, err := os.ReadFile(h.packages)
	if err != nil {
		return ""
	}
	for paragraph := range strings.SplitSeq(string(text), "\n\n") {
		if !strings.HasPrefix(paragraph, "Package: "+name+"\n") || !strings.Contains(paragraph, "\nStatus: install ok installed\n") {
			continue
		}
		_, rest, _ := strings.Cut(paragraph, "\nVersion: ")
		v, _, _ := strings.Cut(rest, "\n")
		return v
	}
	return ""
}
