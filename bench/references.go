package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// referring lets each row name an attachment: any uuid is an id.
const referring = scoped + "    attachments: [{column: id}]\n"

// runReferences measures what references cost: the same backlog with them and without, which is the limit here.
func runReferences(ctx context.Context, b *bench) ([]result, error) {
	n := b.of(500_000)
	without, base, err := drainBacklog(ctx, b, scoped, n)
	if err != nil {
		return nil, err
	}
	with, note, err := drainBacklog(ctx, b, referring, n)
	if err != nil {
		return nil, err
	}
	r := result{name: "rows logged, each with a reference", walgate: float64(n) / with.Seconds(), bare: float64(n) / without.Seconds(), unit: "/s", share: 0.8, note: note + "; without: " + base}
	return []result{r}, nil
}

// drainBacklog lets walgate read a backlog of inserts under a policy. It led before, so that nothing is left to look through.
func drainBacklog(ctx context.Context, b *bench, policy string, n int) (took time.Duration, note string, err error) {
	d, err := b.newDatabase(ctx, policy)
	if err != nil {
		return 0, "", err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.gateway.start(ctx); err != nil {
		return 0, "", err
	}
	err = until(ctx, func() (bool, error) {
		if err := d.gateway.alive(); err != nil {
			return false, err
		}
		var done bool
		err := d.QueryRow(ctx, `SELECT (SELECT count(*) FROM walgate.checkpoint) > 0 AND coalesce(bool_and(swept), $1) FROM walgate.attachment_fills`, policy == scoped).Scan(&done)
		return done, err
	})
	if err := errors.Join(err, d.gateway.stop()); err != nil {
		return 0, "", err
	}
	if err := d.load(ctx, 1, n, owners); err != nil {
		return 0, "", err
	}
	target, err := d.mark(ctx)
	if err != nil {
		return 0, "", err
	}
	if took, err = d.drainWalgate(ctx, target); err != nil {
		return 0, "", err
	}
	sender, writer, err := d.backendsCPU(ctx)
	return took, fmt.Sprintf("%d in %.1f s; CPU: walgate %.1f s, walsender %.1f s, log's writer %.1f s", n, took.Seconds(), d.gateway.cpu().Seconds(), sender.Seconds(), writer.Seconds()), err
}
