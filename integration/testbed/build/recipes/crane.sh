cd "$OUT"
GOBIN=$OUT CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOWORK=off go install -trimpath -ldflags '-s -w' github.com/google/go-containerregistry/cmd/crane@"$VERSION"
