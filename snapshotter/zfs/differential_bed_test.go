//go:build bed

package zfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// program does by the zfs program what go-zfs has no function for.
func program(args ...string) error {
	out, err := exec.Command("zfs", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("zfs %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// send pipes one snapshot into another, by either way.
func send(n *Native, from, incremental, to string) error {
	if n == nil {
		cmd := "zfs send "
		if incremental != "" {
			cmd += "-i " + incremental + " "
		}
		out, err := exec.Command("sh", "-c", cmd+from+" | zfs receive "+to).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", cmd, err, out)
		}
		return nil
	}
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	sent := make(chan error, 1)
	go func() {
		err := n.Send(context.Background(), from, incremental, write)
		sent <- errors.Join(err, write.Close())
	}()
	return errors.Join(n.Receive(context.Background(), to, "", read), <-sent)
}

// TestDifferential does every operation by both ways, each in a pool of its own,
// and compares after each one all that ZFS says of the pools.
func TestDifferential(t *testing.T) {
	ctx, n := context.Background(), openNative(t)
	const natively, other = "zfsway", "zfsayw"
	testPool(t, natively)
	testPool(t, other)
	both := func(f func(z ZFS, pool string) error) func(pool string, native bool) error {
		return func(pool string, native bool) error {
			if native {
				return f(n, pool)
			}
			return f(goZFS{}, pool)
		}
	}
	// either is what go-zfs lacks: natively, and what to tell the zfs program.
	either := func(f func(pool string) error, args ...string) func(pool string, native bool) error {
		return func(pool string, native bool) error {
			if native {
				return f(pool)
			}
			line := strings.ReplaceAll(strings.Join(args, "\x00"), "POOL", pool)
			return program(strings.Split(line, "\x00")...)
		}
	}
	props := Properties{"mountpoint": "legacy", "acltype": "posixacl", "xattr": "sa", "atime": "off", "com.sun:auto-snapshot": "false", "a:b": "with blank"}
	for _, step := range []struct {
		name string
		do   func(pool string, native bool) error
	}{
		{"create", both(func(z ZFS, p string) error { return z.Create(ctx, p+"/a", props) })},
		{"create with a quota", both(func(z ZFS, p string) error {
			return z.Create(ctx, p+"/q", Properties{"mountpoint": "legacy", "refquota": "16777216", "readonly": "on"})
		})},
		{"create with rules for names", both(func(z ZFS, p string) error {
			return z.Create(ctx, p+"/n", Properties{"mountpoint": "legacy", "normalization": "formKC", "utf8only": "on", "casesensitivity": "mixed"})
		})},
		{"create with none, below them", both(func(z ZFS, p string) error {
			return z.Create(ctx, p+"/n/o", Properties{"mountpoint": "legacy", "normalization": "none", "utf8only": "off", "casesensitivity": "sensitive"})
		})},
		{"create with other rules", both(func(z ZFS, p string) error {
			return z.Create(ctx, p+"/n/p", Properties{"mountpoint": "legacy", "normalization": "formKD", "utf8only": "on", "casesensitivity": "insensitive"})
		})},
		{"create that exists", both(func(z ZFS, p string) error { return refused(z.Create(ctx, p+"/a", props)) })},
		{"snapshot", both(func(z ZFS, p string) error { return z.Snapshot(ctx, p+"/a@1", nil) })},
		{"snapshot with a property", both(func(z ZFS, p string) error { return z.Snapshot(ctx, p+"/a@2", Properties{"c:d": "e"}) })},
		{"clone", both(func(z ZFS, p string) error {
			return z.Clone(ctx, p+"/a@2", p+"/b", Properties{"mountpoint": "legacy", "a:b": "own", "readonly": "on"})
		})},
		{"clone with a quota", both(func(z ZFS, p string) error { return z.Clone(ctx, p+"/a@2", p+"/c", Properties{"refquota": "33554432"}) })},
		{"set", both(func(z ZFS, p string) error { return z.Set(ctx, p+"/b", Properties{"a:b": "changed"}) })},
		{"destroy of a cloned snapshot", both(func(z ZFS, p string) error { return refused(z.Destroy(ctx, p+"/a@2")) })},
		{"destroy of a snapshot", both(func(z ZFS, p string) error { return z.Destroy(ctx, p+"/a@1") })},
		{"destroy of a filesystem", both(func(z ZFS, p string) error { return z.Destroy(ctx, p+"/c") })},
		{"set of one that ZFS knows", either(func(p string) error { return n.Set(ctx, p+"/b", Properties{"readonly": "off"}) }, "set", "readonly=off", "POOL/b")},
		{"inherit", either(func(p string) error { return n.Inherit(ctx, p+"/b", "readonly") }, "inherit", "readonly", "POOL/b")},
		{"inherit of a user property", either(func(p string) error { return n.Inherit(ctx, p+"/b", "a:b") }, "inherit", "a:b", "POOL/b")},
		{"promote", either(func(p string) error { return n.Promote(ctx, p+"/b") }, "promote", "POOL/b")},
		{"rename", either(func(p string) error { return n.Rename(ctx, p+"/a", p+"/z") }, "rename", "POOL/a", "POOL/z")},
		{"rename of a snapshot", either(func(p string) error { return n.Rename(ctx, p+"/b@2", p+"/b@two") }, "rename", "POOL/b@2", "POOL/b@two")},
		{"hold", either(func(p string) error { return n.Hold(ctx, map[string]string{p + "/b@two": "tag"}) }, "hold", "tag", "POOL/b@two")},
		{"release", either(func(p string) error { return n.Release(ctx, map[string]string{p + "/b@two": "tag"}) }, "release", "tag", "POOL/b@two")},
		{"bookmark", either(func(p string) error { return n.Bookmark(ctx, map[string]string{p + "/b#mark": p + "/b@two"}) }, "bookmark", "POOL/b@two", "POOL/b#mark")},
		{"snapshot of several", either(func(p string) error {
			return n.Snapshots(ctx, []string{p + "/b@3", p + "/z@3"}, Properties{"f:g": "h"})
		},
			"snapshot", "-o", "f:g=h", "POOL/b@3", "POOL/z@3")},
		{"rollback", both(func(z ZFS, p string) error { return z.(Way).Rollback(ctx, p+"/b@3") })},
		{"rollback to one that is not the latest", both(func(z ZFS, p string) error {
			return isKind(z.(Way).Rollback(ctx, p+"/b@two"), errdefs.IsFailedPrecondition)
		})},
		{"rollback to none", both(func(z ZFS, p string) error {
			return isKind(z.(Way).Rollback(ctx, p+"/b@none"), errdefs.IsNotFound)
		})},
		{"list of snapshots", both(func(z ZFS, p string) error {
			all, err := z.Taken(ctx, p+"/b", []string{"f:g", "c:d"})
			if err != nil || len(all) != 2 || all[0].Name != p+"/b@two" || all[1].Name != p+"/b@3" || all[1].Own["f:g"] != "h" || all[1].Created.IsZero() {
				return fmt.Errorf("%+v, %w", all, err)
			}
			_, err = z.Taken(ctx, p+"/none", nil)
			return isKind(err, errdefs.IsNotFound)
		})},
		{"send", func(p string, native bool) error { return send(way(n, native), p+"/b@two", "", p+"/r@two") }},
		{"send of what came since", func(p string, native bool) error { return send(way(n, native), p+"/b@3", p+"/b@two", p+"/r@3") }},
		{"destroy when it is free", either(func(p string) error { return n.DestroySnapshots(ctx, []string{p + "/b@two"}, true) }, "destroy", "-d", "POOL/b@two")},
		{"destroy of a bookmark", either(func(p string) error { return n.DestroyBookmarks(ctx, []string{p + "/b#mark"}) }, "destroy", "POOL/b#mark")},
		{"destroy of all", both(func(z ZFS, p string) error {
			failed, err := z.DestroyAll(ctx, []string{p + "/r@3", p + "/r@two", p + "/r", p + "/z@3", p + "/z", p + "/none", p + "/b@two", p + "/b@3", p + "/b", p + "/q"})
			if len(failed) > 0 {
				err = fmt.Errorf("%v", failed)
			}
			return err
		})},
	} {
		if err := errors.Join(step.do(natively, true), step.do(other, false)); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if got, want := everything(t, natively), everything(t, other); got != want {
			t.Fatalf("after %s natively\n%s\nand by the zfs program\n%s", step.name, got, want)
		}
	}
}

func way(n *Native, native bool) *Native {
	if native {
		return n
	}
	return nil
}

// refused wants an error.
func refused(err error) error {
	if err == nil {
		return errors.New("it was not refused")
	}
	return nil
}

func isKind(err error, is func(error) bool) error {
	if !is(err) {
		return fmt.Errorf("not the error that it should be: %w", err)
	}
	return nil
}

// volatile are the properties that are another's in every pool, and the sizes,
// which depend on when the pool last wrote.
var volatile = regexp.MustCompile(`\t(creation|createtxg|guid|objsetid|used\w*|available|referenced|written\S*|logical\w+|\w*compressratio|snapshots_changed)\t`)

// everything is what ZFS says of a pool, with its name taken out.
func everything(t *testing.T, pool string) string {
	t.Helper()
	out, err := exec.Command("zfs", "get", "-Hp", "-r", "-t", "all", "-o", "name,property,value,source", "all", pool).CombinedOutput()
	if err != nil {
		t.Fatalf("zfs get: %v: %s", err, out)
	}
	var kept []string
	for line := range strings.Lines(string(out)) {
		if volatile.MatchString(line) {
			continue
		}
		fields := strings.Split(strings.ReplaceAll(line, pool, "POOL"), "\t")
		if fields[1] == "clones" { // in no order
			clones := strings.Split(fields[2], ",")
			slices.Sort(clones)
			fields[2] = strings.Join(clones, ",")
		}
		kept = append(kept, strings.Join(fields, "\t"))
	}
	slices.Sort(kept) // user properties come in the order of their hashes
	return strings.Join(kept, "")
}

// TestDiff: what changed is what the zfs program says, through a clone as well.
func TestDiff(t *testing.T) {
	const pool = "zfsdiff"
	testPool(t, pool)
	ctx, n := context.Background(), openNative(t)
	must := orFail(t)
	dir := t.TempDir()
	mounted := func(dataset, script string) {
		t.Helper()
		out, err := exec.Command("sh", "-euc", "mount -t zfs "+dataset+" "+dir+"; cd "+dir+"; "+script+"; cd /; umount "+dir).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	must(n.Create(ctx, pool+"/a", Properties{"mountpoint": "legacy", "xattr": "sa"}))
	mounted(pool+"/a", "mkdir dir gone; echo 1 > same; echo 1 > changed; echo 1 > removed; echo 1 > old-name; echo 1 > dir/inner; ln -s same link; echo 1 > gone/x; echo 1 > chmod")
	must(n.Snapshot(ctx, pool+"/a@1", nil))
	must(n.Clone(ctx, pool+"/a@1", pool+"/b", Properties{"mountpoint": "legacy"}))
	mounted(pool+"/b", "echo 2 > changed; rm removed; mv old-name new-name; echo 2 > dir/new; rm -r gone; chmod 600 chmod; ln -sf changed link; printf x > \"$(printf 'b\\303\\244 \\n\\377d')\"; mknod null c 1 3; mkfifo fifo")
	must(n.Snapshot(ctx, pool+"/b@2", nil))

	got := map[string]string{}
	note := func(node *Node, what string) { got[node.Path] += what }
	must(n.Diff(ctx, pool+"/a@1", pool+"/b@2", func(c Change) error {
		switch {
		case c.Before == nil:
			note(c.After, "+")
		case c.After == nil:
			note(c.Before, "-")
		case c.Before.Generation != c.After.Generation:
			note(c.Before, "-")
			note(c.After, "+")
		case c.Before.Path != c.After.Path:
			note(c.Before, "R to "+c.After.Path)
		default:
			note(c.After, "M")
		}
		return nil
	}))
	want := map[string]string{
		"/": "M", "/dir": "M", "/changed": "M", "/removed": "-", "/old-name": "R to /new-name", "/dir/new": "+", "/gone": "-", "/gone/x": "-",
		"/chmod": "M", "/b\u00e4 \n\xffd": "+", "/null": "+", "/fifo": "+",
	}
	for path, is := range want {
		if got[path] != is {
			t.Errorf("%q: %q, want %q", path, got[path], is)
		}
		delete(got, path)
	}
	// ln makes the new link before it takes the old one's name.
	if link := got["/link"]; link != "-+" && link != "+-" {
		t.Errorf("link: %q", link)
	}
	delete(got, "/link")
	if len(got) > 0 {
		t.Errorf("and %q", got)
	}

	stop := errors.New("enough")
	if err := n.Diff(ctx, pool+"/a@1", pool+"/b@2", func(Change) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("ended by the caller: %v", err)
	}
	if err := n.Diff(ctx, pool+"/a@1", pool+"/none@2", func(Change) error { return nil }); !errdefs.IsNotFound(err) {
		t.Errorf("of none: %v", err)
	}
	if err := n.Diff(ctx, pool+"/b@2", pool+"/a@1", func(Change) error { return nil }); !errdefs.IsInvalidArgument(err) {
		t.Errorf("the wrong way round: %v", err)
	}
}
