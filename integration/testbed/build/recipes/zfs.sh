# The ZFS module, by plain configure and make in the tools chroot (its /root is scratch space).
kv=$(cat "$DEP_KERNEL/version")
work=$DEP_TOOLS/root/root/zfs
source=$DEP_TOOLS/root/kpkg/zfs
if [ -n "${ZFS_SUITE:-}" ]; then # that of another suite of the same archive
	apt=$OUT/apt source=$OUT/apt/source
	mkdir -p "$apt"/{lists,archives}/partial
	sed -n "s/ $SUITE / $ZFS_SUITE /p" "$DEP_TOOLS/root/etc/apt/sources.list" > "$apt/sources.list"
	(
		cd "$apt"
		for command in update "download zfs-dkms/$ZFS_SUITE"; do
			# shellcheck disable=SC2086 # it is two words
			apt-get -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$apt/lists" -o Dir::Cache::Archives="$apt/archives" \
				-o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dir::Etc::TrustedParts="$DEP_TOOLS/root/etc/apt/trusted.gpg.d" -o APT::Sandbox::User=root \
				$command
		done
		dpkg -x zfs-dkms_*.deb source
	)
fi
rm -rf "$work"
cp -a "$source"/usr/src/zfs-* "$work"
rm -rf "$OUT/apt"
chroot "$DEP_TOOLS/root" sh -euc "cd /root/zfs
	./configure --disable-dependency-tracking --with-config=kernel \
		--with-linux=/usr/src/linux-headers-${kv%-"$FLAVOUR"}-common --with-linux-obj=/usr/src/linux-headers-$kv
	make -j$(nproc)
	strip -g module/zfs.ko module/spl.ko"
cp "$work/module/zfs.ko" "$work/module/spl.ko" "$OUT/"
rm -rf "$work"
