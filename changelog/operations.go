package changelog

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// operationsSQL merges the scopes' index ranges and keeps, of what it found first, the latest of each attachment over all
// scopes asked for. One that is named in very many scopes is looked up scope by scope.
const operationsSQL = `SELECT c.version, c.attachment, c.scope, c.id, CASE WHEN n.held THEN 'u' ELSE 'd' END, c.size, c.content_type, c.sha256, c.created_at,
		c.version = n.version AND c.scope = n.scope
	FROM (SELECT x.* FROM unnest($1::uuid[]) AS s(key) CROSS JOIN LATERAL (
			SELECT * FROM walgate.attachment_operations o
			WHERE o.scope = s.key AND o.version > $2 AND o.version <= least((SELECT version FROM walgate.checkpoint), $3)
			ORDER BY o.scope, o.version LIMIT $4) x
		ORDER BY x.version LIMIT $4) c
	CROSS JOIN LATERAL (
		SELECT max(p.version) AS version, bool_or(p.op = 'u') AS held, (array_agg(p.scope ORDER BY p.version DESC, p.op = 'u' DESC, p.scope))[1] AS scope
		FROM walgate.attachment_operations p WHERE p.attachment = c.attachment AND p.scope = ANY ($1)) n
	ORDER BY c.version, c.attachment`

const operationsFloorSQL = `SELECT greatest(attachments_floor, floor) FROM walgate.checkpoint`

const filledSQL = `SELECT DISTINCT collection FROM walgate.attachment_fills WHERE done ORDER BY collection`

// Operations returns a page of what a caller's scopes are to do after Since, all in one snapshot.
func (l *Log) Operations(ctx context.Context, r OperationsRequest) (*OperationsPage, error) {
	if r.Until == 0 {
		r.Until = maxVersion
	}
	if r.Scopes == nil {
		r.Scopes = [][16]byte{}
	}
	for limit := max(r.Limit, 1); ; limit *= 2 {
		p, whole, err := l.operations(ctx, r, limit)
		if err != nil || whole {
			return p, err
		}
	}
}

// operations returns a page of at most limit operations, and whether it holds a whole version.
func (l *Log) operations(ctx context.Context, r OperationsRequest, limit int) (*OperationsPage, bool, error) {
	p := &OperationsPage{}
	var latest []bool
	b := &pgx.Batch{}
	queueProbing(b)
	b.Queue(operationsSQL, r.Scopes, int64(r.Since), int64(r.Until), limit+1).Query(func(rows pgx.Rows) (err error) {
		p.Operations, err = pgx.CollectRows(rows, func(r pgx.CollectableRow) (o Operation, err error) {
			var op string
			var last bool
			err = r.Scan(&o.Version, &o.Attachment, &o.Scope, &o.ID, &op, &o.Size, &o.ContentType, &o.SHA256, &o.CreatedAt, &last)
			o.Delete = op == "d"
			latest = append(latest, last)
			return o, err
		})
		return err
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
	rows, err := l.pool.Query(ctx, `SELECT `+operationColumns+` FROM walgate.attachment_operations WHERE version > $1 AND version <= least($2,
		(SELECT version FROM walgate.attachment_operations WHERE version > $1 ORDER BY version OFFSET $3 LIMIT 1)) ORDER BY version, attachment, scope`, int64(since), int64(p.Last), limit-1)
	if err == nil {
		p.Operations, err = pgx.CollectRows(rows, scanOperation)
	}
	if err != nil {
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
