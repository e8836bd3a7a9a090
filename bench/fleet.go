package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/walgate/walgate/internal/redisserver"
)

// instances of the fleet.
const instances = 3

// redisURL starts a private Redis once for all paths.
func (b *bench) redisURL(ctx context.Context) (string, error) {
	if b.redis == nil {
		var err error
		if b.redis, err = redisserver.Start(ctx, redisserver.Options{}); err != nil {
			return "", err
		}
	}
	return b.redis.URL(), nil
}

// share makes the database's instance, and as many others as asked, use Redis; none runs yet.
func (d *database) share(ctx context.Context, policy string, others int) error {
	url, err := d.b.redisURL(ctx)
	if err != nil {
		return err
	}
	return d.instances(policy, url, others)
}

// instances makes the database's instance anew, and others.
func (d *database) instances(policy, redis string, others int) (err error) {
	if d.gateway, err = newGateway(d.b, d, policy, redis); err != nil {
		return err
	}
	for range others {
		g, err := newGateway(d.b, d, policy, redis)
		if err != nil {
			return err
		}
		d.others = append(d.others, g)
	}
	return nil
}

// startOthers starts the others once the database's instance leads.
func (d *database) startOthers(ctx context.Context) error {
	for _, g := range d.others {
		if err := errors.Join(g.start(ctx), g.ready(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// runRemote commits one by one; each commit has one client on the leader and one on another instance, whose times are
// compared.
func runRemote(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, open)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.share(ctx, open, 1); err != nil {
		return nil, err
	}
	if err := errors.Join(d.caughtUp(ctx), d.startOthers(ctx)); err != nil {
		return nil, err
	}
	since, err := d.gateway.anyonesPosition(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range b.paces() {
		here, there := newStopwatch(p.count), newStopwatch(p.count)
		here.beside = there
		if err := d.paceBoth(ctx, here, since, p); err != nil {
			return nil, err
		}
		for _, percent := range []int{50, 99} {
			results = append(results, result{name: fmt.Sprintf("%d commits/s beside the leader's clients, p%d", p.rate, percent), unit: "ms", less: true, share: 1 / 1.5,
				walgate: there.percentile(percent), bare: here.percentile(percent), note: fmt.Sprintf("%.2f times the leader's; %d commits", there.percentile(percent)/here.percentile(percent), p.count)})
		}
	}
	return results, nil
}

// paceBoth gives a watch and the one beside it a client each, on the leader and on the first of the others.
func (d *database) paceBoth(ctx context.Context, w *stopwatch, since string, p pace) (err error) {
	for i, g := range []*gateway{d.gateway, d.others[0]} {
		client, err := newSockets(w.all()[i].arrive)
		if err != nil {
			return err
		}
		defer client.close()
		if err := client.follow(ctx, g, 1, since, func(int) string { return "1" }); err != nil {
			return err
		}
	}
	return w.pace(ctx, d.dsn, p.rate, p.count)
}

// runFleet spreads sockets over three instances; the limit is one instance that has them all.
func runFleet(ctx context.Context, b *bench) ([]result, error) {
	n := b.sockets * 9 / 10 / instances * instances
	one, err := b.fleetOf(ctx, 1, n)
	if err != nil {
		return nil, err
	}
	three, err := b.fleetOf(ctx, instances, n)
	if err != nil {
		return nil, err
	}
	name := func(changes int) string {
		return fmt.Sprintf("%d change(s) to %d × %d sockets beside 1 × %d", changes, instances, n/instances, n)
	}
	rate := func(changes int, took time.Duration) float64 { return float64(changes*n) / took.Seconds() }
	return []result{
		{name: name(1), unit: "frames/s", walgate: rate(1, three.one), bare: rate(1, one.one), share: 0.8},
		{name: name(fanOutBurst), unit: "frames/s", walgate: rate(fanOutBurst, three.burst), bare: rate(fanOutBurst, one.burst), share: 0.8},
	}, nil
}

// fleetOf times changes to n sockets of some instances.
func (b *bench) fleetOf(ctx context.Context, size, n int) (t fanTimes, err error) {
	d, err := b.newDatabase(ctx, open)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if size > 1 {
		if err := d.share(ctx, open, size-1); err != nil {
			return t, err
		}
	}
	if err := errors.Join(d.caughtUp(ctx), d.startOthers(ctx)); err != nil {
		return t, err
	}
	since, err := d.gateway.anyonesPosition(ctx)
	if err != nil {
		return t, err
	}
	clients, err := newSockets(nil)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, clients.close()) }()
	if err := clients.followAll(ctx, append([]*gateway{d.gateway}, d.others...), n, since, func(int) string { return "1" }); err != nil {
		return t, err
	}
	return clients.rounds(ctx, func(changes int) error { return d.insert(ctx, changes) })
}
