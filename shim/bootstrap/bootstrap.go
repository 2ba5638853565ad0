// Package bootstrap is the command line of the shim: `start`, `delete`, -info
// and the server they start. It owns the shim's socket and its life as a
// process; it knows nothing of tasks.
//
// containerd 2.3 changed how it calls `start`. This package serves the old way
// (1.7 to 2.2: options on stdin, the answer is an address, Task version 2) and
// the new one (BootstrapParams and BootstrapResult, Task version 3), and tells
// them apart by what is on stdin.
package bootstrap

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/cgroups/v3/cgroup2"
	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/sys/atomicwriter"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/containerd-pve/containerd-pve/lxc"
	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"github.com/containerd-pve/containerd-pve/lxc/seccomp"
	"github.com/containerd-pve/containerd-pve/lxc/tree"
	"github.com/containerd-pve/containerd-pve/shim/sandbox"
	_ "github.com/containerd-pve/containerd-pve/shim/task" // registers the service
)

// Name is the runtime's name in containerd.
const Name = "io.containerd.pve.v2"

// maxInput bounds what is read from stdin.
const maxInput = 10 << 20

// GroupAnnotation makes the containers of a pod share a shim.
const GroupAnnotation = "io.kubernetes.cri.sandbox-id"

// invocation is the command line. containerd's own package parses it again
// for the server; the flags are the same.
type invocation struct {
	id, namespace, address, bundle string
	debug, version, info           bool
	action                         string
}

func parse(args []string) (*invocation, error) {
	var v invocation
	var ignored string
	fs := flag.NewFlagSet(filepath.Base(args[0]), flag.ContinueOnError)
	fs.BoolVar(&v.debug, "debug", false, "enable debug output in logs")
	fs.BoolVar(&v.version, "v", false, "")
	fs.BoolVar(&v.version, "version", false, "show the version and exit")
	fs.BoolVar(&v.info, "info", false, "print the runtime info as protobuf and exit")
	fs.StringVar(&v.namespace, "namespace", "", "namespace that owns the shim")
	fs.StringVar(&v.id, "id", "", "id of the task")
	fs.StringVar(&v.address, "address", "", "containerd's address")
	fs.StringVar(&v.bundle, "bundle", "", "path of the bundle if not the working directory")
	fs.StringVar(&ignored, "socket", "", "socket path to serve")
	fs.StringVar(&ignored, "debug-socket", "", "ignored")
	fs.StringVar(&ignored, "publish-binary", "", "ignored")
	if err := fs.Parse(args[1:]); err != nil {
		return nil, err
	}
	v.action = fs.Arg(0)
	return &v, nil
}

// Main is the shim's main function. It returns the exit status.
func Main(args []string) int {
	v, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return 2
	}
	ctx := context.Background()
	switch {
	case v.version:
		version, revision := buildVersion()
		fmt.Printf("%s:\n  Version:  %s\n  Revision: %s\n  Go version: %s\n", filepath.Base(args[0]), version, revision, runtime.Version())
		return 0
	case v.action == "start" && !v.info:
		if err := start(namespaces.WithNamespace(ctx, v.namespace), v, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %s\n", Name, err)
			return 1
		}
		return 0
	case v.action != "" && v.action != "delete":
		fmt.Fprintf(os.Stderr, "%s: %q is not an action: start, delete or none\n", Name, v.action)
		return 2
	}
	// The children are waited for where they are started, by os/exec; a reaper
	// would steal their status.
	containerdshim.RunShim(ctx, manager{v}, func(c *containerdshim.Config) { c.NoReaper, c.NoSubreaper = true, true })
	return 0
}

func buildVersion() (version, revision string) {
	version, revision = "(devel)", "unknown"
	if b, ok := debug.ReadBuildInfo(); ok {
		if b.Main.Version != "" {
			version = b.Main.Version
		}
		for _, s := range b.Settings {
			if s.Key == "vcs.revision" {
				revision = s.Value
			}
		}
	}
	return version, revision
}

// request is what `start` was asked for.
type request struct {
	legacy     bool
	socketDir  string
	debug      bool
	address    string
	shimCgroup string
}

