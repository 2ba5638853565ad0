cd "$OUT"
GOBIN=$OUT CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOWORK=off go install -trimpath -ldflags '-s -w' \
	github.com/containerd/containerd/v2/cmd/{containerd,ctr,containerd-shim-runc-v2}@"$VERSION"
