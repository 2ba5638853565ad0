package state

import (
	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
	"github.com/containerd-pve/containerd-pve/template/record"
)

// Config is what containerd knows of a container.
type Config struct {
	// Image is its reference with its digest.
	Image string
	// Record is containerd's own message (containers/v1, Container).
	Record []byte
}

const (
	propImage  = "containerd-pve:image"
	propRecord = "containerd-pve:record"
)

// configProperties are those that decode reads.
func configProperties() []string { return append(record.Properties(propRecord), propImage) }

// encode makes properties of it. Errors: InvalidArgument, it is too long.
func (c Config) encode() (zfs.Properties, error) {
	p, err := record.Encode(propRecord, c.Record)
	if err != nil {
		return nil, err
	}
	p[propImage] = c.Image
	return p, nil
}

// decode is what encode made properties of; nil if a snapshot has none. Errors: DataLoss.
func decode(p zfs.Properties) (*Config, error) {
	text, err := record.Decode(propRecord, p)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &Config{Image: p[propImage], Record: text}, nil
}
