#!/bin/bash
# bed.make OUT: what an administrator applies to a cluster.
cp deploy/kubernetes/runtimeclass.yaml "$1"
