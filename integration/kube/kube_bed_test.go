//go:build bed

package kube

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const busybox = "localhost:5000/busybox:latest"

// TestLongKubernetes: a cluster whose pods are ours. `make conformance` runs it, and puts Kubernetes into the guest.
func TestLongKubernetes(t *testing.T) {
	host(t)
	cluster(t)
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"the node is set up", setUp}, {"a pod", first}, {"deployment", deployment}, {"logs, exec, port-forward", streams}, {"a snapshotter for ours alone", ownSnapshotter}, {"figures", figures}, {"job", job}, {"rolling update", update},
		{"what a pod can have", features}, {"debug", debug}, {"resize", resize}, {"user namespace", users}, {"pause container", pause}, {"runc", others}, {"eviction", eviction},
		{"kubelet and containerd are restarted", restart}, {"the node crashes", crash}, {"figures of CRI", figuresOfCRI}, {"nothing is left", remove},
	} {
		if !t.Run(s.name, s.run) && (s.name == "the node is set up" || s.name == "a pod") {
			t.Fatal("without that nothing else can be")
		}
	}
}

// setUp is what docs/kubernetes.md has done to a cluster. A host of its own may have more than one pool.
func setUp(t *testing.T) {
	before := ok(t, state)
	ok(t, "ctr -n k8s.io images import made/containerd-pve-image.tar")
	write(t, "overlay/kustomization.yaml", `apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../made/kubernetes]
patches:
- target: {kind: DaemonSet, name: containerd-pve-install}
  patch: |-
    - op: add
      path: /spec/template/spec/initContainers/0/args/-
      value: --dataset=`+dataset+`
`)
	ok(t, "kubectl apply -k overlay")
	is(t, before, state)
	ok(t, "kubectl label node "+node+" containerd-pve.github.io/node=install")
	if _, code := try(t, 10*time.Minute, "kubectl -n containerd-pve rollout status daemonset/containerd-pve-install --timeout=9m"); code != 0 {
		ok(t, "kubectl -n containerd-pve describe pods; kubectl -n containerd-pve logs daemonset/containerd-pve-install -c install")
		t.FailNow()
	}
	is(t, "true", "kubectl get node "+node+" -o jsonpath='{.metadata.labels.containerd-pve\\.github\\.io/runtime}'")
	if out := ok(t, "kubectl -n containerd-pve logs daemonset/containerd-pve-install -c install"); !strings.Contains(out, "This host is ready.") {
		t.Errorf("the installer's log: %s", out)
	}
	must(t, os.WriteFile(changed, []byte(before), 0o600))
}

const (
	changed = "/tmp/before" // what state was before the installation
	state   = "find /etc/containerd /usr/local/bin /etc/systemd /etc/tmpfiles.d -type f | sort | xargs md5sum"
)

// pod runs one until the test ends. spec is that of the pod, indented by two.
func pod(t *testing.T, name, spec string) {
	t.Helper()
	apply(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: "+name+"}\nspec:\n  runtimeClassName: pve\n  terminationGracePeriodSeconds: 2\n"+spec)
	t.Cleanup(func() { ok(t, "kubectl delete pod --wait=false "+name) })
	if _, code := try(t, 10*time.Minute, "kubectl wait --for=condition=Ready --timeout=9m pod/"+name); code != 0 {
		ok(t, "kubectl describe pod "+name)
		t.FailNow()
	}
}

// sleeper is the containers of a pod with one that does nothing, and whatever more is said of it.
func sleeper(more string) string {
	return "  containers:\n  - {name: c, image: \"" + busybox + "\", command: [sh, -c, 'trap \"exit 0\" TERM; sleep 100000 & wait']" + more + "}\n"
}

