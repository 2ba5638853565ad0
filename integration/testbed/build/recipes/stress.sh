cd "$OUT"
GOBIN=$OUT CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOWORK=off go install -trimpath -ldflags '-s -w' \
	github.com/containerd/containerd/v2/cmd/containerd-stress@"$VERSION"
