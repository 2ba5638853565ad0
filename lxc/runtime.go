// Package lxc runs one OCI container as an LXC container.
//
// It owns the translation of an OCI spec into an LXC configuration and plans
// for pve-init (pure functions), the lxc-start process that monitors the
// container, its cgroup, its processes and their exact exit status. It never
// touches containerd, image layers, stdio other than the files it is handed,
// or the mount of the root file system: callers mount and unmount that.
//
// # What lies where
//
//	<bundle>/lxc/state.json    what must be undone; written before the first effect
//	<bundle>/lxc/exit          the exit status, once known
//	<bundle>/lxc/lxc.log       liblxc's warnings
//	<bundle>/lxc/monitor/      the private monitor FIFO liblxc reports the exit on
//	<lxcpath>/<name>/config    the LXC configuration, so that lxc-ls shows the container
//	<cgroup>                   the OCI cgroup X: limits, statistics
//	<cgroup>/payload           made and removed by liblxc; the container's processes, their freezer
package lxc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// The main goroutine keeps the process's first thread. Threads that entered
// another namespace are thrown away when their goroutine ends, which the first
// thread of a process cannot be: it would stay behind and pin the namespace.
func init() { runtime.LockOSThread() }

// DefaultPath is the lxcpath on a host without Proxmox.
const DefaultPath = "/var/lib/containerd-pve/lxc"

// Config says where things are on this host. Empty fields take their default.
type Config struct {
	// Path is the lxcpath; DefaultPath if empty.
	Path string
	// Start is the lxc-start program; searched in PATH if empty.
	Start string
	// Init is the pve-init program; searched beside the running executable,
	// then in PATH if empty.
	Init string
}

// Stdio is what a process gets as its fds 0 to 2. A nil file is /dev/null.
// With Terminal in the spec they are ignored: take Process.Console instead.
// Create and Exec hand the files to the child; the caller closes its copies
// after the call has returned, whatever it returned.
type Stdio struct {
	Stdin, Stdout, Stderr *os.File
}

// CreateOptions is what a container is made from.
type CreateOptions struct {
	// Namespace and ID are containerd's.
	Namespace, ID string
	// Name is LXC's; made of the two if empty.
	Name string
	// Interfaces are made in the container's own network namespace.
	Interfaces []Veth
	// InnerLimits has memory and cpu limited where Proxmox changes the limits.
	InnerLimits bool
	// Bundle is the absolute path of the OCI bundle; State is kept below Bundle/lxc.
	Bundle string
	// Rootfs is the absolute path of the mounted root file system.
	Rootfs string
	// Spec is the parsed config.json.
	Spec *specs.Spec
	// StopSignal is what lxc-stop(1) sends first; SIGTERM if 0. liblxc's own, SIGPWR, is
	// none that an image's program would know.
	StopSignal int
	// SystemdCgroup has systemd make the container's cgroup.
	SystemdCgroup bool
	// Stdio of the container's init.
	Stdio Stdio
}

// Veth is an interface of a container, whose other end is at a bridge of the host's.
type Veth struct {
	Name      string // in the container
	Host      string // the other end
	Bridge    string
	HWAddr    string
	MTU, VLAN int            // 0: not said
	Addresses []netip.Prefix // of both kinds
	GW4, GW6  netip.Addr     // not valid: none
}

// ExitStatus is how a process ended.
type ExitStatus struct {
	// Code is the exit code, or 128 + the signal's number.
	Code uint32 `json:"code"`
	// At is when it was seen to end.
	At time.Time `json:"at"`
}

// Runtime is where containers are kept on this host. Make it with New.
type Runtime struct {
	config Config

	mu   sync.Mutex
	init *initProgram // opened on first use
}

