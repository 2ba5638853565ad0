// Package clone makes of what was kept of a container's configuration that of another
// container, which is to have the same root file system as the first had then. It
// asks and changes nobody.
package clone

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

const (
	annotationVMID = "io.containerd.pve.vmid" // of shim/task
	annotationNet  = "io.containerd.pve.net"  // the same, with a number
	// restartLabels are what containerd's restart monitor goes by (its package core/runtime/restart).
	restartLabels = "containerd.io/restart."
	// nerdctlName begins nerdctl's labels and annotations.
	nerdctlName = "nerdctl/"
	// criKind is the label of the CRI plugin's containers.
	criKind = "io.cri-containerd.kind"
	// shortID is how much of an id nerdctl takes for a host name.
	shortID = 12
	// maxHostname is Linux's (HOST_NAME_MAX).
	maxHostname = 64
)

// object is one of JSON's. What this package does not know of it stays as it is.
type object = map[string]any

// Of is the configuration of container id, whose snapshot has the same key, from
// that of another. vmid is the one that it asks for; 0: none. notes say what of it is not the
// other's, and what both have to share. Errors: FailedPrecondition, it is a pod's; DataLoss.
func Of(kept *containersapi.Container, id string, vmid int) (_ *containersapi.Container, notes []string, err error) {
	if kept.Sandbox != "" || kept.Labels[criKind] != "" {
		return nil, nil, fmt.Errorf("container %s is a pod's, whose containers are Kubernetes' to make: %w", kept.ID, errdefs.ErrFailedPrecondition)
	}
	var spec object
	d := json.NewDecoder(bytes.NewReader(kept.Spec.GetValue()))
	d.UseNumber()
	if err := d.Decode(&spec); err != nil {
		return nil, nil, fmt.Errorf("the spec of container %s: %w: %w", kept.ID, err, errdefs.ErrDataLoss)
	}
	if spec == nil {
		return nil, nil, fmt.Errorf("container %s has no spec: %w", kept.ID, errdefs.ErrDataLoss)
	}
	c := proto.CloneOf(kept)
	c.ID, c.SnapshotKey, c.CreatedAt, c.UpdatedAt = id, id, nil, nil
	n := &namer{old: kept.ID, id: id, spec: spec}
	n.labels(c.Labels)
	n.hostname()
	n.cgroup()
	n.networks()
	n.mounts()
	annotations := child(spec, "annotations")
	delete(annotations, annotationVMID)
	if vmid != 0 {
		if annotations == nil {
			annotations = object{}
			spec["annotations"] = annotations
		}
		annotations[annotationVMID] = strconv.Itoa(vmid)
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, nil, fmt.Errorf("the spec of container %s: %w", id, err)
	}
	c.Spec = &anypb.Any{TypeUrl: kept.Spec.TypeUrl, Value: text}
	return c, n.notes, nil
}

// namer takes the first container's name out of a spec.
type namer struct {
	old, id string
	spec    object
	notes   []string
	nerdctl bool
}

func (n *namer) note(format string, args ...any) {
	n.notes = append(n.notes, fmt.Sprintf(format, args...))
}

func child(of object, key string) object {
	c, _ := of[key].(object)
	return c
}

func text(of object, key string) string {
	s, _ := of[key].(string)
	return s
}

// labels takes those away with which others would take the new container for the
// old one, or start it.
func (n *namer) labels(labels map[string]string) {
	if drop(labels, restartLabels) {
		n.note("it is not restarted by containerd (%s*)", restartLabels)
	}
	n.nerdctl = drop(labels, nerdctlName)
	drop(child(n.spec, "annotations"), nerdctlName)
	if !n.nerdctl {
		return
	}
	n.note("what nerdctl keeps beside containerd is not its own: it has no name, network, published ports and log of nerdctl's")
	hooks := child(n.spec, "hooks")
	for when, list := range hooks {
		all, _ := list.([]any)
		hooks[when] = slices.DeleteFunc(all, func(h any) bool {
			o, _ := h.(object)
			args, _ := o["args"].([]any)
			return slices.Contains(args, any("oci-hook"))
		})
	}
}

// drop deletes the keys that begin so, and says whether there was one.
func drop[V any](from map[string]V, prefix string) bool {
	before := len(from)
	maps.DeleteFunc(from, func(key string, _ V) bool { return strings.HasPrefix(key, prefix) })
	return len(from) < before
}

// hostname is the new id where it was the old one.
func (n *namer) hostname() {
	was := text(n.spec, "hostname")
	if was != n.old && (len(n.old) < shortID || was != n.old[:shortID]) {
		return
	}
	name := n.id
	if was != n.old {
		name = name[:min(len(name), shortID)]
	}
	name = strings.TrimRight(name[:min(len(name), maxHostname)], "._-")
	n.spec["hostname"] = name
	process := child(n.spec, "process")
	env, _ := process["env"].([]any)
	for i, e := range env {
		if e == "HOSTNAME="+was {
			env[i] = "HOSTNAME=" + name
		}
	}
}

// cgroup gives it one of its own, below the same: no two containers may have one.
func (n *namer) cgroup() {
	linux := child(n.spec, "linux")
	was := text(linux, "cgroupsPath")
	if was == "" {
		return
	}
	if parts := strings.Split(was, ":"); len(parts) == 3 { // systemd's slice:prefix:name
		linux["cgroupsPath"] = strings.Join(append(parts[:2], n.id), ":")
		return
	}
	linux["cgroupsPath"] = path.Join(path.Dir(was), n.id)
}

// networks gives its interfaces addresses of their own, where Ethernet has them.
func (n *namer) networks() {
	annotations := child(n.spec, "annotations")
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		index, err := strconv.Atoi(strings.TrimPrefix(key, annotationNet))
		if err != nil || !strings.HasPrefix(key, annotationNet) {
			continue
		}
		parts := slices.DeleteFunc(strings.Split(text(annotations, key), ","), func(p string) bool { return strings.HasPrefix(p, "hwaddr=") })
		annotations[key] = strings.Join(parts, ",")
		net, err := pve.ParseNet(text(annotations, key), index)
		if err != nil {
			continue // whoever starts it is told
		}
		for _, ip := range []fmt.Stringer{net.IP4, net.IP6} {
			if (ip == net.IP4 && net.IP4.IsValid()) || (ip == net.IP6 && net.IP6.IsValid()) {
				n.note("interface %s has the address %s of container %s", net.Name, ip, n.old)
			}
		}
	}
	spaces, _ := child(n.spec, "linux")["namespaces"].([]any)
	for _, s := range spaces {
		o, _ := s.(object)
		if text(o, "type") == "network" && text(o, "path") != "" {
			n.note("it shares the network namespace %s with container %s", text(o, "path"), n.old)
		}
	}
}

// mounts are of the same directories of the host, but those that nerdctl made for
// the old container.
func (n *namer) mounts() {
	all, _ := n.spec["mounts"].([]any)
	all = slices.DeleteFunc(all, func(m any) bool {
		o, _ := m.(object)
		return n.nerdctl && strings.Contains(text(o, "source"), "/"+n.old+"/")
	})
	if all != nil {
		n.spec["mounts"] = all
	}
	for _, m := range all {
		o, _ := m.(object)
		options, _ := o["options"].([]any)
		bind := text(o, "type") == "bind" || slices.Contains(options, any("bind")) || slices.Contains(options, any("rbind"))
		if source := text(o, "source"); bind && !slices.Contains(options, any("ro")) {
			n.note("it shares %s (its %s) with container %s", source, text(o, "destination"), n.old)
		}
	}
}
