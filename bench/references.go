package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// referring lets each row name an attachment: any uuid is an id.
const referring = scoped + "    attachments: [{column: id}]\n"

// runReferences measures what references cost: the same backlogs with them and without, which is the limit here.
func runReferences(ctx context.Context, b *bench) ([]result, error) {
	n := b.of(500_000)
	inserts := func(d *database) error { return d.load(ctx, 1, n, owners) }
	updates := func(d *database) error {
		if err := inserts(d); err != nil {
			return err
		}
		if err := errors.Join(d.caughtUp(ctx), d.gateway.stop()); err != nil { // the log knows them, and what they refer to
			return err
		}
		_, err := d.Exec(ctx, updateAll)
		return err
	}
	var results []result
	for _, w := range []struct {
		name  string
		write func(*database) error
	}{{"inserts logged, each with a reference", inserts}, {"updates logged, each of a row with a reference", updates}} {
		without, base, err := drainBacklog(ctx, b, scoped, n, w.write)
		if err != nil {
			return nil, err
		}
		with, note, err := drainBacklog(ctx, b, referring, n, w.write)
		if err != nil {
			return nil, err
		}
		after, _, err := drainBacklog(ctx, b, scoped, n, w.write) // the disk still has to do what was written before
		if err != nil {
			return nil, err
		}
		without = (without + after) / 2
		results = append(results, result{name: w.name, walgate: float64(n) / with.Seconds(), bare: float64(n) / without.Seconds(), unit: "/s", share: 0.8, note: note + "; without: " + base})
	}
	return results, nil
}

// updateAll updates every row once, a thousand a transaction.
const updateAll = `DO $$
	DECLARE ids uuid[] := ARRAY(SELECT id FROM items);
	BEGIN
		FOR i IN 0 .. cardinality(ids) / 1000 LOOP
			UPDATE items SET done = NOT done, updated_at = clock_timestamp() WHERE id = ANY (ids[i * 1000 + 1 : i * 1000 + 1000]);
			COMMIT;
		END LOOP;
	END $$`

// drainBacklog lets walgate read a backlog under a policy. It led before, so that nothing is left to look through.
func drainBacklog(ctx context.Context, b *bench, policy string, n int, write func(*database) error) (took time.Duration, note string, err error) {
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
	if err := write(d); err != nil {
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
