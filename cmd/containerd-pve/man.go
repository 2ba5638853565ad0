//go:build man

package main

import (
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// The manual pages are made when the package is built (deploy/deb/build): the
// program that is shipped needs no library for that.
func init() {
	more = append(more, func() *cobra.Command {
		return &cobra.Command{
			Use:    "man DIRECTORY",
			Short:  "write the manual pages there",
			Hidden: true,
			Args:   cobra.ExactArgs(1),
			RunE: func(c *cobra.Command, args []string) error {
				c.Root().DisableAutoGenTag = true
				// The date is SOURCE_DATE_EPOCH's.
				return doc.GenManTree(c.Root(), &doc.GenManHeader{Section: "8", Source: "containerd-pve", Manual: "System administration"}, args[0])
			},
		}
	})
}
