package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/redisserver"
)

type options struct {
	scale    float64
	sockets  int
	runs     int
	major    int
	binary   string
	recorded string
	into     string
	record   bool
	strict   bool
}

// of returns a size of the work at the scale that was asked for.
func (o options) of(full int) int { return max(1000, int(float64(full)*o.scale)) }

// bench is what all paths share: the PostgreSQL server and the walgate binary.
type bench struct {
	options
	dir     string
	server  *pgserver.Server
	admin   *pgx.Conn
	version string
	count   int             // databases made
	logs    map[int]*bigLog // by rows
	redis   *redisserver.Server
}

// newBench builds walgate and starts PostgreSQL as a durable server with room for the work: fsync stays on.
func newBench(ctx context.Context, o options) (*bench, error) {
	dir, err := os.MkdirTemp("", "walgate-bench-")
	if err != nil {
		return nil, err
	}
	b := &bench{options: o, dir: dir, logs: map[int]*bigLog{}}
	// Set by hand, the limit also holds for the processes started from here.
	if err := allowFiles(uint64(o.sockets + 1000)); err != nil {
		return nil, errors.Join(err, b.close())
	}
	if err := b.start(ctx); err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

func (b *bench) start(ctx context.Context) (err error) {
	if b.binary == "" {
		b.binary = filepath.Join(b.dir, "walgate")
		build := exec.CommandContext(ctx, "go", "build", "-o", b.binary, "github.com/walgate/walgate")
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("build walgate (run this within its source tree): %w", err)
		}
	}
	b.server, err = pgserver.Start(ctx, pgserver.Options{Major: b.major, Settings: map[string]string{
		"shared_buffers": "1GB", "max_wal_size": "8GB",
	}})
	if err != nil {
		return err
	}
	if b.admin, err = pgx.Connect(ctx, b.server.DSN("postgres")); err != nil {
		return err
	}
	return b.admin.QueryRow(ctx, "SHOW server_version").Scan(&b.version)
}

func (b *bench) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := b.dropLogs(ctx)
	if b.admin != nil {
		b.admin.Close(ctx)
	}
	if b.server != nil {
		err = errors.Join(err, b.server.Close(ctx))
	}
	if b.redis != nil {
		err = errors.Join(err, b.redis.Close())
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}

// dropLogs drops the databases that several paths share.
func (b *bench) dropLogs(ctx context.Context) (err error) {
	for rows, l := range b.logs {
		err = errors.Join(err, l.drop(ctx))
		delete(b.logs, rows)
	}
	return err
}

// table is the one that all paths work on: rows of about 300 bytes.
const table = `CREATE TABLE items (
	id uuid PRIMARY KEY DEFAULT gen_random_uuid(), owner int NOT NULL, title text NOT NULL, body text NOT NULL,
	done bool NOT NULL DEFAULT false, updated_at timestamptz NOT NULL DEFAULT clock_timestamp())`

// rowsSQL makes rows for so many owners, from one number to another. Digests as text: they compress to a half or so.
const rowsSQL = `INSERT INTO items (owner, title, body)
	SELECT i %% %d, 'Item "' || i || '" of this owner', md5(i::text) || md5(i || 'b') || md5(i || 'c') || md5(i || 'd') || md5(i || 'e')
	FROM generate_series(%d, %d) AS i`

// database is one run's source, with walgate and a bare reader's slot installed on it.
type database struct {
	*pgx.Conn
	b       *bench
	name    string
	dsn     string
	gateway *gateway
	others  []*gateway // further instances
}

// scoped lets each caller see the rows of the owner that its subject names; open lets everybody see all.
const (
	scoped = "    scope: {owner: claims.sub}\n"
	open   = ""
)

// newDatabase makes an empty database with the table, prepared by walgate init, and a second slot for the bare reader.
func (b *bench) newDatabase(ctx context.Context, policy string) (*database, error) {
	d, err := b.emptyDatabase(ctx, policy)
	if err != nil {
		return nil, err
	}
	return d, d.install(ctx)
}

