# Runs one package's tests on this host, in namespaces of its own: called with unshare (mount, pid, net, cgroup).
# What is mounted here and who runs here is gone when this shell ends. T is the directory made for this run.
set -euo pipefail
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t securityfs securityfs /sys/kernel/security 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup # the root of our cgroup namespace
for c in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control; done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock
mount -t tmpfs -o mode=1777 tmpfs /tmp
# Of a node of Proxmox the tests see nothing.
for d in /etc/containerd /etc/containerd-pve /etc/pve /var/lib/containerd /var/lib/containerd-pve /var/lib/lxc /var/lib/pve-cluster \
	/var/lib/registry /var/log/stack; do
	mkdir -p "$T/own$d"
	[ -d "$d" ] || { mkdir -p "$d"; echo "$d" >>"$T/made"; }
	mount --bind "$T/own$d" "$d"
done
cp -a "$T/registry/." /var/lib/registry/
for d in /usr/local/bin /usr/local/sbin /opt; do
	mkdir -p "$T/tree$d"
	mount -t overlay -o "lowerdir=$T/tree$d:$d" overlay "$d"
done
printf 'root:100000:1000000\n' >"$T/subid"
for f in /etc/subuid /etc/subgid; do
	[ -e "$f" ] || { touch "$f"; echo "$f" >>"$T/made"; }
	mount --bind "$T/subid" "$f"
done
mount --make-rshared / # as on any host; within our own namespace
ip link set lo up
mkdir "$T/tmp"
# ZFS opens a pool's file by its path in the host's own mount namespace, which knows nothing of our /tmp.
export TMPDIR=$T/tmp
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TESTBED=host TESTBED_POOL=$POOL
rc=0
bed-registry
cd "$T/test"
"$@" || rc=$?
stack down || true
exit "$rc"
