package main

import (
	"bytes"
	"encoding/json"

	"github.com/containerd-pve/containerd-pve/lxc/plan"
	"golang.org/x/sys/unix"
)

// socket is pve-init's end of a sync socket: one JSON value a line.
type socket struct {
	fd  int
	buf []byte
	// files came along with what was read.
	files []int
}

// receiveFiles is receive with the descriptors that came along, in their order.
func (s *socket) receiveFiles(v any) (files []int, open bool, err error) {
	open, err = s.receive(v)
	files, s.files = s.files, nil
	return files, open, err
}

// read is read(2) that keeps descriptors.
func (s *socket) read(chunk []byte) (int, error) {
	// The kernel passes 253 at once at the most, and never two lots in one read.
	const most = 253
	rights := make([]byte, unix.CmsgSpace(4*most))
	n, rightsLen, _, _, err := unix.Recvmsg(s.fd, chunk, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil || rightsLen == 0 {
		return n, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:rightsLen])
	if err != nil {
		return 0, err
	}
	for i := range messages {
		if messages[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return 0, err
		}
		s.files = append(s.files, fds...)
	}
	return n, nil
}

// receive reads the next message into v; false means that the other end is closed.
func (s *socket) receive(v any) (bool, error) {
	chunk := make([]byte, 64<<10)
	for seen := 0; ; {
		if i := bytes.IndexByte(s.buf[seen:], '\n'); i >= 0 {
			line := s.buf[:seen+i]
			s.buf = s.buf[seen+i+1:]
			return true, json.Unmarshal(line, v)
		}
		seen = len(s.buf)
		n, err := s.read(chunk)
		switch {
		case err == unix.EINTR:
		case err == unix.ECONNRESET || (err == nil && n == 0):
			return false, nil
		case err != nil:
			return false, err
		default:
			s.buf = append(s.buf, chunk[:n]...)
		}
	}
}

// send writes one event, with descriptors.
func (s *socket) send(e plan.Event, pass ...int) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	var rights []byte
	if len(pass) > 0 {
		rights = unix.UnixRights(pass...)
	}
	for len(line) > 0 {
		n, err := unix.SendmsgN(s.fd, line, rights, nil, unix.MSG_NOSIGNAL)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		line, rights = line[n:], nil
	}
	return nil
}

// ready reports that the process is ready, with the terminal's master if it is
// not negative. The container's init hands over a new socket as well and goes on
// with that: lxc-start holds the first one as long as it lives, so that its end
// would say nothing about the execve.
func (s *socket) ready(master int, renew bool) error {
	var pass []int
	if master >= 0 {
		pass = append(pass, master)
	}
	if !renew {
		return s.send(plan.Event{Ready: true}, pass...)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fds[0])
	if err := s.send(plan.Event{Ready: true}, append(pass, fds[0])...); err != nil {
		unix.Close(fds[1])
		return err
	}
	unix.Close(s.fd)
	s.fd, s.buf = fds[1], nil
	return nil
}
