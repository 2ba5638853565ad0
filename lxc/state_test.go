package lxc

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestState: what was written is read again, under both kinds of names, and what
// no Create has written is not.
func TestState(t *testing.T) {
	good := state{Namespace: "default", ID: "web", LXCPath: "/var/lib/lxc", Cgroup: "/default/web"}
	own, err := Name("default", "web")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{own, "100", "999999999"} {
		s := good
		s.Name = name
		bundle := t.TempDir()
		if err := s.write(bundle); err != nil {
			t.Fatal(err)
		}
		if got, err := readState(bundle); err != nil || *got != s {
			t.Errorf("%+v: %+v, %v", s, got, err)
		}
	}
	for _, change := range []func(*state){
		func(s *state) { s.Name = "other" }, func(s *state) { s.Name = "../100" }, func(s *state) { s.Name = "99" }, func(s *state) { s.Name = "0100" },
		func(s *state) { s.Cgroup = "/" }, func(s *state) { s.Cgroup = "" }, func(s *state) { s.Cgroup = "/a/.." }, func(s *state) { s.LXCPath = "x" },
	} {
		s := good
		s.Name = own
		change(&s)
		bundle := t.TempDir()
		if err := s.write(bundle); err != nil {
			t.Fatal(err)
		}
		if got, err := readState(bundle); err == nil {
			t.Errorf("%+v was taken", got)
		}
	}
}

// TestMonitorCgroup: the kubelet takes lxc-start's cgroup for no container's, each name has its own, and what a
// release before called it is known.
func TestMonitorCgroup(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	taken := regexp.MustCompile(`[a-z0-9]{64}`) // cadvisor's
	for name, want := range map[string][]string{
		"default--web":      {"/containerd-pve/monitor/default--web"},
		"100":               {"/containerd-pve/monitor/100"},
		"k8s.io--" + id:     {"/containerd-pve/monitor/k8s.io--" + id[:32] + "+" + id[32:], "/containerd-pve/monitor/k8s.io--" + id},
		"x--" + id + id[:1]: {"/containerd-pve/monitor/x--" + id[:32] + "+" + id[32:] + id[:1], "/containerd-pve/monitor/x--" + id + id[:1]},
	} {
		s := state{Name: name}
		if got := s.monitorCgroups(); !slices.Equal(got, want) {
			t.Errorf("%s: %q, not %q", name, got, want)
		}
	}
	for _, name := range []string{"k8s.io--" + id, strings.Repeat("a", 200)} {
		if got := monitorCgroup(name); taken.MatchString(got) {
			t.Error(got)
		}
	}
}
