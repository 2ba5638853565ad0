# Compiler, kernel headers and QEMU of the suite; beside them, unpacked only, the kernel and the ZFS source of the same archive state.
bootstrap "$OUT/root" ca-certificates,build-essential,kmod,file,xz-utils,zstd,linux-headers-$FLAVOUR,qemu-system-x86,qemu-utils,seabios \
	--customize-hook='chroot "$1" sh -eu -c "
		kv=\$(basename /usr/src/linux-headers-*-'"$FLAVOUR"'); kv=\${kv#linux-headers-}
		mkdir /kpkg; cd /kpkg; echo \$kv > version
		apt-get download linux-image-\$kv zfs-dkms
		dpkg -x linux-image-*.deb kernel; dpkg -x zfs-dkms_*.deb zfs; rm *.deb"'
