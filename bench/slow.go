package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// slowOwners are the scopes that slow readers share: each change is for one of them.
const slowOwners = 100

// slowRowsSQL makes rows of more than a kilobyte: the kernel alone holds several hundred of the usual ones for each socket.
const slowRowsSQL = `INSERT INTO items (owner, title, body)
	SELECT i %% %d, 'Item "' || i || '" of this owner', repeat(md5(i::text), 32) FROM generate_series(%d, %d) AS i`

// runSlow lets changes pass while live sockets stand still, half as many as the largest fan-out has, and then reads them
// all. Then as many subscribe from the beginning and stand still while they catch up. The sockets take next to nothing
// by themselves, so that it is walgate that must do something about them.
func runSlow(ctx context.Context, b *bench) (results []result, err error) {
	d, since, err := b.servedDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	s := &slowReaders{d: d, n: b.sockets / 2 / slowOwners * slowOwners, changes: b.of(100_000) / slowOwners * slowOwners, since: since}
	live, err := s.standStillLive(ctx)
	if err != nil {
		return nil, err
	}
	catching, err := s.standStillCatchingUp(ctx)
	return []result{live, catching}, err
}

// slowReaders are sockets that don't read for a while.
type slowReaders struct {
	d          *database
	n, changes int
	since      string // before the changes
}

// frames is how many frames all of them must get. The mark behind the changes belongs to the first owner.
func (s *slowReaders) frames() int64 {
	return int64(s.n)*int64(s.changes/slowOwners) + int64(s.n/slowOwners)
}

func (s *slowReaders) subject(i int) string { return strconv.Itoa(i % slowOwners) }

func (s *slowReaders) open(ctx context.Context) (*sockets, error) {
	clients, err := newSockets(nil)
	if err == nil {
		clients.small = true
		clients.reopen = func(i int) (*socket, error) { return clients.subscribe(ctx, s.d.gateway, s.subject(i), s.since) }
	}
	return clients, err
}

func (s *slowReaders) standStillLive(ctx context.Context) (r result, err error) {
	clients, err := s.open(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, clients.close()) }()
	d := s.d
	if err := clients.follow(ctx, d.gateway, s.n, s.since, s.subject); err != nil {
		return r, err
	}
	before := d.gateway.memory()
	d.gateway.forgetPeak()
	caughtUp, err := d.gateway.metric(ctx, "walgate_stream_catch_up_total")
	if err != nil {
		return r, err
	}
	for _, one := range clients.open {
		if err := clients.poller.pause(one); err != nil {
			return r, err
		}
	}
	began := time.Now()
	for from := 1; from <= s.changes; from += slowOwners {
		if _, err := d.Exec(ctx, fmt.Sprintf(slowRowsSQL, slowOwners, from, from+slowOwners-1)); err != nil {
			return r, err
		}
	}
	target, err := d.mark(ctx)
	if err != nil {
		return r, err
	}
	if _, err := d.gateway.logged(ctx, target); err != nil {
		return r, err
	}
	note := fmt.Sprintf("%.0f MB before, at most %.0f MB while they stood still (%.1f s)", before, d.gateway.peakMemory(), time.Since(began).Seconds())
	served := s.readAll(ctx, clients)
	more, err := d.gateway.metric(ctx, "walgate_stream_catch_up_total")
	return result{name: fmt.Sprintf("%d sockets stand still for %d changes, peak memory", s.n, s.changes), walgate: d.gateway.peakMemory(), unit: "MB", less: true,
		note: fmt.Sprintf("%s; %.0f times one went on from the log; %s", note, more-caughtUp, served)}, err
}

func (s *slowReaders) standStillCatchingUp(ctx context.Context) (r result, err error) {
	clients, err := s.open(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, clients.close()) }()
	d := s.d
	if err := s.d.gateway.withoutStreams(ctx); err != nil { // those of before
		return r, err
	}
	before := d.gateway.memory()
	d.gateway.forgetPeak()
	began := time.Now()
	err = clients.openAll(ctx, s.n, func(ctx context.Context, i int) (*socket, error) {
		return clients.subscribe(ctx, d.gateway, s.subject(i), s.since)
	}, func(*socket) error { return nil })
	if err != nil {
		return r, err
	}
	if err := d.gateway.quiet(ctx); err != nil {
		return r, err
	}
	note := fmt.Sprintf("%.0f MB before, at most %.0f MB while they stood still (%.1f s)", before, d.gateway.peakMemory(), time.Since(began).Seconds())
	served := s.readAll(ctx, clients)
	return result{name: fmt.Sprintf("%d sockets stand still while they catch up %d changes, peak memory", s.n, s.changes), walgate: d.gateway.peakMemory(), unit: "MB", less: true,
		note: fmt.Sprintf("%s; %s", note, served)}, nil
}

// readAll lets the sockets go on and says whether everybody got everything.
func (s *slowReaders) readAll(ctx context.Context, clients *sockets) string {
	began := time.Now()
	for _, one := range clients.open {
		if err := clients.poller.add(one); err != nil {
			return "NOT everybody was served: " + err.Error()
		}
	}
	if err := clients.wait(ctx, &clients.changes, s.frames()); err != nil {
		return fmt.Sprintf("NOT everybody was served: %v; %d were closed for standing still", err, clients.refused.Load())
	}
	return fmt.Sprintf("everybody got everything (%d frames in %.1f s), %d were closed for standing still and came again", clients.changes.Load(), time.Since(began).Seconds(), clients.refused.Load())
}

// metric returns the value of one of walgate's metrics.
func (g *gateway) metric(ctx context.Context, name string) (float64, error) {
	response, err := g.get(ctx, http.DefaultClient, "/metrics", "1", "identity")
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		if value, ok := bytes.CutPrefix(line, []byte(name+" ")); ok {
			return strconv.ParseFloat(string(bytes.TrimSpace(value)), 64)
		}
	}
	return 0, fmt.Errorf("/metrics doesn't have %s", name)
}

// withoutStreams waits until walgate has noticed that all sockets are gone.
func (g *gateway) withoutStreams(ctx context.Context) error {
	return until(ctx, func() (bool, error) {
		n, err := g.metric(ctx, "sync_websocket_connections")
		return n == 0, err
	})
}

// quiet waits until the process takes no more than a little of a core: whoever could go on has done so.
func (g *gateway) quiet(ctx context.Context) error {
	const span = 500 * time.Millisecond
	last, at := g.cpu(), time.Now()
	return until(ctx, func() (bool, error) {
		if time.Since(at) < span {
			return false, nil
		}
		now := g.cpu()
		still := now-last < span/20
		last, at = now, time.Now()
		return still, nil
	})
}
