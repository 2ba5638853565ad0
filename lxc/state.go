package lxc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/containerd/errdefs"
)

const (
	stateFile  = "state.json"
	exitFile   = "exit"
	logFile    = "lxc.log"
	monitorDir = "monitor"
)

// state is what Cleanup needs to undo a container, in Bundle/lxc/state.json.
type state struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	Name      string `json:"name"`
	LXCPath   string `json:"lxcPath"`
	Cgroup    string `json:"cgroup"`
	Unit      *unit  `json:"unit,omitempty"`
}

func stateDir(bundle string) string { return filepath.Join(bundle, "lxc") }

// monitorCgroup is outside the container's cgroup, so that freezing or killing
// the container leaves lxc-start alone.
func (s *state) monitorCgroup() string { return monitorCgroup(s.Name) }

// monitorCgroups are those that one of any version of ours may have.
func (s *state) monitorCgroups() []string {
	return slices.Compact([]string{s.monitorCgroup(), monitorDirectory + s.Name})
}

const monitorDirectory = "/containerd-pve/monitor/"

// longRun is of ids as the CRI plugin and nerdctl make them.
var longRun = regexp.MustCompile(`([a-z0-9]{32})([a-z0-9])`)

// monitorCgroup has no 64 letters and digits in a row: cadvisor, within the kubelet,
// takes each cgroup whose name has them for the container of that id (isContainerName). A plus is in no name of
// containerd's.
func monitorCgroup(name string) string {
	return monitorDirectory + longRun.ReplaceAllString(name, "$1+$2")
}

// lockFile is what liblxc leaves in /run for every name it has ever locked.
func (s *state) lockFile() string {
	return filepath.Join("/run/lxc/lock", s.LXCPath, "."+s.Name)
}

func (s *state) write(bundle string) error {
	dir := stateDir(bundle)
	if err := os.MkdirAll(filepath.Join(dir, monitorDir), 0o711); err != nil {
		return err
	}
	// A bundle is used once, but a failed Create may be tried again in it.
	for _, stale := range []string{exitFile, logFile} {
		if err := os.Remove(filepath.Join(dir, stale)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return writeJSON(filepath.Join(dir, stateFile), s)
}

func readState(bundle string) (*state, error) {
	var s state
	path := filepath.Join(stateDir(bundle), stateFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &s, nil
}

var vmid = regexp.MustCompile(`^[1-9][0-9]{2,8}$`)

// check refuses a state that no Create has written: an empty cgroup, say, would
// have erase work on the root of all cgroups.
func (s *state) check() error {
	name, err := Name(s.Namespace, s.ID)
	if err != nil {
		return err
	}
	// Proxmox has another name for it, which is a number.
	if s.Name != name && !vmid.MatchString(s.Name) || !filepath.IsAbs(s.LXCPath) || !filepath.IsAbs(s.Cgroup) || filepath.Clean(s.Cgroup) != s.Cgroup || s.Cgroup == "/" {
		return fmt.Errorf("not a container's state: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

func readExit(bundle string) (ExitStatus, bool) {
	var e ExitStatus
	data, err := os.ReadFile(filepath.Join(stateDir(bundle), exitFile))
	if err != nil || json.Unmarshal(data, &e) != nil {
		return ExitStatus{}, false
	}
	return e, true
}

// erase kills what runs and removes every trace but the bundle's directory;
// the state file goes last, so that an interrupted erase is taken up again.
func (s *state) erase(ctx context.Context, bundle string) error {
	err := removeCgroup(ctx, cgroupDir(s.Cgroup))
	for _, m := range s.monitorCgroups() {
		err = errors.Join(err, removeCgroup(ctx, cgroupDir(m)))
	}
	if err != nil {
		return err
	}
	if s.Unit != nil {
		if err := s.Unit.stop(ctx); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(filepath.Join(s.LXCPath, s.Name)); err != nil {
		return err
	}
	for _, path := range []string{
		s.lockFile(),
		filepath.Join(stateDir(bundle), monitorDir, fifoName),
		filepath.Join(stateDir(bundle), stateFile),
	} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// writeJSON replaces the file in one step: a reader sees the old or the new one.
func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
