package main

import (
	"encoding/json"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

// maxBoot is more than a process's arguments and environment can have.
const maxBoot = 4 << 20

// boot becomes what the root's own file says: the first process of a
// container that is no task of containerd's. It keeps what rights LXC gave it as far as the user
// has them. It returns if nothing was executed.
func boot() int {
	err := bootNow()
	stderr(err.Error())
	if e, ok := err.(*plan.Error); ok {
		return exitCode(e.Kind)
	}
	return exitFailure
}

func bootNow() error {
	r, err := openRoot("/")
	if err != nil {
		return failed(plan.ErrorInternal, "opening the root", err)
	}
	data, err := r.readFile(plan.BootFile, maxBoot)
	if err != nil {
		return failed(plan.ErrorInvalid, "reading "+plan.BootFile, err)
	}
	var p process
	if err := json.Unmarshal(data, &p.Process); err != nil || len(p.Args) == 0 {
		return fail(plan.ErrorInvalid, plan.BootFile+" says no process")
	}
	p.Env = withHome(p.Env, r, p.UID)
	if err := ownStdio(p.UID); err != nil {
		return failed(plan.ErrorInternal, "giving the standard streams to the user", err)
	}
	if err := resetSignals(); err != nil {
		return failed(plan.ErrorInternal, "resetting signals", err)
	}
	if err := p.becomeUser(); err != nil {
		return err
	}
	if err := unix.Chdir(p.Cwd); err != nil {
		return failed(plan.ErrorInvalid, "chdir to "+p.Cwd, err)
	}
	if p.path, err = lookPath(p.Args[0], p.Env); err != nil {
		return err
	}
	argv, envv, path := stringPointers(p.Args), stringPointers(p.Env), stringPointers([]string{p.path})
	return execError(p.path, execve(path[0], &argv[0], &envv[0]))
}
