package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/net/websocket"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Channels of a stream, the first byte of each message (remotecommand's protocol v4.channel.k8s.io).
const (
	ChannelStdin = iota
	ChannelStdout
	ChannelStderr
	ChannelError
	ChannelResize
)

// Stream is an exec, an attach or a forwarded port over a WebSocket, as kubectl has it, for a minute.
type Stream struct{ conn *websocket.Conn }

// ExecStream begins a streaming exec.
func (c *Container) ExecStream(ctx context.Context, tty bool, args ...string) (*Stream, error) {
	answer, err := c.pod.node.Exec(ctx, &api.ExecRequest{ContainerId: c.ID, Cmd: args, Stdin: true, Stdout: true, Stderr: !tty, Tty: tty})
	if err != nil {
		return nil, err
	}
	return dial(ctx, answer.Url)
}

// Attach begins a stream of the container's own stdio.
func (c *Container) Attach(ctx context.Context) (*Stream, error) {
	answer, err := c.pod.node.Attach(ctx, &api.AttachRequest{ContainerId: c.ID, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		return nil, err
	}
	return dial(ctx, answer.Url)
}

// PortForward begins a stream to a port of the pod: data is on channel 0 in both directions, errors on 1.
func (p *Pod) PortForward(ctx context.Context, port int) (*Stream, error) {
	answer, err := p.node.PortForward(ctx, &api.PortForwardRequest{PodSandboxId: p.ID, Port: []int32{int32(port)}})
	if err != nil {
		return nil, err
	}
	return dial(ctx, fmt.Sprintf("%s?port=%d", answer.Url, port))
}

func dial(ctx context.Context, url string) (*Stream, error) {
	config, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), "http://localhost")
	if err != nil {
		return nil, err
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	conn, err := config.DialContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &Stream{conn}, nil
}

// Send writes to a channel.
func (s *Stream) Send(channel byte, data string) error {
	return websocket.Message.Send(s.conn, append([]byte{channel}, data...))
}

// Until reads until what has come on the channel holds want, or to the end if want is empty, and answers it.
func (s *Stream) Until(channel byte, want string) (string, error) {
	var got strings.Builder
	for {
		var m []byte
		err := websocket.Message.Receive(s.conn, &m)
		if errors.Is(err, io.EOF) && want == "" {
			return got.String(), nil
		}
		if err != nil {
			return got.String(), err
		}
		if len(m) > 0 && m[0] == channel {
			got.Write(m[1:])
		}
		if want != "" && strings.Contains(got.String(), want) {
			return got.String(), nil
		}
	}
}

// Close ends the stream.
func (s *Stream) Close() error { return s.conn.Close() }
