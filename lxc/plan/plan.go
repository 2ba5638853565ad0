// Package plan is the contract between the shim, which knows the OCI spec, and
// pve-init, which makes it true inside an LXC container.
//
// It owns the data types and the framing of the sync sockets and nothing else:
// it opens no container, mounts nothing and imports only the standard library,
// the runtime-spec types and x/sys, because pve-init links it.
//
// # The mount hook's socket
//
// A unix stream socketpair of its own, with the same framing as the sync socket:
//
//	shim → hook   Mounts             what to mount; SCM_RIGHTS: the trees
//	hook → shim   Event{Ready}       everything is mounted
//	shim → hook   Command{Start}     the hooks of the runtime's namespaces are through
//	hook → shim   Event{Ready}       so are those of the container's
//	hook → shim   Event{Error}       at any moment instead: the start fails
//
// # The sync socket
//
// A unix stream socketpair. Both sides send messages as one JSON value a line
// (the encoder's newline is the frame). For the container's init:
//
//	shim → init   Process            what to become
//	init → shim   Event{Ready}       namespaces, mounts, cwd and argv[0] are fine;
//	                                 SCM_RIGHTS: with a terminal the pty master, then
//	                                 (last) a new socket for all that follows
//	shim → init   Command{Start}     only after the client said so
//	init → shim   Event{Listener}    only with Seccomp.Notify: the filter is loaded;
//	                                 SCM_RIGHTS: its listener
//	shim → init   Command{Listening} the listener has been passed on
//	init → shim   EOF                the entrypoint runs (the socket is CLOEXEC)
//	init → shim   Event{Error}       at any moment instead: nothing was executed
//
// The new socket is there because lxc-start keeps a copy of the first one, so
// that the first one's end comes with lxc-start's, not with the execve. For the
// same reason a container that ends before Ready shows by lxc-start's end.
//
// A process of exec is the same without Command and without a new socket: it
// goes on by itself after Ready. EOF from the shim before Start makes init exit
// with status 1. A reader has to take ECONNRESET for EOF: the other end closed
// with a message unread.
//
// A process of exec that has to enter a user or a time namespace begins with
// other messages, as only a process of one thread may do that:
//
//	shim → init   Enter              what takes the host's rights
//	init → shim   Event{Ready}       SCM_RIGHTS: a pidfd of the process that goes on
//
// A process that holds a pod's namespaces:
//
//	shim → init   Enter              only with a user namespace, as above
//	shim → init   Hold{Split}        only then too: it could not be born in the others
//	init → shim   Event{Ready}       SCM_RIGHTS: a pidfd of the process that goes on
//	shim → init   Hold               what the namespaces are to have
//	init → shim   EOF                they have it, and it waits
//	init → shim   Event{Error}       at any moment instead
package plan

