package archive

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

var (
	between    = regexp.MustCompile(`[^a-z0-9]+`)
	extensions = []string{".tar", ".gz", ".tgz", ".zst", ".tzst", ".xz", ".txz", ".bz2", ".tbz", ".tbz2", ".oci", ".squashfs", ".sqfs"}
)

// Reference is the name of an image: the one that is asked for, or the archive's own if
// that is whole, or localhost/<the file's>. Errors: InvalidArgument.
func Reference(asked, own, file string) (string, error) {
	if asked != "" {
		ref, err := reference.ParseDockerRef(asked)
		if err != nil {
			return "", fmt.Errorf("%q is no name of an image, as registry.example.org/name:tag: %w: %w", asked, err, errdefs.ErrInvalidArgument)
		}
		return ref.String(), nil
	}
	if strings.ContainsAny(own, "/:") {
		if ref, err := reference.ParseDockerRef(own); err == nil {
			return ref.String(), nil
		}
	}
	// An OCI layout has the tag alone, mostly.
	base := "localhost/" + repository(file)
	if ref, err := reference.ParseDockerRef(base + ":" + own); err == nil {
		return ref.String(), nil
	}
	return base + ":latest", nil
}

// repository is what a file's name is as that of an image.
func repository(file string) string {
	if abs, err := filepath.Abs(file); err == nil {
		file = abs // of a directory, . may be given
	}
	name := strings.ToLower(filepath.Base(file))
	for {
		ext := filepath.Ext(name)
		if !slices.Contains(extensions, ext) {
			break
		}
		name = strings.TrimSuffix(name, ext)
	}
	name = between.ReplaceAllStringFunc(name, func(s string) string {
		if s == "." || s == "_" || s == "__" {
			return s
		}
		return "-"
	})
	if name = strings.Trim(name[:min(len(name), 128)], "._-"); name == "" {
		return "image"
	}
	return name
}
