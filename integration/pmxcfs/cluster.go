// Package pmxcfs stands in for Proxmox VE's cluster filesystem (/etc/pve) in the
// tests: one cluster in one process, with a mount for each node. It keeps
// everything in memory, and refuses what the real one refuses (pve-cluster,
// src/pmxcfs: memdb.c, pmxcfs.c, status.c).
package pmxcfs

import (
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	maxFile  = 1 << 20 // MEMDB_MAX_FILE_SIZE
	maxTotal = 128 << 20
)

// entry is a file or directory.
type entry struct {
	dir  bool
	data []byte
	time time.Time
}

// Cluster is what all nodes see.
type Cluster struct {
	mu       sync.Mutex
	entries  map[string]*entry // by path, without a slash before it
	nodes    []string
	quorate  bool
	version  int
	messages int
	before   func(op, path string) syscall.Errno
	total    int
	stall    sync.RWMutex
}

// New is a cluster of nodes, without guests.
func New(nodes []string) *Cluster {
	c := &Cluster{entries: map[string]*entry{"": {dir: true}}, quorate: true}
	for _, d := range []string{"nodes", "priv", "priv/lock", "firewall", "ha", "mapping", "sdn", "virtual-guest"} {
		c.entries[d] = &entry{dir: true, time: time.Now()}
	}
	for _, n := range nodes {
		c.join(n)
	}
	return c
}

// join makes what a node makes when it starts.
func (c *Cluster) join(node string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Contains(c.nodes, node) {
		c.nodes = append(c.nodes, node)
	}
	for _, d := range []string{"", "/lxc", "/qemu-server", "/priv"} {
		if p := "nodes/" + node + d; c.entries[p] == nil {
			c.entries[p] = &entry{dir: true, time: time.Now()}
		}
	}
}

// Leave takes a node out of the cluster; its directory stays, as in a real one.
func (c *Cluster) Leave(node string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes = slices.DeleteFunc(c.nodes, func(n string) bool { return n == node })
}

// guestConf is the path of a guest's conf (cfs-utils.c, path_contain_vm_config).
var guestConf = regexp.MustCompile(`^nodes/([^/]+)/(lxc|qemu-server)/([1-9][0-9]*)\.conf$`)

// guests are all of the cluster: VMID to node and kind. The caller holds the mutex.
func (c *Cluster) guests() map[string][2]string {
	all := map[string][2]string{}
	for p, e := range c.entries {
		if m := guestConf.FindStringSubmatch(p); m != nil && !e.dir {
			all[m[3]] = [2]string{m[1], m[2]}
		}
	}
	return all
}

// taken says whether p is the conf of a guest whose number another one has
// (vmlist_different_vm_exists).
func (c *Cluster) taken(p string) bool {
	m := guestConf.FindStringSubmatch(p)
	if m == nil {
		return false
	}
	for q, e := range c.entries {
		if q != p && !e.dir && strings.HasSuffix(q, "/"+m[3]+".conf") && guestConf.MatchString(q) {
			return true
		}
	}
	return false
}

// changed counts a change.
func (c *Cluster) changed(e *entry) {
	c.version++
	e.time = time.Now()
	c.messages++
}

// message is where a change begins: op is create, mkdir, write, rename or remove.
func (c *Cluster) message(op, p string) syscall.Errno {
	c.waited()
	c.mu.Lock()
	before := c.before
	c.mu.Unlock()
	if before == nil {
		return 0
	}
	return before(op, p)
}

// SetBefore has f called before each change, with what is done and to which path. It may look at the cluster
// and change it. Its error is the call's, and nothing is changed then; nil: no longer.
func (c *Cluster) SetBefore(f func(op, path string) syscall.Errno) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.before = f
}

func (c *Cluster) lookup(p string) (entry, bool) {
	c.waited()
	c.mu.Lock()
	defer c.mu.Unlock()
	e, there := c.entries[p]
	if !there {
		return entry{}, false
	}
	return *e, true
}

// list are the names in a directory.
func (c *Cluster) list(p string) map[string]entry {
	c.waited()
	c.mu.Lock()
	defer c.mu.Unlock()
	names := map[string]entry{}
	for q, e := range c.entries {
		if q != "" && path.Dir("/"+q) == path.Clean("/"+p) {
			names[path.Base(q)] = *e
		}
	}
	return names
}

// parent says whether something can be made at p.
func (c *Cluster) parent(p string) syscall.Errno {
	if !c.quorate {
		return syscall.EACCES
	}
	e := c.entries[strings.Trim(path.Dir("/"+p), "/")]
	switch {
	case e == nil:
		return syscall.ENOENT
	case !e.dir:
		return syscall.ENOTDIR
	}
	return 0
}