import (
	"errors"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// What a template of ours has in its root, where the container's own configuration
// cannot say what the image's process is.
const (
	BootDir  = "/.containerd-pve"
	BootInit = BootDir + "/init"         // pve-init
	BootFile = BootDir + "/process.json" // a Process: Args, Env, Cwd, UID, GID and Groups of it
)

// ErrorKind classifies an Event's error so that the shim can map it to a typed
// error without reading its text.
type ErrorKind string

// The kinds of failure pve-init can report.
const (
	ErrorInternal   ErrorKind = "internal"   // a bug or a host that lacks something
	ErrorInvalid    ErrorKind = "invalid"    // the spec asks for what cannot be
	ErrorNotFound   ErrorKind = "not-found"  // argv[0] (or its interpreter) is not there
	ErrorPermission ErrorKind = "permission" // argv[0] is not executable for the user
)

// Mounts is what the mount hook does.
type Mounts struct {
	// Mounts in the order of the spec.
	Mounts []Mount `json:"mounts,omitempty"`
	// Devices to be made in addition to the runtime spec's default ones.
	Devices []Device `json:"devices,omitempty"`
	// Sysctl keys with dots, as in the spec; written before /proc/sys may become read-only.
	Sysctl map[string]string `json:"sysctl,omitempty"`
	// MaskedPaths and ReadonlyPaths as in the spec.
	MaskedPaths   []string `json:"maskedPaths,omitempty"`
	ReadonlyPaths []string `json:"readonlyPaths,omitempty"`
	// ReadonlyRoot asks for a read-only root file system.
	ReadonlyRoot bool `json:"readonlyRoot,omitempty"`
	// Cwd is made, as a directory of root's, if it is missing, before the root
	// may become read-only.
	Cwd string `json:"cwd,omitempty"`
	// Terminal makes /dev/console exist as a bind target.
	Terminal bool `json:"terminal,omitempty"`
	// ProcTemporary mounts proc at /proc although the spec does not ask for it,
	// since pve-init is executed through it; Process.UnmountProc takes it away again.
	ProcTemporary bool `json:"procTemporary,omitempty"`
	// Hooks run in the container's namespaces once everything is mounted
	// (createContainer), with State on their stdin but for the pid, which the
	// hook knows.
	Hooks []specs.Hook `json:"hooks,omitempty"`
	State *specs.State `json:"state,omitempty"`
}

// Mount is one mount of the spec.
type Mount struct {
	specs.Mount
	// Tree is the number, from 1, of the descriptor of a detached tree that comes
	// along and only has to be attached. Without one the mount is made in the
	// container's namespaces.
	Tree int `json:"tree,omitempty"`
	// Instead is the number of a tree for a mount that the container's
	// namespaces may turn out not to be allowed to make.
	Instead int `json:"instead,omitempty"`
}

// Device is a device node of the container.
type Device struct {
	specs.LinuxDevice
	// Tree is the number, from 1, of the descriptor of the node, to be attached
	// where the container may not make one. It comes with its mode and owner.
	Tree int `json:"tree,omitempty"`
}

// Process is what pve-init becomes.
type Process struct {
	Args     []string `json:"args"`
	Env      []string `json:"env,omitempty"`
	Cwd      string   `json:"cwd"`
	UID      uint32   `json:"uid"`
	GID      uint32   `json:"gid"`
	Groups   []uint32 `json:"groups,omitempty"`
	Umask    *uint32  `json:"umask,omitempty"`
	Terminal bool     `json:"terminal,omitempty"`
	// Rows and Columns are the terminal's first size; 0 leaves it alone.
	Rows    uint16 `json:"rows,omitempty"`
	Columns uint16 `json:"columns,omitempty"`
	// Capabilities nil means none at all (all sets empty), as in the runtime spec.
	Capabilities    *specs.LinuxCapabilities `json:"capabilities,omitempty"`
	Rlimits         []specs.POSIXRlimit      `json:"rlimits,omitempty"`
	NoNewPrivileges bool                     `json:"noNewPrivileges,omitempty"`
	OOMScoreAdj     *int                     `json:"oomScoreAdj,omitempty"`
	// AppArmorProfile is entered on exec; "" and "unconfined" leave the label alone.
	AppArmorProfile string `json:"apparmorProfile,omitempty"`
	// SELinuxLabel is entered on exec; "" leaves it alone.
	SELinuxLabel string   `json:"selinuxLabel,omitempty"`
	Seccomp      *Seccomp `json:"seccomp,omitempty"`
	// Hostname and Domainname are set by init only. A uts namespace that LXC
	// makes has its hostname already.
	Hostname   string `json:"hostname,omitempty"`
	Domainname string `json:"domainname,omitempty"`
	// Hooks run by init inside the container right before the exec
	// (startContainer), with State on their stdin but for the pid.
	Hooks []specs.Hook `json:"hooks,omitempty"`
	State *specs.State `json:"state,omitempty"`
	// UnmountProc takes away the /proc of Mounts.ProcTemporary before the exec.
	UnmountProc bool `json:"unmountProc,omitempty"`
	// Finish is what init does after liblxc is done with the root; nil for exec.
	Finish *Finish `json:"finish,omitempty"`
	// Scheduler, IOPriority and Personality as in the spec.
	Scheduler   *specs.Scheduler        `json:"scheduler,omitempty"`
	IOPriority  *specs.LinuxIOPriority  `json:"ioPriority,omitempty"`
	Personality *specs.LinuxPersonality `json:"personality,omitempty"`
	// MemoryPolicy is set by set_mempolicy(2).
	MemoryPolicy *MemoryPolicy `json:"memoryPolicy,omitempty"`
	// CPUs are what an exec may run on; empty leaves it to the kernel.
	CPUs []int `json:"cpus,omitempty"`
}

// MemoryPolicy are the arguments of set_mempolicy(2): the mode with its flags,
// and the node mask in words of 64 bits.
type MemoryPolicy struct {
	Mode  uint32   `json:"mode"`
	Nodes []uint64 `json:"nodes,omitempty"`
}

// Capabilities by the names of the runtime spec, in the kernel's order.
var Capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// Finish takes back that liblxc makes all mounts shared after the pivot.
type Finish struct {
	// Propagation is the spec's rootfsPropagation ("", "private", "rslave", …).
	Propagation string `json:"propagation,omitempty"`
	// Mounts are those of the spec that ask for a propagation type.
	Mounts []specs.Mount `json:"mounts,omitempty"`
}

// Enter is what a process of exec does before it gives up the host's rights.
type Enter struct {
	// Namespaces are clone flags: those of the container's init to be joined.
	Namespaces uintptr `json:"namespaces"`
	// OOMScoreAdj and Rlimits may need more than the container's root has; only
	// hard limits are raised here.
	OOMScoreAdj *int                `json:"oomScoreAdj,omitempty"`
	Rlimits     []specs.POSIXRlimit `json:"rlimits,omitempty"`
	// Hold has the process enter the user namespace of the descriptor alone, and go on as hold.
	Hold bool `json:"hold,omitempty"`
}

// Hold is what the first process of a pod's namespaces does.
type Hold struct {
	// Split are clone flags: another process in such namespaces goes on, with the next message.
	Split uintptr `json:"split,omitempty"`
	// Hostname is set in the uts namespace; "" leaves it alone.
	Hostname string `json:"hostname,omitempty"`
	// Sysctl keys with dots, as in the spec.
	Sysctl map[string]string `json:"sysctl,omitempty"`
}

// Seccomp is a compiled filter: raw struct sock_filter array in host byte order
// and the flags for seccomp(2) SECCOMP_SET_MODE_FILTER.
type Seccomp struct {
	Filter []byte `json:"filter"`
	Flags  uint   `json:"flags,omitempty"`
	// Notify says that Flags ask for a listener, which goes to the shim.
	Notify bool `json:"notify,omitempty"`
}

// Event goes from pve-init to the shim. Exactly one field is set.
type Event struct {
	Ready    bool   `json:"ready,omitempty"`
	Listener bool   `json:"listener,omitempty"`
	Error    *Error `json:"error,omitempty"`
}

// Command goes from the shim to pve-init. Exactly one field is set.
type Command struct {
	Start bool `json:"start,omitempty"`
	// Listening answers Event.Listener: the listener is with who asked for it.
	Listening bool `json:"listening,omitempty"`
}

// Error is a failure as pve-init reports it.
type Error struct {
	Kind    ErrorKind `json:"kind"`
	Message string    `json:"message"`
	// cause is what Failed was given; it does not travel.
	cause error
}

// Error returns the message; it names the spec field and what failed.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the reason behind it, where that is known.
func (e *Error) Unwrap() error { return e.cause }

// Fail makes a typed failure of a message that names the spec's field.
func Fail(kind ErrorKind, message string) *Error { return &Error{Kind: kind, Message: message} }

// Failed is Fail with the reason behind it. A reason that is a typed failure
// already keeps its kind.
func Failed(kind ErrorKind, what string, err error) *Error {
	if typed := new(Error); errors.As(err, &typed) {
		kind = typed.Kind
	}
	return &Error{Kind: kind, Message: what + ": " + err.Error(), cause: err}
}
