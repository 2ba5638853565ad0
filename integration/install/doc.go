// Package install holds the test of the Debian package and of `containerd-pve
// install`. Its guest is the one that boots systemd (bed.init), with the packages
// that bed.make builds; there is nothing else in it.
package install
