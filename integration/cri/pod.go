package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	api "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is a pod that runs.
type Pod struct {
	ID     string
	Config *api.PodSandboxConfig

	node *Node
}

// Container is one of a pod's.
type Container struct {
	ID     string
	Config *api.ContainerConfig

	pod *Pod
}

var pods atomic.Int64

// RunPod starts a pod as a kubelet would: with a cgroup and a directory of logs of its own, and the kernel's namespaces, but for that of
// processes, for all its containers. change may be nil. Remove takes it away, also if this fails.
func (n *Node) RunPod(ctx context.Context, name string, change func(*api.PodSandboxConfig)) (*Pod, error) {
	uid := fmt.Sprintf("%s-%d", name, pods.Add(1))
	c := &api.PodSandboxConfig{
		Metadata: &api.PodSandboxMetadata{Name: name, Uid: uid, Namespace: "bed"},
		Hostname: name, LogDirectory: filepath.Join("/var/log/pods", uid),
		DnsConfig: &api.DNSConfig{Servers: []string{"10.87.0.53"}, Searches: []string{"bed.local"}},
		Labels:    map[string]string{"io.kubernetes.pod.uid": uid},
		Linux: &api.LinuxPodSandboxConfig{SecurityContext: &api.LinuxSandboxSecurityContext{
			NamespaceOptions: &api.NamespaceOption{Pid: api.NamespaceMode_CONTAINER},
			Seccomp:          &api.SecurityProfile{ProfileType: api.SecurityProfile_RuntimeDefault},
		}},
	}
	p := &Pod{Config: c, node: n}
	if n.options.Systemd {
		c.Linux.CgroupParent = "/kubepods.slice/kubepods-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
		if out, err := exec.CommandContext(ctx, "systemctl", "start", filepath.Base(c.Linux.CgroupParent)).CombinedOutput(); err != nil {
			return p, fmt.Errorf("systemctl start: %w\n%s", err, out)
		}
	} else {
		c.Linux.CgroupParent = "/kubepods/pod" + uid
		if err := makeCgroup(c.Linux.CgroupParent); err != nil {
			return p, err
		}
	}
	if change != nil {
		change(c)
	}
	answer, err := n.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Config: c, RuntimeHandler: Handler})
	if err != nil {
		return p, err
	}
	p.ID = answer.PodSandboxId
	return p, nil
}

// makeCgroup makes a cgroup whose children may have every controller, as a kubelet does.
func makeCgroup(path string) error {
	dir := "/sys/fs/cgroup"
	for _, part := range strings.Split(strings.Trim(path, "/"), "/") {
		controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return err
		}
		if list := strings.Fields(string(controllers)); len(list) > 0 {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+strings.Join(list, " +")), 0); err != nil {
				return err
			}
		}
		dir = filepath.Join(dir, part)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// Cgroup is the pod's directory in the cgroup filesystem.
func (p *Pod) Cgroup() string { return filepath.Join("/sys/fs/cgroup", p.Config.Linux.CgroupParent) }

// Create makes a container that runs args. change may be nil.
func (p *Pod) Create(ctx context.Context, name, image string, args []string, change func(*api.ContainerConfig)) (*Container, error) {
	c := &api.ContainerConfig{
		Metadata: &api.ContainerMetadata{Name: name}, Image: &api.ImageSpec{Image: image}, Command: args, LogPath: name + ".log",
		Linux: &api.LinuxContainerConfig{
			Resources: &api.LinuxContainerResources{},
			SecurityContext: &api.LinuxContainerSecurityContext{
				NamespaceOptions: p.Config.Linux.SecurityContext.NamespaceOptions,
				Seccomp:          &api.SecurityProfile{ProfileType: api.SecurityProfile_RuntimeDefault},
			},
		},
	}
	if change != nil {
		change(c)
	}
	answer, err := p.node.CreateContainer(ctx, &api.CreateContainerRequest{PodSandboxId: p.ID, Config: c, SandboxConfig: p.Config})
	if err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	return &Container{ID: answer.ContainerId, Config: c, pod: p}, nil
}

// Start is Create and start.
func (p *Pod) Start(ctx context.Context, name, image string, args []string, change func(*api.ContainerConfig)) (*Container, error) {
	c, err := p.Create(ctx, name, image, args, change)
	if err != nil {
		return nil, err
	}
	if _, err := p.node.StartContainer(ctx, &api.StartContainerRequest{ContainerId: c.ID}); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	return c, nil
}

// Status is what CRI says of the pod.
func (p *Pod) Status(ctx context.Context) (*api.PodSandboxStatus, error) {
	answer, err := p.node.PodSandboxStatus(ctx, &api.PodSandboxStatusRequest{PodSandboxId: p.ID})
	return answer.GetStatus(), err
}

// Stop stops the pod, as often as one likes.
func (p *Pod) Stop(ctx context.Context) error {
	_, err := p.node.StopPodSandbox(ctx, &api.StopPodSandboxRequest{PodSandboxId: p.ID})
	return err
}

// Remove stops and removes the pod with all that a kubelet made for it. It can be repeated.
func (p *Pod) Remove(ctx context.Context) error {
	if p.ID != "" {
		if err := p.Stop(ctx); err != nil {
			return fmt.Errorf("stop: %w", err)
		}
		if _, err := p.node.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
		p.ID = ""
	}
	if err := os.RemoveAll(p.Config.LogDirectory); err != nil {
		return err
	}
	if p.node.options.Systemd {
		if out, err := exec.CommandContext(ctx, "systemctl", "stop", filepath.Base(p.Config.Linux.CgroupParent)).CombinedOutput(); err != nil {
			return fmt.Errorf("systemctl stop: %w\n%s", err, out)
		}
		return nil
	}
	// What is left in it keeps it from being removed.
	if err := os.Remove(p.Cgroup()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the pod's cgroup: %w", err)
	}
	return nil
}

// Status is what CRI says of the container.
func (c *Container) Status(ctx context.Context) (*api.ContainerStatus, error) {
	answer, err := c.pod.node.ContainerStatus(ctx, &api.ContainerStatusRequest{ContainerId: c.ID})
	return answer.GetStatus(), err
}

// Exec runs a command in the container and answers its output, both streams, and its exit code.
func (c *Container) Exec(ctx context.Context, args ...string) (string, int32, error) {
	answer, err := c.pod.node.ExecSync(ctx, &api.ExecSyncRequest{ContainerId: c.ID, Cmd: args, Timeout: 60})
	return string(answer.GetStdout()) + string(answer.GetStderr()), answer.GetExitCode(), err
}

// Stop stops the container within the grace period.
func (c *Container) Stop(ctx context.Context, grace time.Duration) error {
	_, err := c.pod.node.StopContainer(ctx, &api.StopContainerRequest{ContainerId: c.ID, Timeout: int64(grace.Seconds())})
	return err
}

// Remove removes the container, which is stopped if it runs.
func (c *Container) Remove(ctx context.Context) error {
	_, err := c.pod.node.RemoveContainer(ctx, &api.RemoveContainerRequest{ContainerId: c.ID})
	return err
}

// Log is the container's log, without times and tags.
func (c *Container) Log() (string, error) {
	text, err := os.ReadFile(filepath.Join(c.pod.Config.LogDirectory, c.Config.LogPath))
	var out strings.Builder
	for line := range strings.Lines(string(text)) {
		// "TIME stdout F text"
		if parts := strings.SplitN(line, " ", 4); len(parts) == 4 {
			out.WriteString(parts[3])
		}
	}
	return out.String(), err
}
