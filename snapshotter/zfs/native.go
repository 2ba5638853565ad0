package zfs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs/nvlist"
)

// Native is ZFS by the module's own ioctls: no process, and no library but this
// one. It mounts and unmounts nothing. Its errors are *Error. A call that the
// module has begun is not interrupted when its context ends.
type Native struct {
	device *device
	atOnce bool
}

// tested are the releases that the ABI was compared for, as major.minor.
var tested = []string{"2.0", "2.1", "2.2", "2.3", "2.4"}

// OpenNative opens /dev/zfs if the loaded module is of a release whose ABI is
// known here. Unavailable: no module; NotImplemented: another release.
func OpenNative() (*Native, error) {
	version, err := Module()
	if err != nil {
		return nil, err
	}
	d, err := openDevice()
	if err != nil {
		return nil, err
	}
	return &Native{device: d, atOnce: clonesAtOnce(version)}, nil
}

// release is major.minor of a version; empty if it has no more than that.
func release(version string) string {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, ok := strings.Cut(rest, ".")
	if !ok {
		return ""
	}
	return major + "." + minor
}

func checkVersion(version string) error {
	if strconv.IntSize != 64 || !slices.Contains(tested, release(version)) {
		return fmt.Errorf("the ABI of ZFS module %q is not known here (%s are): %w", version, strings.Join(tested, ", "), errdefs.ErrNotImplemented)
	}
	return nil
}

// Close gives the device back.
func (n *Native) Close() error { return n.device.file.Close() }

// Detached is false: a call that has begun is waited for.
func (n *Native) Detached() bool { return false }

// Calls is how many ioctls were made so far.
func (n *Native) Calls() int64 { return n.device.calls.Load() }

// do makes a call with the list of the new interface.
func (n *Native) do(ctx context.Context, r request, name string, args nvlist.List) (nvlist.List, error) {
	var c command
	if err := c.setText(offName, nameSize, name); err != nil {
		return nil, err
	}
	return n.device.call(ctx, r, &c, args, true)
}

const typeFilesystem = 2 // DMU_OST_ZFS

func (n *Native) create(ctx context.Context, r request, op, name string, args nvlist.List, p Properties) error {
	props, err := properties(p)
	if err != nil {
		return fmt.Errorf("%s %s: %w", op, name, err)
	}
	if len(props) > 0 {
		args["props"] = props
	}
	_, err = n.do(ctx, r, name, args)
	return failure(op, name, err)
}

// Create makes a filesystem; its parent exists.
func (n *Native) Create(ctx context.Context, name string, p Properties) error {
	return n.create(ctx, reqCreate, "create", name, nvlist.List{"type": int32(typeFilesystem)}, p)
}

// Clone makes a filesystem of a snapshot.
func (n *Native) Clone(ctx context.Context, snapshot, name string, p Properties) error {
	return n.create(ctx, reqClone, "clone", name, nvlist.List{"origin": snapshot}, p)
}

func pool(name string) string {
	if i := strings.IndexAny(name, "/@#"); i >= 0 {
		return name[:i]
	}
	return name
}

// set is a list of names, which are all of one pool.
func set(names []string) nvlist.List {
	list := nvlist.List{}
	for _, name := range names {
		list[name] = nvlist.Present{}
	}
	return list
}

// each turns the answer of a call for many names into an error for each that failed.
func each(op string, answer nvlist.List, err error, wrap func(op, name string, err error) error) error {
	var all []error
	for _, name := range slices.Sorted(maps.Keys(answer)) {
		if errno, ok := answer[name].(int32); ok && errno != 0 {
			all = append(all, wrap(op, name, unix.Errno(errno)))
		}
	}
	if all == nil {
		return err
	}
	return errors.Join(all...)
}

// Snapshot takes dataset@snapshot, with user properties.
func (n *Native) Snapshot(ctx context.Context, name string, p Properties) error {
	return n.Snapshots(ctx, []string{name}, p)
}