// New returns a Runtime. It checks nothing that a mere Cleanup does not need,
// so that a host that lost lxc-start can still be cleaned.
func New(config Config) (*Runtime, error) {
	if config.Path == "" {
		config.Path = DefaultPath
	}
	if !filepath.IsAbs(config.Path) {
		return nil, fmt.Errorf("lxcpath %q is not absolute: %w", config.Path, errdefs.ErrInvalidArgument)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err != nil {
		return nil, fmt.Errorf("statfs %s: %w", cgroupRoot, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, fmt.Errorf("%s is not cgroup v2, boot with systemd.unified_cgroup_hierarchy=1: %w", cgroupRoot, errdefs.ErrFailedPrecondition)
	}
	return &Runtime{config: config}, nil
}

// Name is the LXC name of a container. containerd's identifiers hold single
// separators only, so the double one keeps the pair apart.
func Name(namespace, id string) (string, error) {
	name := namespace + "--" + id
	if namespace == "" || id == "" || strings.ContainsAny(name, "/\x00\n") || len(name) > 200 {
		return "", fmt.Errorf("namespace %q and container id %q make no LXC name: %w", namespace, id, errdefs.ErrInvalidArgument)
	}
	return name, nil
}

// program finds an executable by explicit path, beside ourselves, or in PATH.
func program(explicit, name, hint string) (string, error) {
	if explicit != "" {
		return explicit, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if unix.Access(beside, unix.X_OK) == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is not in PATH, %s: %w", name, hint, errdefs.ErrFailedPrecondition)
	}
	return filepath.Abs(path)
}

// AnnotationRollback is of the spec of a container that a rollback has begun to take back
// to the state of that name and has not ended: no task of it may begin.
const AnnotationRollback = "io.containerd.pve.rollback"

// InitProgram is the path of pve-init: explicit, or the one beside this program, or in
// PATH. Errors: FailedPrecondition.
func InitProgram(explicit string) (string, error) {
	return program(explicit, "pve-init", "install it beside containerd-shim-pve-v2")
}

func (r *Runtime) openInit() (*initProgram, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.init != nil {
		return r.init, nil
	}
	path, err := InitProgram(r.config.Init)
	if err != nil {
		return nil, err
	}
	r.init, err = openInitProgram(path)
	return r.init, err
}

// Create makes the container's cgroup and LXC container and returns when
// pve-init has reported that everything before the exec is in place. Of the
// errors, AlreadyExists means that the container runs already, InvalidArgument
// that the spec makes no sense, NotImplemented that it asks for what cannot be
// applied (naming the field), NotFound that the entrypoint is not in the image,
// FailedPrecondition that the host lacks something. On error nothing is left
// behind but Bundle/lxc.
func (r *Runtime) Create(ctx context.Context, o CreateOptions) (_ *Container, retErr error) {
	name := o.Name
	if name == "" {
		var err error
		if name, err = Name(o.Namespace, o.ID); err != nil {
			return nil, err
		}
	}
	pveInit, err := r.openInit()
	if err != nil {
		return nil, err
	}
	start, err := program(r.config.Start, "lxc-start", "install LXC (apt-get install lxc)")
	if err != nil {
		return nil, err
	}
	st := state{
		Namespace: o.Namespace, ID: o.ID, Name: name, LXCPath: r.config.Path,
	}
	if o.Spec, err = hostFacts(ctx, o.Spec); err != nil {
		return nil, err
	}
	t, err := translate(o, name)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkHost(o.Spec.Process), checkIntelRdt(o.Spec.Linux.IntelRdt)); err != nil {
		return nil, err
	}
	warn(ctx, o.Spec.Process)
	st.Cgroup, st.Unit = t.cgroup, t.unit
	if f := t.process.Seccomp; f != nil {
		if err := checkListener(o.Spec.Linux.Seccomp, f.Notify); err != nil {
			return nil, err
		}
	}

	if err := r.claim(&st); err != nil {
		return nil, err
	}
	var c *Container
	defer func() {
		if retErr != nil {
			// The caller's context may be what failed.
			cleanCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			if err := st.erase(cleanCtx, o.Bundle); err != nil {
				retErr = errors.Join(retErr, err)
			}
			if c != nil && c.hooked {
				poststop(cleanCtx, &o)
			}
		}
	}()
	if err := st.write(o.Bundle); err != nil {
		return nil, err
	}

	if t.user != nil {
		if err := t.user.openPaths(r.config.Path, o.Bundle); err != nil {
			return nil, err
		}
	}
	cg, err := createCgroup(ctx, t.cgroup, t.unit, pveInit, o.Spec.Linux.Resources, t.resources, o.InnerLimits)
	if err != nil {
		return nil, err
	}
	c = &Container{
		Process:   newProcess(),
		runtime:   r,
		state:     st,
		bundle:    o.Bundle,
		spec:      o.Spec,
		cgroup:    cg,
		sharedPID: t.sharedPID,
		user:      t.user,
		enter:     t.enter(),
	}
	defer func() {
		if retErr != nil {
			cg.holder.release()
		}
	}()
	if err := os.WriteFile(filepath.Join(st.LXCPath, name, "config"), []byte(t.config), 0o640); err != nil {
		return nil, err
	}
	// liblxc opens the root's /dev before our hook could make it. The image is
	// hostile: the path is resolved inside the root.
	if err := makeDev(o.Rootfs, t.user); err != nil {
		return nil, err
	}
	trees, err := prepareTrees(t, pveInit, filepath.Join(stateDir(o.Bundle), monitorDir))
	if err != nil {
		return nil, err
	}
	defer trees.close()
	if err := c.launch(ctx, start, pveInit, t, trees, &o); err != nil {
		return nil, err
	}
	return c, nil
}

// Cleanup ends whatever is left of the container, without a live Container:
// the shim's `delete`. It can be repeated, and does not unmount Bundle/rootfs.
// The status is the true one if it is known, else 137 if the container was
// killed here, else 255.
func (r *Runtime) Cleanup(ctx context.Context, namespace, id, bundle string) (ExitStatus, error) {
	exit, known := readExit(bundle)
	st, err := readState(bundle)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return exit, err
	case st.Namespace != namespace || st.ID != id:
		return exit, fmt.Errorf("bundle %s belongs to %s/%s and not to %s/%s: %w", bundle, st.Namespace, st.ID, namespace, id, errdefs.ErrFailedPrecondition)
	default:
		alive := populated(cgroupDir(st.Cgroup))
		if err := st.erase(ctx, bundle); err != nil {
			return exit, err
		}
		// Once: the state is gone now.
		switch spec, err := readSpec(bundle); {
		case err == nil:
			poststop(ctx, &CreateOptions{ID: id, Bundle: bundle, Spec: spec})
		case !errors.Is(err, os.ErrNotExist): // a pod has none
			log.G(ctx).WithError(err).Warnf("container %s: its poststop hooks", id)
		}
		if !known && alive {
			exit, known = ExitStatus{Code: 128 + uint32(unix.SIGKILL), At: time.Now()}, true
			if err := writeJSON(filepath.Join(stateDir(bundle), exitFile), exit); err != nil {
				return exit, err
			}
		}
	}
	if !known {
		exit = ExitStatus{Code: 255, At: time.Now()}
	}
	return exit, nil
}

