package lxc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// listenerLimit is how long the seccomp agent may take to accept a connection.
const listenerLimit = 10 * time.Second

// quietInit keeps the Go runtime of a pve-init that loads a filter which
// notifies from interrupting the thread that is under it already.
const quietInit = "GODEBUG=asyncpreemptoff=1"

// checkListener looks whether somebody can be there to be notified.
func checkListener(profile *specs.LinuxSeccomp, notify bool) error {
	if !notify {
		return nil // the runtime spec ignores the path then
	}
	st, err := os.Stat(profile.ListenerPath)
	if err != nil {
		return fmt.Errorf("linux.seccomp.listenerPath: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("linux.seccomp.listenerPath %s is no socket: %w", profile.ListenerPath, errdefs.ErrInvalidArgument)
	}
	return nil
}

// passListener sends the filter's listener to the seccomp agent, with the
// container process state (runtime spec, "The Container Process State").
func passListener(ctx context.Context, profile *specs.LinuxSeccomp, listener *os.File, pid int, state *specs.State) error {
	data, err := json.Marshal(specs.ContainerProcessState{
		Version: specs.Version, Fds: []string{specs.SeccompFdName}, Pid: pid,
		Metadata: profile.ListenerMetadata, State: *state,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, listenerLimit)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", profile.ListenerPath)
	if err != nil {
		return fmt.Errorf("linux.seccomp.listenerPath: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	// The descriptor goes with the first bytes, whatever becomes of the rest.
	n, _, err := conn.(*net.UnixConn).WriteMsgUnix(data, unix.UnixRights(int(listener.Fd())), nil)
	if err == nil && n < len(data) {
		_, err = conn.Write(data[n:])
	}
	if err != nil {
		return fmt.Errorf("linux.seccomp.listenerPath %s: sending the listener: %w: %w", profile.ListenerPath, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// executed waits for the end of file that the exec makes. The listener of the
// process's seccomp filter is passed on meanwhile, if it has one.
func executed(ctx context.Context, sync *channel, pass func(listener *os.File) error) error {
	for {
		m, err := sync.receive(ctx)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case m.Error != nil:
			m.close()
			return typed(m.Error)
		case !m.Listener || len(m.files) != 1:
			m.close()
			return fmt.Errorf("pve-init sent an event nobody asked for: %w", errdefs.ErrInternal)
		}
		err = pass(m.files[0])
		m.close()
		if err != nil {
			return err
		}
		if err := sync.send(ctx, plan.Command{Listening: true}); err != nil {
			return fmt.Errorf("answer pve-init: %w", err)
		}
	}
}