// Snapshots takes all snapshots, each of another dataset of one pool, at one
// moment: all or none. The properties are user properties.
func (n *Native) Snapshots(ctx context.Context, names []string, p Properties) error {
	if len(names) == 0 {
		return nil
	}
	props, err := properties(p)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", names[0], err)
	}
	args := nvlist.List{"snaps": set(names)}
	if len(props) > 0 {
		args["props"] = props
	}
	answer, err := n.do(ctx, reqSnapshot, pool(names[0]), args)
	return each("snapshot", answer, failure("snapshot", names[0], err), failure)
}

// Destroy removes exactly one filesystem or snapshot, never what depends on it.
func (n *Native) Destroy(ctx context.Context, name string) error {
	if strings.Contains(name, "@") {
		// The set call takes a snapshot that is not there for one that is gone.
		if err := n.exists(ctx, name); err != nil {
			return err
		}
		return n.DestroySnapshots(ctx, []string{name}, false)
	}
	var c command
	if err := c.setText(offName, nameSize, name); err != nil {
		return err
	}
	_, err := n.device.call(ctx, reqDestroy, &c, nil, false)
	if errors.Is(err, unix.EBUSY) {
		// Mounted or with snapshots: EBUSY is both.
		if list, lerr := n.SnapshotsOf(ctx, name); lerr == nil && len(list) > 0 {
			return &Error{Op: "destroy", Name: name, Reason: HasDependents, Errno: unix.EBUSY}
		}
	}
	return dependents("destroy", name, err)
}

// DestroySnapshots removes the snapshots, all of one pool, at one moment: all or
// none. What does not exist counts as removed. With later, those that are held
// or cloned go when nothing holds them any more, and that is no error.
func (n *Native) DestroySnapshots(ctx context.Context, names []string, later bool) error {
	if len(names) == 0 {
		return nil
	}
	args := nvlist.List{"snaps": set(names)}
	if later {
		args["defer"] = nvlist.Present{}
	}
	answer, err := n.do(ctx, reqDestroySnaps, pool(names[0]), args)
	return each("destroy", answer, dependents("destroy", names[0], err), dependents)
}

// DestroyLater has a snapshot destroyed as soon as nothing needs it. See ZFS.
func (n *Native) DestroyLater(ctx context.Context, snapshot string) error {
	return n.DestroySnapshots(ctx, []string{snapshot}, true)
}

// Rollback takes the filesystem back to its latest snapshot, which has to be
// that one: name is dataset@snapshot.
func (n *Native) Rollback(ctx context.Context, name string) error {
	dataset, _, _ := strings.Cut(name, "@")
	_, err := n.do(ctx, reqRollback, dataset, nvlist.List{"target": name})
	return dependents("rollback to", name, err)
}

// Rename gives a filesystem or a snapshot another name.
func (n *Native) Rename(ctx context.Context, from, to string) error {
	var c command
	if err := errors.Join(c.setText(offName, nameSize, from), c.setText(offValue, valueSize, to)); err != nil {
		return err
	}
	_, err := n.device.call(ctx, reqRename, &c, nil, false)
	return failure("rename", from, err)
}

// Promote makes a clone independent of its origin, which becomes a clone of it.
func (n *Native) Promote(ctx context.Context, name string) error {
	var c command
	if err := c.setText(offName, nameSize, name); err != nil {
		return err
	}
	_, err := n.device.call(ctx, reqPromote, &c, nil, false)
	if errors.Is(err, unix.EEXIST) {
		if snapshot := c.text(offString, stringSize); snapshot != "" {
			name += " (both have a snapshot " + snapshot + ")"
		}
	}
	return failure("promote", name, err)
}

// Hold keeps snapshots from being destroyed until Release; holds are by snapshot.
func (n *Native) Hold(ctx context.Context, holds map[string]string) error {
	list, first := nvlist.List{}, ""
	for snapshot, tag := range holds {
		list[snapshot], first = tag, snapshot
	}
	if first == "" {
		return nil
	}
	answer, err := n.do(ctx, reqHold, pool(first), nvlist.List{"holds": list})
	return each("hold", answer, failure("hold", first, err), failure)
}

