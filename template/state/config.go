package state

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"io"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/containerd-pve/containerd-pve/snapshotter/zfs"
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
	propRecord = "containerd-pve:record" // and .1, .2…: with partSize of its text each
	maxParts   = 16
	partSize   = 8000 // a value has up to 8191 (ZAP_MAXVALUELEN)
	// maxRecord is more than any that fits, so that a snapshot made to harm makes no more of it.
	maxRecord = 8 << 20
)

func partOf(i int) string {
	if i == 0 {
		return propRecord
	}
	return propRecord + "." + strconv.Itoa(i)
}

// configProperties are those that decode reads.
func configProperties() []string {
	all := []string{propImage}
	for i := range maxParts {
		all = append(all, partOf(i))
	}
	return all
}

// encode makes properties of it. Errors: InvalidArgument, it is too long.
func (c Config) encode() (zfs.Properties, error) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(c.Record); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	text := base64.StdEncoding.EncodeToString(b.Bytes())
	if len(text) > maxParts*partSize || len(c.Record) > maxRecord {
		return nil, fmt.Errorf("a configuration of %d bytes is too long to be kept with a snapshot: %w", len(c.Record), errdefs.ErrInvalidArgument)
	}
	p := zfs.Properties{propImage: c.Image}
	for i := 0; text != ""; i++ {
		n := min(partSize, len(text))
		p[partOf(i)], text = text[:n], text[n:]
	}
	return p, nil
}

// decode is what encode made properties of; nil if a snapshot has none. Errors: DataLoss.
func decode(p zfs.Properties) (*Config, error) {
	if p[propRecord] == "" {
		return nil, nil
	}
	var text string
	for i := range maxParts {
		text += p[partOf(i)]
	}
	c := &Config{Image: p[propImage]}
	compressed, err := base64.StdEncoding.DecodeString(text)
	if err == nil {
		var r *gzip.Reader
		if r, err = gzip.NewReader(bytes.NewReader(compressed)); err == nil {
			c.Record, err = io.ReadAll(io.LimitReader(r, maxRecord))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the configuration kept with it cannot be read: %w: %w", err, errdefs.ErrDataLoss)
	}
	return c, nil
}
