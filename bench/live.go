package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/walgate/walgate/internal/pgserver"
)

// liveClients write at once.
const liveClients = 8

// liveRowsSQL makes the rows that updateOne finds by number.
const liveRowsSQL = `INSERT INTO items (id, owner, title, body)
	SELECT md5(i::text)::uuid, i %% 1000, 'Item "' || i || '" of this owner', md5(i::text) || md5(i || 'b') || md5(i || 'c') || md5(i || 'd') || md5(i || 'e')
	FROM generate_series(1, %d) AS i`

// updateOne is the application's transaction; the clock is read within it, so that it comes a little before the commit.
const updateOne = `UPDATE items SET title = 'upd ' || %[1]s, done = NOT done, updated_at = clock_timestamp() WHERE id = md5(%[1]s::text)::uuid`

// runLive measures what an application reaches while walgate reads along, beside what it reaches while the bare pipe
// does. Each has one client that gets everything. The bare pipe goes first and last, half of the load each time, so
// that a machine that grows slower meanwhile doesn't decide.
func runLive(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, open)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	count, rows := b.of(200_000)/liveClients*liveClients, b.of(500_000)
	if _, err := d.Exec(ctx, fmt.Sprintf(liveRowsSQL, rows)); err != nil {
		return nil, err
	}
	load, err := b.newLoad(ctx, d, rows)
	if err != nil {
		return nil, err
	}
	alone, err := load.run(ctx, count/2)
	if err != nil {
		return nil, err
	}
	var bareRate float64
	bareLag := &lags{}
	bareHalf := func() error {
		rate, err := d.liveBare(ctx, load, count/2, bareLag)
		bareRate += rate / 2
		return err
	}
	if err := bareHalf(); err != nil {
		return nil, err
	}
	lag := &lags{}
	rate, cpu, err := d.liveWalgate(ctx, load, count, lag)
	if err != nil {
		return nil, err
	}
	if err := d.gateway.stop(); err != nil {
		return nil, err
	}
	if err := bareHalf(); err != nil {
		return nil, err
	}
	note := fmt.Sprintf("%d by %s; with nothing beside it: %s tx/s; walgate took %.0f µs of CPU for each", count, load.name, number(alone), float64(cpu.Microseconds())/float64(count))
	return []result{
		{name: "application's transactions", walgate: rate, bare: bareRate, unit: "/s", share: 0.9, note: note},
		{name: "commit to client, p50", walgate: lag.percentile(50), bare: bareLag.percentile(50), unit: "ms", less: true},
		{name: "commit to client, p99", walgate: lag.percentile(99), bare: bareLag.percentile(99), unit: "ms", less: true, wanted: 50},
	}, nil
}

// liveWalgate runs the load beside walgate with one subscriber.
func (d *database) liveWalgate(ctx context.Context, load *load, count int, lag *lags) (rate float64, cpu time.Duration, err error) {
	if err := d.caughtUp(ctx); err != nil {
		return 0, 0, err
	}
	since, err := d.gateway.anyonesPosition(ctx)
	if err != nil {
		return 0, 0, err
	}
	client, err := newSockets(func(payload []byte, at time.Time) { lag.add(payload, at, time.RFC3339Nano) })
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, client.close()) }()
	if err := client.follow(ctx, d.gateway, 1, since, func(int) string { return "1" }); err != nil {
		return 0, 0, err
	}
	if err := d.settle(ctx); err != nil {
		return 0, 0, err
	}
	before := d.gateway.cpu()
	if rate, err = load.run(ctx, count); err != nil {
		return 0, 0, err
	}
	err = client.wait(ctx, &client.changes, int64(count))
	return rate, d.gateway.cpu() - before, err
}

