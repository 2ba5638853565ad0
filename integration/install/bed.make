#!/bin/bash
# bed.make OUT: two versions of the Debian package, quickly.
DPKG_DEB='-Zzstd -z1' exec deploy/deb/build "$1" 1.0 1.1
