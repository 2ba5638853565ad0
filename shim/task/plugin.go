package task

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/shim/sandbox"
)

func init() {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin, sandbox.Plugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			publisher, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			sd, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			pod, err := ic.GetByID(sandbox.Plugin, "sandbox")
			if err != nil {
				return nil, err
			}
			ns, err := namespaces.NamespaceRequired(ic.Context)
			if err != nil {
				return nil, err
			}
			down := sd.(shutdown.Service)
			// A shim of a pod serves a socket named by the pod, which containerd's
			// own clean-up, that goes by the task's id, does not find.
			if path := inheritedSocket(); path != "" {
				down.RegisterCallback(func(context.Context) error {
					if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
						return fmt.Errorf("remove the shim's socket: %w", err)
					}
					return nil
				})
			}
			s := New(ic.Context, ns, lxcEngine{}, publisher.(shim.Publisher), pod.(Pod), down.Shutdown)
			down.RegisterCallback(func(context.Context) error { return s.Close() })
			return s, nil
		},
	})
}

// inheritedSocket is the path of the listener that `start` hands over as fd 3.
func inheritedSocket() string {
	name, err := unix.Getsockname(3)
	if err != nil {
		return ""
	}
	if u, ok := name.(*unix.SockaddrUnix); ok && len(u.Name) > 0 && u.Name[0] == '/' {
		return u.Name
	}
	return ""
}
