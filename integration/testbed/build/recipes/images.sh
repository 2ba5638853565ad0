# The trees the local registry's images are made of; layers and manifests are written from them afterwards.
bootstrap "$OUT/debian" ca-certificates
# with TREE PACKAGE [COMMANDS]: debian with a package more
with() {
	local tree=$OUT/$1
	cp -a "$OUT/debian" "$tree"
	printf '#!/bin/sh\nexit 101\n' > "$tree/usr/sbin/policy-rc.d"
	chmod 755 "$tree/usr/sbin/policy-rc.d"
	cp /etc/resolv.conf "$tree/etc/resolv.conf"
	chroot "$tree" sh -euc "apt-get update; apt-get install -y --no-install-recommends $2
		apt-get clean; rm -rf /var/lib/apt/lists/* /usr/sbin/policy-rc.d /var/log/apt /var/log/dpkg.log /var/cache/*
		${3-}"
	cp -a "$OUT/debian/etc/resolv.conf" "$tree/etc/resolv.conf" 2>/dev/null || rm -f "$tree/etc/resolv.conf"
}
with nginx nginx 'ln -sf /dev/stdout /var/log/nginx/access.log; ln -sf /dev/stderr /var/log/nginx/error.log'
with systemd systemd-sysv ': > /etc/machine-id'
mkdir -p "$OUT"/busybox/{bin,etc,proc,sys,dev,tmp,root,var,run}
chmod 1777 "$OUT/busybox/tmp"
cp "$DEP_ROOTFS/root/bin/busybox" "$OUT/busybox/bin/busybox"
chroot "$OUT/busybox" /bin/busybox --install -s /bin
# the users of the busybox image everybody knows: tests ask for them by name and number
while IFS=: read -r name id; do
	printf '%s:x:%s:%s:%s:/:/bin/false\n' "$name" "$id" "$id" "$name" >> "$OUT/busybox/etc/passwd"
	printf '%s:x:%s:\n' "$name" "$id" >> "$OUT/busybox/etc/group"
done <<-END
	daemon:1
	bin:2
	sys:3
	mail:8
	www-data:33
	operator:37
	nobody:65534
END
sed -i '1i root:x:0:0:root:/root:/bin/sh' "$OUT/busybox/etc/passwd"
sed -i '1i root:x:0:' "$OUT/busybox/etc/group"
sed -i 's/^nobody:/nogroup:/' "$OUT/busybox/etc/group"
mkdir -p "$OUT"/pause/bin
cp "$OUT/busybox/bin/busybox" "$OUT/pause/bin/busybox"
ln -s busybox "$OUT/pause/bin/sleep"
# the image everybody knows has an nc that ends at SIGTERM as PID 1 too; Debian builds busybox without that one
rm "$OUT/busybox/bin/nc"
cat > "$OUT/busybox/bin/nc" <<'END'
#!/bin/sh
trap 'kill $!; exit 143' TERM
busybox nc "$@" &
wait $!
END
chmod 755 "$OUT/busybox/bin/nc"
