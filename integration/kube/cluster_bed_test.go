//go:build bed

package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd-pve/containerd-pve/integration/cri"
)

const (
	programs = "/opt/kubernetes"
	config   = "/etc/kubernetes"
	logs     = "/var/log/stack"
	address  = "10.0.2.15" // the guest's
	dataset  = "tank/containerd-pve"
	node     = "testbed"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(name), 0o755))
	must(t, os.WriteFile(name, []byte(text), 0o644))
}

// try runs a shell command and gives what it wrote and its status. What does not end in time is ended. A cleanup may run one too.
func try(t *testing.T, limit time.Duration, command string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), limit)
	defer cancel()
	begin := time.Now()
	cmd := exec.CommandContext(ctx, "bash", "-o", "pipefail", "-c", command)
	cmd.Env = append(os.Environ(), "PATH="+programs+":"+os.Getenv("PATH"), "KUBECONFIG="+config+"/kubeconfig")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	t.Logf("$ %s   (%.1f s)\n%s", command, time.Since(begin).Seconds(), out)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return string(out), exit.ExitCode()
	case err != nil:
		t.Fatal(err)
	}
	return string(out), 0
}

// ok runs one that has to succeed, and gives what it wrote.
func ok(t *testing.T, command string) string {
	t.Helper()
	out, code := try(t, 10*time.Minute, command)
	if code != 0 {
		t.Fatalf("%s: status %d", command, code)
	}
	return strings.TrimSpace(out)
}

// is runs one that has to write just that.
func is(t *testing.T, want, command string) {
	t.Helper()
	if out := ok(t, command); out != want {
		t.Errorf("%s: %q, want %q", command, out, want)
	}
}

