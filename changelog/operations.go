package changelog

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// operationsSQL merges the scopes' index ranges: of each it reads a share of the page, and goes no further than the first end
// of a share.
const operationsSQL = `WITH x AS MATERIALIZED (SELECT o.* FROM unnest($1::uuid[]) AS s(key) CROSS JOIN LATERAL (
		SELECT * FROM walgate.attachment_operations
		WHERE scope = s.key AND version > $2 AND version <= least((SELECT version FROM walgate.checkpoint), $3)
		ORDER BY scope, version LIMIT $4) o),
	bound AS (SELECT coalesce(min(version), 0) AS version FROM (SELECT max(version) AS version FROM x GROUP BY scope HAVING count(*) >= $4) e)
	SELECT c.version, c.attachment, c.scope, c.id, c.op::text, c.size, c.content_type, c.sha256, c.created_at, bound.version
	FROM bound LEFT JOIN (SELECT * FROM x WHERE version < coalesce((SELECT nullif(version, 0) FROM bound), $3 + 1) ORDER BY version LIMIT $5) c ON true
	ORDER BY c.version, c.attachment, c.scope`

// latestSQL says of attachments what the scopes hold together, and where the latest operation is. Most are in few scopes, of which
// those asked for are picked. Where there are more, each is looked up.
var latestSQL = `SELECT coalesce(a.version, b.version), coalesce(a.scope, b.scope), coalesce(a.u, b.u, false), coalesce(a.m, b.m, false)
	FROM unnest($2::uuid[]) WITH ORDINALITY AS k(attachment, place)
	CROSS JOIN LATERAL (SELECT count(*) < 256 AS few FROM (SELECT FROM walgate.attachment_operations WHERE attachment = k.attachment LIMIT 256) n) f
	LEFT JOIN LATERAL (` + latestOf + `(scope = ANY ($1)) IS TRUE AND f.few) a ON f.few
	LEFT JOIN LATERAL (` + latestOf + `scope = ANY ($1) AND NOT f.few) b ON NOT f.few
	ORDER BY k.place`

const latestOf = `SELECT max(version) AS version, (array_agg(scope ORDER BY version DESC, op = 'u' DESC, scope))[1] AS scope, bool_or(op = 'u') AS u, bool_or(op = 'm') AS m
	FROM walgate.attachment_operations WHERE attachment = k.attachment AND `

const operationsFloorSQL = `SELECT greatest(attachments_floor, floor) FROM walgate.checkpoint`

const filledSQL = `SELECT DISTINCT collection FROM walgate.attachment_fills WHERE done ORDER BY collection`

const (
	leastShare = 16 // operations of each scope that a page reads at least
	fewScopes  = 4  // of so many all are read that a page takes: the operations of most callers are in one scope
)

// Operations returns a page of what a caller's scopes are to do after Since, all in one snapshot.
func (l *Log) Operations(ctx context.Context, r OperationsRequest) (*OperationsPage, error) {
	if r.Until == 0 {
		r.Until = maxVersion
	}
	if r.Scopes == nil {
		r.Scopes = [][16]byte{}
	}
	limit := max(r.Limit, 1)
	share := max(leastShare, 2*limit/max(len(r.Scopes), 1))
	if len(r.Scopes) <= fewScopes {
		share = max(leastShare, limit+1)
	}
	for share = cmp.Or(l.share, share); ; limit, share = 2*limit, 2*share {
		p, whole, err := l.operations(ctx, r, limit, share)
		if err != nil || whole {
			return p, err
		}
	}
}

// operations returns a page of at most limit operations, and whether it holds a whole version.
func (l *Log) operations(ctx context.Context, r OperationsRequest, limit, share int) (*OperationsPage, bool, error) {
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		return nil, false, readError(err)
	}
	defer conn.Release()
	p := &OperationsPage{}
	var bound Version // 0, or the first version that isn't read to its end
	b := &pgx.Batch{}
	queueProbing(b)
	b.Queue(operationsSQL, r.Scopes, int64(r.Since), int64(r.Until), share, limit+1).Query(func(rows pgx.Rows) (err error) {
		p.Operations, bound, err = scanOperations(rows)
		return err
	})
	b.Queue(operationsFloorSQL).QueryRow(func(r pgx.Row) error { return r.Scan(&p.Floor) })
	b.Queue(filledSQL).Query(func(rows pgx.Rows) (err error) {
		p.Filled, err = pgx.CollectRows(rows, pgx.RowTo[int32])
		return err
	})
	queueHead(b, &p.Head)
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		return nil, false, readError(err)
	}
	whole := p.cut(r, limit, bound)
	b = &pgx.Batch{}
	if asked := p.undecided(r.Scopes); whole && len(asked) > 0 {
		b.Queue(latestSQL, r.Scopes, asked).Query(func(rows pgx.Rows) error { return p.decide(rows, asked) })
	}
	b.Queue(`COMMIT`)
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		return nil, false, readError(err)
	}
	p.Operations = slices.DeleteFunc(p.Operations, func(o Operation) bool { return o.Missing })
	return p, whole, nil
}

