package main

import (
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxLinks is how many symlinks one path may lead through, as in the kernel.
	maxLinks = 40
	// openRetries bounds the repetition of openat2, which gives up with EAGAIN
	// when a rename anywhere in the system raced with a "..".
	openRetries = 128
)

// root is a container's root directory. All its paths mean what a process
// chrooted there would see, except that magic links lead nowhere.
type root struct{ fd int }

func openRoot(path string) (root, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return root{fd}, err
}

// openBelow is openat2 with O_CLOEXEC and patience.
func openBelow(dir int, path string, flags int, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: resolve}
	for try := 0; ; try++ {
		fd, err := unix.Openat2(dir, path, &how)
		if (err != unix.EAGAIN && err != unix.EINTR) || try == openRetries {
			return fd, err
		}
	}
}

func (r root) open(path string, flags int) (int, error) {
	if path == "" {
		return -1, unix.ENOENT
	}
	return openBelow(r.fd, path, flags, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

// create opens path (O_PATH), making it first if it is missing: a directory, or
// an empty file. Missing parents are made as directories; symlinks on the way
// are followed inside the root even if they dangle.
func (r root) create(path string, dir bool) (int, error) {
	fd, err := r.open(path, unix.O_PATH)
	if err != unix.ENOENT || path == "" {
		return fd, err
	}
	rest, done, links := components(path), "", 0
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		if name == ".." {
			done = done[:max(strings.LastIndexByte(done, '/'), 0)]
			continue
		}
		next := done + "/" + name
		link, err := r.readlink(next)
		switch {
		case err == unix.ENOENT:
			if err := r.make(done+"/", name, dir || len(rest) > 0); err != nil && err != unix.EEXIST {
				return -1, err
			}
		case err != nil:
			return -1, err
		case link != "":
			if links++; links > maxLinks {
				return -1, unix.ELOOP
			}
			if link[0] == '/' {
				done = ""
			}
			rest = append(components(link), rest...)
			continue
		}
		done = next
	}
	if done == "" {
		done = "/"
	}
	return r.open(done, unix.O_PATH)
}

// make makes name, which must not be a path, in the directory parent.
func (r root) make(parent, name string, dir bool) error {
	at, err := r.open(parent, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	if dir {
		return unix.Mkdirat(at, name, 0o755)
	}
	fd, err := unix.Openat(at, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_WRONLY, 0o644)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// readlink returns "" for what is there and is not a symlink.
func (r root) readlink(path string) (string, error) {
	fd, err := r.open(path, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", nil
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	return string(buf[:max(n, 0)]), err
}

// components splits a path, without the parts that mean nothing.
func components(path string) []string {
	var out []string
	for _, c := range strings.Split(path, "/") {
		if c != "" && c != "." {
			out = append(out, c)
		}
	}
	return out
}

// splitPath is the parent directory and the last component of a path.
func splitPath(path string) (dir, base string) {
	path = strings.TrimRight(path, "/")
	i := strings.LastIndexByte(path, '/')
	return path[:i+1], path[i+1:]
}

// isType says whether fd is on a file system of that magic number.
func isType(fd int, magic int64) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && st.Type == magic
}

// procFS opens the root's /proc and makes sure that it is one, so that what is
// written there goes to the kernel and not to a file that only looks like it.
func (r root) procFS() (int, error) {
	fd, err := r.open("/proc", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	if !isType(fd, unix.PROC_SUPER_MAGIC) {
		unix.Close(fd)
		return -1, unix.ENODEV
	}
	return fd, nil
}

// writeProc writes value into a file of procfs; nothing mounted over parts of
// it is followed.
func (r root) writeProc(path, value string) error {
	proc, err := r.procFS()
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	fd, err := openBelow(proc, path, unix.O_WRONLY,
		unix.RESOLVE_BENEATH|unix.RESOLVE_NO_MAGICLINKS|unix.RESOLVE_NO_XDEV)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(value))
	return err
}

// readFile reads a regular file of at most limit bytes; more is left out.
func (r root) readFile(path string, limit int) ([]byte, error) {
	// Not blocking: the image may have put a FIFO there.
	fd, err := r.open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, unix.EINVAL
	}
	var data []byte
	buf := make([]byte, 16<<10)
	for len(data) < limit {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		data = append(data, buf[:n]...)
	}
	return data, nil
}
