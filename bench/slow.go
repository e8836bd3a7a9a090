package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// slowOwners are the scopes that slow readers share: each change is for one of them.
const slowOwners = 100

// runSlow lets changes pass while sockets stand still, half as many as the largest fan-out has, and then reads them all.
// The sockets take next to nothing by themselves, so that it is walgate that must do something about them.
func runSlow(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	since, err := d.gateway.anyonesPosition(ctx)
	if err != nil {
		return nil, err
	}
	clients, err := newSockets(nil)
	if err != nil {
		return nil, err
	}
	clients.small, clients.lenient = true, true
	defer func() { err = errors.Join(err, clients.close()) }()
	n, changes := b.sockets/2, b.of(100_000)/slowOwners*slowOwners
	if err := clients.follow(ctx, d.gateway, n, since, func(i int) string { return strconv.Itoa(i % slowOwners) }); err != nil {
		return nil, err
	}
	before := d.gateway.memory()
	d.gateway.forgetPeak()
	for _, one := range clients.open {
		if err := clients.poller.pause(one); err != nil {
			return nil, err
		}
	}
	began := time.Now()
	for from := 1; from <= changes; from += slowOwners {
		if _, err := d.Exec(ctx, fmt.Sprintf(rowsSQL, slowOwners, from, from+slowOwners-1)); err != nil {
			return nil, err
		}
	}
	target, err := d.mark(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := d.gateway.logged(ctx, target); err != nil {
		return nil, err
	}
	still := time.Since(began)
	standing := d.gateway.peakMemory()
	for _, one := range clients.open {
		if err := clients.poller.add(one); err != nil {
			return nil, err
		}
	}
	began = time.Now()
	want := int64(n) * int64(changes/slowOwners)
	served := "everybody got everything"
	if err := clients.wait(ctx, &clients.changes, want); err != nil {
		served = fmt.Sprintf("NOT everybody was served: %v", err)
	}
	return []result{{name: fmt.Sprintf("%d sockets that stand still for %d changes, peak memory", n, changes), walgate: d.gateway.peakMemory(), unit: "MB", less: true,
		note: fmt.Sprintf("%.0f MB before, at most %.0f MB while they stood still (%.1f s); %s (%d frames in %.1f s), %d were closed",
			before, standing, still.Seconds(), served, clients.changes.Load(), time.Since(began).Seconds(), clients.refused.Load())}}, nil
}
