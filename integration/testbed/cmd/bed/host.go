package main

import (
	"context"
	"errors"
)

func (b *bed) testOnHost(ctx context.Context, p *testPackage, programs []string) (bool, error) {
	return false, errors.ErrUnsupported
}
