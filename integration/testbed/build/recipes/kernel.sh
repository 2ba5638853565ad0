# The modules a test guest can need, uncompressed: inflating xz in an emulated guest is slow.
kv=$(cat "$DEP_TOOLS/root/kpkg/version")
pkg=$DEP_TOOLS/root/kpkg/kernel
src=$pkg/usr/lib/modules/$kv
[ -d "$src" ] || src=$pkg/lib/modules/$kv
mkdir -p "$OUT/modules"
tar cf - -C "$src" --exclude=drivers/{gpu,scsi,infiniband,media,usb,input,hid,staging} --exclude=drivers/net/ethernet \
	--exclude=sound --exclude=fs/{xfs,ocfs2,gfs2,ceph,smb,bcachefs,btrfs,nfs,nfsd} \
	kernel modules.builtin modules.builtin.modinfo modules.order | tar xf - -C "$OUT/modules"
export -f tool
export DEP_TOOLS
find "$OUT/modules" -name '*.ko.xz' -print0 | xargs -0 -r -n 40 -P "$(nproc)" bash -c 'tool xz -d "$@"' xz
cp "$pkg/boot/vmlinuz-$kv" "$OUT/vmlinuz"
echo "$kv" > "$OUT/version"
