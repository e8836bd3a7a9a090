package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// pace is how many commits a second, and what their latency is to be at most, in milliseconds; 0: nothing in particular.
type pace struct {
	rate, count int
	p50, p99    float64
}

func (b *bench) paces() []pace {
	return []pace{{50, max(300, int(1000*b.scale)), 1.5, 5}, {1000, max(4000, b.of(10_000)), 0, 10}}
}

// writers share the commits, so that one slow commit holds up only its own.
const writers = 4

// stopwatch takes the time from sending a row's COMMIT to its arrival. Rows are told apart by their title.
type stopwatch struct {
	owners  int // the rows go round so many owners
	first   int // of them
	mu      sync.Mutex
	sent    map[int]time.Time
	took    []time.Duration
	arrived chan struct{} // one for each row
	beside  *stopwatch    // takes the time of the same commits to another place; may be nil
}

func newStopwatch(rows int) *stopwatch {
	return &stopwatch{owners: 1, sent: map[int]time.Time{}, arrived: make(chan struct{}, rows)}
}

func (w *stopwatch) send(row int, at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent[row] = at
}

// arrive finds the row's number in its JSON.
func (w *stopwatch) arrive(document []byte, at time.Time) {
	_, rest, _ := bytes.Cut(document, []byte(`"title":"paced `))
	end := bytes.IndexByte(rest, '"')
	if end < 0 {
		return
	}
	row, err := strconv.Atoi(string(rest[:end]))
	if err != nil {
		return
	}
	w.mu.Lock()
	sent, ours := w.sent[row]
	if ours {
		delete(w.sent, row)
		w.took = append(w.took, at.Sub(sent))
	}
	w.mu.Unlock()
	if ours {
		w.arrived <- struct{}{}
	}
}

// percentile in milliseconds, of all that arrived.
func (w *stopwatch) percentile(p int) float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.took) == 0 {
		return 0
	}
	slices.Sort(w.took)
	return milliseconds(w.took[min(len(w.took)*p/100, len(w.took)-1)])
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// pace commits rows one by one at a rate, one owner after the other, and waits until all have arrived.
func (w *stopwatch) pace(ctx context.Context, dsn string, rate, count int) error {
	body := strings.Repeat("a sentence. ", 14)
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for first := range writers {
		g.Go(func() error {
			conn, err := pgx.Connect(ctx, dsn)
			if err != nil {
				return err
			}
			defer conn.Close(context.WithoutCancel(ctx))
			for row := first; row < count; row += writers {
				time.Sleep(time.Until(began.Add(time.Duration(row) * time.Second / time.Duration(rate))))
				insert := fmt.Sprintf("BEGIN; INSERT INTO items (owner, title, body) VALUES (%d, 'paced %d', '%s')", w.first+row%w.owners, row, body)
				if _, err := conn.PgConn().Exec(ctx, insert).ReadAll(); err != nil {
					return err
				}
				now := time.Now()
				for _, w := range w.all() {
					w.send(row, now)
				}
				if _, err := conn.PgConn().Exec(ctx, "COMMIT").ReadAll(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	timeout := time.After(30 * time.Second)
	for _, w := range w.all() {
		for n := range count {
			select {
			case <-w.arrived:
			case <-timeout:
				return fmt.Errorf("only %d of %d rows arrived", n, count)
			}
		}
	}
	return nil
}

func (w *stopwatch) all() []*stopwatch {
	if w.beside == nil {
		return []*stopwatch{w}
	}
	return []*stopwatch{w, w.beside}
}

func runLatency(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, open)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	bare, err := d.bareLatency(ctx, b.paces())
	if err != nil {
		return nil, err
	}
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	since, err := d.gateway.anyonesPosition(ctx)
	if err != nil {
		return nil, err
	}
	for i, p := range b.paces() {
		watch := newStopwatch(p.count)
		client, err := newSockets(watch.arrive)
		if err != nil {
			return nil, err
		}
		err = client.follow(ctx, d.gateway, 1, since, func(int) string { return "1" })
		if err == nil {
			err = watch.pace(ctx, d.dsn, p.rate, p.count)
		}
		if err := errors.Join(err, client.close()); err != nil {
			return nil, err
		}
		results = append(results,
			result{name: fmt.Sprintf("%d commits/s, p50", p.rate), unit: "ms", less: true, wanted: p.p50, walgate: watch.percentile(50), bare: bare[i].percentile(50), note: fmt.Sprintf("%d commits", p.count)},
			result{name: fmt.Sprintf("%d commits/s, p99", p.rate), unit: "ms", less: true, wanted: p.p99, walgate: watch.percentile(99), bare: bare[i].percentile(99)})
	}
	return results, nil
}

// caughtUp starts walgate and waits until all that was committed so far is logged.
func (d *database) caughtUp(ctx context.Context) error {
	target, err := d.mark(ctx)
	if err != nil {
		return err
	}
	if err := d.gateway.start(ctx); err != nil {
		return err
	}
	if _, err := d.gateway.logged(ctx, target); err != nil {
		return err
	}
	return d.gateway.ready(ctx)
}

// bareLatency lets the bare pipe pass rows on to a TCP client at each pace.
func (d *database) bareLatency(ctx context.Context, paces []pace) (watches []*stopwatch, err error) {
	var mu sync.Mutex
	var current *stopwatch
	pipe, err := d.startBarePipe(ctx, func(line []byte, at time.Time) {
		mu.Lock()
		watch := current
		mu.Unlock()
		watch.arrive(line, at)
	})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, pipe.stop()) }()
	for _, p := range paces {
		watch := newStopwatch(p.count)
		mu.Lock()
		current = watch
		mu.Unlock()
		if err := watch.pace(ctx, d.dsn, p.rate, p.count); err != nil {
			return nil, err
		}
		watches = append(watches, watch)
	}
	return watches, nil
}

// runningPipe is a bare pipe with its client.
type runningPipe struct{ stop func() error }

// startBarePipe lets the bare pipe read from now on; its client calls onLine, on one goroutine.
func (d *database) startBarePipe(ctx context.Context, onLine func(line []byte, at time.Time)) (*runningPipe, error) {
	client, server, err := loopback()
	if err != nil {
		return nil, err
	}
	go func() {
		for lines := bufio.NewReaderSize(client, 64<<10); ; {
			line, err := lines.ReadSlice('\n')
			if err != nil {
				return
			}
			onLine(line, time.Now())
		}
	}()
	piping, stop := context.WithCancel(ctx)
	piped := make(chan error, 1)
	pipe := &barePipe{dsn: d.dsn, slot: d.bareSlot(), least: 1, client: server}
	go func() { piped <- pipe.run(piping) }()
	return &runningPipe{stop: func() error {
		stop()
		err := <-piped
		client.Close()
		server.Close()
		return err
	}}, nil
}

// loopback returns the two ends of a TCP connection.
func loopback() (client, server net.Conn, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		return nil, nil, err
	}
	server, err = l.Accept()
	return client, server, err
}
