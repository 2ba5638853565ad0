//go:build bed

package integration

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

func output(t *testing.T, argv ...string) string {
	t.Helper()
	b, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, b)
	}
	return strings.TrimSpace(string(b))
}

func TestBedHasZFS(t *testing.T) {
	if v := output(t, "cat", "/sys/module/zfs/version"); !strings.HasPrefix(v, "2.") {
		t.Errorf("ZFS module %s", v)
	}
	pool := os.Getenv("TESTBED_POOL")
	if h := output(t, "zpool", "list", "-H", "-o", "health", pool); h != "ONLINE" {
		t.Errorf("pool %s is %s", pool, h)
	}
	set := pool + "/bed-smoke"
	output(t, "zfs", "create", set)
	output(t, "zfs", "snapshot", set+"@a")
	output(t, "zfs", "clone", set+"@a", set+"-clone")
	output(t, "zfs", "destroy", "-R", set)
}

func TestBedHasCgroup2(t *testing.T) {
	if fs := output(t, "stat", "-f", "-c", "%T", "/sys/fs/cgroup"); fs != "cgroup2fs" {
		t.Errorf("/sys/fs/cgroup is %s", fs)
	}
	have := strings.Fields(output(t, "cat", "/sys/fs/cgroup/cgroup.subtree_control"))
	for _, want := range []string{"cpu", "memory", "pids"} {
		if !strings.Contains(" "+strings.Join(have, " ")+" ", " "+want+" ") {
			t.Errorf("controller %s is not delegated: %v", want, have)
		}
	}
}

func TestBedHasLXC6(t *testing.T) {
	if v := output(t, "lxc-start", "--version"); !strings.HasPrefix(v, "6.") {
		t.Errorf("LXC %s", v)
	}
}

func TestBedHasAppArmor(t *testing.T) {
	if v := output(t, "cat", "/sys/module/apparmor/parameters/enabled"); v != "Y" {
		t.Errorf("AppArmor enabled: %s", v)
	}
	if p := output(t, "cat", "/sys/kernel/security/apparmor/profiles"); !strings.Contains(p, "lxc-container-default") {
		t.Errorf("LXC's profiles are not loaded:\n%s", p)
	}
}

func TestBedRegistryAnswers(t *testing.T) {
	if os.Getenv("TESTBED") == "host" {
		t.Skip("a host has no local registry of ours")
	}
	if c := output(t, "curl", "-fsS", "http://localhost:5000/v2/_catalog"); !strings.Contains(c, "debian") || !strings.Contains(c, "nginx") {
		t.Errorf("catalog: %s", c)
	}
}

func TestBedClockIsRight(t *testing.T) {
	info, err := os.Stat(os.Args[0]) // the test program was compiled on the host, just now
	if err != nil {
		t.Fatal(err)
	}
	now := strings.TrimSpace(output(t, "date", "+%Y"))
	if want := info.ModTime().Format("2006"); now < want {
		t.Errorf("the guest lives in %s, its test program is of %s", now, want)
	}
}