func (c *Cluster) create(p string) syscall.Errno {
	if errno := c.message("create", p); errno != 0 {
		return errno
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if errno := c.parent(p); errno != 0 {
		return errno
	}
	if c.taken(p) || c.entries[p] != nil {
		return syscall.EEXIST
	}
	c.entries[p] = &entry{}
	c.changed(c.entries[p])
	return 0
}

func (c *Cluster) mkdir(p string) syscall.Errno {
	if errno := c.message("mkdir", p); errno != 0 {
		return errno
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if errno := c.parent(p); errno != 0 {
		return errno
	}
	if c.entries[p] != nil {
		return syscall.EEXIST
	}
	c.entries[p] = &entry{dir: true}
	c.changed(c.entries[p])
	return 0
}

// write puts data at an offset, or sets the size if data is nil.
func (c *Cluster) write(p string, data []byte, offset int) syscall.Errno {
	if errno := c.message("write", p); errno != 0 {
		return errno
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[p]
	size := offset + len(data)
	switch {
	case !c.quorate:
		return syscall.EACCES
	case e == nil:
		return syscall.ENOENT
	case e.dir:
		return syscall.EISDIR
	case size > maxFile:
		return syscall.EFBIG
	case c.taken(p):
		return syscall.EEXIST
	case c.total+max(size-len(e.data), 0) > maxTotal:
		return syscall.ENOSPC
	}
	before := len(e.data)
	if data != nil {
		size = max(size, before)
	}
	// What others have read of it stays as it is.
	content := make([]byte, size)
	copy(content, e.data)
	copy(content[min(offset, size):], data)
	e.data = content
	c.total += size - before
	c.changed(e)
	return 0
}

func (c *Cluster) remove(p string, dir bool) syscall.Errno {
	if errno := c.message("remove", p); errno != 0 {
		return errno
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[p]
	switch {
	case !c.quorate:
		return syscall.EACCES
	case e == nil:
		return syscall.ENOENT
	case dir && !e.dir:
		return syscall.ENOTDIR
	case !dir && e.dir:
		return syscall.EISDIR
	case e.dir && c.inside(p):
		return syscall.ENOTEMPTY
	}
	delete(c.entries, p)
	c.total -= len(e.data)
	c.version++
	c.messages++
	return 0
}

func (c *Cluster) inside(p string) bool {
	for q := range c.entries {
		if strings.HasPrefix(q, p+"/") {
			return true
		}
	}
	return false
}

// rename replaces a file that is there, and moves directories only if they are empty.
func (c *Cluster) rename(from, to string) syscall.Errno {
	if errno := c.message("rename", to); errno != 0 {
		return errno
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[from]
	if e == nil {
		return syscall.ENOENT
	}
	if errno := c.parent(to); errno != 0 {
		return errno
	}
	if e.dir && strings.HasPrefix(from, "priv/lock/") {
		return syscall.EACCES
	}
	if !e.dir && c.taken(to) {
		// Only the guest itself moves from node to node.
		f, t := guestConf.FindStringSubmatch(from), guestConf.FindStringSubmatch(to)
		if f == nil || f[3] != t[3] {
			return syscall.EEXIST
		}
	}
	old := c.entries[to]
	if e.dir && c.inside(from) || old != nil && old.dir && c.inside(to) {
		return syscall.ENOTEMPTY
	}
	if old != nil {
		c.total -= len(old.data)
	}
	delete(c.entries, from)
	c.entries[to] = e
	c.changed(e)
	return 0
}

// vmlist is the file .vmlist.
func (c *Cluster) vmlist() []byte {
	c.waited()
	c.mu.Lock()
	defer c.mu.Unlock()
	type guest struct {
		Node    string `json:"node"`
		Type    string `json:"type"`
		Version int    `json:"version"`
	}
	list := struct {
		Version int              `json:"version"`
		IDs     map[string]guest `json:"ids"`
	}{c.version, map[string]guest{}}
	for vmid, g := range c.guests() {
		kind := map[string]string{"lxc": "lxc", "qemu-server": "qemu"}[g[1]]
		list.IDs[vmid] = guest{g[0], kind, 1}
	}
	text, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		return nil // there is nothing in it that JSON has not
	}
	return append(text, '\n')
}

// SetQuorum makes the cluster's files read-only, or writable again.
func (c *Cluster) SetQuorum(quorate bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.quorate = quorate
}

func (c *Cluster) hasQuorum() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.quorate
}

// members is the file .members, as node self has it.
func (c *Cluster) members(self string) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	type member struct {
		ID     int    `json:"id"`
		Online int    `json:"online"`
		IP     string `json:"ip"`
	}
	list := struct {
		Name    string `json:"nodename"`
		Version int    `json:"version"`
		Cluster struct {
			Name    string `json:"name"`
			Nodes   int    `json:"nodes"`
			Quorate int    `json:"quorate"`
		} `json:"cluster"`
		Nodes map[string]member `json:"nodelist"`
	}{Name: self, Version: c.version, Nodes: map[string]member{}}
	list.Cluster.Name, list.Cluster.Nodes = "test", len(c.nodes)
	if c.quorate {
		list.Cluster.Quorate = 1
	}
	for i, n := range c.nodes {
		list.Nodes[n] = member{i + 1, 1, fmt.Sprintf("10.0.0.%d", i+1)}
	}
	text, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		return nil // there is nothing in it that JSON has not
	}
	return append(text, '\n')
}

// Messages is how often something was made, written, renamed or removed: each is a message to every node, and
// a commit there.
func (c *Cluster) Messages() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.messages
}

// Stall has every call wait until resume is called, as a cluster does that is stuck.
func (c *Cluster) Stall() (resume func()) {
	c.stall.Lock()
	return c.stall.Unlock
}

// waited is where a call waits while the cluster is stuck.
func (c *Cluster) waited() {
	c.stall.RLock()
	c.stall.RUnlock() //nolint:staticcheck // nothing is guarded: it is a gate
}

// versions is the file .version.
func (c *Cluster) versions() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return []byte(`{"version": ` + strconv.Itoa(c.version) + "}\n")
}
