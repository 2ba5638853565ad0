package lxc

import "testing"

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
