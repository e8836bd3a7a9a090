package replication

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/schema"
)

// How long a look at whether tables are empty may take: at each one, behind a lock or through dead rows, and at all.
const (
	emptyLock = 200 * time.Millisecond
	emptyRead = time.Second
	emptyAll  = 5 * time.Second
)

// claimed describes the collections as this instance's configuration and the catalog have them. Only of those that the log
// doesn't know yet does it matter whether they are empty.
func (l *Leader) claimed(ctx context.Context, conn *pgx.Conn, known map[string]bool) []changelog.ClaimedCollection {
	d := l.o.Watcher.Current()
	var out []changelog.ClaimedCollection
	for name, why := range d.Stopped {
		out = append(out, changelog.ClaimedCollection{Name: name, Stopped: why})
	}
	limit := time.Now().Add(emptyAll)
	for _, c := range d.Set.Collections {
		if bare := l.o.Watcher.bare(c); bare != "" { // its next row would stop it
			out = append(out, changelog.ClaimedCollection{Name: c.Name, Stopped: withoutFullReason(bare)})
			continue
		}
		out = append(out, changelog.ClaimedCollection{
			Name: c.Name, Fingerprint: c.Fingerprint, Shape: c.Table.Shape(), RaisedShape: schema.OpenGap(c.Table.Shape()), Retention: c.Retention,
			Empty: !known[c.Name] && time.Now().Before(limit) && isEmpty(ctx, conn, c.Table), Keep: c.Table.KeepsShape,
		})
	}
	return out
}

// isEmpty says whether the table has no row; in doubt it has. Whoever still writes to it may have committed what can't be seen
// yet, but can be in the log: it is then asked for its rows, as it is when they are many. The server ends what takes long: a
// context would end the connection with it, and the next table's look.
func isEmpty(ctx context.Context, conn *pgx.Conn, t *schema.Table) bool {
	only := "ONLY "
	if t.Kind == 'p' {
		only = ""
	}
	empty := false
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `SELECT set_config('row_security', 'off', true), set_config('lock_timeout', $1, true), set_config('statement_timeout', $2, true)`,
			emptyLock.String(), emptyRead.String())
		if err != nil {
			return err
		}
		var written bool
		err = tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'relation' AND granted AND pid IS DISTINCT FROM pg_backend_pid()
				AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND (relation = $1 OR relation IN (SELECT relid FROM pg_partition_tree($1)))
				AND mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))`, t.OID).Scan(&written)
		if err != nil || written {
			return err
		}
		return tx.QueryRow(ctx, `SELECT NOT EXISTS (SELECT FROM `+only+t.SQL()+`)`).Scan(&empty) // after that look, with a snapshot of its own
	})
	return err == nil && empty
}
