package pve

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// The rules of the keys that are written here (pve-container, src/PVE/LXC/Config.pm, $confdesc;
// pve-common, src/PVE/JSONSchema.pm for the formats).
var schema = map[string]func(string) string{
	"arch":         oneOf("amd64", "i386", "arm64", "armhf", "riscv32", "riscv64"),
	"ostype":       oneOf("debian", "devuan", "ubuntu", "centos", "fedora", "opensuse", "archlinux", "alpine", "gentoo", "nixos", "unmanaged"),
	"cmode":        oneOf("shell", "console", "tty"),
	lockKey:        oneOf("backup", "create", "destroyed", "disk", "fstrim", "migrate", "mounted", "rollback", "snapshot", "snapshot-delete"),
	"console":      oneOf("0", "1"),
	"debug":        oneOf("0", "1"),
	"onboot":       oneOf("0", "1"),
	"protection":   oneOf("0", "1"),
	"template":     oneOf("0", "1"),
	"unprivileged": oneOf("0", "1"),
	"cores":        number(1, 8192, true),
	"cpulimit":     number(0, 8192, false),
	"cpuunits":     number(0, 500000, true),
	"memory":       number(16, 1<<53, true),
	"swap":         number(0, 1<<53, true),
	"tty":          number(0, 6, true),
	"hostname":     hostname,
	"searchdomain": anyText,
	"nameserver":   anyText,
	"tags":         tags,
	"features":     anyText,
	"hookscript":   anyText,
	"rootfs":       anyText,
	parentKey:      anyText,
	timeKey:        number(0, 1<<53, true),
	// No control characters but the tab, and an apostrophe makes a container that does not start.
	"entrypoint": func(v string) string {
		if strings.Contains(v, "'") {
			return "has an apostrophe"
		}
		return ""
	},
}

var numbered = regexp.MustCompile(`^(net|mp|dev|unused)\d+$`)

// check says whether Proxmox takes a property.
func check(key, value string) error {
	rule := schema[key]
	if rule == nil && numbered.MatchString(key) {
		rule = anyText
	}
	var why string
	switch {
	case rule == nil:
		why = "no property that is written here"
	case value == "":
		why = "empty"
	case strings.TrimSpace(value) != value:
		why = "begins or ends with a space"
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
		why = "has a control character"
	default:
		why = rule(value)
	}
	if why != "" {
		return fmt.Errorf("conf: %s: %.80q: %s: %w", key, value, why, errdefs.ErrInvalidArgument)
	}
	return nil
}

func anyText(string) string { return "" }

func oneOf(words ...string) func(string) string {
	return func(v string) string {
		if slices.Contains(words, v) {
			return ""
		}
		return "none of " + strings.Join(words, ", ")
	}
}

var decimal = regexp.MustCompile(`^\d+(\.\d+)?$`)

func number(least, most float64, whole bool) func(string) string {
	return func(v string) string {
		n, err := strconv.ParseFloat(v, 64)
		if err != nil || !decimal.MatchString(v) || whole && strings.Contains(v, ".") || n < least || n > most {
			kind := "number"
			if whole {
				kind = "whole number"
			}
			return fmt.Sprintf("no %s from %.0f to %.0f", kind, least, most)
		}
		return ""
	}
}

var (
	dnsName = regexp.MustCompile(`^([a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?\.)*[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?$`)
	tag     = regexp.MustCompile(`(?i)^[a-z0-9_][a-z0-9_+.-]*$`)
)

// maxLabel is the longest part of a DNS name (RFC 1035, 2.3.4); a hostname on Linux
// is of 64 bytes at most (sethostname(2)).
const (
	maxLabel    = 63
	maxHostname = 64
)

func hostname(v string) string {
	if !dnsName.MatchString(v) || len(v) > maxHostname {
		return "no DNS name of 64 characters at most"
	}
	for label := range strings.SplitSeq(v, ".") {
		if len(label) > maxLabel {
			return "no DNS name: a part is longer than 63 characters"
		}
	}
	return ""
}

func tags(v string) string {
	for t := range strings.SplitSeq(v, ";") {
		if !tag.MatchString(t) {
			return fmt.Sprintf("%q is no tag", t)
		}
	}
	return ""
}

// The keys of LXC that Proxmox lets through (is_valid_lxc_conf_key), and of them
// those that are of use here: it knows more.
var lxcKeys = regexp.MustCompile(`^lxc\.(include|arch|uts\.name|signal\.(halt|reboot|stop)|init\.(cmd|cwd|uid|gid|groups)|` +
	`apparmor\.(profile|allow_incomplete|allow_nesting|raw)|autodev|kmsg|mount\.(fstab|entry|auto)|cap\.(drop|keep)|seccomp\.profile|idmap|` +
	`hook\.(pre-start|pre-mount|mount|start|stop|post-stop|clone|destroy|version|autodev)|log\.(level|file)|` +
	`environment|environment\.(runtime|hooks)|(cgroup2|prlimit|net)\.[a-z0-9_.-]+)$`)

func checkLXC(e Entry) error {
	why := ""
	switch {
	case !lxcKeys.MatchString(e.Key):
		why = "Proxmox does not let it through"
	case strings.TrimSpace(e.Value) != e.Value:
		why = "begins or ends with a space"
	case strings.ContainsAny(e.Value, "\n\r\x00"):
		why = "has a control character"
	}
	if why != "" {
		return fmt.Errorf("conf: %s: %.80q: %s: %w", e.Key, e.Value, why, errdefs.ErrInvalidArgument)
	}
	return nil
}
