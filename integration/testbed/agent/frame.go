// Package agent speaks with the test guest: a framed protocol over one TCP connection
// for each command, its server in the guest and its client on the host. It knows
// nothing of virtual machines, and nothing of what the commands mean.
package agent

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Frame kinds. A connection begins with one kindRequest from the client.
const (
	kindStdin   = iota // client to guest; empty means end of input
	kindStdout         // guest to client
	kindStderr         // guest to client
	kindExit           // guest to client, JSON exitStatus; the last frame
	kindResize         // client to guest, JSON size
	kindRequest        // client to guest, JSON request
	kindCount
)

// maxFrame bounds what a reader allocates for a peer it does not trust yet.
const maxFrame = 1 << 20

// ErrFrame is a frame that no correct peer sends.
var ErrFrame = errors.New("malformed frame")

type request struct {
	Argv  []string `json:",omitempty"`
	Env   []string `json:",omitempty"`
	Dir   string   `json:",omitempty"`
	Stdin bool     `json:",omitempty"`
	TTY   *size    `json:",omitempty"`
	Time  int64    `json:",omitempty"` // nanoseconds; with Seed instead of Argv: the guest has just been restored
	Seed  []byte   `json:",omitempty"`
}

type size struct{ Rows, Cols uint16 }

type exitStatus struct {
	Code  int
	Error string `json:",omitempty"` // why the command could not be run at all
}

func readFrame(r io.Reader) (byte, []byte, error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[1:])
	if h[0] >= kindCount || n > maxFrame {
		return 0, nil, fmt.Errorf("%w: kind %d, length %d", ErrFrame, h[0], n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return h[0], b, nil
}

// frameWriter makes frames of several goroutines follow one another whole.
type frameWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (f *frameWriter) send(kind byte, data []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for first := true; first || len(data) > 0; first = false {
		part := data[:min(len(data), maxFrame)]
		data = data[len(part):]
		b := make([]byte, 5, 5+len(part))
		b[0] = kind
		binary.BigEndian.PutUint32(b[1:], uint32(len(part)))
		if _, err := f.w.Write(append(b, part...)); err != nil {
			return err
		}
	}
	return nil
}

func (f *frameWriter) sendJSON(kind byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxFrame {
		return fmt.Errorf("request of %d bytes: the limit is %d", len(b), maxFrame)
	}
	return f.send(kind, b)
}
