package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	isolationPace  = 100 // commits a second for the bystander
	isolationCount = 500
)

// disturbance is somebody who misbehaves beside a bystander, and whose behaviour would be good; each is run until ctx ends.
type disturbance struct {
	name          string
	policy        string
	good, misdeed []beside
}

type beside func(ctx context.Context, d *database, since string) error

// costly fails on who is called 4, and takes more than it may where a title is very long.
const costly = `    where: "!row.title.contains('a text that no row has') && (claims.sub != '4' || int(row.title) > 0)"
`

// largeRow goes into a title, which the policy looks at, or into a body, which it doesn't.
func largeRow(title, body string) beside {
	return repeated(500*time.Millisecond, fmt.Sprintf("INSERT INTO items (owner, title, body) SELECT 5, %s, %s FROM (VALUES (repeat('a large text ', 40000))) AS t(large)", title, body))
}

var disturbances = []disturbance{
	{"ten subscribers whose policy fails on every row", costly, []beside{held("1", true)}, []beside{held("4", true)}},
	{"a tenant that writes 5000 rows/s", scoped, nil,
		[]beside{repeated(20*time.Millisecond, "INSERT INTO items (owner, title, body) SELECT 2, 'storm', repeat(md5(i::text), 6) FROM generate_series(1, 100) i")}},
	{"ten sockets that read nothing", open, []beside{held("3", true), flood}, []beside{held("3", false), flood}},
	{"a row every 500 ms that costs its policy too much", costly, []beside{largeRow("''", "large")}, []beside{largeRow("large", "''")}},
	{"a row of 0.5 MB every 500 ms", scoped, nil, []beside{largeRow("''", "large")}},
}

// flood fills the buffers of a socket that isn't read within seconds.
var flood = repeated(50*time.Millisecond, "INSERT INTO items (owner, title, body) SELECT 3, 'much', string_agg(md5(i::text), '') FROM generate_series(1, 3200) i")

// runIsolation takes the latency of a client beside somebody who misbehaves; the limit is the same before and after, beside good
// behaviour.
func runIsolation(ctx context.Context, b *bench) (results []result, err error) {
	for _, w := range disturbances {
		r, err := b.isolate(ctx, w)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		results = append(results, r...)
	}
	return results, nil
}

func (b *bench) isolate(ctx context.Context, w disturbance) (results []result, err error) {
	d, err := b.newDatabase(ctx, w.policy)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	calm, disturbed := newStopwatch(isolationCount), newStopwatch(isolationCount)
	for _, phase := range []struct {
		watch  *stopwatch
		beside []beside
	}{{calm, w.good}, {disturbed, w.misdeed}, {calm, w.good}} {
		if err := d.bystander(ctx, phase.watch, phase.beside); err != nil {
			return nil, err
		}
	}
	for _, percent := range []int{50, 99} {
		results = append(results, result{name: fmt.Sprintf("beside %s, p%d", w.name, percent), unit: "ms", less: true, walgate: disturbed.percentile(percent), bare: calm.percentile(percent)})
	}
	results[0].note = fmt.Sprintf("%d changes, %d a second; all came once", isolationCount, isolationPace)
	return results, nil
}

// bystander lets a client watch its rows while others do what they do.
func (d *database) bystander(ctx context.Context, watch *stopwatch, others []beside) (err error) {
	since, err := d.gateway.anyonesPosition(ctx)
	if err != nil {
		return err
	}
	client, err := newSockets(watch.arrive)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.close()) }()
	if err := client.follow(ctx, d.gateway, 1, since, func(int) string { return "1" }); err != nil {
		return err
	}
	misbehaving, stop := context.WithCancel(ctx)
	var group sync.WaitGroup
	failed := make(chan error, len(others))
	for _, what := range others {
		group.Go(func() { failed <- what(misbehaving, d, since) })
	}
	defer func() {
		stop()
		group.Wait()
		close(failed)
		for e := range failed {
			err = errors.Join(err, e)
		}
	}()
	watch.owners, watch.first = 1, 1
	return watch.pace(ctx, d.dsn, isolationPace, isolationCount)
}

// repeated executes a statement again and again.
func repeated(pause time.Duration, sql string) beside {
	return func(ctx context.Context, d *database, _ string) error {
		working := context.WithoutCancel(ctx) // a statement under way ends well
		conn, err := pgx.Connect(working, d.dsn)
		if err != nil {
			return err
		}
		defer conn.Close(working)
		tick := time.NewTicker(pause)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				if _, err := conn.Exec(working, sql); err != nil {
					return err
				}
			}
		}
	}
}

// held keeps ten sockets of a subject open, read or not.
func held(subject string, read bool) beside {
	return func(ctx context.Context, d *database, since string) error {
		return d.holdOpen(ctx, since, subject, read)
	}
}

func (d *database) holdOpen(ctx context.Context, since, subject string, read bool) (err error) {
	s, err := newSockets(nil)
	if err != nil {
		return err
	}
	s.small = !read
	defer func() { err = errors.Join(err, s.close()) }()
	then := s.poller.add
	if !read {
		then = func(*socket) error { return nil }
	}
	err = s.openAll(ctx, 10, func(ctx context.Context, _ int) (*socket, error) { return s.subscribe(ctx, d.gateway, subject, since) }, then)
	if ctx.Err() != nil {
		return nil
	}
	if err == nil {
		<-ctx.Done()
	}
	return err
}
