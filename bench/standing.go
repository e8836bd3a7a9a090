package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/replication"
	"github.com/walgate/walgate/schema"
)

const (
	standingOthers = 4
	standingFor    = 10 * time.Second
	standingCalls  = 1000
)

// runStanding measures what one more instance costs while nothing happens: of PostgreSQL's and its own processor time, and in
// connections; and what each of the calls takes that it is made of.
func runStanding(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := errors.Join(d.caughtUp(ctx), d.gateway.stop()); err != nil {
		return nil, err
	}
	if results, err = d.calls(ctx); err != nil {
		return nil, err
	}
	if err := d.share(ctx, scoped, standingOthers); err != nil {
		return nil, err
	}
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	alone, _, before, err := d.idle(ctx)
	if err != nil {
		return nil, err
	}
	if err := d.startOthers(ctx); err != nil {
		return nil, err
	}
	all, own, after, err := d.idle(ctx)
	if err != nil {
		return nil, err
	}
	each := func(v time.Duration) float64 {
		return milliseconds(v) / standingOthers / standingFor.Seconds()
	}
	return append(results,
		result{name: "PostgreSQL's CPU a second for one more idle instance", walgate: each(all - alone), unit: "ms", less: true, note: "source and log"},
		result{name: "an idle instance's own CPU a second", walgate: each(own), unit: "ms", less: true},
		result{name: "connections of one more idle instance", walgate: float64(after-before) / standingOthers, less: true}), nil
}

// idle returns what the backends and the other instances take of the processors in a while, and how many backends there are.
func (d *database) idle(ctx context.Context) (backends, others time.Duration, connections int, err error) {
	own := func() (sum time.Duration) {
		for _, g := range d.others {
			if g.process != nil {
				sum += processNanoseconds(g.process.Process.Pid)
			}
		}
		return sum
	}
	time.Sleep(2 * time.Second) // what a start left to do
	before, _, err := d.backendsTime(ctx)
	if err != nil {
		return 0, 0, 0, err
	}
	ownBefore := own()
	time.Sleep(standingFor)
	after, connections, err := d.backendsTime(ctx)
	return after - before, own() - ownBefore, connections, err
}

// calls times PostgreSQL's side of what instances ask again and again.
func (d *database) calls(ctx context.Context) (results []result, err error) {
	log, err := changelog.Open(ctx, d.dsn, 1)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	pool, err := schema.OpenPool(ctx, d.dsn, 4)
	if err != nil {
		return nil, err
	}
	defer pool.Close()
	watcher := replication.NewWatcher(pool, schema.PublicationsFor("walgate"), map[string]policies.Spec{"items": {Table: "public.items"}}, false, time.Hour, slog.New(slog.DiscardHandler))
	if _, err := watcher.Start(ctx); err != nil {
		return nil, err
	}
	for _, c := range []struct {
		name  string
		every string
		call  func() error
	}{
		{"a look at the log's position", "each second of an instance", func() error { _, err := log.Head(ctx); return err }},
		{"a look at the slot", "each 125 to 250 ms of an instance that doesn't lead", func() error {
			var pid int64
			return pool.QueryRow(ctx, `SELECT coalesce((SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1), 0)::int8`, d.name).Scan(&pid)
		}},
		{"a look at the catalog", "each catalog.poll_interval (5 s) of an instance; one table", func() error { return watcher.Reload(ctx) }},
	} {
		if err := c.call(); err != nil { // connects
			return nil, err
		}
		before, _, err := d.backendsTime(ctx)
		if err != nil {
			return nil, err
		}
		for range standingCalls {
			if err := c.call(); err != nil {
				return nil, err
			}
		}
		after, _, err := d.backendsTime(ctx)
		if err != nil {
			return nil, err
		}
		results = append(results, result{name: "PostgreSQL's CPU for " + c.name, walgate: milliseconds(after-before) / standingCalls, unit: "ms", less: true, note: c.every})
	}
	return results, nil
}

// backendsTime is the processor time of walgate's backends so far, and their number.
func (d *database) backendsTime(ctx context.Context) (sum time.Duration, n int, err error) {
	rows, err := d.Query(ctx, "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'walgate%' AND datname = $1", d.name)
	if err != nil {
		return 0, 0, err
	}
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	for _, pid := range pids {
		sum += processNanoseconds(int(pid))
	}
	return sum, len(pids), err
}

// processNanoseconds returns the processor time of all of a process's threads; 0 where the system doesn't tell.
func processNanoseconds(pid int) (sum time.Duration) {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return 0
	}
	for _, thread := range threads {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/schedstat", pid, thread.Name()))
		if fields := bytes.Fields(text); len(fields) > 0 {
			n, _ := strconv.ParseInt(string(fields[0]), 10, 64) // the kernel writes a number
			sum += time.Duration(n)
		}
	}
	return sum
}
