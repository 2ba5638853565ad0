package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func main() {
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: pmxcfs NODE=DIR...\nShows a cluster of these nodes at these directories until SIGTERM. SIGUSR1 takes its quorum, SIGUSR2 gives it back.")
	}
	flag.Parse()
	if err := run(flag.Args()); err != nil {
		log.Fatal(err)
	}
}

func run(args []string) error {
	dirs := map[string]string{}
	var names []string
	for _, a := range args {
		name, dir, ok := strings.Cut(a, "=")
		if !ok || name == "" || dir == "" {
			return fmt.Errorf("%q is not NODE=DIR", a)
		}
		dirs[name] = dir
		names = append(names, name)
	}
	if len(names) == 0 {
		flag.Usage()
		os.Exit(2)
	}
	c := newCluster(names)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGUSR1, unix.SIGUSR2)
	var servers []*fuse.Server
	defer func() {
		for _, s := range servers {
			if err := s.Unmount(); err != nil {
				log.Print(err)
			}
		}
	}()
	for _, name := range names {
		s, err := mount(c, name, dirs[name])
		if err != nil {
			return fmt.Errorf("mounting %s: %w", dirs[name], err)
		}
		servers = append(servers, s)
	}
	fmt.Println("mounted")
	for s := range signals {
		switch s {
		case unix.SIGUSR1, unix.SIGUSR2:
			c.setQuorum(s == unix.SIGUSR2)
		default:
			return nil
		}
	}
	return nil
}
