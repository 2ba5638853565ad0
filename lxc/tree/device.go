package tree

import (
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// DefaultDevices are in every container, as the runtime spec says.
var DefaultDevices = []specs.LinuxDevice{
	charDevice("/dev/null", 1, 3), charDevice("/dev/zero", 1, 5), charDevice("/dev/full", 1, 7),
	charDevice("/dev/random", 1, 8), charDevice("/dev/urandom", 1, 9), charDevice("/dev/tty", 5, 0),
}

func charDevice(path string, major, minor int64) specs.LinuxDevice {
	mode := os.FileMode(0o666)
	return specs.LinuxDevice{Path: path, Type: "c", Major: major, Minor: minor, FileMode: &mode}
}

// Node is what mknod(2) takes for a device of the spec; false for an unknown type.
func Node(d *specs.LinuxDevice) (mode uint32, number uint64, ok bool) {
	number = unix.Mkdev(uint32(d.Major), uint32(d.Minor))
	switch d.Type {
	case "c", "u":
		mode = unix.S_IFCHR
	case "b":
		mode = unix.S_IFBLK
	case "p":
		mode, number = unix.S_IFIFO, 0
	default:
		return 0, 0, false
	}
	if d.FileMode != nil {
		return mode | uint32(d.FileMode.Perm()), number, true
	}
	return mode | 0o666, number, true
}
