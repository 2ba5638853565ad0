package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
)

// dismissTime is what a shim gets to answer: what it has to do is little, as all processes have ended.
const dismissTime = 5 * time.Second

// dismiss is for what lives of a shim whose task id was deleted without it, as containerd does with one that did not answer in
// time: nobody would ask it to end any more. It forgets the task, and ends unless it has others. pod is what the
// shim was started for. If none answers on the socket, that is removed.
func dismiss(ctx context.Context, address, id, pod string) error {
	ctx, cancel := context.WithTimeout(ctx, dismissTime)
	defer cancel()
	conn, err := containerdshim.AnonDialer(address, dismissTime)
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		if err := containerdshim.RemoveSocket(address); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove its socket: %w", err)
		}
		return nil
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	tasks := taskapi.NewTTRPCTaskClient(client)
	_, err = tasks.Wait(ctx, &taskapi.WaitRequest{ID: id})
	if err == nil {
		_, err = tasks.Delete(ctx, &taskapi.DeleteRequest{ID: id})
	}
	errs := []error{told(err)}
	if id == pod {
		// It may have no pod, and then knows no such sandbox.
		_, err := sandboxapi.NewTTRPCSandboxClient(client).ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
		errs = append(errs, told(err))
	}
	_, err = tasks.Shutdown(ctx, &taskapi.ShutdownRequest{ID: id})
	return errors.Join(append(errs, told(err))...)
}

// told leaves out what says that there is nothing to end, or that the shim has ended with the answer.
func told(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) {
		return nil
	}
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