// overhead logs what the processes that keep a pod have cost it: the shim, what holds the namespaces, and lxc-start. They are known
// by the name that they have, as the program of some is no longer to be seen.
func overhead(t *testing.T, during time.Duration) {
	t.Helper()
	type process struct {
		name  string
		ticks int64
	}
	found := func() map[int]process {
		all := map[int]process{}
		files, err := filepath.Glob("/proc/[0-9]*/stat")
		must(t, err)
		for _, f := range files {
			stat, err := os.ReadFile(f)
			if err != nil {
				continue // it has ended
			}
			open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
			name, fields := string(stat[open+1:end]), strings.Fields(string(stat[end+1:]))
			if !slices.Contains([]string{"containerd-shim", "pve-init", "lxc-start"}, name) {
				continue
			}
			pid, err := strconv.Atoi(strings.Split(f, "/")[2])
			must(t, err)
			p := process{name: name}
			for _, n := range fields[11:13] { // utime, stime
				ticks, err := strconv.ParseInt(n, 10, 64)
				must(t, err)
				p.ticks += ticks
			}
			all[pid] = p
		}
		return all
	}
	before := found()
	time.Sleep(during)
	for pid, p := range found() {
		// What it shares with others counts by shares.
		memory := ok(t, fmt.Sprintf("grep -E '^(Pss|Rss):' /proc/%d/smaps_rollup | tr '\n' ' '; cat /proc/%d/cgroup", pid, pid))
		t.Logf("overhead: %s: %s; %s of processor time in %s", p.name, memory, time.Duration(p.ticks-before[pid].ticks)*10*time.Millisecond, during)
	}
}

// first is a pod by itself, and what it costs beside its container.
func first(t *testing.T) {
	ok(t, "free -m; ps -eo rss,comm --sort=-rss | head -12; kubectl get node -o wide")
	pod(t, "first", "  containers: [{name: c, image: \""+busybox+"\", command: [sleep, \"100000\"]}]\n")
	is(t, "pve", "kubectl get pod first -o jsonpath={.spec.runtimeClassName}")
	is(t, "1", "ls /var/lib/containerd-pve/lxc | wc -l")
	overhead(t, time.Minute)
}

// deployment: two replicas, with probes by http and by exec.
func deployment(t *testing.T) {
	apply(t, `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      runtimeClassName: pve
      terminationGracePeriodSeconds: 5
      containers:
      - name: nginx
        image: localhost:5000/nginx:latest
        imagePullPolicy: IfNotPresent
        env: [{name: STEP, value: one}]
        resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {memory: 128Mi}}
        readinessProbe: {httpGet: {path: /, port: 80}, timeoutSeconds: 60}
        livenessProbe: {exec: {command: [test, -e, /etc/nginx/nginx.conf]}, timeoutSeconds: 120, initialDelaySeconds: 5}
      - name: side
        image: `+busybox+`
        imagePullPolicy: IfNotPresent
        command: [sh, -c, 'touch /ready; trap "exit 0" TERM; sleep 100000 & wait']
        readinessProbe: {exec: {command: [cat, /ready]}, timeoutSeconds: 120}
`)
	rolledOut(t)
	is(t, "2", "kubectl get deployment web -o jsonpath={.status.availableReplicas}")
	// Each of their containers is one of LXC's.
	ids := strings.Fields(ok(t, `kubectl get pods -l app=web -o jsonpath='{.items[*].status.containerStatuses[*].containerID}'`))
	if len(ids) != 4 {
		t.Errorf("containers: %q", ids)
	}
	running := ok(t, "lxc-ls -P /var/lib/containerd-pve/lxc --running -1")
	records := ok(t, "ls /var/lib/containerd-pve/lxc; ctr -n k8s.io containers ls; lxc-ls -P /var/lib/containerd-pve/lxc --fancy")
	for _, id := range ids {
		if id = strings.TrimPrefix(id, "containerd://"); !strings.Contains(running, id) {
			t.Errorf("%s is not among LXC's:\n%s\n%s", id, running, records)
		}
	}
}

func rolledOut(t *testing.T) {
	t.Helper()
	if _, code := try(t, 16*time.Minute, "kubectl rollout status deployment/web --timeout=15m"); code != 0 {
		ok(t, "kubectl describe pods -l app=web")
		t.FailNow()
	}
}