// Release takes holds back.
func (n *Native) Release(ctx context.Context, holds map[string]string) error {
	list, first := nvlist.List{}, ""
	for snapshot, tag := range holds {
		list[snapshot], first = nvlist.List{tag: nvlist.Present{}}, snapshot
	}
	if first == "" {
		return nil
	}
	answer, err := n.do(ctx, reqRelease, pool(first), list)
	return each("release", answer, failure("release", first, err), failure)
}

// Holds are a snapshot's tags with the time of each.
func (n *Native) Holds(ctx context.Context, snapshot string) (map[string]time.Time, error) {
	answer, err := n.do(ctx, reqGetHolds, snapshot, nil)
	if err != nil {
		return nil, failure("holds of", snapshot, err)
	}
	holds := map[string]time.Time{}
	for tag, v := range answer {
		if at, ok := v.(uint64); ok {
			holds[tag] = time.Unix(int64(at), 0)
		}
	}
	return holds, nil
}

// Bookmark makes bookmarks (dataset#name) of snapshots or bookmarks.
func (n *Native) Bookmark(ctx context.Context, bookmarks map[string]string) error {
	list, first := nvlist.List{}, ""
	for bookmark, of := range bookmarks {
		list[bookmark], first = of, bookmark
	}
	if first == "" {
		return nil
	}
	answer, err := n.do(ctx, reqBookmark, pool(first), list)
	return each("bookmark", answer, failure("bookmark", first, err), failure)
}

// Bookmarks are the names, after the #, of a dataset's bookmarks.
func (n *Native) Bookmarks(ctx context.Context, dataset string) ([]string, error) {
	answer, err := n.do(ctx, reqGetBookmarks, dataset, nvlist.List{})
	if err != nil {
		return nil, failure("bookmarks of", dataset, err)
	}
	return slices.Sorted(maps.Keys(answer)), nil
}

// DestroyBookmarks removes bookmarks; one that does not exist counts as removed.
func (n *Native) DestroyBookmarks(ctx context.Context, names []string) error {
	if len(names) == 0 {
		return nil
	}
	answer, err := n.do(ctx, reqDestroyBookmarks, pool(names[0]), set(names))
	return each("destroy", answer, failure("destroy", names[0], err), failure)
}

// Dataset is a filesystem, volume or snapshot as the module describes it.
type Dataset struct {
	Name       string
	Filesystem bool // and no volume
	Snapshot   bool
	Origin     string // of a clone
	properties nvlist.List
}

// Property is a property's value in the words of `zfs get -p`, or Unset.
func (d *Dataset) Property(name string) string {
	if name == "mountpoint" {
		return d.mountpoint()
	}
	if v, ok := property(name, d.properties); ok {
		return v
	}
	return Unset
}

// mountpoint is what libzfs makes of the property: one that a parent has, or that
// nobody gave, goes on with the rest of the name.
func (d *Dataset) mountpoint() string {
	v, ok := property("mountpoint", d.properties)
	if !ok {
		return "/" + d.Name
	}
	entry, _ := d.properties["mountpoint"].(nvlist.List)
	source, _ := entry["source"].(string)
	rest, inherited := strings.CutPrefix(d.Name, source+"/")
	if !inherited || !strings.HasPrefix(v, "/") {
		return v
	}
	return path.Join(v, rest)
}

// clones are the filesystems that were made of a snapshot.
func (d *Dataset) clones() []string {
	entry, _ := d.properties["clones"].(nvlist.List)
	names, _ := entry["value"].(nvlist.List)
	return slices.Sorted(maps.Keys(names))
}

func described(c *command, properties nvlist.List) *Dataset {
	return &Dataset{
		Name:       c.text(offName, nameSize),
		Filesystem: c.get32(offStats+statsType) == typeFilesystem,
		Snapshot:   c[offStats+statsIsSnapshot] != 0,
		Origin:     c.text(offStats+statsOrigin, 256),
		properties: properties,
	}
}

// Stat looks at one dataset, with its properties, or with those alone that are named.
func (n *Native) Stat(ctx context.Context, name string, properties ...string) (*Dataset, error) {
	return n.stat(ctx, name, true, properties)
}

