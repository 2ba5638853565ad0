// Package dhcp gets an IPv4 address for an interface in a network namespace and
// keeps it. It owns the address, the default route it sets, and a socket in that namespace,
// which keeps it alive; it starts no process.
package dhcp

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// tryTime is how long an answer is waited for, tries how often.
	tryTime = 3 * time.Second
	tries   = 5
	// retryTime is how long it takes to ask again a server that did not answer.
	retryTime = 30 * time.Second
	// forever is a lease without an end (RFC 2131, 3.3).
	forever = 1<<32 - 1
)

// Client keeps the lease of one interface.
type Client struct {
	name   string
	client *nclient4.Client
	handle *netlink.Handle
	link   netlink.Link
	lease  *nclient4.Lease
	stop   context.CancelFunc
	done   chan struct{}
}

// Start gets an address for the interface called name in the namespace of the
// file ns, and sets it, until Close. Errors: FailedPrecondition, no server answers.
func Start(ctx context.Context, ns, name string) (*Client, error) {
	fail := func(err error) (*Client, error) { return nil, fmt.Errorf("an address for %s by DHCP: %w", name, err) }
	c, err := open(ns, name)
	if err != nil {
		return fail(err)
	}
	if c.lease, err = c.client.Request(ctx); err != nil {
		c.close()
		if ctx.Err() != nil {
			return fail(ctx.Err())
		}
		return fail(fmt.Errorf("no server of its bridge answers: %w: %w", err, errdefs.ErrFailedPrecondition))
	}
	if err := c.apply(); err != nil {
		c.close()
		return fail(err)
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	c.stop, c.done = stop, make(chan struct{})
	go c.keep(background)
	return c, nil
}

// open makes the sockets, by a thread that enters the namespace and is thrown away.
func open(ns, name string) (c *Client, err error) {
	f, err := os.Open(ns)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c = &Client{name: name}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		done <- func() error {
			if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("entering the network namespace: %w", err)
			}
			if c.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
				return err
			}
			if c.link, err = c.handle.LinkByName(name); err != nil {
				return err
			}
			c.client, err = nclient4.New(name, nclient4.WithTimeout(tryTime), nclient4.WithRetry(tries))
			return err
		}()
	}()
	if err := <-done; err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *Client) close() {
	if c.client != nil {
		_ = c.client.Close()
	}
	if c.handle != nil {
		c.handle.Close()
	}
}

// Nameservers are those that the server told.
func (c *Client) Nameservers() []net.IP { return c.lease.ACK.DNS() }

// Domain is the one that the server told; it may be empty.
func (c *Client) Domain() string { return c.lease.ACK.DomainName() }

// seconds is how long the lease lasts.
func (c *Client) seconds() uint32 {
	return uint32(c.lease.ACK.IPAddressLeaseTime(time.Hour) / time.Second)
}

// apply sets what the server told; the kernel takes the address away when the lease is over.
func (c *Client) apply() error {
	ack := c.lease.ACK
	mask := ack.SubnetMask()
	if mask == nil {
		mask = ack.YourIPAddr.DefaultMask()
	}
	lifetime := int(c.seconds())
	if c.seconds() == forever {
		lifetime = 0 // for netlink
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: ack.YourIPAddr, Mask: mask}, ValidLft: lifetime, PreferedLft: lifetime}
	if err := c.handle.AddrReplace(c.link, address); err != nil {
		return fmt.Errorf("setting %s: %w", address.IPNet, err)
	}
	if routers := ack.Router(); len(routers) > 0 {
		route := &netlink.Route{LinkIndex: c.link.Attrs().Index, Gw: routers[0], Src: ack.YourIPAddr}
		if err := c.handle.RouteReplace(route); err != nil {
			return fmt.Errorf("the route by %s: %w", routers[0], err)
		}
	}
	return nil
}

// keep renews the lease at half of its time (RFC 2131, 4.4.5), and asks for
// another once it is over.
func (c *Client) keep(ctx context.Context) {
	defer close(c.done)
	next := time.Duration(c.seconds()) * time.Second / 2
	for c.seconds() != forever {
		select {
		case <-ctx.Done():
			return
		case <-time.After(next):
		}
		lease, err := c.client.Renew(ctx, c.lease)
		if err != nil && time.Since(c.lease.CreationTime) > time.Duration(c.seconds())*time.Second {
			lease, err = c.client.Request(ctx)
		}
		if err == nil {
			c.lease = lease
			err = c.apply()
		}
		next = time.Duration(c.seconds()) * time.Second / 2
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			log.G(ctx).WithError(err).WithField("interface", c.name).Warn("the address is not renewed; tried again")
			next = min(next, retryTime)
		}
	}
	<-ctx.Done()
}

// Close lets the namespace go. The lease ends by itself: LXC takes the interface
// away with the container, and there is nothing left to give it back by.
func (c *Client) Close() {
	c.stop()
	<-c.done
	c.close()
}
