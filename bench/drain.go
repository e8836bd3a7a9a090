package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

// owners of the rows that are drained: each row goes to one of so many scopes.
const owners = 1000

func runDrain(ctx context.Context, b *bench) ([]result, error) {
	n := b.of(500_000)
	return drain(ctx, b, n, result{name: "rows logged", wanted: 100_000, share: 0.7}, func(d *database) error { return d.load(ctx, 1, n, owners) })
}

// runUpdates makes the transactions within the server, which is the fastest way to get so many small ones.
func runUpdates(ctx context.Context, b *bench) ([]result, error) {
	n := b.of(200_000)
	return drain(ctx, b, n, result{name: "one-row transactions logged", wanted: 50_000}, func(d *database) error { return d.smallTransactions(ctx, n) })
}

// updateEach updates each row in a transaction of its own.
const updateEach = `DO $$
	DECLARE ids uuid[] := ARRAY(SELECT id FROM items);
	BEGIN
		FOR i IN 1 .. cardinality(ids) LOOP
			UPDATE items SET done = NOT done, updated_at = clock_timestamp() WHERE id = ids[i];
			COMMIT;
		END LOOP;
	END $$`

func runLarge(ctx context.Context, b *bench) ([]result, error) {
	n := b.of(1_000_000)
	results, err := drain(ctx, b, n, result{name: "rows logged", wanted: 60_000}, func(d *database) error { return d.insert(ctx, n) })
	if err != nil {
		return nil, err
	}
	results[1].wanted = 150
	return results, nil
}

// insert makes rows in one transaction.
func (d *database) insert(ctx context.Context, count int) error {
	_, err := d.Exec(ctx, fmt.Sprintf(rowsSQL, owners, 1, count))
	return err
}

// skip moves both slots past what was written so far.
func (d *database) skip(ctx context.Context) error {
	for _, slot := range []string{d.name, d.bareSlot()} {
		if _, err := d.Exec(ctx, "SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())", slot); err != nil {
			return err
		}
	}
	return nil
}

// drain writes a backlog while nobody reads, then lets first the bare pipe and then walgate read it. Neither meets the
// WAL of its own log on the way: it lies behind the backlog.
func drain(ctx context.Context, b *bench, count int, r result, write func(*database) error) (results []result, err error) {
	d, err := b.newDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := write(d); err != nil {
		return nil, err
	}
	target, err := d.mark(ctx)
	if err != nil {
		return nil, err
	}
	bare, err := d.drainBare(ctx, target, count)
	if err != nil {
		return nil, err
	}
	walgate, err := d.drainWalgate(ctx, target)
	if err != nil {
		return nil, err
	}
	r.walgate, r.bare, r.unit = float64(count)/walgate.Seconds(), float64(count)/bare.Seconds(), "/s"
	sender, writer, err := d.backendsCPU(ctx)
	if err != nil {
		return nil, err
	}
	r.note = fmt.Sprintf("%d in %.1f s; CPU: walgate %.1f s, walsender %.1f s, log's writer %.1f s", count, walgate.Seconds(), d.gateway.cpu().Seconds(), sender.Seconds(), writer.Seconds())
	peak := result{name: "peak memory", walgate: d.gateway.peakMemory(), unit: "MB", less: true}
	return []result{r, peak}, nil
}

// backendsCPU returns the processor times of PostgreSQL's processes for walgate: the one that sends the WAL, and the busiest
// of the others, which writes the log.
func (d *database) backendsCPU(ctx context.Context) (sender, writer time.Duration, err error) {
	rows, err := d.Query(ctx, "SELECT pid, backend_type = 'walsender' FROM pg_stat_activity WHERE application_name LIKE 'walgate%' AND datname = $1", d.name)
	if err != nil {
		return 0, 0, err
	}
	var pid int
	var sends bool
	_, err = pgx.ForEachRow(rows, []any{&pid, &sends}, func() error {
		if sends {
			sender = processCPU(pid)
		} else {
			writer = max(writer, processCPU(pid))
		}
		return nil
	})
	return sender, writer, err
}

func (d *database) drainBare(ctx context.Context, target string, count int) (time.Duration, error) {
	lsn, err := pglogrepl.ParseLSN(target)
	if err != nil {
		return 0, err
	}
	if err := d.settle(ctx); err != nil {
		return 0, err
	}
	p := &barePipe{dsn: d.dsn, slot: d.bareSlot(), target: lsn, least: bareLeast}
	if err := p.run(ctx); err != nil {
		return 0, err
	}
	if p.rows != count+1 { // and the mark
		return 0, fmt.Errorf("the bare reader saw %d rows instead of %d", p.rows, count+1)
	}
	return time.Since(p.began), nil
}

func (d *database) drainWalgate(ctx context.Context, target string) (time.Duration, error) {
	if err := d.settle(ctx); err != nil {
		return 0, err
	}
	if err := d.gateway.start(ctx); err != nil {
		return 0, err
	}
	began, err := d.gateway.streamingSince(ctx)
	if err != nil {
		return 0, err
	}
	ended, err := d.gateway.logged(ctx, target)
	return ended.Sub(began), err
}
