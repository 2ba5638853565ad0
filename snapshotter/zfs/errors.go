package zfs

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Reason is why ZFS refused something.
type Reason int

// The reasons, each with the kind of errdefs that its Error unwraps to.
const (
	Other         Reason = iota // Unknown
	Exists                      // AlreadyExists
	Missing                     // NotFound
	NoPool                      // Unavailable: the pool is not imported
	Busy                        // FailedPrecondition: mounted, held, or being received into
	HasDependents               // FailedPrecondition: clones, snapshots or children
	NoSpace                     // ResourceExhausted: the pool is full
	OverQuota                   // ResourceExhausted
	ReadOnly                    // FailedPrecondition: the pool is imported read-only
	Suspended                   // Unavailable: the pool lost its devices
	Forbidden                   // PermissionDenied
	Invalid                     // InvalidArgument
	UnknownABI                  // NotImplemented: this module does not know the call, or an argument
)

var reasons = [...]struct {
	text string
	kind error
}{
	Other:         {"failed", errdefs.ErrUnknown},
	Exists:        {"it exists already", errdefs.ErrAlreadyExists},
	NoPool:        {"its pool is not imported (run `zpool import`)", errdefs.ErrUnavailable},
	Missing:       {"it does not exist", errdefs.ErrNotFound},
	Busy:          {"it is in use (mounted, or held)", errdefs.ErrFailedPrecondition},
	HasDependents: {"snapshots, clones or children depend on it", errdefs.ErrFailedPrecondition},
	NoSpace:       {"no space is left in the pool (remove images or containers, or give it a device)", errdefs.ErrResourceExhausted},
	OverQuota:     {"the quota is reached", errdefs.ErrResourceExhausted},
	ReadOnly:      {"the pool is read-only (see `zpool status`; `zpool export` and `zpool import` it writable)", errdefs.ErrFailedPrecondition},
	Suspended:     {"the pool is suspended (see `zpool status`)", errdefs.ErrUnavailable},
	Forbidden:     {"permission is denied", errdefs.ErrPermissionDenied},
	Invalid:       {"the name or an argument makes no sense", errdefs.ErrInvalidArgument},
	UnknownABI:    {"the ZFS module does not know this call or one of its arguments", errdefs.ErrNotImplemented},
}

func (r Reason) String() string { return reasons[r].text }

// Error is a refusal of the ZFS module. It unwraps to the kind of its reason and
// to the error number.
type Error struct {
	Op, Name string
	Reason   Reason
	Errno    unix.Errno
}

func (e *Error) Error() string {
	if e.Reason == Other {
		return fmt.Sprintf("%s %s: %s", e.Op, e.Name, describe(e.Errno))
	}
	return fmt.Sprintf("%s %s: %s (%s)", e.Op, e.Name, e.Reason, describe(e.Errno))
}

// Unwrap serves errors.Is.
func (e *Error) Unwrap() []error { return []error{reasons[e.Reason].kind, e.Errno} }

// ReasonOf is the reason of an error of this package; Other for any other.
func ReasonOf(err error) Reason {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return Other
}

// firstOwn is the first of ZFS's own error numbers (include/sys/fs/zfs.h, ZFS_ERR_*).
const (
	firstOwn       = 1024
	cmdUnavailable = firstOwn + 5 // ZFS_ERR_IOC_CMD_UNAVAIL and the three after it
	argBadType     = firstOwn + 8
	wrongParent    = firstOwn + 9
	badProperty    = firstOwn + 20
)

func describe(errno unix.Errno) string {
	if errno >= firstOwn {
		return fmt.Sprintf("ZFS error %d", int(errno))
	}
	return errno.Error()
}

// reasonOf sorts an error number. What means different things for different
// calls the callers say: see dependents.
func reasonOf(errno unix.Errno) Reason {
	switch errno {
	case unix.EEXIST:
		return Exists
	case unix.ENOENT, unix.ESRCH: // a dataset; a snapshot or a hold of one that is there
		return Missing
	case unix.EBUSY:
		return Busy
	case unix.ENOSPC:
		return NoSpace
	case unix.EDQUOT:
		return OverQuota
	case unix.EROFS:
		return ReadOnly
	case unix.EAGAIN:
		return Suspended
	case unix.EPERM, unix.EACCES:
		return Forbidden
	case unix.EINVAL, unix.ENAMETOOLONG, unix.ERANGE, unix.EXDEV, wrongParent, badProperty:
		return Invalid
	case unix.ENOTTY, unix.ENOTSUP:
		return UnknownABI
	}
	if errno >= cmdUnavailable && errno <= argBadType {
		return UnknownABI
	}
	return Other
}

// failure wraps what a call answered; an error that is no number stays what it is.
func failure(op, name string, err error) error {
	if err == nil {
		return nil
	}
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("%s %s: %w", op, name, err)
	}
	e := &Error{Op: op, Name: name, Reason: reasonOf(errno), Errno: errno}
	if e.Reason == Missing && Ready(name) != nil {
		e.Reason = NoPool // the module says the same of a pool that it does not know
	}
	return e
}

// dependents is failure for a destroy, to which "exists" means that something
// else does (dsl_destroy.c: EEXIST with clones or children; EBUSY with snapshots
// is told from a mount by the caller).
func dependents(op, name string, err error) error {
	err = failure(op, name, err)
	var e *Error
	if errors.As(err, &e) && e.Reason == Exists {
		e.Reason = HasDependents
	}
	return err
}
