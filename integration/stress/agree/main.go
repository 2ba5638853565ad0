// Command agree says whether containerd's snapshots, the records of our daemon
// and what ZFS has are the same, and what the difference is. It runs beside the
// daemons, and changes nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

func main() {
	address := flag.String("address", "/run/containerd/containerd.sock", "containerd's `socket`")
	name := flag.String("snapshotter", "pve-zfs", "our snapshotter's `name` in containerd")
	metadata := flag.String("metadata", "/var/lib/containerd-pve/snapshotter/metadata.db", "our daemon's `records`")
	dataset := flag.String("dataset", "tank/containerd-pve", "our daemon's `dataset`")
	wait := flag.Duration("wait", 30*time.Second, "how long containerd's collection may take")
	flag.Parse()
	err := agreed(context.Background(), *address, *name, *metadata, *dataset, *wait)
	if err != nil {
		fmt.Fprintln(os.Stderr, "agree:", err)
		os.Exit(1)
	}
}

func agreed(ctx context.Context, address, name, metadata, dataset string, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	c, err := client.New(address)
	if err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	defer c.Close()
	for end := time.Now().Add(wait); ; {
		err := compare(ctx, c, name, metadata, dataset)
		if err == nil || time.Now().After(end) {
			return err
		}
		time.Sleep(500 * time.Millisecond)
	}
}

func compare(ctx context.Context, c *client.Client, name, metadata, dataset string) error {
	theirs, err := ofContainerd(ctx, c, name)
	if err != nil {
		return fmt.Errorf("containerd's snapshots: %w", err)
	}
	ours, datasets, err := ofDaemon(ctx, metadata, dataset)
	if err != nil {
		return fmt.Errorf("our records: %w", err)
	}
	has, err := ofZFS(ctx, dataset, datasets)
	if err != nil {
		return fmt.Errorf("zfs list: %w", err)
	}
	err = errors.Join(same("containerd's snapshots", theirs, "our records", ours), same("our records' datasets", datasets, "ZFS's", has))
	if err == nil {
		fmt.Printf("agree: %d snapshots, %d datasets\n", len(theirs), len(has))
	}
	return err
}

// same says what is in one set only.
func same(aName string, a map[string]string, bName string, b map[string]string) error {
	var diff []error
	for _, k := range slices.Sorted(maps.Keys(a)) {
		if v, ok := b[k]; !ok || v != a[k] {
			diff = append(diff, fmt.Errorf("%s have %s %s, %s have %q", aName, k, a[k], bName, v))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(b)) {
		if _, ok := a[k]; !ok {
			diff = append(diff, fmt.Errorf("%s have %s %s, %s have not", bName, k, b[k], aName))
		}
	}
	return errors.Join(diff...)
}

// ofContainerd are the snapshots of all namespaces, as namespace/name, with their kinds.
func ofContainerd(ctx context.Context, c *client.Client, snapshotter string) (map[string]string, error) {
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, ns := range all {
		err := c.SnapshotService(snapshotter).Walk(namespaces.WithNamespace(ctx, ns), func(_ context.Context, i snapshots.Info) error {
			found[ns+"/"+i.Name] = i.Kind.String()
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// ofDaemon are the records, named as containerd's, and the datasets they name.
// They are read in a copy: the daemon has the file locked, and writes it page by
// page, which is why a copy may be unreadable. The caller tries again.
func ofDaemon(ctx context.Context, metadata, dataset string) (records, datasets map[string]string, err error) {
	dir, err := os.MkdirTemp("", "agree-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	copied := filepath.Join(dir, "metadata.db")
	if err := copyFile(metadata, copied); err != nil {
		return nil, nil, err
	}
	ms, err := storage.NewMetaStore(copied)
	if err != nil {
		return nil, nil, err
	}
	defer ms.Close()
	records, datasets = map[string]string{}, map[string]string{dataset: ""}
	err = ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, i snapshots.Info) error {
			id, _, _, err := storage.GetInfo(ctx, i.Name)
			if err != nil {
				return err
			}
			// containerd's key is namespace/number/name.
			ns, rest, _ := strings.Cut(i.Name, "/")
			_, name, ok := strings.Cut(rest, "/")
			if !ok {
				return fmt.Errorf("%s is no key of containerd's: %w", i.Name, errdefs.ErrInvalidArgument)
			}
			records[ns+"/"+name] = i.Kind.String()
			datasets[dataset+"/"+id] = ""
			if i.Kind == snapshots.KindCommitted {
				datasets[dataset+"/"+id+"@snapshot"] = ""
			}
			return nil
		})
	})
	if errdefs.IsNotFound(err) {
		err = nil // none was ever written
	}
	return records, datasets, err
}

func copyFile(from, to string) error {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

// ofZFS are the filesystems and snapshots there are, but for the spares of what is in the records.
func ofZFS(ctx context.Context, dataset string, recorded map[string]string) (map[string]string, error) {
	out, err := exec.CommandContext(ctx, "zfs", "list", "-Hr", "-t", "filesystem,snapshot", "-o", "name,containerd-pve:id,containerd-pve:key,origin", dataset).Output()
	if err != nil {
		return nil, err
	}
	return withoutSpares(string(out), recorded), nil
}

// withoutSpares are the names in a list of names, marks, keys and origins. A spare has the mark and no key.
func withoutSpares(list string, recorded map[string]string) map[string]string {
	found := map[string]string{}
	for line := range strings.Lines(list) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		_, isRecorded := recorded[f[0]]
		_, ofRecorded := recorded[f[3]]
		if isRecorded || f[1] != filepath.Base(f[0]) || f[2] != "-" || !ofRecorded {
			found[f[0]] = ""
		}
	}
	return found
}
