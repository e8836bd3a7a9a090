package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// runBus measures the tail with Redis and a following instance beside one instance alone, before and after: the disk still
// has to do what was written before. The following instance shares the machine, so that its work counts too; a third run
// has one that follows without Redis.
func runBus(ctx context.Context, b *bench) ([]result, error) {
	n := b.of(500_000)
	var results []result
	for _, w := range []struct {
		name  string
		count int
		write func(*database) error
	}{
		{"backlog of inserts, 1000 a transaction", n, func(d *database) error { return d.load(ctx, 1, n, owners) }},
		{"backlog of one-row transactions", b.of(200_000), func(d *database) error { return d.smallTransactions(ctx, b.of(200_000)) }},
	} {
		rate := func(f following) (float64, string, error) {
			took, cpu, err := b.drainBeside(ctx, f, w.write)
			return float64(w.count) / took.Seconds(), fmt.Sprintf("%.1f s", cpu.Seconds()), err
		}
		r, err := compareBus(rate)
		if err != nil {
			return nil, err
		}
		r.name = w.name
		results = append(results, r)
	}
	r, err := compareBus(func(f following) (float64, string, error) { return b.liveBeside(ctx, f) })
	r.name = "live: application's one-row transactions"
	return append(results, r), err
}

// following says who else is there.
type following int

const (
	nobody    following = iota
	withRedis           // another instance, both with Redis
	polling             // another instance, without Redis
)

func compareBus(run func(following) (rate float64, cpu string, err error)) (result, error) {
	var rates []float64
	var cpus []string
	for _, f := range []following{nobody, withRedis, polling, nobody} {
		rate, cpu, err := run(f)
		if err != nil {
			return result{}, err
		}
		rates, cpus = append(rates, rate), append(cpus, cpu)
	}
	return result{walgate: rates[1], bare: (rates[0] + rates[3]) / 2, unit: "/s", share: 0.9,
		note: fmt.Sprintf("with an instance that follows without Redis: %s/s; walgate's CPU, both instances: alone %s, Redis %s, without Redis %s", number(rates[2]), cpus[0], cpus[1], cpus[2])}, nil
}

// smallTransactions makes a backlog of them.
func (d *database) smallTransactions(ctx context.Context, n int) error {
	if err := d.load(ctx, 1, n, owners); err != nil {
		return err
	}
	if err := d.skip(ctx); err != nil {
		return err
	}
	for _, statement := range []string{"SET synchronous_commit = off", updateEach, "RESET synchronous_commit"} {
		if _, err := d.Exec(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

// beside makes the instances of a comparison.
func (b *bench) beside(ctx context.Context, f following, policy string) (d *database, err error) {
	if d, err = b.newDatabase(ctx, policy); err != nil {
		return nil, err
	}
	switch f {
	case withRedis:
		err = d.share(ctx, policy, 1)
	case polling:
		err = d.instances(policy, "", 1)
	}
	if err != nil {
		return nil, errors.Join(err, d.drop(ctx))
	}
	return d, nil
}

// drainBeside starts all instances at a backlog: whichever gets the slot drains it, the other one follows.
func (b *bench) drainBeside(ctx context.Context, f following, write func(*database) error) (took, cpu time.Duration, err error) {
	d, err := b.beside(ctx, f, scoped)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := write(d); err != nil {
		return 0, 0, err
	}
	target, err := d.mark(ctx)
	if err != nil {
		return 0, 0, err
	}
	if err := d.settle(ctx); err != nil {
		return 0, 0, err
	}
	for _, g := range d.others {
		if err := g.start(ctx); err != nil {
			return 0, 0, err
		}
	}
	if err := d.gateway.start(ctx); err != nil {
		return 0, 0, err
	}
	began, err := d.gateway.streamingSince(ctx)
	if err != nil {
		return 0, 0, err
	}
	ended, err := d.gateway.logged(ctx, target)
	return ended.Sub(began), d.cpu(), err
}

// cpu is what all instances took.
func (d *database) cpu() time.Duration {
	cpu := d.gateway.cpu()
	for _, g := range d.others {
		cpu += g.cpu()
	}
	return cpu
}

// liveBeside returns the application's transactions a second; one client gets everything from the leader.
func (b *bench) liveBeside(ctx context.Context, f following) (rate float64, cpu string, err error) {
	d, err := b.beside(ctx, f, open)
	if err != nil {
		return 0, "", err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	count, rows := b.of(200_000)/liveClients*liveClients, b.of(500_000)
	if _, err := d.Exec(ctx, fmt.Sprintf(liveRowsSQL, rows)); err != nil {
		return 0, "", err
	}
	load, err := b.newLoad(ctx, d, rows)
	if err != nil {
		return 0, "", err
	}
	if err := errors.Join(d.caughtUp(ctx), d.startOthers(ctx)); err != nil {
		return 0, "", err
	}
	since, err := d.gateway.anyonesPosition(ctx)
	if err != nil {
		return 0, "", err
	}
	client, err := newSockets(nil)
	if err != nil {
		return 0, "", err
	}
	defer func() { err = errors.Join(err, client.close()) }()
	if err := client.follow(ctx, d.gateway, 1, since, func(int) string { return "1" }); err != nil {
		return 0, "", err
	}
	if err := d.settle(ctx); err != nil {
		return 0, "", err
	}
	before := d.cpu()
	began := time.Now()
	if _, err = load.run(ctx, count); err != nil {
		return 0, "", err
	}
	err = client.wait(ctx, &client.changes, int64(count)) // the tail's throughput: until its client has all
	rate = float64(count) / time.Since(began).Seconds()
	return rate, fmt.Sprintf("%.0f µs a change", float64((d.cpu()-before).Microseconds())/float64(count)), err
}
