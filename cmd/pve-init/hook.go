package main

import (
	"encoding/json"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxHookOutput is how much of a failed hook's output is repeated.
const maxHookOutput = 512

// runHooks runs the hooks of one kind in order, with the state on stdin in which
// the container's process has the pid it has in here; the first that fails ends it.
func runHooks(kind string, hooks []specs.Hook, state *specs.State, pid int) error {
	if len(hooks) == 0 {
		return nil
	}
	if state == nil {
		return fail(plan.ErrorInternal, "hooks."+kind+": without a state")
	}
	s := *state
	s.Pid = pid
	data, err := json.Marshal(s)
	if err != nil {
		return failed(plan.ErrorInternal, "hooks."+kind, err)
	}
	for i := range hooks {
		if err := runHook(&hooks[i], data); err != nil {
			return failed(plan.ErrorInvalid, "hooks."+kind+"["+strconv.Itoa(i)+"]: "+hooks[i].Path, err)
		}
	}
	return nil
}

// runHook runs one hook to its end.
func runHook(h *specs.Hook, state []byte) error {
	stdin, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(stdin)
	if _, err := unix.Pwrite(stdin, state, 0); err != nil {
		return err
	}
	output, err := unix.MemfdCreate("output", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(output)
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	pid, err := syscall.ForkExec(h.Path, args, &syscall.ProcAttr{
		Env: h.Env, Files: []uintptr{uintptr(stdin), uintptr(output), uintptr(output)},
	})
	if err != nil {
		return err
	}
	if h.Timeout != nil {
		late := time.AfterFunc(time.Duration(*h.Timeout)*time.Second, func() {
			// The hook is not waited for yet, so that the pid is its own.
			_ = unix.Kill(pid, unix.SIGKILL)
		})
		defer late.Stop()
	}
	var status unix.WaitStatus
	for {
		if _, err = unix.Wait4(pid, &status, 0, nil); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return err
	}
	if status.Exited() && status.ExitStatus() == 0 {
		return nil
	}
	buf := make([]byte, maxHookOutput)
	n, err := unix.Pread(output, buf, 0)
	if err != nil {
		n = 0
	}
	what := "exited with status " + utoa(uint32(status.ExitStatus()))
	if status.Signaled() {
		what = "ended by signal " + utoa(uint32(status.Signal()))
	}
	return fail(plan.ErrorInvalid, what+": "+strings.TrimSpace(string(buf[:n])))
}
