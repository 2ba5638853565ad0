// Package kube holds the test with Kubernetes' own programs: a cluster of one node, whose kubelet asks containerd for pods of
// our runtime. Its guest is the one that boots systemd (bed.init), and has Kubernetes from `bed test -kubernetes`; bed.make adds
// what is applied to the cluster. kubectl is what the test speaks to it with, as people do: client-go would bring its modules
// into the project's go.mod for this one test.
package kube
