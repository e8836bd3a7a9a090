package changelog

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// operationsSQL merges the scopes' index ranges: of each it reads a share of the page, and goes no further than the first end
// of a share. State says of each row that was found: null, not the attachment's latest over the scopes, or nothing to do; u, d: what to do.
func operationsSQL(state string) string {
	return `WITH x AS MATERIALIZED (SELECT o.* FROM unnest($1::uuid[]) AS s(key) CROSS JOIN LATERAL (
		SELECT * FROM walgate.attachment_operations
		WHERE scope = s.key AND version > $2 AND version <= least((SELECT version FROM walgate.checkpoint), $3)
		ORDER BY scope, version LIMIT $4) o),
	bound AS (SELECT coalesce(min(version), 0) AS version FROM (SELECT max(version) AS version FROM x GROUP BY scope HAVING count(*) >= $4) e)
	SELECT c.version, c.attachment, c.scope, c.id, ` + state + `, c.size, c.content_type, c.sha256, c.created_at, bound.version
	FROM bound LEFT JOIN (SELECT * FROM x WHERE version < coalesce((SELECT nullif(version, 0) FROM bound), $3 + 1) ORDER BY version LIMIT $5) c ON true
	ORDER BY c.version, c.attachment, c.scope`
}

const (
	onlyState   = `nullif(c.op::text, 'm')`
	latestState = `SELECT CASE WHEN max(o.version) = c.version AND (array_agg(o.scope ORDER BY o.version DESC, o.op = 'u' DESC, o.scope))[1] = c.scope
		THEN CASE WHEN bool_or(o.op = 'u') THEN 'u' WHEN NOT bool_or(o.op = 'm') THEN 'd' END END`
)

// Most attachments are in one scope, or in few, of which those asked for are picked. Where there are more, each is looked up.
var operationsOfOne, operationsOfMany = operationsSQL(onlyState), operationsSQL(`
	CASE WHEN (SELECT true FROM walgate.attachment_operations WHERE attachment = c.attachment AND scope <> c.scope LIMIT 1) IS NULL THEN ` + onlyState + `
	WHEN (SELECT count(*) FROM (SELECT FROM walgate.attachment_operations WHERE attachment = c.attachment LIMIT 256) n) < 256 THEN (` + latestState + `
		FROM walgate.attachment_operations o WHERE attachment = c.attachment AND (scope = ANY ($1)) IS TRUE)
	ELSE (` + latestState + ` FROM walgate.attachment_operations o WHERE attachment = c.attachment AND scope = ANY ($1)) END`)

const operationsFloorSQL = `SELECT greatest(attachments_floor, floor) FROM walgate.checkpoint`

const filledSQL = `SELECT DISTINCT collection FROM walgate.attachment_fills WHERE done ORDER BY collection`

// leastShare is how many operations of each scope a page reads at least.
const leastShare = 16

// Operations returns a page of what a caller's scopes are to do after Since, all in one snapshot.
func (l *Log) Operations(ctx context.Context, r OperationsRequest) (*OperationsPage, error) {
	if r.Until == 0 {
		r.Until = maxVersion
	}
	if r.Scopes == nil {
		r.Scopes = [][16]byte{}
	}
	limit := max(r.Limit, 1)
	for share := cmp.Or(l.share, max(leastShare, 2*limit/max(len(r.Scopes), 1))); ; limit, share = 2*limit, 2*share {
		p, whole, err := l.operations(ctx, r, limit, share)
		if err != nil || whole {
			return p, err
		}
	}
}

