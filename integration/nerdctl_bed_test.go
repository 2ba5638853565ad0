//go:build bed

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// bash is what a person would type: lines in which $run is `nerdctl run` with our
// runtime, and $name a container of the case's own.
func bash(t *testing.T, name, lines string) (string, error) {
	t.Helper()
	// What hangs is ended with all that it started.
	cmd := exec.CommandContext(background(t), "timeout", "-k", "5", "150", "bash", "-euo", "pipefail", "-c", lines)
	cmd.WaitDelay = time.Second
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "name="+name, "run=nerdctl run --runtime "+ours, "debian="+debian, "busybox="+busybox, "nginx=localhost:5000/nginx:latest")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestLongNerdctl types what docs/nerdctl.md says, on a node of Proxmox, with the bridge network that
// nerdctl makes by CNI. `make conformance` runs it, and puts nerdctl into the guest.
func TestLongNerdctl(t *testing.T) {
	if _, err := exec.LookPath("nerdctl"); err != nil {
		t.Fatal("nerdctl is not here: bed test -nerdctl ./integration puts it there")
	}
	proxmox(t)
	const config = "/etc/nerdctl/nerdctl.toml"
	must(t, os.MkdirAll(filepath.Dir(config), 0o755))
	must(t, os.WriteFile(config, []byte("namespace = \"default\"\nsnapshotter = \""+zfs+"\"\n"), 0o600))
	// What is made once for all networks of a host.
	if out, err := bash(t, "first", "$run --rm $debian true"); err != nil {
		t.Fatalf("%s%v", out, err)
	}
	// containerd's restart monitor takes a task that is just being made for one that has ended, and begins another:
	// on a machine as slow as this one nerdctl may lose its own so.
	for i, c := range []struct{ name, lines, want string }{
		{"run", "$run --rm $debian echo out", `^out$`},
		{"exit code", "$run --rm $debian sh -c 'exit 7' || echo code $?", `^code 7$`},
		{"stdin", "echo in | $run --rm -i $debian cat", `^in$`},
		{"terminal", "script -qec \"$run --rm -t $debian tty\" /dev/null", `/dev/pts/0`},
		{"detached, logs, wait", "$run -d --name $name $debian sh -c 'echo out; echo err >&2; exit 3'; nerdctl wait $name; nerdctl logs $name", `(?s)^[0-9a-f]{64}\n3\n.*(out.*err|err.*out)`},
		{"logs -f", "$run -d --name $name $debian sh -c 'for i in 1 2 3; do echo line $i; sleep 0.2; done' >/dev/null; nerdctl logs -f $name", `^line 1\nline 2\nline 3\n$`},
		{"exec", "$run -d --name $name $debian sleep 1000 >/dev/null; nerdctl exec -e A=b -w /tmp -u www-data $name sh -c 'echo $A $PWD $(id -u)'; nerdctl exec $name sh -c 'echo new:x:77:77::/: >> /etc/passwd'; nerdctl exec -u new $name id -u; nerdctl exec $name false 2>/dev/null || echo code $?", `^b /tmp 33\n77\ncode 1\n$`},
		{"ps, inspect", "$run -d --name $name $debian sleep 1000 >/dev/null; nerdctl ps --format '{{.Names}} {{.Status}}'; nerdctl inspect -f '{{.State.Status}} {{.State.Running}} {{.Name}}' $name", `(?s)^case\d+ Up\n.*running true case\d+`},
		{"stop and start", "$run -d --name $name --ip 10.4.0.77 --stop-timeout 5 $debian sh -c 'trap \"exit 0\" TERM; date +%N >> /data; while :; do sleep 0.1; done' >/dev/null;" +
			"vmid() { containerd-pve container ls --format json | jq -r '.[] | select(.id == \"'$(nerdctl inspect -f '{{.ID}}' $name)'\") | .vmid'; };" +
			"before=$(vmid) address=$(nerdctl inspect -f '{{.NetworkSettings.IPAddress}}' $name); nerdctl stop $name; nerdctl start $name; nerdctl exec $name sh -c 'until [ $(wc -l < /data) = 2 ]; do sleep 0.1; done; wc -l < /data'; " +
			"[ $(vmid) = $before ] && echo same VMID; [ $(nerdctl inspect -f '{{.NetworkSettings.IPAddress}}' $name) = $address ] && echo same address",
			`(?s)2\nsame VMID\nsame address\n$`},
		{"restart", "$run -d --name $name $debian sleep 1000 >/dev/null; a=$(nerdctl inspect -f '{{.State.Pid}}' $name); nerdctl restart -t 0 $name; b=$(nerdctl inspect -f '{{.State.Pid}}' $name); [ $a != $b ] && echo restarted", `restarted`},
		{"kill", "$run -d --name $name $debian sh -c 'trap \"exit 5\" USR1; while :; do sleep 0.1; done' >/dev/null; sleep 2; nerdctl kill -s USR1 $name; nerdctl wait $name", `\n5\n$`},
		{"restart policy", "$run -d --name $name --restart always $debian sh -c 'echo x >> /runs; [ $(wc -l < /runs) -lt 2 ] && exit 1; sleep 1000' >/dev/null || true; for i in $(seq 60); do [ \"$(nerdctl exec $name wc -l /runs 2>/dev/null)\" = '2 /runs' ] && break; sleep 1; done; nerdctl exec $name wc -l /runs", `2 /runs`},
		{"on-failure", "$run -d --name $name --restart on-failure:2 $debian false >/dev/null || true; sleep 45; nerdctl inspect -f '{{.State.Status}} {{.RestartCount}}' $name", `exited 2`},
		{"memory and cpus", "$run -d --name $name -m 64m --cpus 0.5 --pids-limit 50 $debian sleep 1000 >/dev/null; nerdctl exec $name cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; nerdctl update -m 96m --cpu-quota 100000 $name >/dev/null; nerdctl exec $name cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; id=$(nerdctl inspect -f '{{.ID}}' $name); grep -h -E '^(memory|cpulimit): ' $(grep -l $id /etc/pve/lxc/*.conf)", `^67108864\n50000 100000\n50\n100663296\n100000 100000\ncpulimit: 1\nmemory: 96\n`},
		{"bind mount", "mkdir d; echo here > d/f; $run --rm -v $PWD/d:/mnt:ro $debian sh -c 'cat /mnt/f; touch /mnt/g 2>&1 || true'", `^here\n.*Read-only`},
		{"named volume", "nerdctl volume create $name >/dev/null; $run --rm -v $name:/v $debian sh -c 'echo kept > /v/f'; $run --rm -v $name:/v $debian cat /v/f; nerdctl volume rm $name >/dev/null; nerdctl volume ls -q", `^kept\n$`},
		{"tmpfs", "$run --rm --tmpfs /t:size=1m $debian stat -f -c %T /t", `tmpfs`},
		{"bridge network", "$run -d --name $name $nginx >/dev/null; a=$(nerdctl inspect -f '{{.NetworkSettings.IPAddress}}' $name); curl -s --retry 20 --retry-connrefused http://$a | grep -o '<title>.*</title>'", `<title>.*nginx.*</title>`},
		{"published port", "$run -d --name $name -p 8080:80 $nginx >/dev/null; nerdctl port $name; curl -s --retry 20 --retry-connrefused http://$(hostname -I | cut -d' ' -f1):8080 | grep -o '<title>.*</title>'", `(?s)80/tcp -> 0.0.0.0:8080.*nginx`},
		{"own network, name resolution", "nerdctl network create $name >/dev/null; $run -d --name ${name}a --network $name $nginx >/dev/null; $run --rm --network $name $debian sh -c \"grep -c ${name}a /etc/hosts\"; nerdctl rm -f ${name}a >/dev/null; nerdctl network rm $name >/dev/null", `^1\n$`},
		{"no network, host network", "$run --rm --network none $debian sh -c 'ls /sys/class/net'; $run --rm --network host $debian sh -c 'ls /sys/class/net'", `^lo\n(?s:.*)eth0`},
		{"another's network", "$run -d --name $name $nginx >/dev/null; a=$(nerdctl exec $name cat /proc/net/fib_trie | md5sum); b=$($run --rm --network container:$name $debian cat /proc/net/fib_trie | md5sum); [ \"$a\" = \"$b\" ] && echo same", `same`},
		{"hostname, hosts, dns", "$run --rm --hostname some --add-host a:10.1.1.1 --dns 10.2.2.2 $debian sh -c 'hostname; grep -w a /etc/hosts; cat /etc/resolv.conf'", `(?s)^some\n10.1.1.1\s+a\n.*nameserver 10.2.2.2`},
		{"user, workdir, env, entrypoint", "$run --rm -u 33:33 -w /var -e A=b --entrypoint sh $debian -c 'id -u; pwd; echo $A'", `^33\n/var\nb\n$`},
		{"read-only", "$run --rm --read-only $debian sh -c 'touch /x 2>&1 || echo no'", `no`},
		{"capabilities, privileged", "$run --rm --cap-drop all $debian grep CapEff /proc/self/status; $run --rm --privileged $debian sh -c 'mount -t tmpfs x /mnt && echo mounted'", `CapEff:\s+0+\nmounted\n$`},
		{"user namespace", "for more in '--userns-remap root run' 'run --annotation io.containerd.pve.unprivileged=true'; do ${run/run/$more} -d --name $name $debian sleep 1000 >/dev/null; nerdctl exec -u www-data $name sh -c 'id -u; id -u > /tmp/f; stat -c %U /tmp/f; head -1 /proc/self/uid_map'; nerdctl rm -f $name >/dev/null; done", `^(33\nwww-data\n +0 +100000 +\d+\n){2}$`},
		{"rlimit, sysctl, shm", "$run --rm --ulimit nofile=123:123 --sysctl net.ipv4.ip_forward=0 --shm-size 8m $debian sh -c 'ulimit -n; cat /proc/sys/net/ipv4/ip_forward; df -k /dev/shm | tail -1'", `^123\n0\n.*8192`},
		{"pid of the host, of another", "$run --rm --pid host $debian cat /proc/1/comm; $run -d --name $name $debian sleep 1000 >/dev/null; $run --rm --pid container:$name $debian cat /proc/1/comm", `^(init|vminit|busybox|systemd)\n(?s:.*)sleep\n$`},
		{"device", "$run --rm --device /dev/fuse $debian test -c /dev/fuse && echo there", `there`},
		{"pause", "$run -d --name $name $debian sleep 1000 >/dev/null; nerdctl pause $name >/dev/null; nerdctl inspect -f '{{.State.Status}}' $name; nerdctl unpause $name >/dev/null; nerdctl inspect -f '{{.State.Status}}' $name", `^paused\nrunning\n$`},
		{"top", "$run -d --name $name $debian sleep 1000 >/dev/null; nerdctl top $name", `sleep 1000`},
		{"stats", "$run -d --name $name -m 64m $debian sleep 1000 >/dev/null; (timeout 30 nerdctl stats --format '{{.Name}} {{.MemUsage}} {{.PIDs}}' $name || true) | grep -a -m1 -o 'case.* / 64MiB 1'", `case\d+ [0-9.]+[KM]iB / 64MiB 1`},
		{"events", "timeout 20 nerdctl events --format '{{.Topic}}' > e & sleep 2; $run --rm $debian true; sleep 2; kill %1 2>/dev/null || true; wait || true; cat e", `(?s)/tasks/create.*/tasks/start.*/tasks/exit.*/tasks/delete`},
		{"cp", "$run -d --name $name $debian sleep 1000 >/dev/null; echo there > f; nerdctl cp f $name:/tmp/f; nerdctl exec $name cat /tmp/f; nerdctl cp $name:/etc/os-release o; grep -c '^ID=debian' o", `^there\n1\n$`},
		{"cp of a stopped one", "$run --name $name $debian sh -c 'echo kept > /f'; nerdctl cp $name:/f f; cat f", `^kept\n$`},
		{"diff", "$run --name $name $debian sh -c 'echo > /new; rm /etc/motd'; nerdctl diff $name", `(?s)D /etc/motd.*A /new|A /new.*D /etc/motd`},
		{"commit", "$run --name $name $debian sh -c 'echo kept > /f'; nerdctl commit -c 'CMD [\"cat\", \"/f\"]' $name $name:1 >/dev/null; $run --rm $name:1; nerdctl rmi $name:1 >/dev/null", `^kept\n$`},
		{"commit of a running one", "$run -d --name $name $debian sh -c 'echo kept > /f; sleep 1000' >/dev/null; sleep 1; nerdctl commit $name $name:1 >/dev/null; $run --rm $name:1 cat /f; nerdctl rmi $name:1 >/dev/null", `^kept\n$`},
		{"save and load", "nerdctl save -o i.tar $busybox; nerdctl load -i i.tar; $run --rm $busybox echo loaded", `(?s)Loaded image: localhost:5000/busybox:latest.*loaded`},
		{"an image that another tool built", "mkdir r; umoci init --layout r/l; umoci new --image r/l:x; mkdir b; cp $(command -v busybox) b/sh; umoci insert --image r/l:x b /bin; umoci config --image r/l:x --config.cmd /bin/sh --config.cmd -c --config.cmd 'echo built'; skopeo copy -q oci:r/l:x oci-archive:i.tar:docker.io/library/$name:1; nerdctl load -q -i i.tar; $run --rm $name:1; nerdctl rmi $name:1 >/dev/null", `built`},
		{"rename, rm -f", "$run -d --name $name $debian sleep 1000 >/dev/null; nerdctl rename $name ${name}b; nerdctl exec ${name}b echo alive; nerdctl rm -f ${name}b >/dev/null; nerdctl ps -a -q --filter name=${name}b", `^alive\n$`},
		{"detach, attach", "(sleep 8; printf '\\020\\021'; sleep 3) | timeout 60 script -qec \"$run -it --name $name $debian sh -c 'until [ -e /go ]; do sleep 0.1; done; echo attached'\" /dev/null >/dev/null; (sleep 5; nerdctl exec $name touch /go) & timeout 60 script -qec \"nerdctl attach $name\" /dev/null < <(exec sleep 60 2>/dev/null)", `attached`},
		{"an interface at a bridge of Proxmox's", "ip link add vmbr9 type bridge; ip addr add 10.9.9.1/24 dev vmbr9; ip link set vmbr9 up; $run -d --name $name --network none --annotation io.containerd.pve.net0=bridge=vmbr9,ip=10.9.9.5/24,gw=10.9.9.1 $nginx >/dev/null; ask() { curl -s --retry 20 --retry-connrefused http://10.9.9.5 | grep -o '<title>.*</title>'; }; ask; nerdctl stop $name; nerdctl start $name; ask; nerdctl rm -f $name >/dev/null; ip link del vmbr9", `(?s)nginx.*nginx`},
		{"compose", `cat > compose.yaml <<'Y'
services:
  web:
    image: localhost:5000/nginx:latest
    runtime: ` + ours + `
    ports: ["8081:80"]
    volumes: ["pages:/usr/share/pages"]
  asks:
    image: localhost:5000/debian:13
    runtime: ` + ours + `
    command: ["sh", "-c", "until grep -q web /etc/hosts; do sleep 0.1; done; echo found; sleep 1000"]
    depends_on: [web]
volumes:
  pages:
Y
nerdctl compose -p $name up -d 2>&1 | tail -3
curl -s --retry 20 --retry-connrefused http://$(hostname -I | cut -d' ' -f1):8081 | grep -o '<title>.*</title>'
nerdctl compose -p $name ps --format json | jq -r '.[].State' ; for i in $(seq 50); do nerdctl compose -p $name logs asks 2>&1 | grep found && break; sleep 0.2; done
nerdctl compose -p $name down -v 2>&1 | tail -1; nerdctl ps -a -q; nerdctl volume ls -q`, `(?s)nginx.*running\nrunning\n.*found`},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := fmt.Sprintf("case%d", i)
			out, err := bash(t, name, c.lines)
			if err != nil || !regexp.MustCompile("(?m)"+c.want).MatchString(out) {
				t.Errorf("%v, not %s:\n%s", err, c.want, out)
			}
			left, _ := command("nerdctl", "ps", "-a", "-q")
			for id := range strings.FieldsSeq(left) {
				if out, code := command("nerdctl", "rm", "-f", id); code != 0 {
					t.Errorf("rm: %s", out)
				}
			}
		})
	}
}
