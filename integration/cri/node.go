// Package cri is a kubelet's part in the tests: it starts containerd with its CRI plugin and our runtime, and speaks CRI to it.
//
// It owns containerd's configuration while a Node is up, a CNI plugin of its own (a bridge without any way out) and the cgroups
// that a kubelet makes for its pods. It never touches the snapshotter's daemon nor what runs in containerd's other namespaces.
package cri

import (
	"bytes"
	"context"
	_ "embed" // the CNI plugin
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// Handler is the runtime handler that is ours, the default one too.
	Handler = "pve"
	// Socket is containerd's.
	Socket = "/run/containerd/containerd.sock"
	// PauseImage is the sandbox's, of which the process only sleeps.
	PauseImage = "localhost:5000/pause:3.10.2"
	// Gateway is the host's address in the pods' network, 10.87.0.0/16.
	Gateway = "10.87.0.1"

	configFile = "/etc/containerd/config.toml"
	pluginDir  = "/opt/cni/bin"
	netDir     = "/etc/cni/bed.d"
	// logFile is beside those of `stack`, and kept as they are.
	logFile = "/var/log/stack/containerd.log"
	// pidFile is `stack`'s: with it `stack down` ends what was started here.
	pidFile = "/run/stack/containerd.pid"
)

//go:embed bed-cni
var plugin []byte

// Options of a node.
type Options struct {
	// Sandboxer is containerd's: podsandbox, or shim.
	Sandboxer string
	// Systemd has systemd's cgroup driver used.
	Systemd bool
	// Table has the handler's options say so too. Then containerd starts no task of a pod with a user namespace: it takes all
	// options for runc's (containerd's client/task.go, getRuncOptions).
	Table bool
	// Containerd is the version that `stack` knows: 2.4 if empty, 2.2 or 1.7.
	Containerd string
}

// Node is a containerd with its CRI plugin.
type Node struct {
	api.RuntimeServiceClient
	Images api.ImageServiceClient

	options Options
	conn    *grpc.ClientConn
	saved   []byte // the configuration of before
}

// WriteNetwork puts the tests' CNI plugin, and the network that is made by it, into the directories in which a containerd looks for them.
func WriteNetwork(plugins, networks string) error {
	for _, dir := range []string{plugins, networks} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"bed-cni", "loopback"} { // containerd 1.7 asks for the second
		if err := os.WriteFile(filepath.Join(plugins, name), plugin, 0o755); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(networks, "10-bed.conflist"), []byte(`{"cniVersion": "1.0.0", "name": "bed", "plugins": [{"type": "bed-cni"}]}`), 0o644)
}

// Start replaces the containerd that `stack up` started by one with the CRI plugin. Stop takes that back.
func Start(ctx context.Context, o Options) (_ *Node, retErr error) {
	if o.Containerd == "" {
		o.Containerd = "2.4"
	}
	n := &Node{options: o}
	if err := n.stack(); err != nil {
		return nil, err
	}
	var err error
	if n.saved, err = os.ReadFile(configFile); err != nil {
		return nil, err
	}
	if err := WriteNetwork(pluginDir, netDir); err != nil {
		return nil, err
	}
	if err := n.stop(); err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, n.Stop())
		}
	}()
	if err := os.WriteFile(configFile, n.config(), 0o644); err != nil {
		return nil, err
	}
	if n.conn, err = grpc.NewClient("unix://"+Socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, err
	}
	n.RuntimeServiceClient, n.Images = api.NewRuntimeServiceClient(n.conn), api.NewImageServiceClient(n.conn)
	return n, n.start(ctx)
}

// Attach is the node of a containerd that runs already, and is somebody else's: Restart and Stop are not for it. Close ends the connection.
func Attach(o Options) (*Node, error) {
	n := &Node{options: o}
	var err error
	if n.conn, err = grpc.NewClient("unix://"+Socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, err
	}
	n.RuntimeServiceClient, n.Images = api.NewRuntimeServiceClient(n.conn), api.NewImageServiceClient(n.conn)
	return n, nil
}

// Close ends the connection to containerd.
func (n *Node) Close() error { return n.conn.Close() }

// disabled are the plugins that `stack` goes without.
var disabled = regexp.MustCompile(`(?m)^disabled_plugins = .*$`)