// readSpec reads the bundle's config.json.
func readSpec(bundle string) (*specs.Spec, error) {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, err
	}
	var spec specs.Spec
	return &spec, json.Unmarshal(data, &spec)
}

// claim makes the container's directory below the lxcpath, whose existence
// reserves the name.
func (r *Runtime) claim(st *state) error {
	if err := os.MkdirAll(r.config.Path, 0o711); err != nil {
		return err
	}
	dir := filepath.Join(r.config.Path, st.Name)
	err := os.Mkdir(dir, 0o750)
	if errors.Is(err, os.ErrExist) {
		// Left by a crash, or in use: a monitor tells.
		if slices.ContainsFunc(append(st.monitorCgroups(), st.Cgroup), func(c string) bool { return populated(cgroupDir(c)) }) {
			return fmt.Errorf("container %s runs already as LXC container %s: %w", st.ID, st.Name, errdefs.ErrAlreadyExists)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if populated(cgroupDir(st.Cgroup)) {
		_ = os.Remove(dir)
		return fmt.Errorf("cgroup %s of container %s has processes in it already: %w", st.Cgroup, st.ID, errdefs.ErrAlreadyExists)
	}
	return nil
}

// makeDev makes the directory /dev in the root if it is missing. On a read-only
// root that lacks it there is nothing to be done, and liblxc says so.
func makeDev(rootfs string, user *userNamespace) error {
	err := pathrs.MkdirAll(rootfs, "dev", 0o755)
	if errors.Is(err, unix.EOVERFLOW) && user != nil {
		// A mount that maps ids takes files of those that it maps only.
		err = user.asRoot(func() error { return pathrs.MkdirAll(rootfs, "dev", 0o755) })
	}
	if err != nil && !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("make /dev in %s: %w", rootfs, err)
	}
	return nil
}

// typed turns pve-init's report into an error of errdefs.
func typed(e *plan.Error) error {
	var kind error = errdefs.ErrInternal
	switch e.Kind {
	case plan.ErrorInvalid:
		kind = errdefs.ErrInvalidArgument
	case plan.ErrorNotFound:
		kind = errdefs.ErrNotFound
	case plan.ErrorPermission:
		kind = errdefs.ErrPermissionDenied
	}
	return &initError{e.Message, kind}
}

// initError says what pve-init said; that is enough for people, who need not
// read the name of its kind after it.
type initError struct {
	message string
	kind    error
}

func (e *initError) Error() string { return e.message }
func (e *initError) Unwrap() error { return e.kind }
