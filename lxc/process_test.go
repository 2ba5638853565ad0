package lxc

import (
	"os/exec"
	"testing"
	"time"
)

// TestAwaitEnd: it comes back with the end of the process, with the closing of
// the descriptor, and not before.
func TestAwaitEnd(t *testing.T) {
	for _, closing := range []bool{false, true} {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pidfd, err := openPidfd(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		back := make(chan error, 1)
		go func() { back <- awaitEnd(pidfd) }()
		select {
		case err := <-back:
			t.Errorf("before the end: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		if closing {
			pidfd.Close()
		} else if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-back:
			if (err != nil) != closing {
				t.Errorf("closed %v: %v", closing, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("closed %v: it does not come back", closing)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		pidfd.Close()
	}
}