// servedDatabase is newDatabase with a gateway that has read all of it, and everybody's position at its end.
func (b *bench) servedDatabase(ctx context.Context, policy string) (*database, string, error) {
	d, err := b.newDatabase(ctx, policy)
	if err != nil {
		return nil, "", err
	}
	since := ""
	if err = d.caughtUp(ctx); err == nil {
		since, err = d.gateway.anyonesPosition(ctx)
	}
	if err != nil {
		return nil, "", errors.Join(err, d.drop(ctx))
	}
	return d, since, nil
}

// emptyDatabase makes a database with the table only.
func (b *bench) emptyDatabase(ctx context.Context, policy string) (*database, error) {
	b.count++
	name := fmt.Sprintf("bench_%d", b.count)
	if _, err := b.admin.Exec(ctx, "CREATE DATABASE "+name); err != nil {
		return nil, err
	}
	d := &database{b: b, name: name, dsn: b.server.DSN(name)}
	var err error
	if d.Conn, err = pgx.Connect(ctx, d.dsn); err != nil {
		return nil, err
	}
	if _, err = d.Exec(ctx, table); err != nil {
		return nil, err
	}
	d.gateway, err = newGateway(b, d, policy, "")
	return d, err
}

// install runs walgate init and makes the bare reader's slot.
func (d *database) install(ctx context.Context) error {
	if err := d.gateway.init(ctx); err != nil {
		return err
	}
	_, err := d.Exec(ctx, "CREATE PUBLICATION bare FOR TABLE items")
	if err == nil {
		_, err = d.Exec(ctx, "SELECT pg_create_logical_replication_slot($1, 'pgoutput')", d.bareSlot())
	}
	return err
}

func (d *database) bareSlot() string { return d.name + "_bare" }

// drop stops walgate and removes everything of this run.
func (d *database) drop(ctx context.Context) error {
	err := d.gateway.stop()
	for _, g := range d.others {
		err = errors.Join(err, g.stop())
	}
	for _, slot := range []string{d.name, d.bareSlot()} {
		err = errors.Join(err, d.dropSlot(ctx, slot))
	}
	d.Close(ctx)
	_, dropped := d.b.admin.Exec(ctx, "DROP DATABASE "+d.name+" WITH (FORCE)")
	return errors.Join(err, dropped)
}

// dropSlot ends whoever reads the slot: a walsender notices late that its reader has gone.
func (d *database) dropSlot(ctx context.Context, slot string) error {
	return until(ctx, func() (bool, error) {
		var gone bool
		err := d.QueryRow(ctx, `SELECT count(*) = 0 OR bool_or(pg_terminate_backend(active_pid)) IS NULL
			FROM pg_replication_slots WHERE slot_name = $1`, slot).Scan(&gone)
		if err != nil || !gone {
			return false, err
		}
		_, err = d.Exec(ctx, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1`, slot)
		return true, err
	})
}

// load inserts the rows from first to last (numbers) for so many owners, a thousand a transaction.
func (d *database) load(ctx context.Context, first, last, owners int) error {
	const size = 1000
	for i := first; i <= last; i += size {
		if _, err := d.Exec(ctx, fmt.Sprintf(rowsSQL, owners, i, min(i+size-1, last))); err != nil {
			return err
		}
	}
	return nil
}

// mark commits one row more and returns a position before its commit: whoever has passed it has read all before.
func (d *database) mark(ctx context.Context) (lsn string, err error) {
	if err := d.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&lsn); err != nil {
		return "", err
	}
	_, err = d.Exec(ctx, "INSERT INTO items (owner, title, body) VALUES (0, 'mark', '')")
	return lsn, err
}

// settle makes the server write what it owes before a measurement.
func (d *database) settle(ctx context.Context) error {
	_, err := d.Exec(ctx, "CHECKPOINT")
	return err
}

// until asks again and again, often enough for what is timed with it.
func until(ctx context.Context, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
