package lxc

import (
	"context"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestChannelFiles: descriptors go with the message they were sent with, however
// the kernel cuts what was written into what is read.
func TestChannelFiles(t *testing.T) {
	plain, other := `{"ready":true}`, `{"executed":true}`
	for _, tt := range []struct {
		name   string
		writes []string // a "+" at its end sends a descriptor along
		want   []int    // descriptors of each message
	}{
		{"alone", []string{plain + "\n+"}, []int{1}},
		{"after one without", []string{plain + "\n", other + "\n+"}, []int{0, 1}},
		{"before one without", []string{plain + "\n+", other + "\n"}, []int{1, 0}},
		{"one each", []string{plain + "\n+", other + "\n+"}, []int{1, 1}},
		{"with the end of a message", []string{plain[:4], plain[4:] + "\n+"}, []int{1}},
		{"with the beginning of a message", []string{plain[:4] + "+", plain[4:] + "\n"}, []int{1}},
		{"behind one and a half", []string{plain + "\n" + other[:4], other[4:] + "\n+", plain + "\n"}, []int{0, 1, 0}},
		{"two at once", []string{plain + "\n" + other + "\n+"}, []int{0, 1}},
		{"two lots", []string{plain[:4] + "+", plain[4:] + "\n+"}, []int{2}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ours, theirs, err := socketpair()
			if err != nil {
				t.Fatal(err)
			}
			defer ours.close()
			c, err := net.FileConn(theirs)
			theirs.Close()
			if err != nil {
				t.Fatal(err)
			}
			conn := c.(*net.UnixConn)
			defer conn.Close()
			for _, w := range tt.writes {
				var rights []byte
				if last := len(w) - 1; w[last] == '+' {
					w, rights = w[:last], unix.UnixRights(int(os.Stdin.Fd()))
				}
				if _, _, err := conn.WriteMsgUnix([]byte(w), rights, nil); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			var got []int
			for range tt.want {
				m, err := ours.receive(ctx)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, len(m.files))
				m.close()
			}
			if fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("descriptors %v, want %v", got, tt.want)
			}
		})
	}
}
