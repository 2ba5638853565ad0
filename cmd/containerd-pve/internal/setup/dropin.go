package setup

import "text/template"

// dropInTemplate is deploy/config/containerd-pve.toml, with the lists of this host (TestDropIn).
var dropInTemplate = template.Must(template.New("").Parse(`# By containerd-pve install. The lists have what ` + "`containerd config dump`" + ` said at that time: they go before those elsewhere.
{{with .version}}version = {{.}}
{{end}}
[proxy_plugins.pve-zfs]
  type = "snapshot"
  address = "/run/containerd-pve/snapshotter.sock"
  # containerd 2.x: a user namespace maps the ids of the mount, and no file is copied or chowned.
  capabilities = ["remap-ids"]
  # A directory of the file system whose size and free space the kubelet takes for the containers'. Without one it has no figures
  # at all; for the pool's, name one on a mounted dataset of the pool.
  [proxy_plugins.pve-zfs.exports]
    root = "/var/lib/containerd-pve/snapshotter"

# Layers of ours are unpacked by our daemon, which decompresses ahead of what it writes. What ` + "`nerdctl commit`, `ctr snapshots diff`" + `
# and BuildKit export of a snapshot of ours, ZFS tells: no tree is walked, a running container can be exported, and times and
# attributes are kept. Other snapshotters' go to containerd's own, "walking".
# The diff service then asks our daemon first for all: while it is down, that fails.
[proxy_plugins.pve-zfs-diff]
  type = "diff"
  address = "/run/containerd-pve/snapshotter.sock"
[plugins.'io.containerd.service.v1.diff-service']
  {{.diff}}

# containerd 2.x: ` + "`ctr images pull`" + ` unpacks only for the snapshotters listed here.
[plugins.'io.containerd.transfer.v1.local']
{{- range .unpacks}}
  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
    {{.}}
{{- end}}
`))
