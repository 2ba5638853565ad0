package template

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/user"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// Image is what a template is made of.
type Image struct {
	Name   string        // its reference
	Digest digest.Digest // of what the reference stands for
	// Layer is the snapshot of its top layer, dataset@name, and Chain what containerd
	// calls that: namespace/chain id.
	Layer, Chain string
	// Blob is its config as the registry has it, Config what that says.
	Blob   []byte
	Config ocispec.Image
}

// systemInit is what a whole system boots by, and Proxmox's own default.
const systemInit = "/sbin/init"

// maxFile is how much is read of a file of the image's; it may bring any size.
const maxFile = 4 << 20

// process is what a container of the image is to run, by the files of its root. An
// image that names no command is a whole system with an init. Errors: FailedPrecondition,
// it has neither; InvalidArgument, its user is none.
func (i Image) process(root *os.File) (plan.Process, error) {
	c := i.Config.Config
	p := plan.Process{Args: append(append([]string{}, c.Entrypoint...), c.Cmd...), Env: c.Env, Cwd: path.Join("/", c.WorkingDir)}
	if len(p.Args) == 0 {
		if err := executable(root, systemInit); err != nil {
			return p, fmt.Errorf("image %s names no command and has no %s to boot: %w: %w", i.Name, systemInit, err, errdefs.ErrFailedPrecondition)
		}
		p.Args = []string{systemInit}
		if c.User == "" { // the kernel gives an init no groups either
			return p, nil
		}
	}
	passwd, err := readFile(root, "/etc/passwd")
	if err != nil {
		return p, err
	}
	group, err := readFile(root, "/etc/group")
	if err != nil {
		return p, err
	}
	u, err := user.GetExecUser(c.User, nil, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return p, fmt.Errorf("user %q of image %s: %w: %w", c.User, i.Name, err, errdefs.ErrInvalidArgument)
	}
	p.UID, p.GID = uint32(u.Uid), uint32(u.Gid)
	for _, g := range u.Sgids {
		p.Groups = append(p.Groups, uint32(g))
	}
	return p, nil
}

// missing is what would keep the process from being executed; empty if nothing is known that would.
func missing(root *os.File, p plan.Process) string {
	name := p.Args[0]
	if strings.Contains(name, "/") {
		if !path.IsAbs(name) {
			name = path.Join(p.Cwd, name)
		}
		if err := executable(root, name); err != nil {
			return err.Error()
		}
		return ""
	}
	dirs := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, v := range p.Env {
		if after, ok := strings.CutPrefix(v, "PATH="); ok {
			dirs = after
		}
	}
	for dir := range strings.SplitSeq(dirs, ":") {
		if dir != "" && executable(root, path.Join(dir, name)) == nil {
			return ""
		}
	}
	return fmt.Sprintf("%s is not in %s", name, dirs)
}

// executable wants a file that root may execute. Symbolic links stay below root.
func executable(root *os.File, name string) error {
	f, err := pathrs.OpenatInRoot(root, name)
	if errors.Is(err, os.ErrNotExist) {
		err = os.ErrNotExist // it says much of how it looked
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("%s is not an executable file (%s)", name, info.Mode())
	}
	return nil
}

// readFile is empty for what is no file.
func readFile(root *os.File, name string) ([]byte, error) {
	h, err := pathrs.OpenatInRoot(root, name)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer h.Close()
	if info, err := h.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, err
	}
	f, err := pathrs.Reopen(h, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return data, nil
}

// express writes the process into a conf, if that can say all of it: Proxmox has
// words for a command of root's in the root directory. Without, pve-init is the command.
func express(conf *pve.Conf, host pve.Host, p plan.Process) (all bool, err error) {
	line, ok := pve.Entrypoint(p.Args)
	var entries []pve.Entry
	for _, v := range p.Env {
		e, sayable := pve.Variable(v)
		ok, entries = ok && sayable, append(entries, e)
	}
	if ok && host.Env && p.UID == 0 && p.GID == 0 && len(p.Groups) == 0 && p.Cwd == "/" {
		return true, errors.Join(conf.Set("entrypoint", line), conf.SetLXC(append(conf.LXC(), entries...)))
	}
	if host.Env {
		return false, conf.Set("entrypoint", plan.BootInit+" boot")
	}
	return false, conf.SetLXC(append(conf.LXC(), pve.Entry{Key: "lxc.init.cmd", Value: plan.BootInit + " boot"}))
}
