// Package pve is what a Proxmox VE node knows of a container: its conf and its
// VMID. It owns the files /etc/pve/lxc/<vmid>.conf that bear its tag, and changes
// no other. It starts no process and mounts nothing.
package pve

import (
	"bytes"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Conf is the text of a container's conf. What is not asked for stays as it is,
// to the byte: comments, keys that are not known here, snapshots' sections.
// The format is that of PVE::LXC::Config (parse_pct_config, write_pct_config);
// Get, Set and their like mean the current configuration, which is what comes before the
// first section.
type Conf struct {
	current  []string // lines
	sections []string // the lines from the first section on
}

// As in parse_pct_config, where a section's name is of any case.
var (
	sectionLine  = regexp.MustCompile(`^\[(?i:([a-z][a-z0-9_-]+)|pve:pending)\]\s*$`)
	propertyLine = regexp.MustCompile(`^([a-z][a-z_]*\d*):\s*(.+?)\s*$`)
	lxcLine      = regexp.MustCompile(`^(lxc\.[a-z0-9_.-]+)(?::|\s*=)\s*(.*?)\s*$`)
)

const description = "description"

// Parse reads a conf. There is no text that it does not take: Proxmox passes over
// lines that it does not know, and so does this.
func Parse(text []byte) *Conf {
	c := &Conf{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if len(c.sections) > 0 || sectionLine.MatchString(line) {
			c.sections = append(c.sections, line)
		} else {
			c.current = append(c.current, line)
		}
	}
	return c
}

// Bytes is the text; it ends with a line feed.
func (c *Conf) Bytes() []byte {
	var b bytes.Buffer
	for _, line := range slices.Concat(c.current, c.sections) {
		b.WriteString(line)
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// Get is the value of a property; the last one counts, as for Proxmox.
func (c *Conf) Get(key string) (value string, ok bool) {
	for _, line := range c.current {
		if m := property(line); m != nil && m[1] == key {
			value, ok = m[2], true
		}
	}
	return value, ok
}

// property takes a line apart; nil if it is another kind of line.
func property(line string) []string {
	if strings.HasPrefix(line, "#") || lxcLine.MatchString(line) {
		return nil
	}
	m := propertyLine.FindStringSubmatch(line)
	if m == nil || m[1] == description {
		return nil
	}
	return m
}

// Set gives a property a value. Errors: InvalidArgument for a key or a value that
// Proxmox would refuse (its JSON schema of the key) or that would become another line.
func (c *Conf) Set(key, value string) error {
	if err := check(key, value); err != nil {
		return err
	}
	c.put(key, value)
	return nil
}

// put sets what a conf had, whatever it is.
func (c *Conf) put(key, value string) {
	c.Delete(key)
	line := key + ": " + value
	// Proxmox writes properties in the order of their keys, after the description
	// and before what is LXC's.
	at := len(c.current)
	for i, l := range c.current {
		if m := property(l); m != nil && m[1] > key || lxcLine.MatchString(l) {
			at = i
			break
		}
	}
	for at > 0 && at == len(c.current) && strings.TrimSpace(c.current[at-1]) == "" {
		at-- // before the empty line that a section begins with
	}
	c.current = slices.Insert(c.current, at, line)
}

// Delete takes a property away.
func (c *Conf) Delete(key string) {
	c.current = slices.DeleteFunc(c.current, func(line string) bool {
		m := property(line)
		return m != nil && m[1] == key
	})
}

// Description is the text that the GUI shows as notes; it ends with a line feed if there is one.
func (c *Conf) Description() string {
	var b strings.Builder
	for _, line := range c.current {
		if text, ok := strings.CutPrefix(line, "#"); ok {
			b.WriteString(decode(text) + "\n")
		} else if m := propertyLine.FindStringSubmatch(line); m != nil && m[1] == description {
			b.WriteString(decode(m[2]))
		}
	}
	return b.String()
}

// maxDescription is the longest that Proxmox takes.
const maxDescription = 8 << 10

// SetDescription replaces it. Errors: InvalidArgument, it is longer than 8 KiB.
func (c *Conf) SetDescription(text string) error {
	if len(text) > maxDescription {
		return fmt.Errorf("a description of %d bytes is longer than Proxmox's limit of %d: %w", len(text), maxDescription, errdefs.ErrInvalidArgument)
	}
	c.current = slices.DeleteFunc(c.current, func(line string) bool {
		m := propertyLine.FindStringSubmatch(line)
		return strings.HasPrefix(line, "#") || m != nil && m[1] == description
	})
	var lines []string
	for line := range strings.Lines(text) {
		lines = append(lines, "#"+encode(strings.TrimSuffix(line, "\n")))
	}
	c.current = append(lines, c.current...)
	return nil
}

// encode is PVE::ParseUtils::encode_text: all that is not printable ASCII, colons
// and percent signs as in a URL.
func encode(text string) string {
	var b strings.Builder
	for _, ch := range []byte(text) {
		if ch < ' ' || ch > '~' || ch == ':' || ch == '%' {
			fmt.Fprintf(&b, "%%%02X", ch)
		} else {
			b.WriteByte(ch)
		}
	}
	return b.String()
}

var escaped = regexp.MustCompile(`%[0-9A-Fa-f]{2}`)

// decode leaves a percent sign alone that begins no escape, as uri_unescape does.
func decode(text string) string {
	return escaped.ReplaceAllStringFunc(text, func(e string) string {
		s, err := url.PathUnescape(e)
		if err != nil {
			return e
		}
		return s
	})
}

// Entry is a line of LXC's own configuration within a conf.
type Entry struct{ Key, Value string }

// LXC are the lines of LXC's own configuration, in their order.
func (c *Conf) LXC() []Entry {
	var all []Entry
	for _, line := range c.current {
		if m := lxcLine.FindStringSubmatch(line); m != nil {
			all = append(all, Entry{m[1], m[2]})
		}
	}
	return all
}

// SetLXC replaces all lines of LXC's own configuration. Errors: InvalidArgument
// for a key that Proxmox does not let through, and for a value that would become another line.
func (c *Conf) SetLXC(entries []Entry) error {
	var lines []string
	for _, e := range entries {
		if err := checkLXC(e); err != nil {
			return err
		}
		lines = append(lines, e.Key+": "+e.Value)
	}
	c.current = slices.DeleteFunc(c.current, lxcLine.MatchString)
	at := len(c.current)
	for at > 0 && strings.TrimSpace(c.current[at-1]) == "" {
		at--
	}
	c.current = slices.Insert(c.current, at, lines...)
	return nil
}

// Snapshots are the names of the snapshots' sections.
func (c *Conf) Snapshots() []string {
	var names []string
	for _, line := range c.sections {
		if m := sectionLine.FindStringSubmatch(line); m != nil && m[1] != "" {
			names = append(names, m[1])
		}
	}
	return names
}
