package main

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
)

func TestSame(t *testing.T) {
	for _, c := range []struct {
		a, b map[string]string
		want string
	}{
		{map[string]string{"x": "Active"}, map[string]string{"x": "Active"}, "<nil>"},
		{map[string]string{"x": "Active"}, map[string]string{"x": "View"}, `A have x Active, B have "View"`},
		{map[string]string{"x": "Active"}, nil, `A have x Active, B have ""`},
		{nil, map[string]string{"y": "View"}, "B have y View, A have not"},
	} {
		if got := fmt.Sprint(same("A", c.a, "B", c.b)); got != c.want {
			t.Errorf("%v and %v: %s, want %s", c.a, c.b, got, c.want)
		}
	}
}

// TestWithoutSpares: a spare is of a snapshot with a record; without one it is left.
func TestWithoutSpares(t *testing.T) {
	const list = "x\t-\t-\t-\n" +
		"x/1\t1\tdefault/1/extract a\t-\nx/1@snapshot\t1\tdefault/1/extract a\t-\n" +
		"x/2\t2\t-\tx/1@snapshot\n" + // a spare
		"x/3\t3\t-\tx/1@snapshot\n" + // one that was given away
		"x/4\t4\t-\tx/9@snapshot\n" +
		"x/5\t-\t-\tx/1@snapshot\n"
	recorded := map[string]string{"x": "", "x/1": "", "x/1@snapshot": "", "x/3": ""}
	if got, want := fmt.Sprint(withoutSpares(list, recorded)), "map[x: x/1: x/1@snapshot: x/3: x/4: x/5:]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestOfDaemon reads records as our daemon writes them, while it has the file open.
func TestOfDaemon(t *testing.T) {
	ctx, file := context.Background(), filepath.Join(t.TempDir(), "metadata.db")
	ms, err := storage.NewMetaStore(file)
	if err != nil {
		t.Fatal(err)
	}
	defer ms.Close()
	err = ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "default/3/extract a", ""); err != nil {
			return err
		}
		if _, err := storage.CommitActive(ctx, "default/3/extract a", "default/4/sha256:a", snapshots.Usage{}); err != nil {
			return err
		}
		_, err := storage.CreateSnapshot(ctx, snapshots.KindView, "k8s.io/5/view/b", "default/4/sha256:a")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	records, datasets, err := ofDaemon(ctx, file, "tank/x")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(records), "map[default/sha256:a:Committed k8s.io/view/b:View]"; got != want {
		t.Errorf("records %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(datasets), "map[tank/x: tank/x/1: tank/x/1@snapshot: tank/x/2:]"; got != want {
		t.Errorf("datasets %s, want %s", got, want)
	}
}
