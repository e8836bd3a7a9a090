package schema

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Kept says how long walgate's records in the source are kept.
type Kept struct {
	Pushes   time.Duration // what is known of pushes, events of attachments, and local ids after their device has confirmed the row
	Sessions time.Duration // what is known of a device after it last opened a session or asked for its manifest
}

// forgetBatch bounds the rows that one statement of Forget deletes.
const forgetBatch = 1000

// forgetSQL deletes the oldest rows of each table that are older than what it is given, and touches few others: ids of
// pushes and of events rise with time, the other tables have an index.
var forgetSQL = []struct {
	what, sql string
	kept      func(Kept) time.Duration
}{
	{"pushes", `DELETE FROM walgate.pushes WHERE id = ANY (ARRAY(SELECT id FROM (SELECT id, created_at FROM walgate.pushes ORDER BY id LIMIT $2) p WHERE created_at < now() - $1::interval))`, Kept.pushes},
	{"attachment events", `DELETE FROM walgate.attachments WHERE id = ANY (ARRAY(SELECT id FROM (SELECT id, created_at FROM walgate.attachments ORDER BY id LIMIT $2) a WHERE created_at < now() - $1::interval))`, Kept.pushes},
	{"outcomes", `DELETE FROM walgate.outcomes WHERE ctid = ANY (ARRAY(SELECT ctid FROM walgate.outcomes WHERE created_at < now() - $1::interval ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED))`, Kept.pushes},
	{"local ids", `DELETE FROM walgate.local_ids WHERE ctid = ANY (ARRAY(SELECT ctid FROM walgate.local_ids WHERE confirmed_at < now() - $1::interval ORDER BY confirmed_at LIMIT $2 FOR UPDATE SKIP LOCKED))`, Kept.pushes},
	{"sessions", `DELETE FROM walgate.sessions WHERE ctid = ANY (ARRAY(SELECT ctid FROM walgate.sessions WHERE opened_at < now() - $1::interval ORDER BY opened_at LIMIT $2 FOR UPDATE SKIP LOCKED))`, Kept.sessions},
	{"manifests", `DELETE FROM walgate.manifests WHERE ctid = ANY (ARRAY(SELECT ctid FROM walgate.manifests WHERE seen_at < now() - $1::interval ORDER BY seen_at LIMIT $2 FOR UPDATE SKIP LOCKED))`, Kept.sessions},
}

func (k Kept) pushes() time.Duration   { return k.Pushes }
func (k Kept) sessions() time.Duration { return k.Sessions }

// Forget deletes some of walgate's records in the source that nobody can need any more, in small transactions; more says
// that others may be left. Ages are measured by the source's clock.
func Forget(ctx context.Context, source interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}, k Kept) (more bool, err error) {
	for _, f := range forgetSQL {
		done, err := source.Exec(ctx, f.sql, f.kept(k), forgetBatch)
		if err != nil {
			return false, fmt.Errorf("delete old %s: %w", f.what, err)
		}
		more = more || done.RowsAffected() == forgetBatch
	}
	return more, nil
}
