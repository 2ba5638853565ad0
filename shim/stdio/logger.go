package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const (
	loggerReady = 10 * time.Second
	loggerGrace = 10 * time.Second
)

// logger is a program that takes the output (containerd's docs, "runtime v2",
// binary logging): stdout on fd 3, stderr on fd 4; it closes fd 5 when ready.
type logger struct {
	cmd            *exec.Cmd
	stdout, stderr *os.File // our ends, which become the process's
	ended          chan struct{}
}

// arguments are the query's keys and values, in the order of the keys.
func arguments(u *url.URL) (args []string) {
	query := u.Query()
	keys := make([]string, 0, len(query))
	for k := range query {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		args = append(args, k)
		if v := query.Get(k); v != "" {
			args = append(args, v)
		}
	}
	return args
}

func startLogger(ctx context.Context, c Config, u *url.URL) (_ *logger, retErr error) {
	var files []*os.File
	pipe := func() (r, w *os.File, err error) {
		if r, w, err = os.Pipe(); err == nil {
			files = append(files, r, w)
		}
		return r, w, err
	}
	defer func() {
		if retErr != nil {
			for _, f := range files {
				f.Close()
			}
		}
	}()
	outR, outW, err := pipe()
	if err != nil {
		return nil, err
	}
	errR, errW, err := pipe()
	if err != nil {
		return nil, err
	}
	readyR, readyW, err := pipe()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(u.Path, arguments(u)...)
	cmd.Env = []string{"CONTAINER_ID=" + c.ID, "CONTAINER_NAMESPACE=" + c.Namespace}
	cmd.ExtraFiles = []*os.File{outR, errR, readyW}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("logging program: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	l := &logger{cmd: cmd, stdout: outW, stderr: errW, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(l.ended)
	}()
	defer func() {
		if retErr != nil {
			_ = cmd.Process.Kill()
			<-l.ended
		}
	}()
	outR.Close()
	errR.Close()
	readyW.Close()
	if err := readyR.SetReadDeadline(time.Now().Add(loggerReady)); err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = readyR.SetReadDeadline(time.Unix(1, 0)) })()
	n, err := readyR.Read(make([]byte, 1))
	readyR.Close()
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return nil, fmt.Errorf("logging program %s is not ready: %w: %w", u.Path, err, errdefs.ErrUnavailable)
	case u.Scheme == "binary-v2" && n == 0:
		return nil, fmt.Errorf("logging program %s ended without being ready: %w", u.Path, errdefs.ErrUnavailable)
	}
	return l, nil
}

// stop lets the program take what is left in its pipes and end by itself.
func (l *logger) stop() {
	l.stdout.Close()
	l.stderr.Close()
	for _, sig := range []unix.Signal{0, unix.SIGTERM, unix.SIGKILL} {
		grace := loggerGrace
		if sig != 0 {
			log.L.Warnf("logging program %s does not end: signal %d", l.cmd.Path, int(sig))
			_ = l.cmd.Process.Signal(sig)
			grace = 2 * time.Second
		}
		select {
		case <-l.ended:
			return
		case <-time.After(grace):
		}
	}
}
