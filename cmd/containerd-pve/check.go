package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"text/tabwriter"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// finding is one line of `check`.
type finding struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Warning: it works, and something should be done all the same.
	Warning bool `json:"warning,omitempty"`
	// Detail is what was found, or what to do.
	Detail string `json:"detail"`
}

func checkCommand() *cobra.Command {
	var path, dataset, format string
	c := &cobra.Command{
		Use:   "check",
		Short: "say whether this host is ready, and what to do",
		Long:  "Says whether this host is ready, and what to do. The exit status is 1 if it is not; a warning does not count.",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if format != "text" && format != "json" {
				return fmt.Errorf("--format %q is neither text nor json: %w", format, errdefs.ErrInvalidArgument)
			}
			conf, err := readConfig(path, c.Flags().Changed("config"))
			if err == nil && dataset != "" {
				conf.Dataset = dataset
			}
			findings := check(c.Context(), conf, err)
			if err := report(c.OutOrStdout(), format, findings); err != nil {
				return err
			}
			for _, f := range findings {
				if !f.OK {
					return errNotReady
				}
			}
			return nil
		},
	}
	c.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration `file`")
	c.Flags().StringVar(&dataset, "dataset", "", "parent `dataset` instead of the configured one")
	c.Flags().StringVar(&format, "format", "text", "text or json")
	return c
}

func check(ctx context.Context, conf config, confErr error) []finding {
	list := []finding{result("configuration", "read", confErr)}
	if confErr == nil {
		err := conf.complete()
		list[0] = result("configuration", "dataset "+conf.Dataset, err)
		if err == nil {
			list = append(list, thisHost.check(ctx, conf)...)
			list = append(list, thisProxmox.check(ctx, conf)...)
		}
	}
	return append(list, checkPrograms(ctx)...)
}

// checkPrograms says what the host has of what every container needs.
func checkPrograms(ctx context.Context) []finding {
	list := []finding{result("cgroup", "version 2", cgroup2())}
	for _, p := range []struct{ program, hint string }{
		{"zfs", "apt-get install zfsutils-linux"},
		{"lxc-start", "apt-get install lxc"},
		{"containerd-shim-pve-v2", "install the package, or put it in /usr/local/bin"},
		{"pve-init", "install it beside containerd-shim-pve-v2"},
		{"containerd", "apt-get install containerd"},
	} {
		at, err := exec.LookPath(p.program)
		if err != nil {
			err = fmt.Errorf("not in PATH: %s", p.hint)
		}
		list = append(list, result(p.program, at, err))
	}
	if at, err := exec.LookPath("lxc-start"); err == nil {
		out, err := exec.CommandContext(ctx, at, "--version").Output()
		v := strings.TrimSpace(string(out))
		if err == nil && !strings.HasPrefix(v, "5.") && !strings.HasPrefix(v, "6.") && !strings.HasPrefix(v, "7.") {
			err = fmt.Errorf("%q was not tried: install LXC 5 to 7", v)
		}
		list = append(list, result("lxc version", v, err))
	}
	return list
}

func result(name, detail string, err error) finding {
	if err != nil {
		return finding{Name: name, Detail: err.Error()}
	}
	return finding{Name: name, OK: true, Detail: detail}
}

func warning(name, detail string) finding {
	return finding{Name: name, OK: true, Warning: true, Detail: detail}
}

func cgroup2() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		return &os.PathError{Op: "statfs", Path: "/sys/fs/cgroup", Err: err}
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("/sys/fs/cgroup is not version 2: boot with systemd.unified_cgroup_hierarchy=1")
	}
	return nil
}

func report(w io.Writer, format string, findings []finding) error {
	if format == "json" {
		return printJSON(w, findings)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, f := range findings {
		state := "ok"
		switch {
		case !f.OK:
			state = "FAIL"
		case f.Warning:
			state = "warn"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", state, f.Name, f.Detail)
	}
	return t.Flush()
}
