//go:build bed

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
)

// The tests of this file are what the tests of containerd's client suite are about that cannot run here: those that put
// another program in runc's place or call runc, and the one that needs XFS.

// ended waits for the end of the task and returns the code.
func (b *box) ended(limit time.Duration) uint32 {
	b.t.Helper()
	select {
	case st := <-b.exit:
		if st.Error() != nil {
			b.t.Fatalf("wait: %v", st.Error())
		}
		return st.ExitCode()
	case <-time.After(limit):
		b.t.Fatal("Wait does not come back")
		return 0
	}
}

// TestInitKilledBeforeStart: a created container whose init somebody kills is stopped, and says so (containerd issue 9103).
func TestInitKilledBeforeStart(t *testing.T) {
	b, err := create(t, options{image: busybox, args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(int(b.task.Pid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := b.ended(time.Minute); code != 137 {
		t.Errorf("exit code %d", code)
	}
	if st, err := b.task.Status(b.ctx); err != nil || st.Status != client.Stopped || st.ExitStatus != 137 {
		t.Errorf("status %+v, %v", st, err)
	}
	if err := b.task.Start(b.ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start: %v", err)
	}
	if st, err := b.task.Delete(b.ctx); err != nil || st.ExitCode() != 137 {
		t.Errorf("delete: %v, %v", st, err)
	}
	b.task = nil
}

// TestExecOfDyingTask: execs that were added before the init's end are not started after it, and can be deleted
// (containerd issue 10589).
func TestExecOfDyingTask(t *testing.T) {
	b := start(t, options{image: busybox, args: []string{"sleep", "1000"}})
	spec, err := b.container.Spec(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	spec.Process.Args = []string{"sleep", "1000"}
	add := func(id string) client.Process {
		p, err := b.task.Exec(b.ctx, id, spec.Process, cio.NullIO)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	runs, early, late := add("runs"), add("early"), add("late")
	if err := runs.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	runsExit, err := runs.Wait(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(int(b.task.Pid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// Nobody has noticed yet, or somebody has: it must fail either way.
	if err := early.Start(b.ctx); err == nil {
		t.Error("an exec was started in a container whose init is dead")
	} else {
		t.Log(err)
	}
	if code := b.ended(time.Minute); code != 137 {
		t.Errorf("exit code %d", code)
	}
	if st := <-runsExit; st.ExitCode() != 137 {
		t.Errorf("exit code of the running exec %d, %v", st.ExitCode(), st.Error())
	}
	if err := late.Start(b.ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start after the end: %v", err)
	}
	if st, err := late.Status(b.ctx); err != nil || st.Status != client.Created {
		t.Errorf("exec that never ran: %+v, %v", st, err)
	}
	if _, err := b.task.Exec(b.ctx, "later", spec.Process, cio.NullIO); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec after the end: %v", err)
	}
	for _, p := range []client.Process{runs, early, late} {
		if _, err := p.Delete(b.ctx); err != nil {
			t.Errorf("delete of %s: %v", p.ID(), err)
		}
	}
}

// TestStoppedByLXC: lxc-stop ends a container as any other LXC container, and containerd learns it.
func TestStoppedByLXC(t *testing.T) {
	// As CRI and nerdctl start them.
	b := start(t, options{id: "stopped-by-lxc", image: busybox, args: []string{"sleep", "1000"}, spec: []oci.SpecOpts{defaultProfile(t, "containerd-pve-stopped")}})
	if out, code := command("lxc-stop", "-k", "-P", "/var/lib/containerd-pve/lxc", "-n", "default--stopped-by-lxc"); code != 0 {
		t.Fatalf("lxc-stop: status %d: %s", code, out)
	}
	if code := b.ended(time.Minute); code != 137 {
		t.Errorf("exit code %d", code)
	}
	if err := b.task.Kill(b.ctx, syscall.SIGKILL); !errdefs.IsNotFound(err) {
		t.Errorf("kill: %v", err)
	}
}

// TestMountsOfMountManager: a root that containerd's mount manager puts together of a loop device and an overlay on it.
func TestMountsOfMountManager(t *testing.T) {
	dir := t.TempDir()
	device := filepath.Join(dir, "upper.img")
	f, err := os.Create(device)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(16 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if out, code := command("mke2fs", "-q", "-t", "ext4", device); code != 0 {
		t.Fatal(out)
	}
	disk := mount.Mount{Type: "ext4", Source: device, Options: []string{"loop"}}
	if err := mount.WithTempMount(background(t), []mount.Mount{disk}, func(root string) error {
		for _, d := range []string{"upper", "work"} {
			if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	c := connect(t)
	ctx, done, err := c.WithLease(background(t)) // or the views below are nobody's, and collected
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = done(ctx) })
	image, err := c.GetImage(ctx, busybox)
	if err != nil {
		t.Fatal(err)
	}
	diffIDs, err := image.RootFS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i, args := range [][]string{{"sh", "-c", "echo kept > /etc/mark"}, {"grep", "-q", "kept", "/etc/mark"}} {
		id := fmt.Sprintf("mounts-%d", i)
		lower, err := c.SnapshotService(zfs).View(ctx, id, identity.ChainID(diffIDs).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := c.SnapshotService(zfs).Remove(ctx, id); err != nil {
				t.Error(err)
			}
		})
		container, err := c.NewContainer(ctx, id, client.WithRuntime(ours, nil), client.WithNewSpec(oci.WithDefaultPathEnv, oci.WithProcessArgs(args...)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := container.Delete(ctx); err != nil {
				t.Error(err)
			}
		})
		task, err := container.NewTask(ctx, cio.NullIO, client.WithRootFS(append(lower, disk, mount.Mount{
			Type: "format/overlay", Source: "overlay",
			Options: []string{"lowerdir={{ mount 0 }}", "upperdir={{ mount 1 }}/upper", "workdir={{ mount 1 }}/work"},
		})))
		if err != nil {
			t.Fatal(err)
		}
		exit, err := task.Wait(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := task.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if st := <-exit; st.ExitCode() != 0 {
			t.Errorf("%q: exit code %d, %v", args, st.ExitCode(), st.Error())
		}
		if _, err := task.Delete(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := c.MountManager().Info(ctx, id); !errdefs.IsNotFound(err) {
			t.Errorf("mounts after the delete: %v", err)
		}
	}
}
