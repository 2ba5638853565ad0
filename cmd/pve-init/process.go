package main

import (
	"strings"
	"unsafe"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

// process is one process on its way to the execve.
type process struct {
	plan.Process
	root   root
	isInit bool
	// path is what argv[0] was found to be.
	path string
	// slave is the terminal, or -1.
	slave int
	// inCwd says that the working directory is entered already.
	inCwd bool
}

// runProcess is the verbs init and exec. It returns only if nothing was executed.
// before is what failed already.
func runProcess(fd int, isInit bool, before error) int {
	s := &socket{fd: fd}
	if before != nil {
		return report(s, before)
	}
	if err := closeInherited(fd); err != nil {
		stderr("closing inherited descriptors: " + err.Error())
		return exitFailure
	}
	p := &process{isInit: isInit, slave: -1}
	open, err := s.receive(&p.Process)
	if !open && err == nil {
		return exitFailure // the shim is gone
	}
	if err == nil {
		err = p.prepare(s)
	} else {
		err = failed(plan.ErrorInternal, "reading the process plan", err)
	}
	if err == nil && isInit {
		var c plan.Command
		open, err = s.receive(&c)
		if err != nil {
			err = failed(plan.ErrorInternal, "reading the start command", err)
		} else if !open || !c.Start {
			return exitFailure // deleted without having been started
		}
	}
	if err == nil {
		err = p.become(s)
	}
	return report(s, err)
}

// report tells the shim why nothing was executed, and gives the exit code for it.
func report(s *socket, err error) int {
	e, ok := err.(*plan.Error)
	if !ok {
		e = fail(plan.ErrorInternal, err.Error())
	}
	if err := s.send(plan.Event{Error: e}); err != nil {
		stderr(e.Message)
	}
	return exitCode(e.Kind)
}

// exitCode is a shell's for a failure.
func exitCode(kind plan.ErrorKind) int {
	switch kind {
	case plan.ErrorNotFound:
		return exitNotFound
	case plan.ErrorPermission:
		return exitNotExecuted
	}
	return exitFailure
}

// closeInherited closes everything but the standard descriptors and the sync
// socket. What the Go runtime opened for itself stays: those are anonymous
// inodes with CLOEXEC, which lead nowhere.
func closeInherited(socket int) error {
	if _, err := unix.FcntlInt(uintptr(socket), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return err
	}
	// The runtime polls as soon as one standard descriptor does not block, with
	// the lowest descriptors that were free then.
	const scanned = 1024
	own := uint(firstInheritedFD)
	for fd := range firstInheritedFD {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err == nil && flags&unix.O_NONBLOCK != 0 {
			own = scanned
		}
	}
	for fd := firstInheritedFD; fd < int(own); fd++ {
		var st unix.Stat_t
		if fd == socket || unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT == 0 {
			continue
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	if uint(socket) >= own {
		if uint(socket) > own {
			if err := unix.CloseRange(own, uint(socket)-1, 0); err != nil {
				return err
			}
		}
		own = uint(socket) + 1
	}
	if err := unix.CloseRange(own, ^uint(0)>>32, 0); err != nil {
		return err
	}
	return unix.CloseRange(firstInheritedFD, ^uint(0)>>32, unix.CLOSE_RANGE_CLOEXEC)
}

// prepare does and checks all that can fail before anybody says start, and
// reports that the process is ready.
func (p *process) prepare(s *socket) error {
	unix.Umask(0o022)
	if len(p.Args) == 0 || p.Args[0] == "" {
		return fail(plan.ErrorInvalid, "process.args must not be empty")
	}
	for _, list := range [][]string{p.Args, p.Env, {p.Cwd}} {
		for _, text := range list {
			if strings.IndexByte(text, 0) >= 0 {
				return fail(plan.ErrorInvalid, "process: args, env and cwd cannot hold a NUL byte")
			}
		}
	}
	var err error
	if p.root, err = openRoot("/"); err != nil {
		return failed(plan.ErrorInternal, "opening the root file system", err)
	}
	if p.Hostname != "" && p.isInit {
		if err := unix.Sethostname([]byte(p.Hostname)); err != nil {
			return failed(plan.ErrorInvalid, "hostname", err)
		}
	}
	if p.Domainname != "" && p.isInit {
		if err := unix.Setdomainname([]byte(p.Domainname)); err != nil {
			return failed(plan.ErrorInvalid, "domainname", err)
		}
	}
	if err := p.enterCwd(); err != nil {
		return err
	}
	p.Env = withHome(p.Env, p.root, p.UID)
	if p.path, err = lookPath(p.Args[0], p.Env); err != nil {
		return err
	}
	master := -1
	if p.Terminal {
		if master, p.slave, err = openTerminal(p.root, p.Rows, p.Columns); err != nil {
			return failed(plan.ErrorInvalid, "process.terminal", err)
		}
		if p.isInit {
			if err := p.bindConsole(); err != nil {
				return failed(plan.ErrorInvalid, "process.terminal: /dev/console", err)
			}
		}
	}
	if p.Finish != nil && p.isInit {
		if err := p.root.finish(p.Finish); err != nil {
			return err
		}
	}
	if err := p.setScheduling(); err != nil {
		return err
	}
	// A profile that is not loaded has to fail the create. Where hooks run first
	// that must wait: their own execve would enter it.
	if len(p.Hooks) == 0 {
		if err := p.setLabels(); err != nil {
			return err
		}
	}
	if err := s.ready(master, p.isInit); err != nil {
		return failed(plan.ErrorInternal, "reporting ready", err)
	}
	if master >= 0 {
		unix.Close(master)
	}
	return nil
}

// enterCwd goes to the working directory, which init makes if it is missing. A
// directory that only the user may enter is left to the user.
func (p *process) enterCwd() error {
	if !strings.HasPrefix(p.Cwd, "/") {
		return fail(plan.ErrorInvalid, "process.cwd must be absolute: "+p.Cwd)
	}
	err := unix.Chdir(p.Cwd)
	if err == unix.ENOENT && p.isInit {
		fd, makeErr := p.root.create(p.Cwd, true)
		if makeErr != nil {
			return failed(plan.ErrorInvalid, "process.cwd: making "+p.Cwd, makeErr)
		}
		unix.Close(fd)
		err = unix.Chdir(p.Cwd)
	}
	if err == unix.EACCES || err == unix.EPERM {
		return nil
	}
	if err != nil {
		return failed(plan.ErrorInvalid, "process.cwd: chdir to "+p.Cwd, err)
	}
	p.inCwd = true
	return p.checkCwd()
}

// checkCwd makes sure that the working directory is in the container's root: a
// hostile image may have found a descriptor of the host's to go to.
func (p *process) checkCwd() error {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	if err != nil {
		return failed(plan.ErrorInvalid, "process.cwd: "+p.Cwd, err)
	}
	if n < 1 || buf[0] != '/' {
		return fail(plan.ErrorInvalid, "process.cwd: "+p.Cwd+" is outside of the container")
	}
	return nil
}

// become turns this process into the planned one. Everything that needs root's
// rights in the container comes first, what takes them away last.
func (p *process) become(s *socket) error {
	if err := runHooks("startContainer", p.Hooks, p.State, unix.Getpid()); err != nil {
		return err
	}
	if err := p.takeTerminal(); err != nil {
		return failed(plan.ErrorInternal, "process.terminal", err)
	}
	if len(p.Hooks) > 0 {
		if err := p.setLabels(); err != nil {
			return err
		}
	}
	if p.UnmountProc {
		if err := unix.Unmount("/proc", unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return failed(plan.ErrorInternal, "unmounting the temporary /proc", err)
		}
	}
	if p.Umask != nil {
		unix.Umask(int(*p.Umask))
	}
	if err := ownStdio(p.UID); err != nil {
		return failed(plan.ErrorInternal, "giving the standard streams to the user", err)
	}
	if err := setRlimits(p.Rlimits); err != nil {
		return err
	}
	if err := resetSignals(); err != nil {
		return failed(plan.ErrorInternal, "resetting signals", err)
	}
	argv, envv := stringPointers(p.Args), stringPointers(p.Env)
	path := stringPointers([]string{p.path})
	if p.NoNewPrivileges {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return failed(plan.ErrorInternal, "process.noNewPrivileges", err)
		}
	} else if err := loadSeccomp(p.Seccomp, s); err != nil {
		// Without no_new_privs a filter needs CAP_SYS_ADMIN.
		return err
	}
	if err := p.setCredentials(); err != nil {
		return err
	}
	if !p.inCwd {
		if err := unix.Chdir(p.Cwd); err != nil {
			return failed(plan.ErrorInvalid, "process.cwd: chdir to "+p.Cwd, err)
		}
		if err := p.checkCwd(); err != nil {
			return err
		}
	}
	if p.NoNewPrivileges {
		if err := loadSeccomp(p.Seccomp, s); err != nil {
			return err
		}
	}
	// No allocation and no scheduling from here on: the filter is in force.
	return execError(p.path, execve(path[0], &argv[0], &envv[0]))
}

// execve is the bare system call: os and syscall do more around it than a strict
// seccomp filter may allow.
func execve(path *byte, argv, envv **byte) unix.Errno {
	const attempts = 16 // a thread of the runtime's being made at this moment
	var errno unix.Errno
	for range attempts {
		_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)),
			uintptr(unsafe.Pointer(argv)), uintptr(unsafe.Pointer(envv)))
		if errno != unix.EAGAIN {
			break
		}
	}
	return errno
}

