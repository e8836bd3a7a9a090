package changelog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// partitionSpan is how many versions one partition holds: a day's.
const partitionSpan = Version(24*time.Hour/time.Millisecond) << counterBits

// partitions knows the lower bounds of the partitions that exist. It belongs to the appender.
type partitions struct{ have map[Version]bool }

func partitionOf(v Version) Version { return v - v%partitionSpan }

func partitionName(table string, lower Version) string {
	return fmt.Sprintf("%s_%016x", table, int64(lower))
}

func (p *partitions) load(ctx context.Context, conn *pgx.Conn) error {
	p.have = map[Version]bool{}
	lowers, err := listPartitions(ctx, conn)
	for _, l := range lowers {
		p.have[l] = true
	}
	return err
}

func listPartitions(ctx context.Context, conn interface {
	Query(context.Context, string, ...any) (pgx.Rows, error)
}) ([]Version, error) {
	rows, err := conn.Query(ctx, `SELECT relname::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
		WHERE inhparent = 'walgate.changes'::regclass ORDER BY relname`)
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	var out []Version
	for _, n := range names {
		var l int64
		if _, err := fmt.Sscanf(strings.TrimPrefix(n, "changes_"), "%016x", &l); err == nil {
			out = append(out, Version(l))
		}
	}
	return out, nil
}

// ensure makes the partitions that hold v. They are attached, for making them in place would wait for every reader of the
// log and keep new ones out meanwhile. Within an open log transaction they come and go with it.
func (p *partitions) ensure(ctx context.Context, conn *pgx.Conn, v Version) error {
	lower := partitionOf(v)
	if p.have[lower] {
		return nil
	}
	var exists bool // made by a leader before or beside this one
	if err := conn.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL`, "walgate."+partitionName("changes", lower)).Scan(&exists); err != nil {
		return fmt.Errorf("look for the log's partition: %w", err)
	}
	if exists {
		p.have[lower] = true
		return nil
	}
	sql := ""
	for _, table := range []string{"changes", "transactions"} {
		sql += fmt.Sprintf(`CREATE TABLE walgate.%[1]s (LIKE walgate.%[2]s INCLUDING ALL);
			ALTER TABLE walgate.%[2]s ATTACH PARTITION walgate.%[1]s FOR VALUES FROM (%[3]d) TO (%[4]d);`,
			partitionName(table, lower), table, lower, lower+partitionSpan)
	}
	if _, err := conn.PgConn().Exec(ctx, sql).ReadAll(); err != nil {
		return fmt.Errorf("create the log's partition from %s: %w", lower.Time().Format(time.DateOnly), err)
	}
	p.have[lower] = true
	return nil
}

// Expire applies retention. First it drops the partitions that end at or below droppable, which the previous call
// returned: their floors were committed then, and reads that began before have ended if the calls lie further apart than
// the longest read. Then it raises the floor of each collection to the end of the newest partition that its retention
// has passed. Delete operations of attachments go with the longest retention. now is the physical time of the newest version, not this machine's clock.
func (l *Log) Expire(ctx context.Context, now time.Time, droppable Version) (next Version, dropped []string, err error) {
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		return 0, nil, err
	}
	defer conn.Release()
	lowers, err := listPartitions(ctx, conn)
	if err != nil {
		return 0, nil, err
	}
	for len(lowers) > 0 && lowers[0]+partitionSpan <= droppable {
		err := dropPartition(ctx, conn.Conn(), lowers[0])
		var pg *pgconn.PgError
		if errors.As(err, &pg) && pg.Code == "55P03" { // lock_not_available: somebody still reads there; next time
			break
		}
		if err != nil {
			return 0, dropped, fmt.Errorf("drop an expired partition: %w", err)
		}
		dropped = append(dropped, partitionName("changes", lowers[0]))
		lowers = lowers[1:]
	}
	if err := expireOperations(ctx, conn.Conn(), now); err != nil {
		return 0, dropped, err
	}
	next, err = raiseByRetention(ctx, conn.Conn(), now, lowers)
	return next, dropped, err
}

// raiseByRetention returns the version up to which every collection's retention has passed.
func raiseByRetention(ctx context.Context, conn *pgx.Conn, now time.Time, lowers []Version) (Version, error) {
	type kept struct {
		id        int32
		retention time.Duration
	}
	rows, err := conn.Query(ctx, `SELECT id, retention FROM walgate.collections WHERE fingerprint <> ''`)
	if err != nil {
		return 0, err
	}
	all, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (k kept, err error) { return k, r.Scan(&k.id, &k.retention) })
	if err != nil || len(all) == 0 {
		return 0, err
	}
	next := maxVersion
	for _, k := range all {
		var cut Version
		for _, lower := range lowers {
			if end := lower + partitionSpan; end <= VersionAt(now.Add(-k.retention)) {
				cut = max(cut, end)
			}
		}
		if _, err := conn.Exec(ctx, `UPDATE walgate.collections SET floor = $2, floor_reason = 'retention' WHERE id = $1 AND floor < $2`, k.id, int64(cut)); err != nil {
			return 0, fmt.Errorf("raise a floor by retention: %w", err)
		}
		next = min(next, cut)
	}
	return next, nil
}

func dropPartition(ctx context.Context, conn *pgx.Conn, lower Version) error {
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '1s'`); err != nil {
			return err
		}
		for _, table := range []string{"changes", "transactions"} {
			if _, err := tx.Exec(ctx, fmt.Sprintf(`DROP TABLE IF EXISTS walgate.%s`, partitionName(table, lower))); err != nil {
				return err
			}
		}
		return nil
	})
}
