package export

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func run(stdin io.Reader, argv ...string) (string, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	return string(out), err
}

type counter int64

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }

func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// holds are the files of a directory with their text.
func holds(t *testing.T, dir string) map[string]string {
	t.Helper()
	list, err := os.ReadDir(dir)
	must(t, err)
	all := map[string]string{}
	for _, e := range list {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			text = []byte(err.Error())
		}
		all[e.Name()] = string(text)
	}
	return all
}

func TestToFile(t *testing.T) {
	ctx, no := t.Context(), errors.New("no")
	dir := t.TempDir()
	name := filepath.Join(dir, "out.tar")
	say := func(text string) func(io.Writer) error {
		return func(w io.Writer) error { _, err := io.WriteString(w, text); return err }
	}
	is := func(what, want string) {
		t.Helper()
		if got := holds(t, dir); len(got) != min(len(want), 1) || got["out.tar"] != want {
			t.Errorf("%s: %v, want %q", what, got, want)
		}
	}
	if err := ToFile(ctx, name, false, func(w io.Writer) error { return errors.Join(say("half")(w), no) }); !errors.Is(err, no) {
		t.Error(err)
	}
	is("what failed", "")
	interrupted, cancel := context.WithCancel(ctx)
	err := ToFile(interrupted, name, false, func(w io.Writer) error {
		must(t, say("half")(w))
		cancel()
		_ = say("more")(w) // as a writer does that keeps its errors for itself
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	is("what was interrupted", "")
	must(t, ToFile(ctx, name, false, say("whole")))
	is("what was not", "whole")
	if info, err := os.Stat(name); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := ToFile(ctx, name, false, func(io.Writer) error { t.Error("it was asked for"); return nil }); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	is("what was there", "whole")
	if err := ToFile(ctx, name, true, func(io.Writer) error { return no }); !errors.Is(err, no) {
		t.Error(err)
	}
	is("what was there, to be replaced by what failed", "whole")
	must(t, ToFile(ctx, name, true, say("new")))
	is("what replaced it", "new")
	must(t, os.Remove(name))
	err = ToFile(ctx, name, false, func(w io.Writer) error {
		must(t, os.WriteFile(name, []byte("another's"), 0o600))
		return say("ours")(w)
	})
	if !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	is("what another wrote meanwhile", "another's")
	for _, force := range []bool{false, true} {
		if err := ToFile(ctx, dir, force, say("x")); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a directory: %v", err)
		}
	}
	if err := ToFile(ctx, filepath.Join(dir, "none", "x"), true, say("x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that is none: %v", err)
	}
	is("at last", "another's")
}

// TestToFileOfFullDisk: nothing is left, also if whoever writes does not say that it failed.
func TestToFileOfFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("mounting: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	for _, silent := range []bool{false, true} {
		err := ToFile(t.Context(), filepath.Join(dir, "out"), false, func(w io.Writer) error {
			_, err := io.Copy(w, io.LimitReader(zeros{}, 4<<20))
			if silent {
				return nil
			}
			return err
		})
		if !errors.Is(err, unix.ENOSPC) || len(holds(t, dir)) > 0 {
			t.Errorf("%v, %v", err, holds(t, dir))
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

func TestToStream(t *testing.T) {
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	must(t, ToStream(t.Context(), w, func(w io.Writer) error { _, err := w.Write([]byte("text")); return err }))
	got := make([]byte, 4)
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, []byte("text")) {
		t.Errorf("%q, %v", got, err)
	}
	// Nobody reads.
	ctx, cancel := context.WithCancel(t.Context())
	cancelled := false
	err = ToStream(ctx, w, func(w io.Writer) error {
		for range 64 {
			if _, err := w.Write(make([]byte, bufferSize)); err != nil {
				return err
			}
			if !cancelled {
				cancelled = true
				cancel()
			}
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	tty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer tty.Close()
	if err := ToStream(t.Context(), tty, func(io.Writer) error { t.Error("it was asked for"); return nil }); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a terminal: %v", err)
	}
}
