// Package guest holds the files that go into the test guest as they are: its first
// process, the preparation before the snapshot and the script that starts the daemons.
// It never runs on the host.
package guest

import "embed"

// Files are the guest's scripts by name.
//
//go:embed vminit initramfs-init stack bed-prepare bed-registry bed-systemd bed.target bed-setup.service vmagent.service
var Files embed.FS
