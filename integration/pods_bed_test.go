//go:build bed

package integration

import (
	"context"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd-pve/containerd-pve/integration/cri"
)

// TestProxmoxPods: each container of a pod is one of Proxmox's, with the pod's tag, and nothing else of the pod is, however
// containerd has it kept.
func TestProxmoxPods(t *testing.T) {
	proxmox(t)
	for _, sandboxer := range []string{"podsandbox", "shim"} {
		t.Run(sandboxer, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			t.Cleanup(cancel)
			node, err := cri.Start(ctx, cri.Options{Sandboxer: sandboxer})
			must(t, err)
			t.Cleanup(func() { must(t, node.Stop()) })
			_, err = node.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: busybox}})
			must(t, err)
			pod, err := node.RunPod(ctx, "web-7d9c", nil)
			defer func() { must(t, pod.Remove(ctx)) }()
			must(t, err)
			for _, name := range []string{"one", "two"} {
				_, err := pod.Start(ctx, name, busybox, []string{"sleep", "1000"}, nil)
				must(t, err)
			}
			confs, err := filepath.Glob("/etc/pve/lxc/*.conf")
			must(t, err)
			if !slices.Equal(confs, []string{"/etc/pve/lxc/100.conf", "/etc/pve/lxc/101.conf"}) {
				t.Fatalf("confs: %v", confs)
			}
			for _, vmid := range []int{100, 101} {
				if conf := confOf(t, vmid); !regexp.MustCompile(`(?m)^tags: containerd;ns-k8s.io;pod-web-7d9c$`).MatchString(conf) || !regexp.MustCompile(`#pod%3A bed/web-7d9c`).MatchString(conf) {
					t.Errorf("%d:\n%s", vmid, conf)
				}
			}
			must(t, pod.Remove(ctx))
			eventually(t, time.Minute, "the confs are gone", func() bool { collect(t); return noConf(100) && noConf(101) })
		})
	}
}
