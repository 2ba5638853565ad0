package lxc

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"syscall"
	"time"

	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// runHooks calls the hooks of one kind in order with the state on their stdin
// (OCI runtime spec, "POSIX-platform Hooks"); the first that fails ends it.
func runHooks(ctx context.Context, kind string, hooks []specs.Hook, st *specs.State) error {
	if len(hooks) == 0 {
		return nil
	}
	data, err := json.Marshal(st)
	if err != nil {
		return err
	}
	for i, h := range hooks {
		if err := runHook(ctx, h, data); err != nil {
			return fmt.Errorf("hooks.%s[%d] %s: %w", kind, i, h.Path, err)
		}
	}
	return nil
}

// poststop runs the hooks of a container that is gone. What fails is no reason to
// have it come back.
func poststop(ctx context.Context, o *CreateOptions) {
	if o.Spec.Hooks == nil {
		return
	}
	st := ociState(o, specs.StateStopped)
	for i, h := range o.Spec.Hooks.Poststop {
		if err := runHooks(ctx, "poststop", []specs.Hook{h}, st); err != nil {
			log.G(ctx).WithError(err).Warnf("container %s: poststop hook %d", o.ID, i)
		}
	}
}

func runHook(ctx context.Context, h specs.Hook, st []byte) error {
	if h.Timeout != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(*h.Timeout)*time.Second)
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	cmd.Env = append([]string{}, h.Env...)
	cmd.Stdin = bytes.NewReader(st)
	// Late, it ends with all that it has started.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A grandchild that keeps the pipe open must not keep us.
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %s", ctx.Err(), bytes.TrimSpace(out))
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}
