#!/bin/bash
# bed.make OUT: two versions of the Debian package, quickly, and two of the node installer's image, whose programs differ by
# a byte that nobody reads.
set -euo pipefail
out=$1
DPKG_DEB='-Zzstd -z1' deploy/deb/build "$out" 1.0 1.1
other=$(mktemp -d)
trap 'rm -rf "$other"' EXIT
for p in containerd-pve containerd-shim-pve-v2 pve-init; do
	install -m 755 "bin/$p" "$other/$p"
	echo >>"$other/$p"
done
deploy/image/build "$out" localhost/containerd-pve:1
mv "$out/containerd-pve-image.tar" "$out/image1.tar"
deploy/image/build "$out" localhost/containerd-pve:2 "$other"
mv "$out/containerd-pve-image.tar" "$out/image2.tar"
