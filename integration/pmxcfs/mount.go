package pmxcfs

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// wwwData is the group of all files.
const wwwData = 33

// view is one node's mount.
type view struct {
	self string // the node's name
	mu   sync.Mutex
	made map[string][]byte // the files that are made, as of the last time that anybody asked for their size
}

// node is a file, directory or link of a mount; what it is its path says.
type node struct {
	fs.Inode
	*view
	cluster *Cluster
}

var (
	_ fs.NodeLookuper   = (*node)(nil)
	_ fs.NodeGetattrer  = (*node)(nil)
	_ fs.NodeSetattrer  = (*node)(nil)
	_ fs.NodeReaddirer  = (*node)(nil)
	_ fs.NodeOpener     = (*node)(nil)
	_ fs.NodeReader     = (*node)(nil)
	_ fs.NodeWriter     = (*node)(nil)
	_ fs.NodeCreater    = (*node)(nil)
	_ fs.NodeMkdirer    = (*node)(nil)
	_ fs.NodeUnlinker   = (*node)(nil)
	_ fs.NodeRmdirer    = (*node)(nil)
	_ fs.NodeRenamer    = (*node)(nil)
	_ fs.NodeReadlinker = (*node)(nil)
	_ fs.NodeSymlinker  = (*node)(nil)
	_ fs.NodeLinker     = (*node)(nil)
	_ fs.NodeMknoder    = (*node)(nil)
	_ fs.NodeSetxattrer = (*node)(nil)
	_ fs.NodeFsyncer    = (*node)(nil)
)

// Mount shows the cluster as node self sees it at dir, until unmount is called.
func (c *Cluster) Mount(self, dir string) (unmount func() error, err error) {
	c.join(self)
	s, err := fs.Mount(dir, &node{cluster: c, view: &view{self: self, made: map[string][]byte{}}}, &fs.Options{
		// The other nodes change it too: nothing is remembered.
		MountOptions: fuse.MountOptions{AllowOther: true, FsName: "/dev/fuse", Name: "fuse", DirectMountStrict: true, Options: []string{"default_permissions"}},
	})
	if err != nil {
		return nil, fmt.Errorf("mounting %s: %w", dir, err)
	}
	return s.Unmount, nil
}

func (n *node) path(name string) string {
	p := n.Path(n.Root())
	if name != "" {
		p = strings.Trim(p+"/"+name, "/")
	}
	return p
}

// links are the node's own names for its directories.
func (n *node) link(p string) (target string, ok bool) {
	switch p {
	case "local":
		return "nodes/" + n.self, true
	case "lxc", "qemu-server":
		return "nodes/" + n.self + "/" + p, true
	}
	return "", false
}

func isMade(p string) bool { return p == ".vmlist" || p == ".version" || p == ".members" }

// make makes such a file anew. The real one does so whenever a size is asked for,
// and reads from what was made last: somebody who reads it in parts may get
// parts of two (cfs-plug-func.c).
func (n *node) make(p string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch p {
	case ".vmlist":
		n.made[p] = n.cluster.vmlist()
	case ".members":
		n.made[p] = n.cluster.members(n.self)
	default:
		n.made[p] = n.cluster.versions()
	}
	return len(n.made[p])
}

func (n *node) madeLast(p string) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.made[p]
}

// attributes fills in what there is at p.
func (n *node) attributes(p string, out *fuse.Attr) syscall.Errno {
	out.Gid = wwwData
	mode := func(kind uint32, quorate, not uint32) {
		m := quorate
		if !n.cluster.hasQuorum() {
			m = not
		}
		switch {
		case strings.Contains("/"+p+"/", "/priv/"):
			m &= 0o700
		case kind == syscall.S_IFREG:
			m &= 0o750
		default:
			m &= 0o755
		}
		out.Mode = kind | m
	}
	if target, ok := n.link(p); ok {
		out.Size = uint64(len(target))
		mode(syscall.S_IFLNK, 0o777, 0o777)
		return 0
	}
	if isMade(p) {
		out.Size = uint64(n.make(p))
		out.Mode = syscall.S_IFREG | 0o440
		return 0
	}
	e, there := n.cluster.lookup(p)
	if !there {
		return syscall.ENOENT
	}
	out.SetTimes(&e.time, &e.time, &e.time)
	if e.dir {
		mode(syscall.S_IFDIR, 0o777, 0o555)
		return 0
	}
	out.Size = uint64(len(e.data))
	mode(syscall.S_IFREG, 0o666, 0o444)
	return 0
}

func (n *node) child(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.attributes(n.path(name), &out.Attr); errno != 0 {
		return nil, errno
	}
	return n.NewInode(ctx, &node{cluster: n.cluster, view: n.view}, fs.StableAttr{Mode: out.Mode & syscall.S_IFMT}), 0
}