// stringPointers is a list as execve takes it, with its NULL.
func stringPointers(list []string) []*byte {
	out := make([]*byte, len(list)+1)
	for i, text := range list {
		b := make([]byte, len(text)+1)
		copy(b, text)
		out[i] = &b[0]
	}
	return out
}

// execError classifies why the kernel did not execute path.
func execError(path string, errno unix.Errno) *plan.Error {
	kind := plan.ErrorInternal
	switch errno {
	case unix.ENOENT, unix.ENOTDIR:
		kind = plan.ErrorNotFound
	case unix.EACCES, unix.EPERM:
		kind = plan.ErrorPermission
	case unix.ENOEXEC, unix.ELIBBAD, unix.EINVAL, unix.E2BIG, unix.ELOOP, unix.EISDIR, unix.ENAMETOOLONG:
		kind = plan.ErrorInvalid
	}
	return failed(kind, "exec "+path, errno)
}

// lookPath finds argv[0] as a shell would, in the container's own PATH.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			kind := plan.ErrorNotFound
			if err == unix.EACCES {
				kind = plan.ErrorPermission
			}
			return "", failed(kind, "exec: \""+name+"\": stat "+name, err)
		}
		if err := executable(&st); err != nil {
			return "", failed(plan.ErrorPermission, "exec: \""+name+"\"", err)
		}
		return name, nil
	}
	for _, dir := range strings.Split(getenv(env, "PATH"), ":") {
		if dir == "" {
			continue
		}
		var st unix.Stat_t
		path := strings.TrimSuffix(dir, "/") + "/" + name
		if unix.Stat(path, &st) == nil && executable(&st) == nil {
			return path, nil
		}
	}
	return "", fail(plan.ErrorNotFound, "exec: \""+name+"\": executable file not found in $PATH")
}

