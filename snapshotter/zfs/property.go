package zfs

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

var onOff = map[string]uint64{"off": 0, "on": 1}

// indexes are the properties with named values, as the module numbers them
// (module/zcommon/zfs_prop.c).
var indexes = map[string]map[string]uint64{
	"atime": onOff, "relatime": onOff, "readonly": onOff, "exec": onOff, "setuid": onOff, "devices": onOff, "overlay": onOff, "zoned": onOff,
	"utf8only":        onOff,
	"acltype":         {"off": 0, "noacl": 0, "posix": 1, "posixacl": 1, "nfsv4": 2},
	"xattr":           {"off": 0, "dir": 1, "sa": 2},
	"canmount":        {"off": 0, "on": 1, "noauto": 2},
	"snapdir":         {"hidden": 0, "visible": 1, "disabled": 2},
	"sync":            {"standard": 0, "always": 1, "disabled": 2},
	"casesensitivity": {"sensitive": 0, "insensitive": 1, "mixed": 2},
	"normalization":   {"none": 0, "formD": 0x10, "formKD": 0x20, "formC": 0x50, "formKC": 0x60},
}

// numbers are the properties whose value is a number; "none" is 0.
var numbers = map[string]bool{
	"quota": true, "refquota": true, "reservation": true, "refreservation": true, "recordsize": true,
	"filesystem_limit": true, "snapshot_limit": true,
}

// texts are the native properties whose value is a string.
var texts = map[string]bool{"mountpoint": true}

// userProperty says that a property is nobody's but its user's: its name holds a colon.
func userProperty(name string) bool { return strings.Contains(name, ":") }

// properties makes the module's list of the properties, as `zfs set` takes them.
func properties(p Properties) (nvlist.List, error) {
	list := nvlist.List{}
	for _, name := range slices.Sorted(maps.Keys(p)) {
		value := p[name]
		switch table, index := indexes[name]; {
		case userProperty(name) || texts[name]:
			list[name] = value
		case index:
			n, ok := table[value]
			if !ok {
				return nil, fmt.Errorf("property %s: %q is none of %s: %w", name, value, strings.Join(slices.Sorted(maps.Keys(table)), ", "), errdefs.ErrInvalidArgument)
			}
			list[name] = n
		case numbers[name]:
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil && value != "none" {
				return nil, fmt.Errorf("property %s: %q is no number of bytes: %w", name, value, errdefs.ErrInvalidArgument)
			}
			list[name] = n
		default:
			return nil, fmt.Errorf("property %s is not known here: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	return list, nil
}

// property is one value out of the module's answer, in the words of `zfs get -p`.
func property(name string, list nvlist.List) (string, bool) {
	entry, ok := list[name].(nvlist.List)
	if !ok {
		return "", false
	}
	switch v := entry["value"].(type) {
	case string:
		return v, true
	case uint64:
		for _, text := range slices.Sorted(maps.Keys(indexes[name])) {
			// Of two words for a number the first in the list is ZFS's own, but
			// for the acltype, where that is the new one.
			if indexes[name][text] == v && text != "noacl" {
				return text, true
			}
		}
		return strconv.FormatUint(v, 10), true
	}
	return "", false
}
