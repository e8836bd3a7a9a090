package changelog

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/internal/migrate"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// Log is the change log in one database. Safe for concurrent use.
type Log struct {
	pool *pgxpool.Pool
	// Patience is how long an append may take before the server is asked what it is doing. Set both before NewAppender.
	Patience time.Duration
	// OnWaiting, where not nil, is told why an append takes long, again and again, and "" when that is over; it is called
	// on the watchdog's goroutine.
	OnWaiting func(why string)
	share     int // of a page of operations that is read of each scope; 0: as the page's limit asks for
}

// Open makes a pool of at most maxConns connections to the log's database; it connects when first used. Every session
// commits durably whatever the database's default is.
func Open(ctx context.Context, url string, maxConns int) (*Log, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("storage url: %w", err)
	}
	cfg.MaxConns = int32(maxConns)
	cfg.ConnConfig.RuntimeParams["application_name"] = "walgate"
	for _, name := range []string{"statement_timeout", "lock_timeout"} {
		cfg.ConnConfig.RuntimeParams[name] = "0" // what a role sets for the application; here a context bounds each call
	}
	// A page is to cost what it returns. With statistics older than a burst of changes, PostgreSQL takes a caller's rows for
	// fewer than a page, and a bitmap scan would read all of them to sort out the first.
	cfg.ConnConfig.RuntimeParams["enable_bitmapscan"] = "off"
	boundConnections(cfg)
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("storage: %w", err)
	}
	return &Log{pool: pool, Patience: defaultPatience}, nil
}

// Close ends the pool's connections.
func (l *Log) Close() { l.pool.Close() }

// Migrate creates or updates the log's tables.
func (l *Log) Migrate(ctx context.Context) error {
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect to the change log's database: %w", err)
	}
	defer conn.Release()
	sub, err := fs.Sub(migrationFiles, "migrations")
	if err != nil {
		return err
	}
	return migrate.Up(ctx, conn.Conn(), "log", sub)
}

// Uninstall drops the log and everything else in schema walgate of its database.
func (l *Log) Uninstall(ctx context.Context) error {
	_, err := l.pool.Exec(ctx, `DROP SCHEMA IF EXISTS walgate CASCADE`)
	return err
}

// Server is the identity of a PostgreSQL server: it changes when a standby is promoted or a backup restored elsewhere.
type Server struct {
	System   string // system identifier
	Timeline int64
}

// ServerIdentity asks a connection which server it is on.
func ServerIdentity(ctx context.Context, q interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}) (Server, error) {
	var s Server
	err := q.QueryRow(ctx, `SELECT (SELECT system_identifier::text FROM pg_control_system()),
		('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint`).Scan(&s.System, &s.Timeline)
	if err != nil {
		return s, fmt.Errorf("identify the server: %w", err)
	}
	return s, nil
}

// Note stores the number that the leader of an epoch has noted in the source just before (see Claim.Noted).
func (l *Log) Note(ctx context.Context, epoch, noted int64) error {
	done, err := l.pool.Exec(ctx, `UPDATE walgate.checkpoint SET noted = $2 WHERE epoch = $1`, epoch, noted)
	if err == nil && done.RowsAffected() == 0 { // the caller must not go on counting
		err = errors.New("another instance has taken over")
	}
	if err != nil {
		return fmt.Errorf("note the source's number in the change log: %w", err)
	}
	return nil
}

// Collection is the stored state of one collection.
type Collection struct {
	ID          int32
	Name        string
	Fingerprint string
	Shape       string
	Floor       Version
	FloorReason string
	Stopped     string
	Refill      Version // of the last raise of the floor that isn't retention's: a fill that began before is no good
}

// Head is where the log stood in one snapshot.
type Head struct {
	Version     Version
	History     string
	Floor       Version
	LSN         LSN
	Claim       int64        // a random number of the leader that took the log over last
	Collections []Collection // sorted by id
	Gaps        []Version    // pairs, rising: no version between the two of a pair was ever issued
}

// Issued says whether the log may have issued v, as far as it remembers.
func (h *Head) Issued(v Version) bool { return v <= h.Version && !h.Skipped(v) }

// Skipped says whether v lies in a gap: who has it has seen what was lost.
func (h *Head) Skipped(v Version) bool {
	for i := 0; i+1 < len(h.Gaps); i += 2 {
		if h.Gaps[i] < v && v < h.Gaps[i+1] {
			return true
		}
	}
	return false
}

// Collection returns the state of the collection with this id, or nil.
func (h *Head) Collection(id int32) *Collection {
	for i := range h.Collections {
		if h.Collections[i].ID == id {
			return &h.Collections[i]
		}
	}
	return nil
}

const (
	headSQL = `SELECT version, history, floor, lsn - '0/0'::pg_lsn, claim,
		ARRAY(SELECT v FROM walgate.gaps, unnest(ARRAY[after_version, first_version]) v ORDER BY v) FROM walgate.checkpoint`
	collectionsSQL = `SELECT id, name, fingerprint, shape, floor, floor_reason, stopped, refill FROM walgate.collections ORDER BY id`
)

// Head reads where the log stands. ErrNotInitialised where no leader has started it yet.
func (l *Log) Head(ctx context.Context) (*Head, error) {
	var h Head
	b := &pgx.Batch{}
	b.Queue(`BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY`)
	queueHead(b, &h)
	b.Queue(`COMMIT`)
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return nil, readError(err)
	}
	return &h, nil
}

// Newest reads the newest version that was issued. ErrNotInitialised where no leader has started the log yet.
func (l *Log) Newest(ctx context.Context) (v Version, err error) {
	err = l.pool.QueryRow(ctx, `SELECT version FROM walgate.checkpoint`).Scan(&v)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return 0, ErrNotInitialised
	case err != nil:
		return 0, readError(err)
	}
	return v, nil
}

// queueHead queues the reading of the checkpoint and of the collections.
func queueHead(b *pgx.Batch, h *Head) {
	b.Queue(headSQL).QueryRow(func(r pgx.Row) error {
		err := r.Scan(&h.Version, &h.History, &h.Floor, (*pgLSN)(&h.LSN), &h.Claim, &h.Gaps)
		if errors.Is(err, pgx.ErrNoRows) {
			return ErrNotInitialised
		}
		return err
	})
	b.Queue(collectionsSQL).Query(func(rows pgx.Rows) (err error) {
		h.Collections, err = pgx.CollectRows(rows, scanCollection)
		return err
	})
}

func scanCollection(r pgx.CollectableRow) (c Collection, err error) {
	err = r.Scan(&c.ID, &c.Name, &c.Fingerprint, &c.Shape, &c.Floor, &c.FloorReason, &c.Stopped, &c.Refill)
	return c, err
}

// EstimatedRows returns about how many rows the log holds, from the planner's statistics.
func (l *Log) EstimatedRows(ctx context.Context) (int64, error) {
	var n int64
	err := l.pool.QueryRow(ctx, `SELECT coalesce(sum(greatest(reltuples, 0)), 0)::int8 FROM pg_inherits JOIN pg_class ON oid = inhrelid
		WHERE inhparent = 'walgate.changes'::regclass`).Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("estimate the change log's size: %w", err)
	}
	return n, nil
}

// Ping says whether the log's database answers.
func (l *Log) Ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return l.pool.Ping(ctx)
}
