//go:build bed

package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
)

// fromEnv is a count from the environment, for `make stress`, or a small one.
func fromEnv(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s=%s: %v", variable, text, err)
	}
	return n
}

// TestRestarts starts one container's task again and again (STRESS_RESTARTS
// times): each start gets its own exit code, and the thousandth leaves what the
// first left.
func TestRestarts(t *testing.T) {
	restarts := fromEnv(t, "STRESS_RESTARTS", 10)
	oneMore(t)
	b := start(t, options{image: busybox, args: []string{"true"}})
	if code := b.wait(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	b.ctx = background(t)
	before := calm(t)
	failed := 0
	for i := range restarts {
		if err := restart(b, uint32(i%256)); err != nil {
			failed++
			t.Errorf("restart %d: %v", i, err)
		}
		if (i+1)%100 == 0 {
			fmt.Printf("stress: %d of %d restarts, %d failed\n", i+1, restarts, failed)
		}
	}
	fmt.Printf("stress: restarts=%d failed=%d\n", restarts, failed)
	same(t, before)
}

func restart(b *box, code uint32) error {
	b.ctx = background(b.t)
	spec, err := b.container.Spec(b.ctx)
	if err != nil {
		return err
	}
	spec.Process.Args = []string{"sh", "-c", fmt.Sprintf("exit %d", code)}
	if err := b.container.Update(b.ctx, client.UpdateContainerOpts(client.WithSpec(spec))); err != nil {
		return err
	}
	task, err := b.container.NewTask(b.ctx, cio.NullIO)
	if err != nil {
		return err
	}
	exit, err := task.Wait(b.ctx)
	if err != nil {
		return err
	}
	if err := task.Start(b.ctx); err != nil {
		return err
	}
	st := <-exit
	deleted, err := task.Delete(b.ctx)
	if err != nil {
		return err
	}
	if st.ExitCode() != code || deleted.ExitCode() != code {
		return fmt.Errorf("exit code %d by wait and %d by delete, want %d", st.ExitCode(), deleted.ExitCode(), code)
	}
	return nil
}

// slot is a container of TestRandomOperations and the state it has to be in.
type slot struct {
	*box
	state client.ProcessStatus // "" for none
}

// TestRandomOperations does STRESS_OPERATIONS random things to a few containers.
// Each does what it should in the container's state, or fails by the right
// kind of error; in the end nothing is left. STRESS_SEED repeats a run.
func TestRandomOperations(t *testing.T) {
	seed := uint64(fromEnv(t, "STRESS_SEED", int(time.Now().UnixNano()&0x7fffffff)))
	operations := fromEnv(t, "STRESS_OPERATIONS", 40)
	fmt.Printf("stress: STRESS_SEED=%d\n", seed)
	oneMore(t)
	before := calm(t)
	t.Run("operations", func(t *testing.T) {
		random := rand.New(rand.NewPCG(seed, 0))
		slots := make([]slot, 3)
		done, failed := map[string]int{}, 0
		names := []string{"create", "create", "start", "start", "exec", "pause", "resume", "kill", "delete", "shim"}
		for i := range operations {
			at := random.IntN(len(slots))
			name := names[random.IntN(len(names))]
			s := &slots[at]
			if (name == "create") != (s.state == "") {
				name = "create"
				if s.state != "" {
					name = "exec"
				}
			}
			was := s.state
			if err := s.do(t, name, fmt.Sprintf("random-%d-%d", seed, i)); err != nil {
				failed++
				t.Errorf("operation %d, %s of slot %d (%s): %v", i, name, at, was, err)
				break // what follows would only be its consequence
			}
			done[name]++
			if (i+1)%100 == 0 {
				fmt.Printf("stress: %d of %d operations, %d failed\n", i+1, operations, failed)
			}
		}
		fmt.Printf("stress: operations=%d failed=%d %v\n", operations, failed, done)
	})
	oneMore(t)
	same(t, before)
}

// do is one operation. An error says that it did not come out as it should have.
func (s *slot) do(t *testing.T, name, id string) error {
	if name == "create" {
		b, err := create(t, options{id: id, image: busybox, args: []string{"sleep", "10000"}})
		if err == nil {
			s.box, s.state = b, client.Created
		}
		return err
	}
	s.ctx = background(t)
	// want is what the operation has to come to where it is not allowed.
	allowed := func(err error, ok bool, kind func(error) bool) error {
		switch {
		case ok || err == nil && !ok:
			if !ok {
				return fmt.Errorf("was allowed")
			}
			return err
		case !kind(err):
			return fmt.Errorf("is refused by %w", err)
		}
		return nil
	}
	switch name {
	case "start":
		ok := s.state == client.Created
		err := allowed(s.task.Start(s.ctx), ok, errdefs.IsFailedPrecondition)
		if ok && err == nil {
			s.state = client.Running
		}
		return err
	case "exec":
		out, code, err := s.execIn([]string{"sh", "-c", "echo in; exit 5"}, nil)
		if err == nil && (out != "in\n" || code != 5) {
			return fmt.Errorf("%q, %d", out, code)
		}
		return allowed(err, s.state == client.Running, errdefs.IsFailedPrecondition)
	case "pause":
		ok := s.state == client.Running
		err := allowed(s.task.Pause(s.ctx), ok, errdefs.IsFailedPrecondition)
		if ok && err == nil {
			s.state = client.Paused
		}
		return err
	case "resume":
		ok := s.state == client.Paused
		err := allowed(s.task.Resume(s.ctx), ok, errdefs.IsFailedPrecondition)
		if ok && err == nil {
			s.state = client.Running
		}
		return err
	case "kill":
		ok := s.state != client.Stopped
		if err := allowed(s.task.Kill(s.ctx, syscall.SIGKILL), ok, errdefs.IsNotFound); err != nil {
			return err
		}
		exit, err := s.task.Wait(s.ctx)
		if err != nil {
			return err
		}
		select {
		case st := <-exit:
			if st.ExitCode() != 137 {
				return errors.Join(fmt.Errorf("exit code %d", st.ExitCode()), st.Error())
			}
		case <-time.After(time.Minute):
			return fmt.Errorf("it does not end")
		}
		s.state = client.Stopped
	case "delete":
		ok := s.state == client.Stopped // the client's library wants it so
		st, err := s.task.Delete(s.ctx)
		if err := allowed(err, ok, errdefs.IsFailedPrecondition); err != nil || !ok {
			return err
		}
		if st.ExitCode() != 137 {
			return fmt.Errorf("exit code %d", st.ExitCode())
		}
		s.task, s.state = nil, ""
		return s.container.Delete(s.ctx, client.WithSnapshotCleanup)
	case "shim":
		if err := syscall.Kill(shimOf(t, s.container.ID()), syscall.SIGKILL); err != nil {
			return err
		}
		s.gone()
		s.state = ""
		return s.container.Delete(s.ctx, client.WithSnapshotCleanup)
	}
	if st, err := s.task.Status(s.ctx); err != nil || st.Status != s.state {
		return errors.Join(fmt.Errorf("status %s", st.Status), err)
	}
	return nil
}