// decode tells BootstrapParams from the options that containerd up to 2.2
// writes to stdin. Both are protobuf and many messages decode as both, so it is
// params only if they name the same task as the flags.
func decode(input []byte, v *invocation) (*request, error) {
	r := &request{debug: v.debug, address: v.address}
	var params bootapi.BootstrapParams
	if err := proto.Unmarshal(input, &params); err == nil && params.InstanceID == v.id && params.Namespace == v.namespace {
		r.socketDir = params.GetSocketDir()
		if a := params.ContainerdGrpcAddress; a != "" {
			r.address = a
		}
		level := params.LogLevel
		r.debug = r.debug || level == bootapi.LogLevel_LOG_LEVEL_DEBUG || level == bootapi.LogLevel_LOG_LEVEL_TRACE
		var o runcoptions.Options
		if found, err := params.FindExtension(&o); err != nil {
			return nil, fmt.Errorf("runtime options: %w", err)
		} else if found {
			r.shimCgroup = o.ShimCgroup
		}
		return r, nil
	}
	r.legacy = true
	var a anypb.Any
	if len(input) == 0 {
		return r, nil
	}
	if err := proto.Unmarshal(input, &a); err != nil {
		return nil, fmt.Errorf("stdin holds neither bootstrap parameters of task %q nor options: %w", v.id, errdefs.ErrInvalidArgument)
	}
	// Options that are not known here are the task's to refuse.
	if typeurl.Is(&a, &runcoptions.Options{}) {
		var o runcoptions.Options
		if err := typeurl.UnmarshalTo(&a, &o); err != nil {
			return nil, fmt.Errorf("runtime options: %w", err)
		}
		r.shimCgroup = o.ShimCgroup
	}
	return r, nil
}

// start runs the server, or finds the one of the group, and prints its address.
func start(ctx context.Context, v *invocation, stdin io.Reader, stdout io.Writer) (retErr error) {
	if v.namespace == "" || v.id == "" {
		return fmt.Errorf("-namespace and -id must be given: %w", errdefs.ErrInvalidArgument)
	}
	input, err := io.ReadAll(io.LimitReader(stdin, maxInput))
	if err != nil {
		return fmt.Errorf("read stdin: %w", err)
	}
	r, err := decode(input, v)
	if err != nil {
		return err
	}
	address, err := serve(ctx, v, r)
	if err != nil {
		return err
	}
	answer := []byte(address)
	if !r.legacy {
		answer, err = proto.Marshal(&bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: address})
		if err != nil {
			return err
		}
	}
	_, err = stdout.Write(answer)
	return err
}

func socketRoot(dir string) string {
	if dir == "" {
		return filepath.Join(defaults.DefaultStateDir, "s")
	}
	return dir
}

