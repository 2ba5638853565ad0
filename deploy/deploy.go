// Package deploy holds the files that go onto a host as they are: the
// configurations, each with its comments, and the daemon's unit; and the manifests
// of Kubernetes.
package deploy

import "embed"

// Files are these files by their paths below this directory.
//
//go:embed config systemd kubernetes
var Files embed.FS
