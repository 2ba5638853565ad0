mkdir "$OUT/cni"
p=github.com/containernetworking/plugins/plugins
GOBIN=$OUT/cni CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOWORK=off go install -trimpath -ldflags '-s -w' \
	$p/main/{bridge,loopback}@"$VERSION" $p/ipam/host-local@"$VERSION" $p/meta/{portmap,firewall,tuning}@"$VERSION"