// exists answers NotFound for a dataset that is not there. Its properties are not asked for.
func (n *Native) exists(ctx context.Context, name string) error {
	_, err := n.stat(ctx, name, false, nil)
	return err
}

func (n *Native) stat(ctx context.Context, name string, withProperties bool, properties []string) (*Dataset, error) {
	var c command
	if err := c.setText(offName, nameSize, name); err != nil {
		return nil, err
	}
	list, err := n.device.call(ctx, reqObjsetStats, &c, nil, withProperties, properties...)
	if err != nil {
		return nil, failure("stat", name, err)
	}
	return described(&c, list), nil
}

// Property is the value of a property, or Unset.
func (n *Native) Property(ctx context.Context, name, property string) (string, error) {
	d, err := n.Stat(ctx, name, property)
	if err != nil {
		return "", err
	}
	return d.Property(property), nil
}

// Space is what a filesystem or snapshot takes.
func (n *Native) Space(ctx context.Context, name string) (Space, error) {
	d, err := n.Stat(ctx, name, "used", "referenced", "objsetid")
	if err != nil {
		return Space{}, err
	}
	used, uerr := number("used", name, d.Property("used"))
	referenced, rerr := number("referenced", name, d.Property("referenced"))
	objset, _ := strconv.ParseUint(d.Property("objsetid"), 10, 64) // 0 where it is not known
	return Space{Used: used, Referenced: referenced, Objset: objset}, errors.Join(uerr, rerr)
}

// Set sets properties of a filesystem or a snapshot.
func (n *Native) Set(ctx context.Context, name string, p Properties) error {
	list, err := properties(p)
	if err != nil {
		return fmt.Errorf("set of %s: %w", name, err)
	}
	var c command
	if err := c.setText(offName, nameSize, name); err != nil {
		return err
	}
	answer, err := n.device.call(ctx, reqSetProp, &c, list, true)
	return each("set", answer, failure("set of", name, err), func(op, property string, err error) error {
		return failure(op+" "+property+" of", name, err)
	})
}

// Inherit takes a property's own value away.
func (n *Native) Inherit(ctx context.Context, name, property string) error {
	var c command
	if err := errors.Join(c.setText(offName, nameSize, name), c.setText(offValue, valueSize, property)); err != nil {
		return err
	}
	_, err := n.device.call(ctx, reqInheritProp, &c, nil, false)
	return failure("inherit "+property+" of", name, err)
}

// List calls f for each dataset directly below parent, with its properties if
// they are wanted; without, a list of many is much cheaper.
func (n *Native) List(ctx context.Context, parent string, withProperties bool, f func(*Dataset) error) error {
	return n.list(ctx, reqDatasetListNext, parent, withProperties, f)
}

// ListSnapshots does the same for the snapshots of a dataset.
func (n *Native) ListSnapshots(ctx context.Context, dataset string, withProperties bool, f func(*Dataset) error) error {
	return n.list(ctx, reqSnapshotListNext, dataset, withProperties, f)
}

func (n *Native) list(ctx context.Context, r request, parent string, withProperties bool, f func(*Dataset) error) error {
	var c command
	if err := c.setText(offName, nameSize, parent); err != nil {
		return err
	}
	if !withProperties {
		c[offSimple] = 1
	}
	for first := true; ; first = false {
		// The module puts the next name where the parent's was.
		if err := c.setText(offName, nameSize, parent); err != nil {
			return err
		}
		cookie := c.get64(offCookie)
		list, err := n.device.call(ctx, r, &c, nil, withProperties)
		if errors.Is(err, unix.ESRCH) {
			if first {
				// The end, or no such parent: the module says the same.
				return n.exists(ctx, parent)
			}
			return nil
		}
		if err != nil {
			return failure("list below", parent, err)
		}
		if c.get64(offCookie) == cookie {
			return fmt.Errorf("list below %s: the module does not go on: %w", parent, errdefs.ErrInternal)
		}
		if err := f(described(&c, list)); err != nil {
			return err
		}
	}
}

// childrenProgram lists names and looks at nothing else.
const childrenProgram = `
local args = ...
local names = {}
for child in zfs.list.children(args["of"]) do
	names[child] = true
end
return names`

