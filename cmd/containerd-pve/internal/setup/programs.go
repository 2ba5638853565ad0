package setup

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// ProgramsDir is where programs are copied to: it is in the PATH that systemd gives
// containerd, which looks for shims there.
const ProgramsDir = "/usr/local/bin"

// Programs are those that are copied.
var Programs = []string{"containerd-pve", "containerd-shim-pve-v2", "pve-init"}

// planPrograms has those of dir copied that are not there yet. Errors:
// FailedPrecondition, a package has brought its own, or there is another file.
func (h *Host) planPrograms(p *Plan, r record, dir string) error {
	if _, err := os.Stat(h.at("/usr/bin/containerd-pve")); err == nil {
		return fmt.Errorf("the Debian package is installed, and has its own programs: run `containerd-pve install --pods` of that, or `apt-get purge containerd-pve` first: %w", errdefs.ErrFailedPrecondition)
	}
	for _, name := range Programs {
		s := Step{Action: Copy, Target: filepath.Join(ProgramsDir, name), From: filepath.Join(dir, name)}
		var err error
		if s.digest, err = digestFile(s.From); err != nil {
			return err
		}
		old, there, err := h.read(s.Target)
		switch {
		case err != nil:
			return err
		case there && digestOf(old) == s.digest:
			continue
		case there && r.Files[s.Target] != digestOf(old):
			return fmt.Errorf("%s is there, and was not brought by this: move it away, or run its own `containerd-pve install --pods`: %w", s.Target, errdefs.ErrFailedPrecondition)
		}
		p.add(s)
	}
	return nil
}

func digestFile(path string) (digest.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return digest.FromReader(f)
}

// copy puts a program in its place. One that runs goes on as what it was.
func (r *run) copy(s Step) error {
	b, err := os.ReadFile(s.From)
	if err != nil {
		return err
	}
	if digest.FromBytes(b) != s.digest {
		return fmt.Errorf("%s was changed meanwhile: run it again: %w", s.From, errdefs.ErrFailedPrecondition)
	}
	return r.write(s.Target, string(b), 0o755)
}
