// Package rpc makes methods of a ttrpc service of functions. It owns how their errors travel and knows no service.
package rpc

import (
	"context"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	grpcstatus "google.golang.org/grpc/status"
)

// Method is f as a method. Errors of errdefs keep their kind on the wire.
func Method[Request, Response any](f func(context.Context, *Request) (*Response, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var r Request
		if err := unmarshal(&r); err != nil {
			return nil, err
		}
		response, err := f(ctx, &r)
		if err != nil {
			// What else it wraps would be lines of its own in the client's message.
			s := grpcstatus.Convert(errgrpc.ToGRPC(err))
			return nil, grpcstatus.Error(s.Code(), s.Message())
		}
		return response, nil
	}
}
