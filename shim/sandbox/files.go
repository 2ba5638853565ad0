package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd-pve/containerd-pve/lxc"
)

// What the pod's containers share, in the sandbox's bundle.
const (
	hostnameFile = "hostname"
	hostsFile    = "hosts"
	resolvFile   = "resolv.conf"
	shmDir       = "shm"

	shm     = "/dev/shm"
	shmData = "mode=1777,size=67108864" // as containerd's
)

// shared is where a container has them.
var shared = map[string]string{"/etc/hostname": hostnameFile, "/etc/hosts": hostsFile, "/etc/resolv.conf": resolvFile}

// linux is the real engine.
type linux struct{}

func (linux) Hold(ctx context.Context, config lxc.Config, o lxc.PodOptions) (Holder, error) {
	r, err := lxc.New(config)
	if err != nil {
		return nil, err
	}
	p, err := r.CreatePod(ctx, o)
	if err != nil {
		return nil, err
	}
	return p, nil
}

func (linux) Files(dir string, pod *cri.PodSandboxConfig) error {
	name := pod.GetHostname()
	var err error
	if name == "" {
		if name, err = os.Hostname(); err != nil {
			return err
		}
	}
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	resolv := []byte(resolvConf(pod.GetDnsConfig()))
	if pod.GetDnsConfig() == nil {
		if resolv, err = os.ReadFile("/etc/resolv.conf"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for file, text := range map[string][]byte{hostnameFile: []byte(name + "\n"), hostsFile: hosts, resolvFile: resolv} {
		if err := os.WriteFile(filepath.Join(dir, file), text, 0o644); err != nil {
			return err
		}
	}
	if pod.GetLinux().GetSecurityContext().GetNamespaceOptions().GetIpc() == cri.NamespaceMode_NODE {
		return nil // the host's
	}
	target := filepath.Join(dir, shmDir)
	if err := os.Mkdir(target, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.Mount("shm", target, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, shmData); err != nil {
		return fmt.Errorf("mount the pod's %s: %w", shm, err)
	}
	return nil
}

func (linux) RemoveFiles(dir string) error { return RemoveFiles(dir) }

// RemoveFiles takes away what a pod's containers share: the rest goes with the bundle. It can be repeated.
func RemoveFiles(bundle string) error {
	target := filepath.Join(bundle, shmDir)
	if err := mount.UnmountRecursive(target, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the pod's %s: %w", shm, err)
	}
	for _, file := range append([]string{shmDir}, hostnameFile, hostsFile, resolvFile) {
		if err := os.Remove(filepath.Join(bundle, file)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Join gives a container what it shares with the others of the pod, unless its spec has a mount of its own there.
func (s *Service) Join(spec *specs.Spec) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != ready {
		return
	}
	mounted := func(path string) int {
		return slices.IndexFunc(spec.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == path })
	}
	readonly := "rw"
	if spec.Root != nil && spec.Root.Readonly {
		readonly = "ro"
	}
	for path, file := range shared {
		if mounted(path) < 0 {
			spec.Mounts = append(spec.Mounts, specs.Mount{Type: "bind", Destination: path, Source: filepath.Join(s.bundle, file), Options: []string{"rbind", "rprivate", readonly}})
		}
	}
	if s.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetIpc() == cri.NamespaceMode_NODE {
		return // containerd has mounted the host's
	}
	m := specs.Mount{Type: "bind", Destination: shm, Source: filepath.Join(s.bundle, shmDir), Options: []string{"rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"}}
	switch i := mounted(shm); {
	case i < 0:
		spec.Mounts = append(spec.Mounts, m)
	case spec.Mounts[i].Type == "tmpfs": // containerd's default
		spec.Mounts[i] = m
	}
}
