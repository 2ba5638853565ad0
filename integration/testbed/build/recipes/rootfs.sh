# The guest's root, and Debian's own containerd beside it, unpacked only.
bootstrap "$OUT/root" "$PACKAGES" \
	--customize-hook='chroot "$1" sh -eu -c "
		cd /root; apt-get download containerd
		dpkg -x containerd_*.deb /opt/containerd-1.7; rm containerd_*.deb"'
