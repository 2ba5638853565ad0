#!/bin/bash
# bed.make OUT: what an administrator applies to a cluster, and the image of it.
set -euo pipefail
cp -r deploy/kubernetes "$1"
deploy/image/build "$1" localhost/containerd-pve:latest
