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

// paces are the commits a second and for how many seconds, at which latency is taken.
var paces = []struct{ rate, seconds int }{{50, 6}, {1000, 4}}

// writers share the commits, so that one slow commit holds up only its own.
const writers = 4

// stopwatch takes the time from sending a row's COMMIT to its arrival. Rows are told apart by their owner.
type stopwatch struct {
	mu      sync.Mutex
	sent    map[int]time.Time
	took    []time.Duration
	arrived chan struct{} // one for each row
}

func newStopwatch(rows int) *stopwatch {
	return &stopwatch{sent: map[int]time.Time{}, arrived: make(chan struct{}, rows)}
}

func (w *stopwatch) send(row int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent[row] = time.Now()
}

// arrive finds the row's owner in its JSON.
func (w *stopwatch) arrive(document []byte, at time.Time) {
	_, rest, _ := bytes.Cut(document, []byte(`"owner":`))
	end := bytes.IndexByte(rest, ',')
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

// pace commits rows one by one at a rate, the owners counting from 0, and waits until all have arrived.
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
				insert := fmt.Sprintf("BEGIN; INSERT INTO items (owner, title, body) VALUES (%d, 'paced', '%s')", row, body)
				if _, err := conn.PgConn().Exec(ctx, insert).ReadAll(); err != nil {
					return err
				}
				w.send(row)
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
	for n := range count {
		select {
		case <-w.arrived:
		case <-timeout:
			return fmt.Errorf("only %d of %d rows arrived", n, count)
		}
	}
	return nil
}

func runLatency(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, open)
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
	since, err := d.gateway.position(ctx, "1")
	if err != nil {
		return nil, err
	}
	for i, p := range paces {
		watch := newStopwatch(p.rate * p.seconds)
		client := newSockets(watch.arrive)
		if err := client.subscribe(ctx, d.gateway, "1", since); err != nil {
			return nil, err
		}
		err := client.wait(ctx, &client.ready, 1)
		if err == nil {
			err = watch.pace(ctx, d.dsn, p.rate, p.rate*p.seconds)
		}
		if err := errors.Join(err, client.close()); err != nil {
			return nil, err
		}
		for _, percent := range []int{50, 99} {
			results = append(results, result{name: fmt.Sprintf("%d commits/s, p%d", p.rate, percent), unit: "ms", less: true,
				walgate: watch.percentile(percent), bare: bare[i].percentile(percent)})
		}
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
func (d *database) bareLatency(ctx context.Context) ([]*stopwatch, error) {
	client, server, err := loopback()
	if err != nil {
		return nil, err
	}
	defer client.Close()
	defer server.Close()
	var mu sync.Mutex
	var current *stopwatch
	go func() {
		for lines := bufio.NewReaderSize(client, 64<<10); ; {
			line, err := lines.ReadSlice('\n')
			if err != nil {
				return
			}
			mu.Lock()
			watch := current
			mu.Unlock()
			watch.arrive(line, time.Now())
		}
	}()
	piping, stop := context.WithCancel(ctx)
	defer stop()
	piped := make(chan error, 1)
	pipe := &barePipe{dsn: d.dsn, slot: d.bareSlot(), least: 1, client: server}
	go func() { piped <- pipe.run(piping) }()
	var watches []*stopwatch
	for _, p := range paces {
		watch := newStopwatch(p.rate * p.seconds)
		mu.Lock()
		current = watch
		mu.Unlock()
		if err := watch.pace(ctx, d.dsn, p.rate, p.rate*p.seconds); err != nil {
			return nil, err
		}
		watches = append(watches, watch)
	}
	stop()
	return watches, <-piped
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
