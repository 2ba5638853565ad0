package compare

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Files writes all files below root as one layer, the root itself first, in the
// order of their paths: the same files give the same bytes. Nobody writes to them meanwhile.
// leave is a path, with a slash before it, that is left out with what is below it; empty for none.
// edit, if not nil, changes a header before it is written. Errors: those of edit, of the files, and of w.
func Files(ctx context.Context, w io.Writer, root *os.File, leave string, edit func(*tar.Header) error) error {
	m := &mounted{root: root}
	l := newLayer(w, m.dir(), nil)
	l.edit = edit
	err := filepath.WalkDir(m.path("/."), func(at string, d fs.DirEntry, err error) error {
		p := "/"
		if at != m.path("/.") {
			p = strings.TrimPrefix(at, m.dir())
		}
		if leave != "" && p == leave {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = l.file(ctx, p)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return l.tw.Close()
}
