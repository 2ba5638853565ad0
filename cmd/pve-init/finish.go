package main

import (
	"strconv"
	"strings"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/tree"
	"golang.org/x/sys/unix"
)

// maxMountinfo bounds what is read of /proc/self/mountinfo: as many mounts as a
// mount namespace may have by default, and more.
const maxMountinfo = 64 << 20

// finish is what init does once liblxc is done with the root: liblxc makes every
// mount shared after the pivot, which the spec does not ask for.
func (r root) finish(p *plan.Finish) error {
	change, asked := tree.ParsePropagation(p.Propagation)
	if !asked && p.Propagation != "" {
		return fail(plan.ErrorInvalid, "linux.rootfsPropagation: unknown value "+p.Propagation)
	}
	changes := []tree.Propagation{tree.SlaveBelow}
	if asked {
		changes = append(changes, change)
	}
	shared, err := r.sharedMounts(p)
	if err != nil {
		return err
	}
	if len(shared) == 0 {
		err = tree.Propagate(r.fd, changes...)
	} else {
		err = r.propagateBeside(shared, changes)
	}
	if err != nil {
		return failed(plan.ErrorInvalid, "linux.rootfsPropagation", err)
	}
	for i := range p.Mounts {
		m := &p.Mounts[i]
		err := func() error {
			fd, err := r.open(m.Destination, unix.O_PATH)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			o := tree.Parse(m)
			return tree.Propagate(fd, o.Propagation...)
		}()
		if err != nil {
			return failed(plan.ErrorInvalid, "mounts ("+m.Destination+")", err)
		}
	}
	return nil
}

// sharedMount is one that is to stay in the peer group of its source on the
// host. Once out of it, there is no way back in.
type sharedMount struct {
	path  string
	below bool // so are the mounts below it
}

func (r root) sharedMounts(p *plan.Finish) ([]sharedMount, error) {
	var out []sharedMount
	for i := range p.Mounts {
		m := &p.Mounts[i]
		o := tree.Parse(m)
		shared, below := o.Shared()
		if !shared || !o.Bind {
			continue
		}
		fd, err := r.open(m.Destination, unix.O_PATH)
		if err != nil {
			return nil, failed(plan.ErrorInvalid, "mounts ("+m.Destination+")", err)
		}
		path, err := fdPath(fd)
		unix.Close(fd)
		if err != nil {
			return nil, failed(plan.ErrorInternal, "mounts ("+m.Destination+")", err)
		}
		out = append(out, sharedMount{path, below})
	}
	return out, nil
}

// propagateBeside changes all mounts but those, one by one: there is no call
// that leaves some out. A mount that is covered by another one is not found by
// its path and stays as it is, the only one of its peer group.
func (r root) propagateBeside(shared []sharedMount, changes []tree.Propagation) error {
	proc, err := r.procFS()
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	text, err := root{proc}.readFile("thread-self/mountinfo", maxMountinfo)
	if err != nil {
		return err
	}
mounts:
	for line := range strings.SplitSeq(string(text), "\n") {
		fields := strings.SplitN(line, " ", 6)
		if len(fields) < 6 {
			continue
		}
		path := unescape(fields[4])
		for _, s := range shared {
			if path == s.path || s.below && strings.HasPrefix(path, s.path+"/") {
				continue mounts
			}
		}
		if err := r.propagateOne(path, fields[0], changes, path == "/"); err != nil {
			return failed(plan.ErrorInvalid, path, err)
		}
	}
	return nil
}

// propagateOne changes the mount at path if it is the one of that id.
func (r root) propagateOne(path, id string, changes []tree.Propagation, isRoot bool) error {
	fd, err := r.open(path, unix.O_PATH)
	if err == unix.ENOENT || err == unix.EACCES || err == unix.ENOTDIR {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return err
	}
	if strconv.FormatUint(st.Mnt_id, 10) != id {
		return nil
	}
	for _, c := range changes {
		one, below := c.One()
		if !isRoot && !below {
			continue
		}
		if err := tree.Propagate(fd, one); err != nil {
			return err
		}
	}
	return nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
