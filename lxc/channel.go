package lxc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
)

// channel is the shim's end of a sync socket (see package plan).
type channel struct {
	conn *net.UnixConn
	rest []byte
	// files came with the last bytes of rest: the kernel may put a message without
	// any before the one that has them, and never one behind it.
	files []*os.File
}

// message is an event with what came along with it.
type message struct {
	plan.Event
	pid   int // the sender's, in our pid namespace
	files []*os.File
}

func (m *message) close() {
	for _, f := range m.files {
		f.Close()
	}
}

// socketpair returns our end and the child's.
func socketpair() (*channel, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	child := os.NewFile(uintptr(fds[1]), "sync")
	c, err := newChannel(os.NewFile(uintptr(fds[0]), "sync"))
	if err != nil {
		child.Close()
		return nil, nil, err
	}
	return c, child, nil
}

// newChannel takes the file over. The kernel tells the sender's pid with each
// message: inside its own pid namespace a process cannot.
func newChannel(f *os.File) (*channel, error) {
	defer f.Close()
	if err := unix.SetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return nil, fmt.Errorf("SO_PASSCRED: %w", err)
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return &channel{conn: conn.(*net.UnixConn)}, nil
}

func (c *channel) close() error {
	for _, f := range c.files {
		f.Close()
	}
	c.files = nil
	return c.conn.Close()
}

// bound makes the context end blocking calls on the socket.
func (c *channel) bound(ctx context.Context) (release func() bool) {
	return context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
}

// filesAtOnce is how many descriptors go with one message, below the kernel's 253.
const filesAtOnce = 250

// send writes one message, with files if it has to take them along.
func (c *channel) send(ctx context.Context, v any, files ...*os.File) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	data = append(data, '\n')
	defer c.bound(ctx)()
	for len(files) > 0 {
		lot := files[:min(len(files), filesAtOnce)]
		fds := make([]int, len(lot))
		for i, f := range lot {
			fds[i] = int(f.Fd())
		}
		// A byte of the message carries them: there is one for every file.
		n, _, err := c.conn.WriteMsgUnix(data[:1], unix.UnixRights(fds...), nil)
		if err != nil {
			return errors.Join(err, ctx.Err())
		}
		data, files = data[n:], files[len(lot):]
	}
	if _, err := c.conn.Write(data); err != nil {
		return errors.Join(err, ctx.Err())
	}
	return nil
}

// receive returns the next event, or io.EOF.
func (c *channel) receive(ctx context.Context) (_ *message, retErr error) {
	defer c.bound(ctx)()
	m := &message{}
	defer func() {
		if retErr != nil {
			m.close()
		}
	}()
	buf := make([]byte, 64<<10)
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*4))
	for {
		if line, rest, ok := bytes.Cut(c.rest, []byte("\n")); ok {
			c.rest = rest
			if len(rest) == 0 {
				m.files, c.files = c.files, nil
			}
			if err := json.Unmarshal(line, &m.Event); err != nil {
				return nil, fmt.Errorf("message of pve-init: %w", err)
			}
			return m, nil
		}
		if len(c.rest) > 1<<20 {
			return nil, errors.New("message of pve-init: longer than 1 MiB")
		}
		n, oobn, _, _, err := c.conn.ReadMsgUnix(buf, oob)
		if oobn > 0 {
			if err := m.ancillary(oob[:oobn]); err != nil {
				return nil, err
			}
			c.files, m.files = append(c.files, m.files...), nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("waiting for pve-init: %w", ctx.Err())
		}
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || err == nil && n == 0 {
			return nil, io.EOF
		}
		if err != nil {
			return nil, err
		}
		c.rest = append(c.rest, buf[:n]...)
	}
}

func (m *message) ancillary(oob []byte) error {
	controls, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	for _, control := range controls {
		switch control.Header.Type {
		case unix.SCM_RIGHTS:
			fds, err := unix.ParseUnixRights(&control)
			if err != nil {
				return err
			}
			for _, fd := range fds {
				m.files = append(m.files, os.NewFile(uintptr(fd), "from pve-init"))
			}
		case unix.SCM_CREDENTIALS:
			cred, err := unix.ParseUnixCredentials(&control)
			if err != nil {
				return err
			}
			if cred.Pid != 0 {
				m.pid = int(cred.Pid)
			}
		}
	}
	return nil
}
