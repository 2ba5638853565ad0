package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestFrameRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 1000, maxFrame, maxFrame + 1, 2*maxFrame + 7} {
		var b bytes.Buffer
		want := bytes.Repeat([]byte("x"), n)
		if err := (&frameWriter{w: &b}).send(kindStdout, want); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for b.Len() > 0 {
			kind, data, err := readFrame(&b)
			if err != nil || kind != kindStdout {
				t.Fatalf("n=%d: kind %d, %v", n, kind, err)
			}
			got = append(got, data...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("n=%d: %d bytes came back", n, len(got))
		}
	}
}

func TestFrameRefused(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want error
	}{
		"empty":        {"", io.EOF},
		"short header": {"\x00\x00", io.ErrUnexpectedEOF},
		"short data":   {"\x01\x00\x00\x00\x05abc", io.ErrUnexpectedEOF},
		"no data":      {"\x01\x00\x00\x00\x05", io.ErrUnexpectedEOF},
		"kind":         {"\x77\x00\x00\x00\x00", ErrFrame},
		"length":       {"\x01\xff\xff\xff\xff", ErrFrame},
	} {
		if _, _, err := readFrame(strings.NewReader(c.in)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x00\x03abc"))
	f.Add([]byte("\x05\x00\x00\x00\x02{}"))
	f.Add([]byte("\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		for {
			kind, data, err := readFrame(r)
			if err != nil {
				return
			}
			var b bytes.Buffer
			if err := (&frameWriter{w: &b}).send(kind, data); err != nil {
				t.Fatal(err)
			}
			k, d, err := readFrame(&b)
			if err != nil || k != kind || !bytes.Equal(d, data) {
				t.Fatalf("%d %q became %d %q, %v", kind, data, k, d, err)
			}
		}
	})
}

func server(t *testing.T) Client {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); handle(c) }()
		}
	}()
	return Client{Addr: l.Addr().String()}
}

func TestRun(t *testing.T) {
	c := server(t)
	for _, tc := range []struct {
		name, script, stdin, stdout, stderr string
		code                                int
		tty                                 bool
	}{
		{name: "outputs apart", script: "echo a; echo b >&2; exit 3", stdout: "a\n", stderr: "b\n", code: 3},
		{name: "signal", script: "kill -9 $$", code: 137},
		{name: "stdin", script: "cat; exit 0", stdin: "hello", stdout: "hello"},
		{name: "daemon keeps stdout", script: "sleep 30 & echo started", stdout: "started\n"},
		{name: "terminal", script: "stty size; test -t 0", stdout: "24 80\r\n", tty: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out, errs strings.Builder
			cmd := Command{Argv: []string{"sh", "-c", tc.script}, Stdout: &out, Stderr: &errs, TTY: tc.tty, Rows: 24, Cols: 80}
			if tc.stdin != "" {
				cmd.Stdin = strings.NewReader(tc.stdin)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			code, err := c.Run(ctx, cmd)
			if err != nil {
				t.Fatal(err)
			}
			if code != tc.code || out.String() != tc.stdout || errs.String() != tc.stderr {
				t.Errorf("status %d, stdout %q, stderr %q", code, out.String(), errs.String())
			}
		})
	}
}

func TestRunLargeOutputArrivesWhole(t *testing.T) {
	var n countingWriter
	code, err := server(t).Run(t.Context(), Command{Argv: []string{"head", "-c", "50000000", "/dev/zero"}, Stdout: &n})
	if err != nil || code != 0 || n != 50000000 {
		t.Errorf("%d bytes, status %d, %v", n, code, err)
	}
}

type countingWriter int

func (c *countingWriter) Write(b []byte) (int, error) {
	*c += countingWriter(len(b))
	return len(b), nil
}

func TestNotRun(t *testing.T) {
	if _, err := server(t).Run(t.Context(), Command{Argv: []string{"/does/not/exist"}}); !errors.Is(err, ErrNotRun) {
		t.Error(err)
	}
}

func TestClientGoneEndsCommand(t *testing.T) {
	mark := filepath.Join(t.TempDir(), "mark")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := server(t).Run(ctx, Command{Argv: []string{"sh", "-c", "sleep 1; touch " + mark}})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	time.Sleep(time.Second)
	if _, err := os.Stat(mark); err == nil {
		t.Error("the command went on after its client had gone")
	}
}

func TestPutGet(t *testing.T) {
	c, src, dst, back := server(t), t.TempDir(), t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(src, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "d", "f"), []byte("text"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := c.Put(t.Context(), map[string]string{dst + "/tree": src}); err != nil {
		t.Fatal(err)
	}
	if err := c.Get(t.Context(), back, strings.TrimPrefix(dst, "/"), "no/such"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(back, dst, "tree", "d", "f"))
	if err != nil || string(b) != "text" {
		t.Errorf("%q, %v", b, err)
	}
	if err := c.Put(t.Context(), map[string]string{dst: "/does/not/exist"}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