// liveBare runs the load beside the bare pipe with one client. Its slot is a new one: the old would begin with what was
// written meanwhile.
func (d *database) liveBare(ctx context.Context, load *load, count int, lag *lags) (rate float64, err error) {
	if err := d.dropSlot(ctx, d.bareSlot()); err != nil {
		return 0, err
	}
	if _, err := d.Exec(ctx, "SELECT pg_create_logical_replication_slot($1, 'pgoutput')", d.bareSlot()); err != nil {
		return 0, err
	}
	seen, all := 0, make(chan struct{})
	pipe, err := d.startBarePipe(ctx, func(line []byte, at time.Time) {
		lag.add(line, at, "2006-01-02 15:04:05.999999-07")
		if seen++; seen == count {
			close(all)
		}
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, pipe.stop()) }()
	if err := d.settle(ctx); err != nil {
		return 0, err
	}
	if rate, err = load.run(ctx, count); err != nil {
		return 0, err
	}
	select {
	case <-all:
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(time.Minute):
		return 0, errors.New("the bare pipe's client did not get everything within a minute")
	}
	return rate, nil
}

// lags are the times from a row's updated_at to its arrival. Every eighth row is enough, and costs the machine less.
type lags struct {
	mu   sync.Mutex
	seen int
	took []time.Duration
}

func (l *lags) add(document []byte, at time.Time, layout string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.seen++; l.seen%8 != 0 {
		return
	}
	_, rest, _ := bytes.Cut(document, []byte(`"updated_at":"`))
	text, _, _ := bytes.Cut(rest, []byte(`"`))
	if written, err := time.Parse(layout, string(text)); err == nil {
		l.took = append(l.took, at.Sub(written))
	}
}

// percentile in milliseconds.
func (l *lags) percentile(p int) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.took) == 0 {
		return 0
	}
	slices.Sort(l.took)
	return milliseconds(l.took[min(len(l.took)*p/100, len(l.took)-1)])
}

// load is an application of eight clients.
type load struct {
	name    string
	d       *database
	rows    int
	pgbench string // its path; empty: our own clients
	script  string
}

// newLoad takes pgbench where it lies beside the server's binaries. Packages of bare servers have none: then it is our
// own clients, who need somewhat more of the machine; it is the same for walgate and for the limit.
func (b *bench) newLoad(ctx context.Context, d *database, rows int) (*load, error) {
	l := &load{name: fmt.Sprintf("our own %d clients (no pgbench beside the server's binaries)", liveClients), d: d, rows: rows}
	installs, err := pgserver.Find(ctx)
	if err != nil {
		return nil, err
	}
	for _, install := range installs {
		file := filepath.Join(install.Bin, "pgbench")
		if _, err := os.Stat(file); err == nil && (b.major == 0 || b.major == install.Major) {
			l.name, l.pgbench = fmt.Sprintf("pgbench -c %d -j 2 -M prepared", liveClients), file
			l.script = filepath.Join(b.dir, "update.pgbench")
			text := fmt.Sprintf("\\set n random(1, %d)\n", rows) + fmt.Sprintf(updateOne, ":n") + ";\n"
			return l, os.WriteFile(l.script, []byte(text), 0o644)
		}
	}
	return l, nil
}

var tpsLine = regexp.MustCompile(`tps = ([0-9.]+)`)

// run makes count transactions and returns how many there were a second.
func (l *load) run(ctx context.Context, count int) (float64, error) {
	each := strconv.Itoa(count / liveClients)
	if l.pgbench == "" {
		return l.ownClients(ctx, count/liveClients, updateOne)
	}
	out, err := exec.CommandContext(ctx, l.pgbench, "-n", "-c", strconv.Itoa(liveClients), "-j", "2", "-M", "prepared", "-t", each, "-f", l.script, l.d.dsn).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("pgbench: %w\n%s", err, out)
	}
	found := tpsLine.FindSubmatch(out)
	if found == nil {
		return 0, fmt.Errorf("pgbench didn't say how many transactions there were a second:\n%s", out)
	}
	return strconv.ParseFloat(string(found[1]), 64)
}

func (l *load) ownClients(ctx context.Context, each int, statement string) (float64, error) {
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for range liveClients {
		g.Go(func() error {
			conn, err := pgx.Connect(ctx, l.d.dsn)
			if err != nil {
				return err
			}
			defer conn.Close(context.WithoutCancel(ctx))
			sql := fmt.Sprintf(statement, "$1::int")
			for range each {
				if _, err := conn.Exec(ctx, sql, 1+rand.IntN(l.rows)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := g.Wait()
	return float64(each*liveClients) / time.Since(began).Seconds(), err
}
