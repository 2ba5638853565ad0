# Puts the finished parts together: root.img, vmlinux, initrd.
kv=$(cat "$DEP_KERNEL/version")
root=$OUT/root
cp -a --reflink=auto "$DEP_ROOTFS/root" "$root"
rm -rf "$root/usr/lib/modules"
mkdir -p "$root/usr/lib/modules/$kv/updates"
cp -a "$DEP_KERNEL/modules/." "$root/usr/lib/modules/$kv/"
cp "$DEP_ZFS"/*.ko "$root/usr/lib/modules/$kv/updates/"
chroot "$root" /sbin/depmod "$kv"
# udev rules for hardware the guest has not
for r in cdrom_id persistent-alsa persistent-hidraw persistent-input persistent-storage-mtd persistent-storage-tape persistent-v4l \
	sensor btrfs camera joystick memory mouse touchpad probe_mtd sound-card iocost; do rm -f "$root"/usr/lib/udev/rules.d/*-$r*.rules; done
mkdir -p "$root"/opt/containerd-2.2/bin "$root"/work "$root"/var/crash "$root"/var/lib/registry "$root"/etc/containerd "$root"/etc/containerd-pve
cp "$DEP_CONTAINERD"/* "$DEP_CRANE"/* "$root/usr/local/bin/"
cp "$DEP_CONTAINERD22"/* "$root/opt/containerd-2.2/bin/"
cp -a "$DEP_IMAGES/registry/." "$root/var/lib/registry/"
install -m 755 "$DEP_AGENT/vmagent" "$root/sbin/vmagent"
install -m 755 "$GUEST/vminit" "$root/sbin/vminit"
install -m 755 "$GUEST/stack" "$GUEST/bed-prepare" "$GUEST/bed-registry" "$GUEST/bed-systemd" "$root/usr/local/sbin/"
install -m 644 "$GUEST/bed.target" "$GUEST/bed-setup.service" "$GUEST/vmagent.service" "$root/etc/systemd/system/"
printf '::respawn:/sbin/vmagent serve :7000\n' > "$root/etc/inittab"
printf 'root:100000:1000000\n' | tee "$root/etc/subuid" > "$root/etc/subgid"
printf 'nameserver 10.0.2.3\n' > "$root/etc/resolv.conf"
printf '127.0.0.1 localhost testbed\n' > "$root/etc/hosts"
echo testbed > "$root/etc/hostname"
echo 'options zfs zfs_arc_max=268435456' > "$root/etc/modprobe.d/zfs.conf"
# the initramfs: busybox and what it takes to mount the root
ird=$OUT/initramfs
mkdir -p "$ird"/{bin,m,proc,dev,newroot}
cp "$root/bin/busybox" "$ird/bin/"
install -m 755 "$GUEST/initramfs-init" "$ird/init"
n=0
for mod in virtio_blk ext4; do
	for f in $(chroot "$root" /sbin/modprobe -S "$kv" -D $mod | awk '/^insmod/{print $2}'); do
		n=$((n + 1))
		[ -e "$ird"/m/*-"${f##*/}" ] || cp "$root$f" "$ird/m/$(printf %02d $n)-${f##*/}"
	done
done
(cd "$ird" && find . | cpio -o -H newc --quiet) > "$OUT/initrd.cpio"
mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$root" "$OUT/root.img" 6G
cp "$DEP_KERNEL/vmlinux" "$OUT/vmlinux"
rm -rf "$root" "$ird"
