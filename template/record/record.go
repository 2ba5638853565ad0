// Package record keeps a document of any kind with a dataset: compressed, in as
// many user properties as it takes. It owns how it is written there, and asks nothing of ZFS.
package record

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

const (
	maxParts = 16
	partSize = 8000 // a value has up to 8191 bytes (ZAP_MAXVALUELEN)
	// MaxSize is more than any document that fits, so that one made to harm makes no more of itself.
	MaxSize = 8 << 20
)

func part(name string, i int) string {
	if i == 0 {
		return name
	}
	return name + "." + strconv.Itoa(i)
}

// Properties are the names of those that a document may be in, of which name is the first.
func Properties(name string) []string {
	var all []string
	for i := range maxParts {
		all = append(all, part(name, i))
	}
	return all
}

// Encode makes properties of a document. Errors: InvalidArgument, it is too long.
func Encode(name string, document []byte) (zfs.Properties, error) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(document); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	text := base64.StdEncoding.EncodeToString(b.Bytes())
	if len(text) > maxParts*partSize || len(document) > MaxSize {
		return nil, fmt.Errorf("a document of %d bytes is too long to be kept with a dataset: %w", len(document), errdefs.ErrInvalidArgument)
	}
	p := zfs.Properties{}
	for i := 0; text != ""; i++ {
		n := min(partSize, len(text))
		p[part(name, i)], text = text[:n], text[n:]
	}
	return p, nil
}

// Decode is what Encode made properties of. Errors: NotFound, there is none; DataLoss.
func Decode(name string, own zfs.Properties) ([]byte, error) {
	if own[name] == "" {
		return nil, fmt.Errorf("no %s is kept: %w", name, errdefs.ErrNotFound)
	}
	var text string
	for i := range maxParts {
		text += own[part(name, i)]
	}
	var document []byte
	compressed, err := base64.StdEncoding.DecodeString(text)
	if err == nil {
		var r *gzip.Reader
		if r, err = gzip.NewReader(bytes.NewReader(compressed)); err == nil {
			document, err = io.ReadAll(io.LimitReader(r, MaxSize))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the %s that is kept cannot be read: %w: %w", name, err, errdefs.ErrDataLoss)
	}
	return document, nil
}
