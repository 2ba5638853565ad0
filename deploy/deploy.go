// Package deploy holds the files that go onto a host as they are: the
// configurations, each with its comments, and the daemon's unit.
package deploy

import "embed"

// Files are these files by their paths below this directory.
//
//go:embed config systemd
var Files embed.FS
