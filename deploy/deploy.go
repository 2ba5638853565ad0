// Package deploy holds the files that go onto a host as they are: the
// configurations, each with its comments, the daemon's unit, and what a boot removes; and the
// manifests of Kubernetes.
package deploy

import "embed"

// Files are these files by their paths below this directory.
//
//go:embed config systemd tmpfiles kubernetes
var Files embed.FS
