package agent

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// Client reaches the agent of one guest.
type Client struct{ Addr string }

// Command is what to run in the guest. Without Stdin the command reads from /dev/null.
type Command struct {
	Argv, Env      []string
	Dir            string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool
	Rows, Cols     uint16
	Resize         <-chan [2]uint16 // rows, columns
}

// ErrNotRun means that the guest could not run the command at all.
var ErrNotRun = errors.New("command not run")

// Wait returns once the guest answers.
func (c Client) Wait(ctx context.Context) error {
	for {
		// The host's side of a forwarded port accepts before the guest listens: only an answer counts.
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := c.do(try, request{}, Command{})
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the guest's agent does not answer: %w", errors.Join(ctx.Err(), err))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Resumed tells a guest restored from a snapshot the time, and seeds its random pool anew.
func (c Client) Resumed(ctx context.Context) error {
	seed := make([]byte, 256)
	if _, err := rand.Read(seed); err != nil {
		return err
	}
	_, err := c.do(ctx, request{Time: time.Now().UnixNano(), Seed: seed}, Command{})
	return err
}

// Run runs one command and returns its exit status, 128+n after signal n.
func (c Client) Run(ctx context.Context, cmd Command) (int, error) {
	q := request{Argv: cmd.Argv, Env: cmd.Env, Dir: cmd.Dir, Stdin: cmd.Stdin != nil}
	if cmd.TTY {
		q.TTY = &size{cmd.Rows, cmd.Cols}
	}
	return c.do(ctx, q, cmd)
}

func (c Client) do(ctx context.Context, q request, cmd Command) (int, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.Addr)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	out := &frameWriter{w: conn}
	if err := out.sendJSON(kindRequest, q); err != nil {
		return 0, cause(ctx, err)
	}
	done := make(chan struct{})
	defer close(done)
	if cmd.Stdin != nil {
		go func() {
			b := make([]byte, 1<<18)
			for {
				n, err := cmd.Stdin.Read(b)
				if n > 0 && out.send(kindStdin, b[:n]) != nil {
					return
				}
				if err != nil {
					_ = out.send(kindStdin, nil)
					return
				}
			}
		}()
	}
	if cmd.Resize != nil {
		go func() {
			for {
				select {
				case <-done:
					return
				case s := <-cmd.Resize:
					_ = out.sendJSON(kindResize, size{s[0], s[1]})
				}
			}
		}()
	}
	in := bufio.NewReaderSize(conn, 1<<16)
	for {
		kind, data, err := readFrame(in)
		if err != nil {
			return 0, fmt.Errorf("connection to the guest lost: %w", cause(ctx, err))
		}
		var w io.Writer
		switch kind {
		case kindStdout:
			w = cmd.Stdout
		case kindStderr:
			w = cmd.Stderr
		case kindExit:
			var st exitStatus
			if err := json.Unmarshal(data, &st); err != nil {
				return 0, fmt.Errorf("exit status: %w", err)
			}
			if st.Error != "" {
				return st.Code, fmt.Errorf("%w: %s", ErrNotRun, st.Error)
			}
			return st.Code, nil
		}
		if w != nil {
			if _, err := w.Write(data); err != nil {
				return 0, fmt.Errorf("write the guest's output: %w", err)
			}
		}
	}
}

func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// Put copies host files and trees into the guest; files maps the path in the guest to the path here.
func (c Client) Put(ctx context.Context, files map[string]string) error {
	r, w := io.Pipe()
	go func() { w.CloseWithError(writeTar(w, files)) }()
	defer r.Close()
	var stderr strings.Builder
	src := &errReader{r: r}
	code, err := c.Run(ctx, Command{Argv: []string{"tar", "xf", "-", "-C", "/"}, Stdin: src, Stderr: &stderr})
	if src.err != nil && !errors.Is(src.err, io.EOF) {
		return fmt.Errorf("copy into the guest: %w", src.err)
	}
	if err != nil {
		return fmt.Errorf("copy into the guest: %w", err)
	}
	if code != 0 {
		return fmt.Errorf("copy into the guest: tar: %s", strings.TrimSpace(stderr.String()))
	}
	return nil
}

type errReader struct {
	r   io.Reader
	err error
}

func (e *errReader) Read(b []byte) (int, error) {
	n, err := e.r.Read(b)
	if err != nil {
		e.err = err
	}
	return n, err
}

func writeTar(w io.Writer, files map[string]string) error {
	t := tar.NewWriter(w)
	for guest, host := range files {
		host, err := filepath.EvalSymlinks(host)
		if err != nil {
			return err
		}
		err = filepath.WalkDir(host, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(host, p)
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if !info.Mode().IsRegular() && !info.IsDir() && info.Mode()&fs.ModeSymlink == 0 {
				return nil // sockets and devices of the host mean nothing in the guest
			}
			link := ""
			if info.Mode()&fs.ModeSymlink != 0 {
				if link, err = os.Readlink(p); err != nil {
					return err
				}
			}
			h, err := tar.FileInfoHeader(info, link)
			if err != nil {
				return err
			}
			h.Name = strings.TrimPrefix(path.Join(guest, filepath.ToSlash(rel)), "/")
			h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
			if err := t.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
				return err
			}
			f, err := os.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = io.Copy(t, f)
			return err
		})
		if err != nil {
			return err
		}
	}
	return t.Close()
}

// Get copies the guest's directories dirs below dest; what is missing is left out.
func (c Client) Get(ctx context.Context, dest string, dirs ...string) error {
	r, w := io.Pipe()
	defer r.Close()
	go func() {
		_, err := c.Run(ctx, Command{Argv: append([]string{"tar", "cf", "-", "--ignore-failed-read", "-C", "/"}, dirs...), Stdout: w})
		w.CloseWithError(err)
	}()
	root, err := os.OpenRoot(dest) // names come from the guest: they must not lead out
	if err != nil {
		return err
	}
	defer root.Close()
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, r)
			return err
		}
		if err != nil {
			return fmt.Errorf("copy from the guest: %w", err)
		}
		name := filepath.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = root.MkdirAll(name, 0o755)
		case tar.TypeReg:
			err = saveFile(root, name, t)
		}
		if err != nil {
			return fmt.Errorf("copy from the guest: %w", err)
		}
	}
}

func saveFile(root *os.Root, name string, r io.Reader) error {
	if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := root.Create(name)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