// Children are the names of the filesystems directly below parent, and of volumes. See ZFS.
//
// The list that the zfs program reads tells the origin of each, for which the module looks through the names of all that
// stand beside the origin (dsl_dir_hold_obj, zap_value_search): ten thousand clones are a hundred million names.
func (n *Native) Children(ctx context.Context, parent string) ([]string, error) {
	answer, err := n.ChannelProgram(ctx, pool(parent), childrenProgram, nvlist.List{"of": parent}, true)
	if found, ok := answer["return"].(nvlist.List); err == nil && ok {
		return slices.Collect(maps.Keys(found)), nil
	}
	// There is no such parent, or more below it than a program may hold.
	var names []string
	err = n.List(ctx, parent, false, func(d *Dataset) error {
		names = append(names, d.Name)
		return nil
	})
	return names, err
}

// SnapshotsOf are the names of a dataset's snapshots.
func (n *Native) SnapshotsOf(ctx context.Context, dataset string) ([]string, error) {
	var names []string
	err := n.ListSnapshots(ctx, dataset, false, func(d *Dataset) error {
		names = append(names, d.Name)
		return nil
	})
	return names, err
}

// Send writes the stream of a snapshot to the file, from another snapshot or
// bookmark of its past if from is not empty.
func (n *Native) Send(ctx context.Context, snapshot, from string, to *os.File) error {
	args := nvlist.List{"fd": int32(to.Fd()), "largeblockok": nvlist.Present{}, "embedok": nvlist.Present{}, "compressok": nvlist.Present{}}
	if from != "" {
		args["fromsnap"] = from
	}
	_, err := n.do(ctx, reqSendNew, snapshot, args)
	return failure("send", snapshot, err)
}

// recordSize is dmu_replay_record_t, with which a stream begins.
const recordSize = 312

// Receive makes the snapshot, and its filesystem if it is not there, of a
// stream. origin is for the stream of a clone's.
func (n *Native) Receive(ctx context.Context, snapshot, origin string, from *os.File) error {
	begin := make([]byte, recordSize)
	for read := 0; read < len(begin); {
		got, err := from.Read(begin[read:])
		if err != nil {
			return fmt.Errorf("receive %s: the stream's beginning: %w: %w", snapshot, err, errdefs.ErrInvalidArgument)
		}
		read += got
	}
	dataset, _, ok := strings.Cut(snapshot, "@")
	if !ok {
		return fmt.Errorf("receive %s: it is no snapshot's name: %w", snapshot, errdefs.ErrInvalidArgument)
	}
	if err := n.exists(ctx, dataset); errdefs.IsNotFound(err) {
		i := strings.LastIndex(dataset, "/")
		if i < 0 {
			return err
		}
		dataset = dataset[:i]
	} else if err != nil {
		return err
	}
	args := nvlist.List{"snapname": snapshot, "begin_record": nvlist.Bytes(begin), "input_fd": int32(from.Fd())}
	if origin != "" {
		args["origin"] = origin
	}
	_, err := n.do(ctx, reqReceive, dataset, args)
	return failure("receive", snapshot, err)
}

// ChannelProgram runs a Lua program in the pool (man 8 zfs-program): atomic, with
// one synchronisation if it changes anything, and none with readOnly. Its return
// value is the list under "return".
func (n *Native) ChannelProgram(ctx context.Context, pool, program string, args nvlist.List, readOnly bool) (nvlist.List, error) {
	const instructions = 10_000_000 // the default of `zfs program`
	if args == nil {
		args = nvlist.List{}
	}
	answer, err := n.do(ctx, reqChannelProgram, pool, nvlist.List{
		"program": program, "arg": args, "sync": !readOnly, "instrlimit": uint64(instructions), "memlimit": uint64(programMemory),
	})
	if err != nil {
		if text, ok := answer["error"].(string); ok {
			return nil, fmt.Errorf("channel program in %s: %s: %w", pool, text, failure("channel program in", pool, err))
		}
		return nil, failure("channel program in", pool, err)
	}
	return answer, nil
}
