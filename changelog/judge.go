package changelog

import (
	"context"

	"github.com/jackc/pgx/v5"
)

const (
	givenTouches   = `SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bigint[]) AS t(attachment, scope, version)`
	spilledTouches = `SELECT attachment, scope, version FROM pg_temp.attachments_touched`
	allScopes      = `'00000000-0000-0000-0000-000000000000'::uuid`
)

// naming lists the scopes in which documents name the attachment in column a, with one probe of the index for each.
func naming(a string) string {
	next := `SELECT scope FROM walgate.attachment_references WHERE attachment = ` + a
	return `(WITH RECURSIVE n AS ((` + next + ` ORDER BY attachment, scope LIMIT 1)
		UNION ALL SELECT m.scope FROM n CROSS JOIN LATERAL (` + next + ` AND scope > n.scope ORDER BY attachment, scope LIMIT 1) m)
		SELECT scope FROM n)`
}

// named says whether a document names the attachment in column a in the scope in column s, null where none does. Such a lookup
// has a limit of one, so that no plan is possible but a probe of an index.
func named(a, s string) string {
	return `(SELECT true FROM walgate.attachment_references WHERE attachment = ` + a + ` AND scope = ` + s + ` ORDER BY attachment, scope, document LIMIT 1)`
}

// anywhere says the same of any scope.
func anywhere(a string) string {
	return `(SELECT true FROM walgate.attachment_references WHERE attachment = ` + a + ` ORDER BY attachment, scope, document LIMIT 1)`
}

// judgeSQL compares what each touched scope should hold now with its last operation, and writes a new one where they
// differ: u and d are told; m, that the store lost the bytes, is not, for a device may have the last copy. An uploader's own
// hold ends with the first document that names the attachment.
func judgeSQL(touches string) string {
	return `WITH known AS MATERIALIZED (SELECT t.attachment, t.scope, t.version, b.home FROM (` + touches + `) t
		CROSS JOIN LATERAL (SELECT home FROM walgate.attachment_bytes WHERE key = t.attachment LIMIT 1) b),
	freed AS (UPDATE walgate.attachment_bytes b SET home = NULL
		FROM (SELECT q.attachment, q.home, max(q.version) AS version FROM known q WHERE q.home IS NOT NULL AND ` + anywhere("q.attachment") + ` GROUP BY q.attachment, q.home) k
		WHERE b.key = k.attachment RETURNING k.attachment, k.home AS scope, k.version),
	whole AS (SELECT attachment, home, max(version) AS version FROM known WHERE scope = ` + allScopes + ` GROUP BY attachment, home),
	pairs AS (SELECT attachment, scope, max(version) AS version FROM (
		SELECT attachment, scope, version FROM known WHERE scope <> ` + allScopes + `
		UNION ALL SELECT attachment, scope, version FROM freed
		UNION ALL SELECT attachment, home, version FROM whole WHERE home IS NOT NULL
		UNION ALL SELECT w.attachment, n.scope, w.version FROM whole w CROSS JOIN LATERAL ` + naming("w.attachment") + ` n
		UNION ALL SELECT w.attachment, o.scope, w.version FROM whole w CROSS JOIN LATERAL (SELECT scope FROM walgate.attachment_operations WHERE attachment = w.attachment OFFSET 0) o
		) p GROUP BY attachment, scope)
	INSERT INTO walgate.attachment_operations AS o (attachment, scope, version, op, id, size, content_type, sha256, created_at)
	SELECT p.attachment, p.scope, p.version, h.op::"char", b.id, b.size, b.content_type, b.sha256, b.created_at
	FROM pairs p
	CROSS JOIN LATERAL (SELECT * FROM walgate.attachment_bytes WHERE key = p.attachment LIMIT 1) b
	CROSS JOIN LATERAL (SELECT CASE WHEN b.state <> 'd' AND CASE WHEN ` + named("p.attachment", "p.scope") + ` THEN true
			WHEN p.scope = b.home THEN ` + anywhere("p.attachment") + ` IS NULL ELSE false END
		AND (SELECT true FROM walgate.attachment_withheld WHERE attachment = p.attachment AND scope = p.scope LIMIT 1) IS NULL THEN b.state::text ELSE 'd' END AS op OFFSET 0) h
	LEFT JOIN LATERAL (SELECT op, sha256, content_type FROM walgate.attachment_operations WHERE attachment = p.attachment AND scope = p.scope LIMIT 1) x ON true
	WHERE CASE h.op WHEN 'd' THEN x.op <> 'd' ELSE x.op::text IS DISTINCT FROM h.op OR x.sha256 IS DISTINCT FROM b.sha256 OR x.content_type <> b.content_type END
	ORDER BY p.version, p.attachment, p.scope
	ON CONFLICT (attachment, scope) DO UPDATE SET version = excluded.version, op = excluded.op, id = excluded.id, size = excluded.size,
		content_type = excluded.content_type, sha256 = excluded.sha256, created_at = excluded.created_at
	RETURNING ` + operationColumns
}

var judgeGiven, judgeSpilled = judgeSQL(givenTouches), judgeSQL(spilledTouches)

// spill moves the touched pairs to a temporary table once they are many: a giant transaction needs no more memory than others.
// The table goes with the transaction; one that stayed would keep the server from forgetting old transaction ids.
func (a *Appender) spill(ctx context.Context) error {
	t := &a.att.touched
	if len(t.version) < a.att.most {
		return nil
	}
	if !a.att.spilled {
		a.att.spilled = true
		if _, err := a.conn.PgConn().Exec(ctx, `CREATE TEMPORARY TABLE attachments_touched (attachment uuid, scope uuid, version bigint) ON COMMIT DROP`).ReadAll(); err != nil {
			return err
		}
	}
	_, err := a.conn.Exec(ctx, `INSERT INTO pg_temp.attachments_touched `+givenTouches,
		t.attachment, t.scope, t.version)
	t.reset()
	return err
}

// judge writes the operations that come of what the log transaction touched, and keeps them for the announcement.
func (a *Appender) judge(ctx context.Context) error {
	t := &a.att.touched
	if len(t.version) == 0 && !a.att.spilled {
		return nil
	}
	var rows pgx.Rows
	var err error
	if a.att.spilled {
		if len(t.version) > 0 {
			a.att.most = 0
			if err := a.spill(ctx); err != nil {
				return err
			}
			a.att.most = touchedMost
		}
		rows, err = a.conn.Query(ctx, judgeSpilled)
	} else {
		rows, err = a.conn.Query(ctx, judgeGiven, t.attachment, t.scope, t.version)
	}
	t.reset()
	a.att.spilled = false
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if a.omitted {
			continue
		}
		o, err := scanOperation(rows)
		if err != nil {
			return err
		}
		if a.held += operationBytes + len(o.ID) + len(o.ContentType); a.held > announceLimit {
			a.omitted, a.entries, a.operations = true, nil, nil
			continue
		}
		a.operations = append(a.operations, o)
	}
	return rows.Err()
}

// operationBytes is what an operation counts for in an announcement.
const operationBytes = 200
