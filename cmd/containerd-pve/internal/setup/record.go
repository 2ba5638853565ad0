package setup

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/atomicwriter"
	"github.com/opencontainers/go-digest"
)

// record is what was made on this host. It is written before what it names.
type record struct {
	Version int `json:"version"`
	// Files have the digests of what was written.
	Files map[string]digest.Digest `json:"files"`
	// Dirs were made for them, the outer ones first.
	Dirs []string `json:"dirs,omitempty"`
	// Edits are lines of files that are not ours.
	Edits map[string]edit `json:"edits,omitempty"`
	// Dataset was not there before.
	Dataset string `json:"dataset,omitempty"`
	// Enabled: the service was not before.
	Enabled bool `json:"enabled,omitempty"`
}

// edit is a line that took the place of another, or is one more.
type edit struct {
	Line string `json:"line"`
	Was  string `json:"was,omitempty"`
}

const recordVersion = 1

func digestOf(text string) digest.Digest { return digest.FromString(text) }

func (h *Host) record() (record, error) {
	r := record{Version: recordVersion, Files: map[string]digest.Digest{}, Edits: map[string]edit{}}
	text, there, err := h.read(Record)
	if err != nil || !there {
		return r, err
	}
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return r, fmt.Errorf("%s: %w: %w", Record, err, errdefs.ErrInvalidArgument)
	}
	if r.Version != recordVersion {
		return r, fmt.Errorf("%s is of version %d, not %d: use the containerd-pve that wrote it: %w", Record, r.Version, recordVersion, errdefs.ErrFailedPrecondition)
	}
	if r.Files == nil {
		r.Files = map[string]digest.Digest{}
	}
	if r.Edits == nil {
		r.Edits = map[string]edit{}
	}
	return r, nil
}

// empty: nothing of ours is left.
func (r record) empty() bool {
	return len(r.Files) == 0 && len(r.Edits) == 0 && r.Dataset == "" && !r.Enabled
}

// keep writes the record, or removes it if it says nothing.
func (h *Host) keep(r record) error {
	if r.empty() {
		if err := os.Remove(h.at(Record)); err != nil && !os.IsNotExist(err) {
			return err
		}
		_ = os.Remove(filepath.Dir(h.at(Record))) // an empty directory only
		return nil
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(h.at(Record)), 0o711) // containers pass through it
	}
	if err == nil {
		err = atomicwriter.WriteFile(h.at(Record), append(b, '\n'), 0o644)
	}
	return err
}
