package sandbox

import (
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
)

// Plugin is the service's type among the shim's plugins, by which the tasks find it.
const Plugin plugin.Type = "io.containerd-pve.sandbox.v1"

// answerTime is what the answer to ShutdownSandbox has to get away. containerd fails the pod's removal
// without it, unlike that of a task, and the shim's server waits for none.
const answerTime = time.Second

func init() {
	registry.Register(&plugin.Registration{
		Type:     Plugin,
		ID:       "sandbox",
		Requires: []plugin.Type{plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			sd, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			ns, err := namespaces.NamespaceRequired(ic.Context)
			if err != nil {
				return nil, err
			}
			return New(ns, linux{}, func() { time.AfterFunc(answerTime, sd.(shutdown.Service).Shutdown) }), nil
		},
	})
}
