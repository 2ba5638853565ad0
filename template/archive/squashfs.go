package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// unpacker makes a tar of a squashfs. No library in Go was found that keeps all of one
// (attributes, device numbers, set-user-id), and the kernel's own code is nothing to give an
// untrusted file to.
const unpacker = "sqfs2tar"

// squashfsTar runs it: as nobody, with leave to read the file and for nothing else. Close
// waits for its end. Errors: FailedPrecondition, it is not installed.
func squashfsTar(ctx context.Context, f *os.File) (io.ReadCloser, error) {
	program, err := exec.LookPath(unpacker)
	if err != nil {
		return nil, fmt.Errorf("it is a squashfs, which needs %s: `apt-get install squashfs-tools-ng`: %w", unpacker, errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, program, "--no-skip", "--root-becomes", ".", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = []string{"LC_ALL=C"}
	if os.Geteuid() == 0 {
		const nobody = 65534
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: nobody, Gid: nobody},
			AmbientCaps: []uintptr{unix.CAP_DAC_READ_SEARCH}, // the file may be root's alone
			Cloneflags:  syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
			Pdeathsig:   syscall.SIGKILL,
		}
	}
	p := &process{cmd: cmd, cancel: cancel}
	cmd.Stderr = &p.stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		p.out = out
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	return p, nil
}

// process is read to its end, at which it must have succeeded.
type process struct {
	cmd    *exec.Cmd
	cancel func()
	out    io.Reader
	stderr bytes.Buffer
	waited bool
}

func (p *process) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if errors.Is(err, io.EOF) && !p.waited {
		p.waited = true
		if werr := p.cmd.Wait(); werr != nil {
			err = fmt.Errorf("%s: %w: %s: %w", unpacker, werr, strings.TrimSpace(p.stderr.String()), errdefs.ErrInvalidArgument)
		}
	}
	return n, err
}

// Close ends it.
func (p *process) Close() error {
	p.cancel()
	if !p.waited {
		p.waited = true
		_ = p.cmd.Wait() // it was killed
	}
	return nil
}
