package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

const (
	fewSockets = 10
	onePace    = 100 // commits a second
	oneChanges = 500 // so few that it is over before the first heartbeats, which would come to all sockets at once
)

// runOne gives each socket a scope of its own, and each change to one of them. What a change costs among few sockets is
// the limit of what it costs among many.
func runOne(ctx context.Context, b *bench) ([]result, error) {
	few, err := b.oneOf(ctx, fewSockets)
	if err != nil {
		return nil, err
	}
	many, err := b.oneOf(ctx, b.sockets)
	if err != nil {
		return nil, err
	}
	of := fmt.Sprintf("1 of %d sockets beside 1 of %d, ", b.sockets, fewSockets)
	return []result{
		{name: of + "p50", walgate: many.p50, bare: few.p50, unit: "ms", less: true, note: fmt.Sprintf("%d changes, %d a second", oneChanges, onePace)},
		{name: of + "p99", walgate: many.p99, bare: few.p99, unit: "ms", less: true},
		{name: of + "CPU", walgate: many.cpu, bare: few.cpu, unit: "ms", less: true, note: "walgate's own, for each change; what it takes while nothing changes is taken off"},
	}, nil
}

type oneOf struct{ p50, p99, cpu float64 } // milliseconds

func (b *bench) oneOf(ctx context.Context, n int) (_ *oneOf, err error) {
	d, since, err := b.servedDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	watch := newStopwatch(oneChanges)
	watch.owners = n
	clients, err := newSockets(watch.arrive)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, clients.close()) }()
	if err := clients.follow(ctx, d.gateway, n, since, strconv.Itoa); err != nil {
		return nil, err
	}
	took := time.Duration(oneChanges) * time.Second / onePace
	before := d.gateway.cpu()
	time.Sleep(took / 2)
	idle := 2 * (d.gateway.cpu() - before)
	before = d.gateway.cpu()
	if err := watch.pace(ctx, d.dsn, onePace, oneChanges); err != nil {
		return nil, err
	}
	return &oneOf{cpu: milliseconds(d.gateway.cpu()-before-idle) / oneChanges, p50: watch.percentile(50), p99: watch.percentile(99)}, nil
}
