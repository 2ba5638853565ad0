package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPrintContainers(t *testing.T) {
	disk := int64(3 << 20)
	list := []container{
		{Namespace: "k8s.io", ID: "b", VMID: 101, Pod: "web", State: "running", PID: 7, Memory: 5 << 20, Image: "i\n"},
		{Namespace: "default", ID: "plain"},
		{Namespace: "default", ID: "a", VMID: 100, Image: "debian:13", State: "stopped", Disk: &disk},
	}
	sortContainers(list, false)
	var table, json bytes.Buffer
	if err := printContainers(&table, "table", list); err != nil {
		t.Fatal(err)
	}
	const want = `VMID  NAMESPACE  CONTAINER  POD  STATE    MEMORY  DISK  IMAGE
-     default    plain      -    -        -       -     -
100   default    a          -    stopped  -       3MiB  debian:13
101   k8s.io     b          web  running  5MiB    -     "i\n"
`
	if d := cmp.Diff(want, table.String()); d != "" {
		t.Error(d)
	}
	sortContainers(list, true)
	if err := printContainers(&json, "json", list[:1]); err != nil {
		t.Fatal(err)
	}
	const object = `[
  {
    "namespace": "default",
    "id": "plain",
    "vmid": 0,
    "image": "",
    "pod": "",
    "state": "",
    "pid": 0,
    "memory": 0,
    "disk": null
  }
]
`
	if d := cmp.Diff(object, json.String()); d != "" {
		t.Error(d)
	}
}

func TestAddMemory(t *testing.T) {
	proc, cgroups := t.TempDir(), t.TempDir()
	put := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(filepath.Join(proc, "7", "cgroup"), "0::/default/x/payload/.lxc\n")
	put(filepath.Join(cgroups, "default", "x", "memory.current"), "4096\n")
	put(filepath.Join(proc, "8", "cgroup"), "0::/gone\n")
	list := []container{{PID: 7, State: "running"}, {PID: 8, State: "running"}, {PID: 9, State: "running"}, {PID: 7, State: "stopped"}, {}}
	addMemory(list, proc, cgroups)
	for i, want := range []int64{4096, 0, 0, 0, 0} {
		if list[i].Memory != want {
			t.Errorf("%d: %d", i, list[i].Memory)
		}
	}
}
