package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/containerd-pve/containerd-pve/integration/testbed/agent"
	"github.com/containerd-pve/containerd-pve/integration/testbed/machine"
)

// preparing is how long a guest may take to get the daemons up and the images pulled.
const preparing = 10 * time.Minute

// guestInfo is what one call leaves for the next about the guest that runs.
type guestInfo struct {
	PID      int
	Addr     string
	Saved    string // key of the state it came from
	Binaries string // hash of our programs in it
	Stack    bool   // the daemons were started
}

func (b *bed) runDir() string {
	sum := sha256.Sum256([]byte(b.repo + "\x00" + os.Getenv("BED_VM") + "\x00" + os.Getenv("BED_INIT") + os.Getenv("BED_ZFS")))
	return filepath.Join(b.cache.Dir, "run", hex.EncodeToString(sum[:6]))
}

func infoFile(dir string) string { return filepath.Join(dir, "guest.json") }

func (b *bed) running() (*machine.Machine, guestInfo, bool) {
	var info guestInfo
	data, err := os.ReadFile(infoFile(b.runDir()))
	if err != nil || json.Unmarshal(data, &info) != nil {
		return nil, guestInfo{}, false
	}
	m, ok := machine.Find(b.runDir(), info.PID, info.Addr)
	return m, info, ok
}

func lockDir(ctx context.Context, dir string) (io.Closer, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), f.Close())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// guest is a running guest with our current programs and the daemons in it.
func (b *bed) guest(ctx context.Context) (*machine.Machine, error) {
	log, err := b.quiet()
	if err != nil {
		return nil, err
	}
	defer log.Close()
	init, err := bedInit()
	if err != nil {
		return nil, err
	}
	if err := b.setup(ctx); err != nil {
		return nil, err
	}
	saved, err := b.saved(ctx, init)
	if err != nil {
		return nil, err
	}
	programs, err := b.programs(ctx)
	if err != nil {
		return nil, err
	}
	hash, err := hashFiles(programs)
	if err != nil {
		return nil, err
	}
	unlock, err := lockDir(ctx, b.runDir())
	if err != nil {
		return nil, err
	}
	defer unlock.Close()
	m, info, ok := b.running()
	if ok && info.Saved != saved.Key() { // the bed itself has changed
		if err := m.Kill(); err != nil {
			return nil, err
		}
		ok = false
	}
	if !ok {
		m, err = machine.Restore(ctx, b.cache, b.parts, b.cache.Path(saved), b.accel, b.runDir(), true)
		if err != nil {
			return nil, err
		}
		info = guestInfo{PID: m.PID, Addr: m.Client.Addr, Saved: saved.Key()}
	}
	stack := os.Getenv("BED_STACK") != "no"
	limited, cancel := context.WithTimeout(ctx, preparing)
	defer cancel()
	if info.Binaries != hash {
		if info.Stack {
			if err := inGuest(limited, m, agent.Command{Argv: []string{"stack", "down"}, Dir: "/"}); err != nil {
				return nil, err
			}
			info.Stack = false
		}
		if err := m.Client.Put(limited, toGuest(programs)); err != nil {
			return nil, err
		}
		info.Binaries = hash
	}
	var stackErr error
	if stack {
		stackErr = inGuest(limited, m, agent.Command{Argv: []string{"stack", "up", "--pull"}, Dir: "/"})
		info.Stack = true
	}
	data, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(infoFile(b.runDir()), data, 0o600); err != nil {
		return nil, err
	}
	return m, stackErr
}

// inGuest runs a step of the preparation; what it said counts only if it failed.
func inGuest(ctx context.Context, m *machine.Machine, c agent.Command) error {
	var out strings.Builder
	c.Stdout, c.Stderr = &out, &out
	code, err := m.Client.Run(ctx, c)
	if err == nil && code != 0 {
		err = fmt.Errorf("status %d", code)
	}
	if err != nil {
		return fmt.Errorf("%s in the guest: %w\n%s%s", strings.Join(c.Argv, " "), err, out.String(), consoleNote(ctx, m))
	}
	return nil
}

func consoleNote(ctx context.Context, m *machine.Machine) string {
	if ctx.Err() == nil {
		return ""
	}
	return "the guest's console:\n" + m.Console()
}