func serve(ctx context.Context, v *invocation, r *request) (_ string, retErr error) {
	address, err := containerdshim.CreateSocketAddress(ctx, socketRoot(r.socketDir), r.address, group(".", v.id), false)
	if err != nil {
		return "", err
	}
	if r.legacy {
		// containerd up to 1.7 finds the shim again by this file after a restart; later ones
		// write their own, and read this one on the way up from there.
		if err := atomicwriter.WriteFile(filepath.Join(v.bundle, "address"), []byte(address), 0o600); err != nil {
			return "", fmt.Errorf("the shim's address: %w", err)
		}
	}
	socket, err := containerdshim.NewSocket(address)
	if containerdshim.SocketEaddrinuse(err) {
		if containerdshim.CanConnect(address) {
			return address, nil
		}
		if err := containerdshim.RemoveSocket(address); err != nil {
			return "", fmt.Errorf("remove the socket of a dead shim: %w", err)
		}
		socket, err = containerdshim.NewSocket(address)
	}
	if err != nil {
		return "", fmt.Errorf("socket %s: %w", address, err)
	}
	// The file goes with the server, not with this process.
	socket.SetUnlinkOnClose(false)
	defer socket.Close()
	defer func() {
		if retErr != nil {
			_ = containerdshim.RemoveSocket(address)
		}
	}()
	f, err := socket.File()
	if err != nil {
		return "", err
	}
	defer f.Close()
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	args := []string{"-namespace", v.namespace, "-id", v.id, "-address", r.address}
	if r.debug {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2")
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	defer func() {
		if retErr != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}()
	if r.shimCgroup != "" {
		cg, err := cgroup2.Load(r.shimCgroup)
		if err != nil {
			return "", fmt.Errorf("shim cgroup %s: %w", r.shimCgroup, err)
		}
		if err := cg.AddProc(uint64(cmd.Process.Pid)); err != nil {
			return "", fmt.Errorf("shim cgroup %s: %w", r.shimCgroup, err)
		}
	}
	if err := containerdshim.AdjustOOMScore(cmd.Process.Pid); err != nil {
		return "", fmt.Errorf("OOM score of the shim: %w", err)
	}
	return address, nil
}

// group is the id the socket is named by. A shim without a config.json (the
// sandbox controller writes none) serves its own id.
func group(bundle, id string) string {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return id
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if json.Unmarshal(data, &spec) == nil && spec.Annotations[GroupAnnotation] != "" {
		return spec.Annotations[GroupAnnotation]
	}
	return id
}

// manager is what containerd's package asks.
type manager struct{ v *invocation }

func (manager) Name() string { return Name }

// Start is answered before containerd's package is called at all.
func (manager) Start(context.Context, *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	return nil, errdefs.ErrNotImplemented
}

// Stop is `delete`: it removes whatever a task has left, and can be repeated.
func (m manager) Stop(ctx context.Context, id string) (containerdshim.StopStatus, error) {
	bundle := m.v.bundle
	if bundle == "" {
		cwd, err := os.Getwd()
		if err != nil {
			return containerdshim.StopStatus{}, err
		}
		bundle = filepath.Join(filepath.Dir(cwd), id)
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return containerdshim.StopStatus{}, err
	}
	engine, err := lxc.New(lxc.Config{})
	if err != nil {
		return containerdshim.StopStatus{}, err
	}
	exit, err := engine.Cleanup(ctx, ns, id, bundle)
	if err != nil {
		return containerdshim.StopStatus{}, err
	}
	if err := mount.UnmountRecursive(filepath.Join(bundle, "rootfs"), 0); err != nil {
		// Detached it is out of the way at once and gone with its last user.
		if err := mount.UnmountRecursive(filepath.Join(bundle, "rootfs"), unix.MNT_DETACH); err != nil {
			return containerdshim.StopStatus{}, fmt.Errorf("unmount rootfs: %w", err)
		}
	}
	if err := sandbox.RemoveFiles(bundle); err != nil {
		return containerdshim.StopStatus{}, err
	}
	dir, _ := os.Readlink(filepath.Join(bundle, "s"))
	pod := group(bundle, id)
	if address, err := containerdshim.CreateSocketAddress(ctx, socketRoot(dir), m.v.address, pod, false); err == nil {
		if err := dismiss(ctx, address, id, pod); err != nil {
			log.G(ctx).WithError(err).Warnf("the shim of %s, which is to be deleted", id)
		}
	}
	status := containerdshim.StopStatus{ExitStatus: int(exit.Code), ExitedAt: exit.At}
	if data, err := os.ReadFile(filepath.Join(bundle, "init.pid")); err == nil {
		if pid, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil {
			status.Pid = pid
		}
	}
	return status, nil
}

// Info answers -info: what CRI asks a runtime before it uses it.
func (manager) Info(_ context.Context, stdin io.Reader) (*types.RuntimeInfo, error) {
	version, revision := buildVersion()
	info := &types.RuntimeInfo{Name: Name, Version: &types.RuntimeVersion{Version: version, Revision: revision}}
	input, err := io.ReadAll(io.LimitReader(stdin, maxInput))
	if err != nil {
		return nil, err
	}
	if len(input) > 0 {
		info.Options = &anypb.Any{}
		if err := proto.Unmarshal(input, info.Options); err != nil {
			return nil, fmt.Errorf("options on stdin: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	yes, no := true, false
	f := &features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: specs.Version,
		Hooks:         []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"},
		MountOptions:  tree.Known(),
		Linux: &features.Linux{
			Namespaces:   []string{"cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"},
			Cgroup:       &features.Cgroup{V1: &no, V2: &yes, Systemd: &yes, SystemdUser: &no, Rdma: &yes},
			Capabilities: plan.Capabilities,
			Seccomp: &features.Seccomp{
				Enabled: &yes, Actions: names(seccomp.Actions()), Operators: names(seccomp.Operators()), Archs: names(seccomp.Architectures()),
				KnownFlags: names(seccomp.Flags()), SupportedFlags: names(seccomp.Flags()),
			},
			Apparmor:     &features.Apparmor{Enabled: &yes},
			Selinux:      &features.Selinux{Enabled: &yes},
			IntelRdt:     &features.IntelRdt{Enabled: &no},
			MemoryPolicy: &features.MemoryPolicy{Modes: names(lxc.MemoryPolicyModes()), Flags: names(lxc.MemoryPolicyFlags())},
			MountExtensions: &features.MountExtensions{
				IDMap: &features.IDMap{Enabled: &yes},
			},
			NetDevices: &features.NetDevices{Enabled: &yes},
		},
	}
	a, err := typeurl.MarshalAny(f)
	if err != nil {
		return nil, err
	}
	info.Features = &anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()}
	return info, nil
}

// names are the words of a list of one of the runtime spec's types.
func names[T ~string](list []T) []string {
	out := make([]string, len(list))
	for i, n := range list {
		out[i] = string(n)
	}
	return out
}