// streams are what kubectl opens to a pod.
func streams(t *testing.T) {
	is(t, "7", "kubectl exec deploy/web -c side -- sh -c 'exit 7' 2>/dev/null; echo $?")
	is(t, "in", "echo in | kubectl exec -i deploy/web -c side -- cat")
	is(t, "root", "kubectl exec deploy/web -c nginx -- sh -c 'echo oops >&2; id -un' 2>/dev/null")
	if out := ok(t, "script -qec 'kubectl exec -it deploy/web -c side -- tty' /dev/null"); !strings.Contains(out, "/dev/pts/") {
		t.Errorf("a terminal: %q", out)
	}
	ok(t, "kubectl port-forward deploy/web 8080:80 & trap 'kill $!' EXIT; curl -sS --retry 60 --retry-delay 1 --retry-connrefused http://127.0.0.1:8080 | grep -i 'welcome to nginx'")
	ok(t, "name=$(kubectl get pods -l app=web -o jsonpath={.items[0].metadata.name}); kubectl cp -c side $name:/ready /tmp/ready && test -e /tmp/ready")
	if out := ok(t, "kubectl logs -l app=web -c nginx --tail=50"); !strings.Contains(out, "kube-probe") {
		t.Errorf("nginx's log: %q", out)
	}
	// One that is still being written.
	pod(t, "writes", "  containers: [{name: c, image: \""+busybox+"\", command: [sh, -c, 'i=0; while :; do i=$((i+1)); echo line $i; sleep 0.5; done']}]\n")
	ok(t, "{ timeout 120 kubectl logs -f writes || true; } | grep -m 1 'line 20$'") // which ends it by SIGPIPE
}

const summary = "kubectl get --raw /api/v1/nodes/" + node + "/proxy/stats/summary"

// figures are the kubelet's, of each container and of the pod.
func figures(t *testing.T) {
	ok(t, "for p in $(kubectl get pods -l app=web -o name); do kubectl exec $p -c side -- dd if=/dev/urandom of=/data bs=1M count=3; done")
	for _, c := range []string{"nginx", "side"} {
		eventually(t, 5*time.Minute, summary+` | jq -e '[.pods[] | select(.podRef.name | startswith("web-")) | .containers[] | select(.name == "`+c+`")
			| select(.memory.workingSetBytes > 0 and .memory.usageBytes > 0 and .cpu.usageCoreNanoSeconds > 0 and .rootfs.capacityBytes > 0)] | length == 2'`)
	}
	ok(t, summary+` | jq -c '.node.runtime, [.pods[] | select(.podRef.name | startswith("web-"))][0]'`)
	ok(t, summary+` | jq -e '[.pods[] | select(.podRef.name | startswith("web-")) | select(.memory.workingSetBytes > 0 and .cpu.usageCoreNanoSeconds > 0)] | length == 2'`)
	eventually(t, 5*time.Minute, summary+` | jq -e '[.pods[] | select(.podRef.name | startswith("web-")) | .containers[] | select(.name == "side") | select(.rootfs.usedBytes > 3000000)] | length == 2'`)
}

// eviction is of a pod that writes more to its disk than it may, which the kubelet has from the snapshotter's figures.
func eviction(t *testing.T) {
	apply(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: full}\nspec:\n  runtimeClassName: pve\n  restartPolicy: Never\n  terminationGracePeriodSeconds: 2\n  containers:\n"+
		"  - {name: c, image: \""+busybox+"\", resources: {limits: {ephemeral-storage: 8Mi}}, command: [sh, -c, 'dd if=/dev/urandom of=/data bs=1M count=4; sleep 100000']}\n"+
		"  - {name: d, image: \""+busybox+"\", resources: {limits: {ephemeral-storage: 8Mi}}, command: [sh, -c, 'dd if=/dev/urandom of=/data bs=1M count=4; sleep 100000']}\n")
	t.Cleanup(func() { ok(t, "kubectl delete pod full --timeout=5m") })
	ok(t, "kubectl wait --for=condition=Ready --timeout=9m pod/full")
	eventually(t, 5*time.Minute, summary+` | jq -e '.pods[] | select(.podRef.name == "full") | [.containers[] | select(.rootfs.usedBytes > 4000000)] | length == 2'`)
	// Both are within what they may.
	is(t, "Running", "kubectl get pod full -o jsonpath={.status.phase}")
	ok(t, "kubectl exec full -c d -- dd if=/dev/urandom of=/more bs=1M count=8")
	eventually(t, 5*time.Minute, "kubectl get pod full -o jsonpath='{.status.phase} {.status.reason}' | grep -x 'Failed Evicted'")
	if out := ok(t, "kubectl get pod full -o jsonpath={.status.message}"); !strings.Contains(out, "ephemeral") {
		t.Errorf("the reason: %q", out)
	}
	eventually(t, 5*time.Minute, "! kubectl get pod full -o jsonpath='{.status.containerStatuses[*].state}' | grep -i running")
	ok(t, ready+"))'")
}