// scanOperations reads what operationsSQL says.
func scanOperations(rows pgx.Rows) (out []Operation, bound Version, err error) {
	for rows.Next() {
		v := rows.RawValues()
		if len(v) != 10 || len(v[9]) != 8 || v[0] != nil && (len(v[0]) != 8 || len(v[1]) != 16 || len(v[2]) != 16 || len(v[4]) != 1 || len(v[5]) != 8 || len(v[8]) != 8) {
			return nil, 0, errors.New("read the operations of attachments: unexpected row format")
		}
		if bound = Version(be64(v[9])); v[0] == nil {
			continue // only the bound
		}
		text := string(v[3]) + string(v[6]) // kept together
		out = append(out, Operation{Version: Version(be64(v[0])), Attachment: [16]byte(v[1]), Scope: [16]byte(v[2]), ID: text[:len(v[3])], Delete: v[4][0] == 'd', Missing: v[4][0] == 'm',
			Size: int64(be64(v[5])), ContentType: text[len(v[3]):], SHA256: bytes.Clone(v[7]), CreatedAt: timestamp(be64(v[8]))})
	}
	return out, bound, rows.Err()
}

// timestamp makes a time of microseconds since 2000.
func timestamp(since2000 uint64) time.Time {
	return time.UnixMicro(int64(since2000) + time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro())
}

// cut ends the page where it is to end, and says whether it holds a whole version.
func (p *OperationsPage) cut(r OperationsRequest, limit int, bound Version) bool {
	p.Last = max(min(p.Head.Version, r.Until), r.Since)
	n := len(p.Operations)
	if bound != 0 {
		if n == 0 {
			return false
		}
		p.Last, p.More = bound-1, true
	}
	if n > limit { // the last one only shows that there is more
		next := p.Operations[n-1].Version
		for n > 0 && p.Operations[n-1].Version == next {
			n--
		}
		if n == 0 {
			return false
		}
		p.Last, p.More = p.Operations[n-1].Version, true
	}
	p.Operations = p.Operations[:n]
	return true
}

// undecided keeps the latest operation of each attachment on the page, as far as the page tells, and returns the attachments about
// which the other scopes have to be asked: they may hold one that the page deletes or, where the log goes on, say something later.
func (p *OperationsPage) undecided(scopes [][16]byte) (asked [][16]byte) {
	if len(scopes) <= 1 {
		return nil
	}
	at := make(map[[16]byte]int, len(p.Operations)) // the place of the latest
	kept := p.Operations[:0]
	for i := range p.Operations {
		o := p.Operations[i]
		j, again := at[o.Attachment]
		if !again {
			at[o.Attachment] = len(kept)
			kept = append(kept, o)
			continue
		}
		kept[j].merge(&o)
	}
	slices.SortFunc(kept, func(a, b Operation) int {
		return cmp.Or(cmp.Compare(a.Version, b.Version), bytes.Compare(a.Attachment[:], b.Attachment[:]))
	})
	p.Operations = kept
	for i := range kept {
		if kept[i].Delete || p.Last < p.Head.Version {
			asked = append(asked, kept[i].Attachment)
		}
	}
	return asked
}

// merge takes in what another scope says of the attachment, not earlier.
func (o *Operation) merge(later *Operation) {
	merged := *later
	if later.Version == o.Version && (later.Delete || later.Missing || !o.Delete && !o.Missing) { // of one version a download stands for all, else the first scope
		merged = *o
	}
	merged.Delete = o.Delete && later.Delete
	merged.Missing = !merged.Delete && (o.Delete || o.Missing) && (later.Delete || later.Missing)
	*o = merged
}

// decide takes in what latestSQL says of the attachments that were asked about, in the order of the page. What is said later on another
// page is left to it.
func (p *OperationsPage) decide(rows pgx.Rows, asked [][16]byte) error {
	i := 0
	for _, key := range asked {
		for p.Operations[i].Attachment != key {
			i++
		}
		var version Version
		var scope [16]byte
		var u, m bool
		if !rows.Next() {
			break
		}
		if err := rows.Scan(&version, &scope, &u, &m); err != nil {
			return err
		}
		o := &p.Operations[i]
		o.Delete, o.Missing = !u && !m, !u && m || version > o.Version
		if o.Missing {
			o.Delete = false
		}
	}
	return rows.Err()
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