func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return n.child(ctx, name, out)
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return n.attributes(n.path(""), &out.Attr)
}

// Setattr takes the one owner and the modes that there are, and a size.
func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	p := n.path("")
	if errno := n.attributes(p, &out.Attr); errno != 0 {
		return errno
	}
	if m, ok := in.GetMode(); ok {
		allowed := uint32(0o640)
		if strings.HasPrefix(p, "priv/") || strings.Contains(p, "/priv/") {
			allowed = 0o600
		}
		if m&0o7777 != allowed {
			return syscall.EPERM
		}
	}
	if uid, ok := in.GetUID(); ok && uid != 0 {
		return syscall.EPERM
	}
	if gid, ok := in.GetGID(); ok && gid != wwwData {
		return syscall.EPERM
	}
	if size, ok := in.GetSize(); ok {
		if errno := n.cluster.write(p, nil, int(size)); errno != 0 {
			return errno
		}
	}
	return n.attributes(p, &out.Attr)
}

func (n *node) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	p := n.path("")
	var list []fuse.DirEntry
	for name, e := range n.cluster.list(p) {
		mode := uint32(syscall.S_IFREG)
		if e.dir {
			mode = syscall.S_IFDIR
		}
		list = append(list, fuse.DirEntry{Name: name, Mode: mode})
	}
	if p == "" {
		for _, name := range []string{"local", "lxc", "qemu-server"} {
			list = append(list, fuse.DirEntry{Name: name, Mode: syscall.S_IFLNK})
		}
		for _, name := range []string{".vmlist", ".version", ".members"} {
			list = append(list, fuse.DirEntry{Name: name, Mode: syscall.S_IFREG})
		}
	}
	return fs.NewListDirStream(list), 0
}

func (n *node) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	var out fuse.Attr
	if p := n.path(""); !isMade(p) {
		return nil, fuse.FOPEN_DIRECT_IO, n.attributes(p, &out)
	}
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, dest []byte, offset int64) (fuse.ReadResult, syscall.Errno) {
	p := n.path("")
	var data []byte
	if isMade(p) {
		data = n.madeLast(p)
	} else if e, there := n.cluster.lookup(p); there {
		data = e.data
	} else {
		return nil, syscall.ENOENT
	}
	from := min(int(offset), len(data))
	return fuse.ReadResultData(data[from:min(from+len(dest), len(data))]), 0
}

func (n *node) Write(_ context.Context, _ fs.FileHandle, data []byte, offset int64) (uint32, syscall.Errno) {
	p := n.path("")
	if isMade(p) {
		return 0, syscall.EACCES
	}
	return uint32(len(data)), n.cluster.write(p, data, int(offset))
}

func (n *node) Create(ctx context.Context, name string, _, _ uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	p := n.path(name)
	_, isLink := n.link(p)
	if isLink || isMade(p) {
		return nil, nil, 0, syscall.EACCES
	}
	if errno := n.cluster.create(p); errno != 0 {
		return nil, nil, 0, errno
	}
	i, errno := n.child(ctx, name, out)
	return i, nil, fuse.FOPEN_DIRECT_IO, errno
}

func (n *node) Mkdir(ctx context.Context, name string, _ uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.cluster.mkdir(n.path(name)); errno != 0 {
		return nil, errno
	}
	return n.child(ctx, name, out)
}

func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	return n.cluster.remove(n.path(name), false)
}

func (n *node) Rmdir(_ context.Context, name string) syscall.Errno {
	return n.cluster.remove(n.path(name), true)
}

// Rename knows no flags.
func (n *node) Rename(_ context.Context, name string, parent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	to, ok := parent.(*node)
	if !ok || flags != 0 {
		return syscall.EINVAL
	}
	return n.cluster.rename(n.path(name), to.path(newName))
}

func (n *node) Readlink(context.Context) ([]byte, syscall.Errno) {
	target, ok := n.link(n.path(""))
	if !ok {
		return nil, syscall.EINVAL
	}
	return []byte(target), 0
}

// Fsync is not there, which the kernel takes for done.
func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return syscall.ENOSYS }

// Symlink is not there.
func (n *node) Symlink(context.Context, string, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.ENOSYS
}

// Link is not there.
func (n *node) Link(context.Context, fs.InodeEmbedder, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.ENOSYS
}

// Mknod is not there.
func (n *node) Mknod(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.ENOSYS
}

// Setxattr is not there.
func (n *node) Setxattr(context.Context, string, []byte, uint32) syscall.Errno { return syscall.ENOSYS }
