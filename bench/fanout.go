package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	fanOutRounds = 15
	fanOutBurst  = 20 // changes in one transaction
)

var fanOutSizes = []int{1000, 5000}

func runFanOut(ctx context.Context, b *bench) ([]result, error) {
	bare, err := bareFanOut(ctx)
	if err != nil {
		return nil, err
	}
	results, err := fanOutToAll(ctx, b, bare)
	if err != nil {
		return nil, err
	}
	one, err := fanOutToOne(ctx, b, fanOutSizes[len(fanOutSizes)-1])
	return append(results, one...), err
}

// fanTimes are the times that one change, and a burst of them, take to reach all sockets.
type fanTimes struct{ one, burst time.Duration }

// rounds sends changes to all of n sockets and waits for the last frame each time.
func (s *sockets) rounds(ctx context.Context, send func(changes int) error) (t fanTimes, err error) {
	n, want := int64(len(s.conns)), s.changes.Load()
	round := func(changes int) (time.Duration, error) {
		want += n * int64(changes)
		began := time.Now()
		if err := send(changes); err != nil {
			return 0, err
		}
		err := s.wait(ctx, &s.changes, want)
		return time.Since(began), err
	}
	var ones, bursts []time.Duration
	for i := range 2 * fanOutRounds {
		changes, list := 1, &ones
		if i >= fanOutRounds {
			changes, list = fanOutBurst, &bursts
		}
		took, err := round(changes)
		if err != nil {
			return t, err
		}
		*list = append(*list, took)
	}
	slices.Sort(ones)
	slices.Sort(bursts)
	return fanTimes{ones[len(ones)/2], bursts[len(bursts)/2]}, nil
}

// fanOutToAll lets everybody see everything. walgate's times begin before COMMIT and hold the whole way through WAL and
// log; those of the bare broadcast begin before asking the server for it.
func fanOutToAll(ctx context.Context, b *bench, bare []fanTimes) (results []result, err error) {
	d, err := b.newDatabase(ctx, open)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	clients := newSockets(nil)
	defer func() { err = errors.Join(err, clients.close()) }()
	for i, n := range fanOutSizes {
		since, err := d.gateway.position(ctx, "1")
		if err != nil {
			return nil, err
		}
		for len(clients.conns) < n {
			if err := clients.subscribe(ctx, d.gateway, "1", since); err != nil {
				return nil, err
			}
		}
		if err := clients.wait(ctx, &clients.ready, int64(n)); err != nil {
			return nil, err
		}
		t, err := clients.rounds(ctx, func(changes int) error {
			_, err := d.Exec(ctx, fmt.Sprintf(rowsSQL, 1, 1, changes))
			return err
		})
		if err != nil {
			return nil, err
		}
		note := fmt.Sprintf("walgate holds %.0f MB", processMemory(d.gateway.process.Process.Pid, "VmRSS:"))
		results = append(results,
			result{name: fmt.Sprintf("1 change to %d sockets", n), walgate: float64(n) / t.one.Seconds(), bare: float64(n) / bare[i].one.Seconds(), unit: "changes/s", note: note},
			result{name: fmt.Sprintf("%d changes to %d sockets", fanOutBurst, n), walgate: float64(fanOutBurst*n) / t.burst.Seconds(), bare: float64(fanOutBurst*n) / bare[i].burst.Seconds(), unit: "changes/s"})
	}
	return results, nil
}

// fanOutToOne gives each socket an owner of its own, and each change to one of them.
func fanOutToOne(ctx context.Context, b *bench, n int) (results []result, err error) {
	d, err := b.newDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	bare, err := d.bareLatency(ctx)
	if err != nil {
		return nil, err
	}
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	positions, err := d.positions(ctx, n)
	if err != nil {
		return nil, err
	}
	p := paces[0]
	watch := newStopwatch(p.rate * p.seconds)
	clients := newSockets(watch.arrive)
	defer func() { err = errors.Join(err, clients.close()) }()
	for i, since := range positions {
		if err := clients.subscribe(ctx, d.gateway, strconv.Itoa(i), since); err != nil {
			return nil, err
		}
	}
	if err := clients.wait(ctx, &clients.ready, int64(n)); err != nil {
		return nil, err
	}
	if err := watch.pace(ctx, d.dsn, p.rate, p.rate*p.seconds); err != nil {
		return nil, err
	}
	for _, percent := range []int{50, 99} {
		results = append(results, result{name: fmt.Sprintf("1 change to 1 of %d sockets, p%d", n, percent), unit: "ms", less: true,
			walgate: watch.percentile(percent), bare: bare[0].percentile(percent)})
	}
	return results, nil
}

// positions returns where each of n subjects begins: a cursor is bound to its caller's scopes.
func (d *database) positions(ctx context.Context, n int) ([]string, error) {
	positions := make([]string, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range positions {
		g.Go(func() (err error) {
			positions[i], err = d.gateway.position(ctx, strconv.Itoa(i))
			return err
		})
	}
	return positions, g.Wait()
}

// bareFanOut measures the bare broadcast, in a process of its own.
func bareFanOut(ctx context.Context) (times []fanTimes, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	server := exec.CommandContext(ctx, self, bareFanOutCommand)
	server.Stderr = os.Stderr
	stdin, err := server.StdinPipe() // its end tells the server to stop
	if err != nil {
		return nil, err
	}
	stdout, err := server.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := server.Start(); err != nil {
		return nil, err
	}
	defer func() {
		stdin.Close()
		err = errors.Join(err, server.Wait())
	}()
	line := make([]byte, 100)
	length, err := stdout.Read(line)
	if err != nil {
		return nil, fmt.Errorf("the bare server did not start: %w", err)
	}
	base := strings.TrimSpace(string(line[:length]))
	clients := newSockets(nil)
	defer func() { err = errors.Join(err, clients.close()) }()
	for _, n := range fanOutSizes {
		for len(clients.conns) < n {
			if err := clients.connect(ctx, base, "/stream", "", ""); err != nil {
				return nil, err
			}
		}
		t, err := clients.rounds(ctx, func(changes int) error {
			return until(ctx, func() (bool, error) { // the last socket may still be on its way into the server's list
				response, err := http.Get(fmt.Sprintf("%s/broadcast?sockets=%d&changes=%d", base, n, changes))
				if err != nil {
					return false, err
				}
				return response.StatusCode == http.StatusNoContent, response.Body.Close()
			})
		})
		if err != nil {
			return nil, err
		}
		times = append(times, t)
	}
	return times, nil
}
