package plan

import "slices"

// MountOptions are the options of a spec's mount that pve-init understands itself; all others go to the file system.
// The runtime announces them, and CRI and others look for what they need among them.
func MountOptions() []string {
	attributes := []string{
		"ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "nodiratime", "diratime", "nosymfollow", "symfollow",
		"relatime", "norelatime", "noatime", "atime", "strictatime", "nostrictatime",
	}
	propagation := []string{"private", "slave", "shared", "unbindable"}
	all := []string{
		"acl", "async", "bind", "defaults", "dirsync", "iversion", "lazytime", "loud", "mand", "noacl", "noiversion",
		"nolazytime", "nomand", "rbind", "silent", "sync", "tmpcopyup",
	}
	for _, o := range append(attributes, propagation...) {
		all = append(all, o, "r"+o)
	}
	slices.Sort(all)
	return all
}