// figuresOfCRI are the same from containerd alone, with those of the network, for which the kubelet otherwise looks at a pause container.
func figuresOfCRI(t *testing.T) {
	ok(t, "cp "+config+"/kubelet.yaml "+config+"/kubelet.before && echo 'featureGates: {PodAndContainerStatsFromCRI: true}' >>"+config+"/kubelet.yaml && systemctl restart kubelet")
	eventually(t, 5*time.Minute, summary+` | jq -e '[.pods[] | select(.podRef.name | startswith("web-"))
		| select(.network.rxBytes > 0 and .network.txBytes > 0 and .memory.workingSetBytes > 0 and .cpu.usageCoreNanoSeconds > 0)
		| select([.containers[] | select(.memory.workingSetBytes > 0 and .cpu.usageCoreNanoSeconds > 0 and .rootfs.usedBytes > 0)] | length == 2)] | length == 2'`)
	ok(t, summary+` | jq -c '[.pods[] | select(.podRef.name | startswith("web-"))][0]'`)
	ok(t, "mv "+config+"/kubelet.before "+config+"/kubelet.yaml && systemctl restart kubelet")
	eventually(t, 5*time.Minute, "kubectl get node "+node+" && "+ready+"))'")
}

// ownSnapshotter is what `install --pods` writes alone: other pods' images stay containerd's own snapshotter's, ours are of ours all
// the same. The tests after it have all pods' images kept by ours.
func ownSnapshotter(t *testing.T) {
	is(t, "overlayfs", "containerd config dump 2>/dev/null | sed -n \"/^ *\\[plugins.'io.containerd.cri.v1.images'\\]/,/^ *\\[/s/^ *snapshotter = '\\(.*\\)'/\\1/p\"")
	pod(t, "own", sleeper(""))
	is(t, "pve-zfs", "ctr -n k8s.io containers info $(kubectl get pod own -o jsonpath='{.status.containerStatuses[0].containerID}' | sed s,.*/,,) | jq -r .Snapshotter")
	eventually(t, 5*time.Minute, summary+` | jq -e '.node.runtime.imageFs.capacityBytes > 0 and ([.pods[] | select(.podRef.name == "own") | .containers[] | select(.memory.workingSetBytes > 0)] | length == 1)'`)
	ok(t, summary+` | jq -c '.node.runtime, [.pods[] | select(.podRef.name == "own")][0]'`)
	ok(t, "containerd-pve install --yes --default-snapshotter && kubectl wait --for=condition=Ready --timeout=9m node/"+node)
}

// job runs twice, and its pods stay until the job goes.
func job(t *testing.T) {
	apply(t, `apiVersion: batch/v1
kind: Job
metadata: {name: count}
spec:
  completions: 2
  backoffLimit: 6
  template:
    spec:
      runtimeClassName: pve
      restartPolicy: OnFailure
      volumes: [{name: v, emptyDir: {}}]
      containers:
      - {name: c, image: "`+busybox+`", imagePullPolicy: IfNotPresent, volumeMounts: [{name: v, mountPath: /v}], command: [sh, -c, 'echo run >>/v/runs; [ $(wc -l </v/runs) = 2 ] || exit 3; echo counted']}
`)
	ok(t, "kubectl wait --for=condition=complete --timeout=9m job/count")
	is(t, "2", "kubectl get job count -o jsonpath={.status.succeeded}")
	is(t, "counted\ncounted", "kubectl logs -l job-name=count --tail=-1")
	is(t, "3 1 Completed", `kubectl get pods -l job-name=count -o jsonpath='{range .items[0].status.containerStatuses[0]}{.lastState.terminated.exitCode} {.restartCount} {.state.terminated.reason}{end}'`)
	ok(t, "kubectl delete job count")
}

// update replaces both pods, one after the other.
func update(t *testing.T) {
	before := strings.Fields(ok(t, "kubectl get pods -l app=web -o name"))
	ok(t, "kubectl set env deployment/web -c nginx STEP=two")
	rolledOut(t)
	for _, p := range before {
		ok(t, "kubectl wait --for=delete --timeout=5m "+p)
	}
	after := strings.Fields(ok(t, "kubectl get pods -l app=web -o name"))
	if len(after) != 2 || slices.ContainsFunc(after, func(p string) bool { return slices.Contains(before, p) }) {
		t.Errorf("before %q, after %q", before, after)
	}
	for _, p := range after {
		is(t, "two", "kubectl exec "+p+" -c nginx -- printenv STEP")
	}
}