// within repeats one until it succeeds, and says whether it did.
func within(t *testing.T, limit time.Duration, command string) bool {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(time.Second) {
		if _, code := try(t, limit, command); code == 0 {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

// eventually is within that has to succeed.
func eventually(t *testing.T, limit time.Duration, command string) {
	t.Helper()
	if !within(t, limit, command) {
		t.Fatalf("not within %s: %s", limit, command)
	}
}

// apply gives the cluster a manifest.
func apply(t *testing.T, manifest string) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "manifest.yaml")
	write(t, name, manifest)
	ok(t, "kubectl apply -f - <'"+name+"'") // kubectl takes a comma in a name for two names
}

// unit starts a program as a service.
func unit(t *testing.T, name, more string, argv ...string) {
	t.Helper()
	must(t, os.MkdirAll(logs, 0o755))
	write(t, "/etc/systemd/system/"+name+".service", "[Service]\nExecStart="+strings.Join(argv, " ")+"\nStandardOutput=append:"+
		filepath.Join(logs, name)+".log\nStandardError=inherit\nLimitNOFILE=infinity\nTasksMax=infinity\n"+more)
	ok(t, "systemctl daemon-reload && systemctl restart "+name)
}

// certificates makes an authority (ca.crt), a server's certificate of it (server.crt, server.key), and the key that service
// accounts' tokens are signed with (sa.key). RSA's would cost an emulated processor a minute.
func certificates(t *testing.T) {
	t.Helper()
	save := func(name, kind string, der []byte) {
		must(t, os.WriteFile(filepath.Join(config, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	key := func(name string) *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		der, err := x509.MarshalECPrivateKey(k)
		must(t, err)
		save(name, "EC PRIVATE KEY", der)
		return k
	}
	from, to := time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bed"}, NotBefore: from, NotAfter: to, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	caKey := key("ca.key")
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	must(t, err)
	save("ca.crt", "CERTIFICATE", der)
	server := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: node}, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames: []string{node, "localhost"}, IPAddresses: []net.IP{net.ParseIP(address), net.ParseIP("127.0.0.1"), net.ParseIP("10.96.0.1")}}
	der, err = x509.CreateCertificate(rand.Reader, server, ca, key("server.key").Public(), caKey)
	must(t, err)
	save("server.crt", "CERTIFICATE", der)
	key("sa.key")
}

// runtimes is containerd's configuration: a cluster's usual one, with runc for pods that do not ask for another.
const runtimes = `version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '` + cri.PauseImage + `'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = true
`

// host makes the guest a node's host, with containerd as a service and nothing of ours.
func host(t *testing.T) {
	t.Helper()
	write(t, "/etc/containerd/config.toml", runtimes)
	must(t, cri.WriteNetwork("/opt/cni/bin", "/etc/cni/net.d"))
	// As containerd's own containerd.service is.
	unit(t, "containerd", "Type=notify\nDelegate=yes\nKillMode=process\nRestart=always\nOOMScoreAdjust=-999\n", "/usr/local/bin/containerd")
	ok(t, "bed-registry; rm /usr/local/bin/containerd-pve /usr/local/bin/containerd-shim-pve-v2 /usr/local/bin/pve-init")
}

// cluster starts Kubernetes and waits for its node. What a program needs to go on in a slow guest is in its arguments.
func cluster(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(programs); err != nil {
		t.Fatal("Kubernetes is not here: bed test -kubernetes ./integration/kube puts it there")
	}
	must(t, os.MkdirAll(config, 0o755))
	certificates(t)
	write(t, config+"/tokens", "bed,admin,admin,system:masters\n")
	write(t, config+"/kubeconfig", `apiVersion: v1
kind: Config
clusters: [{name: bed, cluster: {server: "https://127.0.0.1:6443", certificate-authority: `+config+`/ca.crt}}]
users: [{name: admin, user: {token: bed}}]
contexts: [{name: bed, context: {cluster: bed, user: admin}}]
current-context: bed
`)
	write(t, config+"/kubelet.yaml", `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://`+cri.Socket+`
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
tlsCertFile: `+config+`/server.crt
tlsPrivateKeyFile: `+config+`/server.key
resolvConf: /etc/resolv.conf
failSwapOn: false
nodeLeaseDurationSeconds: 600
runtimeRequestTimeout: 10m
evictionHard: {memory.available: 20Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
`)
	unit(t, "etcd", "Type=notify\nTimeoutStartSec=300\n", programs+"/etcd", "--data-dir=/var/lib/etcd", "--unsafe-no-fsync", "--heartbeat-interval=1000", "--election-timeout=10000")
	// An emulated one that is busy may take longer than it gives itself to start.
	unit(t, "kube-apiserver", "Restart=always\n", programs+"/kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--advertise-address="+address,
		"--tls-cert-file="+config+"/server.crt", "--tls-private-key-file="+config+"/server.key", "--token-auth-file="+config+"/tokens", "--authorization-mode=AlwaysAllow",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+config+"/sa.key", "--service-account-signing-key-file="+config+"/sa.key",
		"--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged", "--request-timeout=5m",
		"--kubelet-preferred-address-types=InternalIP") // its name is 127.0.0.1's here, to which no API server passes anything on
	eventually(t, 10*time.Minute, "kubectl get --raw /readyz")
	// In the place of kube-proxy: pods reach the API server by its service's address.
	ok(t, `ip address add 10.96.0.1/32 dev lo
nft add table ip bed
nft add chain ip bed output '{ type nat hook output priority -100; }'
nft add rule ip bed output ip daddr 10.96.0.1 tcp dport 443 redirect to :6443`)
	// One of each only: nobody to elect.
	as := []string{"--kubeconfig=" + config + "/kubeconfig", "--leader-elect=false"}
	unit(t, "kube-controller-manager", "", append([]string{programs + "/kube-controller-manager", "--root-ca-file=" + config + "/ca.crt", "--service-account-private-key-file=" + config + "/sa.key",
		"--secure-port=0", "--node-monitor-grace-period=10m", "--controllers=" + strings.Join([]string{"serviceaccount-controller", "serviceaccount-token-controller", "root-ca-certificate-publisher-controller",
			"namespace-controller", "daemonset-controller", "garbage-collector-controller", "pod-garbage-collector-controller", "deployment-controller", "replicaset-controller", "job-controller", "node-lifecycle-controller"}, ",")}, as...)...)
	unit(t, "kube-scheduler", "", append([]string{programs + "/kube-scheduler", "--secure-port=0"}, as...)...)
	unit(t, "kubelet", "Restart=always\nRestartSec=2\n", programs+"/kubelet", as[0], "--config="+config+"/kubelet.yaml", "--node-ip="+address, "--hostname-override="+node)
	eventually(t, 5*time.Minute, "kubectl get node "+node)
	ok(t, "kubectl wait --for=condition=Ready --timeout=9m node/"+node)
	eventually(t, 5*time.Minute, "kubectl get serviceaccount default")
}
