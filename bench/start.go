package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// runStart times walgate from the start of its process until clients can be served: on an empty database, for the first
// time after init, and on one with a large table and its log.
func runStart(ctx context.Context, b *bench) ([]result, error) {
	empty, err := b.newDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	first, err := empty.startUp(ctx)
	if err := errors.Join(err, empty.drop(ctx)); err != nil {
		return nil, err
	}
	l, err := b.bigLog(ctx, 10*b.of(500_000))
	if err != nil {
		return nil, err
	}
	large, err := l.startUp(ctx)
	if err != nil {
		return nil, err
	}
	fresh, err := b.startOnTable(ctx, b.of(1_000_000))
	if err != nil {
		return nil, err
	}
	return []result{
		{name: "empty database, after init", walgate: milliseconds(first), unit: "ms", less: true, wanted: 2000},
		{name: fmt.Sprintf("table of %d, after init", b.of(1_000_000)), walgate: milliseconds(fresh), bare: milliseconds(first), unit: "ms", less: true, wanted: 2000, note: "the empty database is the limit"},
		{name: fmt.Sprintf("table and log of %d, again", l.rows), walgate: milliseconds(large), bare: milliseconds(first), unit: "ms", less: true, wanted: 2000, note: "the empty database is the limit"},
	}, nil
}

// startUp starts walgate, waits until it is ready, and stops it.
func (d *database) startUp(ctx context.Context) (time.Duration, error) {
	if err := d.gateway.start(ctx); err != nil {
		return 0, err
	}
	err := d.gateway.ready(ctx)
	took := time.Since(d.gateway.started)
	return took, errors.Join(err, d.gateway.stop())
}

// startOnTable times the first start on a table that was there before init.
func (b *bench) startOnTable(ctx context.Context, rows int) (took time.Duration, err error) {
	d, err := b.emptyDatabase(ctx, scoped)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.insert(ctx, rows); err != nil {
		return 0, err
	}
	if err := d.install(ctx); err != nil {
		return 0, err
	}
	return d.startUp(ctx)
}
