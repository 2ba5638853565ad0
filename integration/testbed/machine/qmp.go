package machine

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"time"
)

// qmp is a connection to QEMU's monitor.
type qmp struct {
	conn net.Conn
	dec  *json.Decoder
}

type qmpReply struct {
	Event  string          `json:"event"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
}

func (m *Machine) monitor(ctx context.Context) (*qmp, error) {
	dir, err := os.Open(m.opts.Dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	name := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), qmpName) // a socket's name may have 108 bytes, a directory's more
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", name)
		if err == nil {
			q := &qmp{conn: conn, dec: json.NewDecoder(conn)}
			var greeting json.RawMessage
			if err = q.dec.Decode(&greeting); err == nil {
				_, err = q.call("qmp_capabilities", nil)
			}
			if err != nil {
				conn.Close()
				return nil, fmt.Errorf("QEMU's monitor: %w", err)
			}
			return q, nil
		}
		select {
		case <-m.dead:
			return nil, fmt.Errorf("QEMU ended: %s", m.log())
		case <-ctx.Done():
			return nil, fmt.Errorf("QEMU's monitor: %w", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (q *qmp) call(command string, arguments any) (json.RawMessage, error) {
	c := map[string]any{"execute": command}
	if arguments != nil {
		c["arguments"] = arguments
	}
	if err := json.NewEncoder(q.conn).Encode(c); err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	for {
		var r qmpReply
		if err := q.dec.Decode(&r); err != nil {
			return nil, fmt.Errorf("%s: %w", command, err)
		}
		if r.Error != nil {
			return nil, fmt.Errorf("%s: %s", command, r.Error.Desc)
		}
		if r.Return != nil { // else an event
			return r.Return, nil
		}
	}
}

// event reads on until there is one of that name.
func (q *qmp) event(ctx context.Context, name string) error {
	stop := context.AfterFunc(ctx, func() { q.conn.Close() })
	defer stop()
	for {
		var r qmpReply
		if err := q.dec.Decode(&r); err != nil {
			return fmt.Errorf("waiting for %s: %w", name, err)
		}
		if r.Event == name {
			return nil
		}
	}
}

// status asks a query command until done says so.
func (q *qmp) status(ctx context.Context, query string, done func(status string) (bool, error)) error {
	for {
		b, err := q.call(query, nil)
		if err != nil {
			return err
		}
		var s struct{ Status string }
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		if ok, err := done(s.Status); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

var ignoreShared = map[string]any{"capabilities": []any{map[string]any{"capability": "x-ignore-shared", "state": true}}}

// save stops the guest, writes the state of its devices (its memory is a file already) and ends QEMU.
func (q *qmp) save(ctx context.Context, file string) error {
	if _, err := q.call("stop", nil); err != nil {
		return err
	}
	if _, err := q.call("migrate-set-capabilities", ignoreShared); err != nil {
		return err
	}
	if _, err := q.call("migrate", map[string]any{"uri": "file:" + file}); err != nil {
		return err
	}
	err := q.status(ctx, "query-migrate", func(s string) (bool, error) {
		if s == "failed" || s == "cancelled" {
			return false, fmt.Errorf("save the guest's state: %s", s)
		}
		return s == "completed", nil
	})
	if err != nil {
		return err
	}
	_, err = q.call("quit", nil)
	return err
}

func (q *qmp) restore(ctx context.Context, file string) error {
	if _, err := q.call("migrate-set-capabilities", ignoreShared); err != nil {
		return err
	}
	if _, err := q.call("migrate-incoming", map[string]any{"uri": "file:" + file}); err != nil {
		return err
	}
	err := q.status(ctx, "query-status", func(s string) (bool, error) { return s != "inmigrate", nil })
	if err != nil {
		return err
	}
	_, err = q.call("cont", nil)
	return err
}
