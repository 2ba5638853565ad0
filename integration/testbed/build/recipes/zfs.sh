# The ZFS module, by plain configure and make in the tools chroot (its /root is scratch space).
kv=$(cat "$DEP_KERNEL/version")
work=$DEP_TOOLS/root/root/zfs
rm -rf "$work"
cp -a "$DEP_TOOLS"/root/kpkg/zfs/usr/src/zfs-* "$work"
chroot "$DEP_TOOLS/root" sh -euc "cd /root/zfs
	./configure --disable-dependency-tracking --with-config=kernel \
		--with-linux=/usr/src/linux-headers-${kv%-"$FLAVOUR"}-common --with-linux-obj=/usr/src/linux-headers-$kv
	make -j$(nproc)
	strip -g module/zfs.ko module/spl.ko"
cp "$work/module/zfs.ko" "$work/module/spl.ko" "$OUT/"
rm -rf "$work"