// config is `stack`'s with the CRI plugin.
func (n *Node) config() []byte {
	text := `
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'pve-zfs'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'PAUSE'
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['BIN']
  conf_dir = 'CONF'
  use_internal_loopback = true
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = 'HANDLER'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.HANDLER]
  runtime_type = 'io.containerd.pve.v2'
  snapshotter = 'pve-zfs'
  sandboxer = 'SANDBOXER'
`
	switch {
	case n.options.Containerd == "1.7":
		text = `
[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = 'PAUSE'
[plugins.'io.containerd.grpc.v1.cri'.cni]
  bin_dir = 'BIN'
  conf_dir = 'CONF'
[plugins.'io.containerd.grpc.v1.cri'.containerd]
  snapshotter = 'pve-zfs'
  default_runtime_name = 'HANDLER'
[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.HANDLER]
  runtime_type = 'io.containerd.pve.v2'
`
	case n.options.Sandboxer == "shim":
		text = strings.Replace(text, "  sandboxer = ", "  disable_pause_image_pull = true\n  sandboxer = ", 1)
	}
	if n.options.Table {
		text += "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.HANDLER.options]\n  SystemdCgroup = true\n"
	}
	text = strings.NewReplacer("PAUSE", PauseImage, "BIN", pluginDir, "CONF", netDir, "HANDLER", Handler, "SANDBOXER", n.options.Sandboxer).Replace(text)
	return append(disabled.ReplaceAll(n.saved, nil), text...)
}

// stack has the containerd of that version, without CRI, and our daemon run.
func (n *Node) stack() error {
	if out, err := exec.Command("stack", "up", "--containerd", n.options.Containerd).CombinedOutput(); err != nil {
		return fmt.Errorf("stack up: %w\n%s", err, out)
	}
	return nil
}

func (n *Node) bin() string {
	switch n.options.Containerd {
	case "1.7":
		return "/opt/containerd-1.7/usr/bin"
	case "2.2":
		return "/opt/containerd-2.2/bin"
	}
	return "/usr/local/bin"
}

// start starts containerd and waits until its CRI plugin is ready.
func (n *Node) start(ctx context.Context) error {
	log, err := os.OpenFile(logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(n.bin(), "containerd"), "--config", configFile)
	cmd.Env = append(os.Environ(), "PATH="+n.bin()+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	if err != nil {
		return err
	}
	// The name may hold anything but a second ")"; field 22 is the start time.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if err := os.WriteFile(pidFile, fmt.Appendf(nil, "%d %s\n", cmd.Process.Pid, fields[19]), 0o644); err != nil {
		return err
	}
	for {
		answer, err := n.Status(ctx, &api.StatusRequest{})
		ready := err == nil
		for _, c := range answer.GetStatus().GetConditions() {
			ready = ready && c.Status
		}
		if ready {
			return nil
		}
		select {
		case err := <-ended:
			return fmt.Errorf("containerd ended: %w; see %s", err, logFile)
		case <-ctx.Done():
			return fmt.Errorf("containerd's CRI plugin is not ready (%v): %w", answer.GetStatus().GetConditions(), errors.Join(err, ctx.Err()))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// stop ends containerd as `stack` would.
func (n *Node) stop() error {
	text, err := os.ReadFile(pidFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.Fields(string(text))[0])
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop containerd: %w", err)
	}
	for end := time.Now().Add(20 * time.Second); syscall.Kill(pid, 0) == nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("containerd (pid %d) does not end", pid)
		}
	}
	return os.Remove(pidFile)
}

// Restart ends containerd, calls meanwhile, and starts it again.
func (n *Node) Restart(ctx context.Context, meanwhile func()) error {
	if err := n.stop(); err != nil {
		return err
	}
	meanwhile()
	return n.start(ctx)
}

// Stop brings the containerd of before back.
func (n *Node) Stop() error {
	if n.conn != nil {
		n.conn.Close()
	}
	err := n.stop()
	if werr := os.WriteFile(configFile, n.saved, 0o644); werr != nil {
		return errors.Join(err, werr)
	}
	err = errors.Join(err, n.stack())
	_ = exec.Command("ip", "link", "del", "bed-cni").Run() // it is there only once a pod was
	return err
}