func executable(st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.EISDIR
	}
	if st.Mode&0o111 == 0 {
		return unix.EACCES
	}
	return nil
}

// getenv is the last value of key, as most programs see it.
func getenv(env []string, key string) string {
	for i := len(env) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(env[i], key+"="); ok {
			return v
		}
	}
	return ""
}

// maxPasswd is how much of /etc/passwd is read; the image may bring any size.
const maxPasswd = 1 << 20

// withHome adds HOME, if the spec does not say it, from the container's /etc/passwd.
func withHome(env []string, r root, uid uint32) []string {
	if getenv(env, "HOME") != "" {
		return env
	}
	home := "/"
	if data, err := r.readFile("/etc/passwd", maxPasswd); err == nil {
		if h := homeOf(string(data), uid); h != "" {
			home = h
		}
	}
	out := make([]string, 0, len(env)+1)
	for _, e := range env {
		if e != "HOME=" {
			out = append(out, e)
		}
	}
	return append(out, "HOME="+home)
}

// homeOf is the home directory of uid in a passwd file, or "".
func homeOf(passwd string, uid uint32) string {
	want := utoa(uid)
	for line := range strings.SplitSeq(passwd, "\n") {
		f := strings.Split(line, ":")
		if len(f) >= 6 && f[2] == want && strings.HasPrefix(f[5], "/") && strings.IndexByte(f[5], 0) < 0 {
			return f[5]
		}
	}
	return ""
}
