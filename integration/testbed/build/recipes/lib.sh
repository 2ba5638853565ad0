# Read before every recipe. A recipe gets OUT (a fresh directory) and DEP_<STAGE> (finished stages, read only).
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

bootstrap() { # bootstrap DIR PACKAGES [mmdebstrap options...]
	local dir=$1 packages=$2
	shift 2
	mmdebstrap --variant=minbase --components=main,contrib --include="$packages" \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-include=/usr/share/doc/*/copyright' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		"$@" "$SUITE" "$dir" ${MIRROR:+"$MIRROR"}
}

tool() { # a program of the tools chroot, run through its own loader: works on an older host without chroot
	local t=$DEP_TOOLS/root name=$1
	shift
	"$t/lib64/ld-linux-x86-64.so.2" --library-path "$t/usr/lib/x86_64-linux-gnu" "$t/usr/bin/$name" "$@"
}