// features are what a pod's manifest asks of volumes, hooks and identity.
func features(t *testing.T) {
	ok(t, "kubectl create configmap settings --from-literal=key=value; kubectl create secret generic hidden --from-literal=word=secret")
	t.Cleanup(func() { ok(t, "kubectl delete configmap/settings secret/hidden") })
	pod(t, "features", `  hostname: named
  hostAliases: [{ip: 10.1.1.1, hostnames: [other]}]
  securityContext: {runAsUser: 33, runAsGroup: 33, fsGroup: 44, supplementalGroups: [55], sysctls: [{name: net.ipv4.ip_local_port_range, value: "1024 60000"}], seccompProfile: {type: RuntimeDefault}}
  volumes: [{name: v, emptyDir: {}}, {name: m, emptyDir: {medium: Memory, sizeLimit: 8Mi}}, {name: s, configMap: {name: settings}}, {name: h, secret: {secretName: hidden}}]
  initContainers: [{name: i, image: "`+busybox+`", command: [sh, -c, 'echo initial >/v/f'], volumeMounts: [{name: v, mountPath: /v}]}]
  containers:
  - name: c
    image: `+busybox+`
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'trap "exit 0" TERM; sleep 100000 & wait']
    env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}, {name: KEY, valueFrom: {configMapKeyRef: {name: settings, key: key}}}]
    securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    lifecycle: {postStart: {exec: {command: [sh, -c, 'echo started >/v/started']}}, preStop: {exec: {command: [sh, -c, 'echo stopping >/v/stopping']}}}
    startupProbe: {exec: {command: [test, -e, /v/started]}, timeoutSeconds: 120}
    volumeMounts: [{name: v, mountPath: /v}, {name: m, mountPath: /m}, {name: s, mountPath: /s}, {name: s, mountPath: /one, subPath: key}, {name: h, mountPath: /h}]
`)
	scripts, wants := []string{}, []string{}
	for _, c := range [][2]string{
		{"cat /v/f /v/started", "initial\nstarted"}, {"hostname", "named"}, {"grep -w other /etc/hosts | cut -c1-8", "10.1.1.1"}, {"cat /s/key /one /h/word", "valuevaluesecret"},
		{"echo $POD $KEY", "features value"}, {"id -u; id -G", "33\n33 44 55"}, {"stat -c %g /v", "44"}, {"touch /x 2>/dev/null || echo read-only", "read-only"},
		{"grep ' /m ' /proc/mounts | cut -d' ' -f3", "tmpfs"}, {"cat /proc/sys/net/ipv4/ip_local_port_range", "1024\t60000"},
		{"grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t'", "CapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2"},
		{"test -s /var/run/secrets/kubernetes.io/serviceaccount/token && echo token", "token"},
	} {
		scripts, wants = append(scripts, c[0]), append(wants, c[1])
	}
	// One call for all of them: each costs an emulated processor seconds.
	out := ok(t, "kubectl exec features -c c -- sh -c "+quote(strings.Join(scripts, "\necho; echo ----\n")))
	for i, got := range strings.Split(out, "----") {
		if i >= len(wants) || strings.TrimSpace(got) != wants[i] {
			t.Errorf("%d: %q, not one of %q", i, got, wants)
		}
	}
	ok(t, "kubectl annotate pod features changed=yes && kubectl get pod features -o jsonpath={.status.podIP} | grep '^10[.]87[.]'")
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// debug puts a container beside another, into its process namespace.
func debug(t *testing.T) {
	pod(t, "subject", sleeper(""))
	ok(t, "kubectl debug subject --profile=general --image="+busybox+" --image-pull-policy=IfNotPresent --target=c -c dbg -- sleep 1000")
	eventually(t, 5*time.Minute, "kubectl get pod subject -o jsonpath='{.status.ephemeralContainerStatuses[0].state.running.startedAt}' | grep .")
	if out := ok(t, "kubectl exec subject -c dbg -- cat /proc/1/cmdline | tr '\\0' ' '"); !strings.Contains(out, "sleep 100000 & wait") {
		t.Errorf("its process 1: %q", out)
	}
}

// resize changes a container's limits while it runs.
func resize(t *testing.T) {
	pod(t, "sized", sleeper(", resources: {requests: {cpu: 20m, memory: 32Mi}, limits: {cpu: 500m, memory: 64Mi}}"))
	const started = "kubectl get pod sized -o jsonpath='{.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}'"
	before := ok(t, started)
	is(t, "67108864", "kubectl exec sized -- cat /sys/fs/cgroup/memory.max")
	ok(t, `kubectl patch pod sized --subresource=resize -p '{"spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "700m", "memory": "96Mi"}}}]}}'`)
	eventually(t, 5*time.Minute, "kubectl exec sized -- cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max | tr '\\n' ' ' | grep -x '100663296 70000 100000 '")
	eventually(t, 5*time.Minute, "kubectl get pod sized -o jsonpath={.status.containerStatuses[0].resources.limits.memory} | grep -x 96Mi")
	is(t, before, started)
}

// users is a pod with a user namespace.
func users(t *testing.T) {
	pod(t, "users", "  hostUsers: false\n  volumes: [{name: v, emptyDir: {}}]\n"+sleeper(", volumeMounts: [{name: v, mountPath: /v}]"))
	is(t, "0", "kubectl exec users -- id -u")
	if out := ok(t, "kubectl exec users -- cat /proc/self/uid_map"); strings.Fields(out)[1] == "0" {
		t.Errorf("its ids are the host's: %s", out)
	}
	is(t, "0:0", "kubectl exec users -- sh -c 'touch /v/f; stat -c %u:%g /v/f'")
}

// pause is a pod with a pause container, of a handler of its own.
func pause(t *testing.T) {
	const file = "/etc/containerd/conf.d/paused.toml"
	write(t, file, `version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pve-pause]
  runtime_type = 'io.containerd.pve.v2'
  snapshotter = 'pve-zfs'
`)
	ok(t, "systemctl restart containerd && kubectl wait --for=condition=Ready --timeout=9m node/"+node)
	apply(t, "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: pve-pause}\nhandler: pve-pause\n")
	for n := 1; ; n++ {
		apply(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: paused}\nspec:\n  runtimeClassName: pve-pause\n  terminationGracePeriodSeconds: 2\n"+sleeper(""))
		ok(t, "kubectl wait --for=condition=Ready --timeout=9m pod/paused")
		// The kubelet's cadvisor gives a task 1.5 s from its cgroup to its creation, or never looks at its network. An emulated
		// processor that is busy may need more.
		if within(t, 90*time.Second, summary+` | jq -e '.pods[] | select(.podRef.name == "paused") | .network.rxBytes >= 0'`) {
			break
		}
		if n == 3 {
			t.Fatal("a pause container has no network's figures")
		}
		ok(t, "kubectl delete pod paused --timeout=5m")
	}
	is(t, "2", `for id in $(ctr -n k8s.io containers ls -q 'labels."io.kubernetes.pod.name"==paused'); do ls -d /var/lib/containerd-pve/lxc/k8s.io--$id; done | wc -l`)
	is(t, "paused", "kubectl exec paused -- hostname")
	ok(t, "kubectl delete pod paused --timeout=5m; kubectl delete runtimeclass pve-pause; rm "+file)
}

// others are the pods that do not ask for us: runc's, of our snapshotter.
func others(t *testing.T) {
	apply(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: runc}\nspec:\n  terminationGracePeriodSeconds: 2\n"+sleeper(""))
	ok(t, "kubectl wait --for=condition=Ready --timeout=9m pod/runc")
	is(t, "runc", "kubectl exec runc -- hostname")
	is(t, "io.containerd.runc.v2", "ctr -n k8s.io containers ls | grep -o 'io.containerd.runc.v2' | sort -u")
	ok(t, "kubectl delete pod runc --timeout=5m")
}

const (
	tasks = "ctr -n k8s.io tasks ls | sort"
	ready = `kubectl get pods -l app=web -o json | jq -e '(.items | length) == 2 and all(.items[]; .metadata.deletionTimestamp == null and all(.status.containerStatuses[]; .ready`
)

// restart stops the node's services, not its pods.
func restart(t *testing.T) {
	eventually(t, 5*time.Minute, "! kubectl get pods --no-headers | grep -v ^web-")
	before := ok(t, tasks)
	ok(t, "systemctl stop kubelet containerd containerd-pve && sleep 5 && systemctl start containerd-pve containerd kubelet")
	ok(t, "kubectl wait --for=condition=Ready --timeout=9m node/"+node)
	eventually(t, 5*time.Minute, ready+"))'")
	is(t, before, tasks)
	eventually(t, 5*time.Minute, "kubectl exec deploy/web -c side -- sh -c 'exit 7'; test $? = 7")
	// Well after: the kubelet has looked at all of them.
	time.Sleep(time.Minute)
	is(t, before, tasks)
	eventually(t, 5*time.Minute, ready+" and .restartCount == 0))'")
}

// crash is what a reset of the node leaves: no process, no mount, nothing in /run; but disks as they were.
func crash(t *testing.T) {
	pods := ok(t, "kubectl get pods -l app=web -o name")
	ok(t, `systemctl stop kubelet; systemctl kill -s KILL containerd containerd-pve; systemctl stop containerd containerd-pve
pgrep -f '^[^ ]*(containerd-shim|lxc-start|pve-init)' | xargs -r kill -KILL
find /sys/fs/cgroup/kubepods.slice -name cgroup.kill | while read -r f; do echo 1 >"$f"; done 2>/dev/null || true
for i in $(seq 100); do pgrep -f '^[^ ]*(containerd-shim|lxc-start|pve-init)' || break; sleep 0.1; done
for i in 1 2 3; do awk '{print $5}' /proc/self/mountinfo | grep -E '^(/run/containerd|/run/netns|/run/ipcns|/var/lib/kubelet)/' | sort -r | xargs -r -n 1 umount -l; done
rm -rf /run/containerd /run/containerd-pve /run/netns /run/bed-cni /run/lxc
systemd-tmpfiles --boot --remove --prefix=/var/lib/containerd-pve
systemctl start containerd-pve containerd kubelet`)
	eventually(t, 15*time.Minute, ready+" and .restartCount > 0))'")
	is(t, pods, "kubectl get pods -l app=web -o name")
	rolledOut(t)
	eventually(t, 5*time.Minute, "kubectl exec deploy/web -c side -- sh -c 'exit 7'; test $? = 7")
	ok(t, "kubectl port-forward deploy/web 8080:80 & trap 'kill $!' EXIT; curl -sS --retry 60 --retry-delay 1 --retry-connrefused http://127.0.0.1:8080 | grep -i 'welcome to nginx'")
}

// remove takes all away. Containers and sandboxes the kubelet collects within minutes.
func remove(t *testing.T) {
	ok(t, "containerd-pve install --yes --default-snapshotter=false && kubectl wait --for=condition=Ready --timeout=9m node/"+node)
	// The installer's pod is of runc, and was made anew after the crash, on our snapshotter.
	ok(t, "kubectl -n containerd-pve delete pods --all --timeout=5m")
	ok(t, "kubectl label --overwrite node "+node+" containerd-pve.github.io/node=remove")
	eventually(t, 5*time.Minute, "kubectl -n containerd-pve logs daemonset/containerd-pve-remove -c remove | grep 'waiting until they are removed'")
	ok(t, "kubectl delete deployment web --timeout=5m")
	ok(t, "kubectl wait node "+node+" --for=jsonpath='{.metadata.labels.containerd-pve\\.github\\.io/node}'=removed --timeout=9m")
	ok(t, "kubectl delete -k overlay --timeout=5m; kubectl label nodes -l containerd-pve.github.io/node containerd-pve.github.io/node-")
	was, err := os.ReadFile(changed)
	must(t, err)
	is(t, string(was), state)
	is(t, "active", "systemctl is-active containerd")
	eventually(t, 5*time.Minute, "! kubectl get pods --no-headers 2>/dev/null | grep .")
	// A reset leaves no cgroup.
	ok(t, "rmdir /sys/fs/cgroup/containerd-pve/monitor/*/ || true")
	eventually(t, 5*time.Minute, `! { ls -d /var/lib/containerd-pve/lxc/* /sys/fs/cgroup/containerd-pve/monitor/*/ /run/netns/* /sys/fs/cgroup/kubepods.slice/kubepods-*pod*.slice /sys/fs/cgroup/kubepods.slice/*/kubepods-*pod*.slice /var/lib/kubelet/pods/*
		ls -d /run/containerd/s/* /run/containerd/io.containerd.*/k8s.io/* /var/log/pods/*
		pgrep -a 'lxc-start|pve-init|containerd-shim'
		awk '{print $5}' /proc/self/mountinfo | grep -E '^(/run/containerd|/run/netns|/var/lib/kubelet)/'
		ctr -n k8s.io containers ls -q
		ctr -n k8s.io sandboxes ls | tail -n +2; true; } 2>/dev/null | grep .`)
	// What stays is the images' layers.
	ok(t, "zfs list -r "+dataset)
}
