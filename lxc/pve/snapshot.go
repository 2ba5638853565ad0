package pve

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// snapshotName is Proxmox's format pve-configid, with the length that its API
// lets the names of snapshots have.
var snapshotName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{1,39}$`)

// CheckSnapshotName refuses what Proxmox would not take for the name of a
// snapshot, or takes for something else. Errors: InvalidArgument.
func CheckSnapshotName(name string) error {
	switch {
	case !snapshotName.MatchString(name):
		return fmt.Errorf("the name %q of a snapshot is not 2 to 40 letters, digits, - and _, the first a letter: %w", name, errdefs.ErrInvalidArgument)
	case slices.Contains([]string{"current", "pending", "vzdump"}, strings.ToLower(name)):
		return fmt.Errorf("the name %q means something else to Proxmox than a snapshot: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Properties that a snapshot's section has besides the configuration.
const (
	parentKey = "parent"
	timeKey   = "snaptime"
	lockKey   = "lock"
)

// blocks are the sections with their lines, of which the first is the header.
func (c *Conf) blocks() [][]string {
	var all [][]string
	for _, line := range c.sections {
		if sectionLine.MatchString(line) {
			all = append(all, nil)
		}
		all[len(all)-1] = append(all[len(all)-1], line)
	}
	return all
}

// snapshotOf is the name of the snapshot that a block is of; empty for pending changes.
func snapshotOf(block []string) string { return sectionLine.FindStringSubmatch(block[0])[1] }

// snapshot is the configuration in a snapshot's section; nil: there is none.
func (c *Conf) snapshot(name string) *Conf {
	for _, b := range c.blocks() {
		if snapshotOf(b) == name && name != "" {
			return &Conf{current: trimmed(b[1:])}
		}
	}
	return nil
}

// trimmed is without the empty lines at the end, which belong to the next header.
func trimmed(lines []string) []string {
	for len(lines) > 0 && strings.TrimSpace(lines[len(lines)-1]) == "" {
		lines = lines[:len(lines)-1]
	}
	return slices.Clone(lines)
}

// AddSnapshot notes a snapshot as Proxmox does (PVE::AbstractConfig,
// snapshot_prepare and snapshot_commit): the configuration as it is, in a section of its own, whose
// parent is the last one before. Errors: AlreadyExists, InvalidArgument.
func (c *Conf) AddSnapshot(name, text string, taken time.Time) error {
	if err := CheckSnapshotName(name); err != nil {
		return err
	}
	if c.snapshot(name) != nil {
		return fmt.Errorf("snapshot %s: %w", name, errdefs.ErrAlreadyExists)
	}
	s := &Conf{current: trimmed(c.current)}
	s.Delete(lockKey)
	s.deleteUnused()
	if err := s.SetDescription(text); err != nil {
		return err
	}
	if err := s.Set(timeKey, strconv.FormatInt(taken.Unix(), 10)); err != nil {
		return err
	}
	if err := c.Set(parentKey, name); err != nil {
		return err
	}
	c.current = append(trimmed(c.current), "")
	if c.sections = trimmed(c.sections); len(c.sections) > 0 {
		c.sections = append(c.sections, "")
	}
	c.sections = append(append(c.sections, "["+name+"]"), s.current...)
	return nil
}

// deleteUnused takes away the volumes that only the current configuration lists.
func (c *Conf) deleteUnused() {
	c.current = slices.DeleteFunc(c.current, isUnused)
}

func isUnused(line string) bool {
	m := property(line)
	return m != nil && strings.HasPrefix(m[1], "unused")
}

// RemoveSnapshot takes the section away; those that came after it have its parent
// then (snapshot_delete). There is nothing to do where there is none.
func (c *Conf) RemoveSnapshot(name string) {
	s := c.snapshot(name)
	if s == nil {
		return
	}
	before, has := s.Get(parentKey)
	adopt := func(conf *Conf) {
		switch parent, _ := conf.Get(parentKey); {
		case parent != name:
		case has:
			conf.put(parentKey, before)
		default:
			conf.Delete(parentKey)
		}
	}
	adopt(c)
	var kept []string
	for _, b := range c.blocks() {
		if snapshotOf(b) == name {
			continue
		}
		conf := &Conf{current: b[1:]}
		adopt(conf)
		kept = append(append(kept, b[0]), conf.current...)
	}
	c.sections = trimmed(kept)
	if len(c.sections) == 0 {
		c.current = trimmed(c.current)
	}
}

// Rollback makes a snapshot's configuration the current one, all but the
// description (snapshot_rollback). Errors: NotFound.
func (c *Conf) Rollback(name string) error {
	s := c.snapshot(name)
	if s == nil {
		return fmt.Errorf("the conf has no snapshot %s: %w", name, errdefs.ErrNotFound)
	}
	s.Delete(timeKey)
	s.Delete("snapstate")
	s.put(parentKey, name)
	if err := s.SetDescription(c.Description()); err != nil {
		return err
	}
	for _, line := range c.current {
		if isUnused(line) {
			m := property(line)
			s.put(m[1], m[2])
		}
	}
	c.current = s.current
	if len(c.sections) > 0 {
		c.current = append(c.current, "")
	}
	return nil
}