// programs builds our commands and returns their files.
func (b *bed) programs(ctx context.Context) ([]string, error) {
	dirs, err := filepath.Glob(filepath.Join(b.repo, "cmd", "*"))
	if err != nil {
		return nil, err
	}
	var files []string
	for _, d := range dirs {
		source, err := filepath.Glob(filepath.Join(d, "*.go"))
		if err != nil {
			return nil, err
		}
		if len(source) == 0 {
			continue
		}
		out := filepath.Join(b.repo, "bin", filepath.Base(d))
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", out, "./cmd/"+filepath.Base(d))
		cmd.Dir, cmd.Env = b.repo, append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			err = fmt.Errorf("go build ./cmd/%s: %w\n%s", filepath.Base(d), err, msg)
			if os.Getenv("BED_PARTIAL") == "" {
				return nil, err
			}
			fmt.Fprintln(os.Stderr, "bed: going on without it (BED_PARTIAL):", err)
			continue
		}
		files = append(files, out)
	}
	return files, nil
}

func toGuest(programs []string) map[string]string {
	files := map[string]string{}
	for _, p := range programs {
		files["/usr/local/bin/"+filepath.Base(p)] = p
	}
	return files
}

func hashFiles(files []string) (string, error) {
	h := sha256.New()
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(h, filepath.Base(name))
		_, err = io.Copy(h, f)
		if err = errors.Join(err, f.Close()); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

type fileList []string

func (f *fileList) String() string     { return strings.Join(*f, " ") }
func (f *fileList) Set(s string) error { *f = append(*f, s); return nil }

func (b *bed) run(ctx context.Context, args []string) error {
	var files fileList
	flags := flag.NewFlagSet("run", flag.ContinueOnError)
	flags.Var(&files, "f", "file or directory to copy to /work first")
	if err := flags.Parse(args); err != nil {
		return exitError(2)
	}
	if flags.NArg() != 1 {
		fmt.Fprint(os.Stderr, usage)
		return exitError(2)
	}
	ctx, cancel, err := limit(ctx, 0)
	if err != nil {
		return err
	}
	defer cancel()
	m, err := b.guest(ctx)
	if err != nil {
		return err
	}
	put := map[string]string{}
	for _, f := range files {
		if !filepath.IsAbs(f) {
			f = filepath.Join(os.Getenv("BED_CWD"), f)
		}
		put["/work/"+filepath.Base(f)] = f
	}
	if len(put) > 0 {
		if err := m.Client.Put(ctx, put); err != nil {
			return err
		}
	}
	code, err := m.Client.Run(ctx, agent.Command{Argv: []string{"bash", "-c", flags.Arg(0)}, Dir: "/work", Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return errors.Join(fmt.Errorf("time limit BED_TIMEOUT reached; the guest is ended, its console:\n%s", m.Console()), m.Kill())
		}
		return err
	}
	if code != 0 {
		return exitError(code)
	}
	return nil
}

// limit applies BED_TIMEOUT; without it the limit is d, 0 for none.
func limit(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc, error) {
	if s := os.Getenv("BED_TIMEOUT"); s != "" {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			return nil, nil, fmt.Errorf("BED_TIMEOUT: %w", err)
		}
	}
	if d == 0 {
		ctx, cancel := context.WithCancel(ctx)
		return ctx, cancel, nil
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	return ctx, cancel, nil
}

func (b *bed) shell(ctx context.Context) error {
	in := int(os.Stdin.Fd())
	if !term.IsTerminal(in) {
		return errors.New("shell: the standard input is no terminal (bed run runs a command)")
	}
	m, err := b.guest(ctx)
	if err != nil {
		return err
	}
	cols, rows, err := term.GetSize(in)
	if err != nil {
		return err
	}
	old, err := term.MakeRaw(in)
	if err != nil {
		return err
	}
	resize, winch := make(chan [2]uint16), make(chan os.Signal, 1)
	signal.Notify(winch, syscall.SIGWINCH)
	go func() {
		for range winch {
			if c, r, err := term.GetSize(in); err == nil {
				resize <- [2]uint16{uint16(r), uint16(c)}
			}
		}
	}()
	code, err := m.Client.Run(ctx, agent.Command{Argv: []string{"bash", "-l"}, Dir: "/work", Env: []string{"TERM=" + os.Getenv("TERM")},
		Stdin: os.Stdin, Stdout: os.Stdout, TTY: true, Rows: uint16(rows), Cols: uint16(cols), Resize: resize})
	if err := errors.Join(err, term.Restore(in, old)); err != nil {
		return err
	}
	if code != 0 {
		return exitError(code)
	}
	return nil
}

func (b *bed) down() error {
	m, _, ok := b.running()
	if ok {
		if err := m.Kill(); err != nil {
			return err
		}
	}
	return os.RemoveAll(b.runDir())
}