// operations returns a page of at most limit operations, and whether it holds a whole version.
func (l *Log) operations(ctx context.Context, r OperationsRequest, limit, share int) (*OperationsPage, bool, error) {
	p := &OperationsPage{}
	var latest []bool
	var bound Version // 0, or the first version that isn't read to its end
	sql := operationsOfMany
	if len(r.Scopes) == 1 {
		sql = operationsOfOne
	}
	b := &pgx.Batch{}
	queueProbing(b)
	b.Queue(sql, r.Scopes, int64(r.Since), int64(r.Until), share, limit+1).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var version *Version
			var attachment, scope *[16]byte
			var id, op, contentType *string
			var size *int64
			var created *time.Time
			var o Operation
			if err := rows.Scan(&version, &attachment, &scope, &id, &op, &size, &contentType, &o.SHA256, &created, &bound); err != nil {
				return err
			}
			if version == nil {
				continue // only the bound
			}
			o.Version, o.Attachment, o.Scope, o.ID, o.Size, o.ContentType, o.CreatedAt = *version, *attachment, *scope, *id, *size, *contentType, *created
			o.Delete = op != nil && *op == "d"
			p.Operations = append(p.Operations, o)
			latest = append(latest, op != nil)
		}
		return rows.Err()
	})
	b.Queue(operationsFloorSQL).QueryRow(func(r pgx.Row) error { return r.Scan(&p.Floor) })
	b.Queue(filledSQL).Query(func(rows pgx.Rows) (err error) {
		p.Filled, err = pgx.CollectRows(rows, pgx.RowTo[int32])
		return err
	})
	queueHead(b, &p.Head)
	b.Queue(`COMMIT`)
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return nil, false, readError(err)
	}
	p.Last = max(min(p.Head.Version, r.Until), r.Since)
	n := len(p.Operations)
	if bound != 0 {
		if n == 0 {
			return nil, false, nil
		}
		p.Last, p.More = bound-1, true
	}
	if n > limit { // the last one only shows that there is more
		next := p.Operations[n-1].Version
		for n > 0 && p.Operations[n-1].Version == next {
			n--
		}
		if n == 0 {
			return nil, false, nil
		}
		p.Last, p.More = p.Operations[n-1].Version, true
	}
	kept := p.Operations[:0]
	for i := range n {
		if latest[i] {
			kept = append(kept, p.Operations[i])
		}
	}
	p.Operations = kept
	return p, true, nil
}

// addOperations reads the operations of the page's range: at most limit, but whole versions. The page ends with them.
func (l *Log) addOperations(ctx context.Context, p *Page, since Version, limit int) error {
	b := &pgx.Batch{}
	queueProbing(b)
	b.Queue(`SELECT `+operationColumns+` FROM walgate.attachment_operations WHERE version > $1 AND version <= least($2,
		(SELECT version FROM walgate.attachment_operations WHERE version > $1 ORDER BY version OFFSET $3 LIMIT 1)) ORDER BY version, attachment, scope`, int64(since), int64(p.Last), limit-1).Query(func(rows pgx.Rows) (err error) {
		p.Operations, err = pgx.CollectRows(rows, scanOperation)
		return err
	})
	b.Queue(`COMMIT`)
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return readError(err)
	}
	if n := len(p.Operations); n >= limit && p.Operations[n-1].Version < p.Last {
		p.Last, p.More, p.Partial = p.Operations[n-1].Version, true, false
		for n = len(p.Entries); n > 0 && p.Entries[n-1].Version > p.Last; n-- {
			p.Partial = p.Entries[n-1].Tx <= p.Last
		}
		p.Entries = p.Entries[:n]
		for n = len(p.Pushes); n > 0 && p.Pushes[n-1].Tx > p.Last; n-- {
		}
		p.Pushes = p.Pushes[:n]
	}
	return nil
}

// expiredAtOnce is how many delete operations one statement of expireOperations drops.
const expiredAtOnce = 10_000

// expireOperations drops the delete operations that the longest retention has passed. The floor rises first: who comes from below
// it is told to begin anew, and a read that began before still sees both as they were.
func expireOperations(ctx context.Context, conn *pgx.Conn, now time.Time) error {
	var longest time.Duration
	if err := conn.QueryRow(ctx, `SELECT coalesce(max(retention), interval '0') FROM walgate.collections WHERE fingerprint <> ''`).Scan(&longest); err != nil {
		return err
	}
	cut := VersionAt(now.Add(-longest))
	if longest == 0 || cut <= 0 {
		return nil
	}
	raised, err := conn.Exec(ctx, `UPDATE walgate.checkpoint SET attachments_floor = $1 WHERE attachments_floor < $1
		AND EXISTS (SELECT FROM walgate.attachment_operations WHERE op = 'd' AND version <= $1)`, int64(cut))
	if err != nil {
		return fmt.Errorf("raise the floor of attachments by retention: %w", err)
	}
	if raised.RowsAffected() == 0 {
		return nil
	}
	for {
		dropped, err := conn.Exec(ctx, `DELETE FROM walgate.attachment_operations WHERE op = 'd' AND version <= $1 AND ctid = ANY (ARRAY(
			SELECT ctid FROM walgate.attachment_operations WHERE op = 'd' AND version <= $1 ORDER BY version LIMIT $2))`, int64(cut), expiredAtOnce)
		if err != nil {
			return fmt.Errorf("drop expired operations of attachments: %w", err)
		}
		if dropped.RowsAffected() < expiredAtOnce {
			return nil
		}
	}
}
