package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/containerd-pve/containerd-pve/lxc/pve"
)

// Service is the name of the registry among the services of a ttrpc server. A
// message is JSON in a google.protobuf.BytesValue: it has one caller, the shim of the same release.
const Service = "containerd_pve.registry.v1.Registry"

type registerRequest struct {
	VMID      int           `json:"vmid"`
	Container pve.Container `json:"container"`
	Disk      Disk          `json:"disk"`
}

type updateRequest struct {
	Namespace string     `json:"namespace"`
	ID        string     `json:"id"`
	Limits    pve.Limits `json:"limits"`
	Parts     pve.Parts  `json:"parts"`
}

// Address is the daemon's socket, if nobody configured another.
const Address = "/run/containerd-pve/registry.sock"

const (
	// callLimit is how long a call waits for the cluster's filesystem, which may be stuck.
	// Proxmox's tools wait 10 s for the lock of a conf alone.
	callLimit = 30 * time.Second
	// answerLimit is how long the shim waits for the daemon, which has to give up first.
	answerLimit = callLimit + 5*time.Second
)

// Serve offers a registry on a ttrpc server.
func Serve(server *ttrpc.Server, r *Registry) {
	server.RegisterService(Service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Register": method(func(ctx context.Context, q registerRequest) (Registered, error) {
			return r.Register(ctx, q.VMID, q.Container, q.Disk)
		}),
		"Update": method(func(ctx context.Context, q updateRequest) (struct{}, error) {
			return struct{}{}, r.Update(ctx, q.Namespace, q.ID, q.Limits, q.Parts)
		}),
	}})
}

func method[Request, Response any](f func(context.Context, Request) (Response, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var in wrapperspb.BytesValue
		if err := unmarshal(&in); err != nil {
			return nil, err
		}
		var q Request
		if err := json.Unmarshal(in.Value, &q); err != nil {
			return nil, errgrpc.ToGRPC(fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument))
		}
		ctx, cancel := context.WithTimeout(ctx, callLimit)
		defer cancel()
		a, err := answer(ctx, func() (Response, error) { return f(ctx, q) })
		if err != nil {
			s := status.Convert(errgrpc.ToGRPC(err)) // one line, as the shim answers it
			return nil, status.Error(s.Code(), s.Message())
		}
		text, err := json.Marshal(a)
		if err != nil {
			return nil, err
		}
		return wrapperspb.Bytes(text), nil
	}
}

// answer is f's, or that the time is over: what hangs in the cluster's filesystem
// cannot be ended. f goes on, and takes back what it did.
func answer[Response any](ctx context.Context, f func() (Response, error)) (Response, error) {
	type result struct {
		a   Response
		err error
	}
	done := make(chan result, 1)
	go func() {
		a, err := f()
		done <- result{a, err}
	}()
	select {
	case r := <-done:
		return r.a, r.err
	case <-ctx.Done():
		var none Response
		return none, fmt.Errorf("the cluster filesystem of Proxmox did not answer in time (`systemctl status pve-cluster`): %w", errdefs.ErrUnavailable)
	}
}

// Client asks the registry of the node's daemon.
type Client struct{ address string }

// NewClient is for the daemon's socket; it is met with each call, of which a
// container has few.
func NewClient(address string) *Client { return &Client{address: address} }

// Register is Registry.Register. Errors besides: Unavailable, no daemon answers.
func (c *Client) Register(ctx context.Context, want int, container pve.Container, disk Disk) (a Registered, err error) {
	err = c.call(ctx, "Register", registerRequest{want, container, disk}, &a)
	return a, err
}

// Update is Registry.Update. Errors besides: Unavailable, no daemon answers.
func (c *Client) Update(ctx context.Context, namespace, id string, limits pve.Limits, parts pve.Parts) error {
	return c.call(ctx, "Update", updateRequest{namespace, id, limits, parts}, &struct{}{})
}

func (c *Client) call(ctx context.Context, name string, q, a any) error {
	text, err := json.Marshal(q)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.address)
	if err != nil {
		return fmt.Errorf("the daemon does not answer (`systemctl start containerd-pve`): %w: %w", err, errdefs.ErrUnavailable)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	var out wrapperspb.BytesValue
	if err := client.Call(ctx, Service, name, wrapperspb.Bytes(text), &out); err != nil {
		return errgrpc.ToNative(err)
	}
	return json.Unmarshal(out.Value, a)
}
