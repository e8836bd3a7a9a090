package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"syscall"
	"time"
)

const (
	fanOutOnes   = 15 // rounds with one change
	fanOutBursts = 5  // rounds with many
	fanOutBurst  = 20 // changes in one transaction
)

// fanOutSizes are the numbers of sockets.
func (o options) fanOutSizes() []int { return []int{o.sockets / 10, o.sockets / 2, o.sockets} }

func runFanOut(ctx context.Context, b *bench) ([]result, error) {
	bare, err := b.bareFanOut(ctx)
	if err != nil {
		return nil, err
	}
	walgate, err := b.fanOutToAll(ctx)
	if err != nil {
		return nil, err
	}
	var results []result
	for i, n := range b.fanOutSizes() {
		w, l := walgate.times[i], bare.times[i]
		one := result{name: fmt.Sprintf("1 change to %d sockets", n), unit: "frames/s", walgate: float64(n) / w.one.Seconds(), bare: float64(n) / l.one.Seconds(),
			note: fmt.Sprintf("the client took %.2f of a core, beside the bare limit %.2f", w.client, l.client)}
		if n == b.sockets {
			one.wanted, one.share = 100_000, 0.8
		}
		results = append(results, one, result{name: fmt.Sprintf("%d changes to %d sockets", fanOutBurst, n), unit: "frames/s",
			walgate: float64(fanOutBurst*n) / w.burst.Seconds(), bare: float64(fanOutBurst*n) / l.burst.Seconds()})
	}
	each := func(m fanMemory) (idle, after float64) {
		return (m.idle - m.before) * 1024 / float64(b.sockets), (m.after - m.before) * 1024 / float64(b.sockets)
	}
	idle, after := each(walgate.memory)
	bareIdle, bareAfter := each(bare.memory)
	return append(results,
		result{name: "memory of an idle socket", walgate: idle, bare: bareIdle, unit: "KB", less: true, wanted: 25,
			note: fmt.Sprintf("RSS: %.0f MB before, %.0f MB with %d sockets", walgate.memory.before, walgate.memory.idle, b.sockets)},
		result{name: "memory of a socket after the broadcasts", walgate: after, bare: bareAfter, unit: "KB", less: true,
			note: fmt.Sprintf("RSS: %.0f MB", walgate.memory.after)}), nil
}

// fanTimes are the times that one change, and a burst of them, take to reach all sockets.
type fanTimes struct {
	one, burst time.Duration
	client     float64 // the share of a core that the client took for single changes
}

// fanMemory is what the server's process held, in megabytes.
type fanMemory struct{ before, idle, after float64 }

type fanOut struct {
	times  []fanTimes
	memory fanMemory
}

// ownCPU returns the processor time of this process.
func ownCPU() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// rounds sends changes to all of n sockets and waits for the last frame each time.
func (s *sockets) rounds(ctx context.Context, send func(changes int) error) (t fanTimes, err error) {
	n, want := int64(s.len()), s.changes.Load()
	round := func(changes int) (float64, error) {
		want += n * int64(changes)
		began := time.Now()
		if err := send(changes); err != nil {
			return 0, err
		}
		err := s.wait(ctx, &s.changes, want)
		return float64(time.Since(began)), err
	}
	var ones, bursts []float64
	began, cpu := time.Now(), ownCPU()
	for range fanOutOnes {
		took, err := round(1)
		if err != nil {
			return t, err
		}
		ones = append(ones, took)
	}
	t.client = (ownCPU() - cpu).Seconds() / time.Since(began).Seconds()
	for range fanOutBursts {
		took, err := round(fanOutBurst)
		if err != nil {
			return t, err
		}
		bursts = append(bursts, took)
	}
	t.one, t.burst = time.Duration(median(ones)), time.Duration(median(bursts))
	return t, nil
}

// fanOutToAll lets everybody see everything. walgate's times begin before COMMIT and hold the whole way through WAL and
// log; those of the bare broadcast begin before asking the server for it.
func (b *bench) fanOutToAll(ctx context.Context) (f *fanOut, err error) {
	d, err := b.newDatabase(ctx, open)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	clients, err := newSockets(nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, clients.close()) }()
	f = &fanOut{}
	f.memory.before = d.gateway.memory()
	for _, n := range b.fanOutSizes() {
		since, err := d.gateway.anyonesPosition(ctx)
		if err != nil {
			return nil, err
		}
		if err := clients.follow(ctx, d.gateway, n, since, func(int) string { return "1" }); err != nil {
			return nil, err
		}
		f.memory.idle = d.gateway.memory()
		t, err := clients.rounds(ctx, func(changes int) error { return d.insert(ctx, changes) })
		if err != nil {
			return nil, err
		}
		f.times = append(f.times, t)
	}
	f.memory.after = d.gateway.memory()
	return f, nil
}

// bareFanOut measures the bare broadcast, in a process of its own.
func (b *bench) bareFanOut(ctx context.Context) (f *fanOut, err error) {
	server, err := startBareServer(ctx, bareFanOutCommand)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, server.stop()) }()
	base := server.base
	clients, err := newSockets(nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, clients.close()) }()
	memory := func() float64 { return processMemory(server.pid, "VmRSS:") }
	f = &fanOut{}
	f.memory.before = memory()
	for _, n := range b.fanOutSizes() {
		err := clients.connectAll(ctx, n, func(ctx context.Context, _ int) (*socket, error) {
			return clients.connect(ctx, base, "/stream", "", "")
		})
		if err != nil {
			return nil, err
		}
		f.memory.idle = memory()
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
		f.times = append(f.times, t)
	}
	f.memory.after = memory()
	return f, nil
}
