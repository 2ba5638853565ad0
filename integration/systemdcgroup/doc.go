// Package systemdcgroup holds the tests of systemd's cgroup driver. Its guest is
// the one that boots systemd (bed.init); there is nothing else in it.
package systemdcgroup
