package changelog

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/jackc/pgx/v5"
)

// Request asks for a caller's changes.
type Request struct {
	Scopes   [][16]byte // the scope keys that the caller may read, of all collections asked for
	Since    Version    // exclusive
	Until    Version    // inclusive; 0: the newest
	Limit    int        // entries; at least 1
	MaxBytes int        // of documents; one larger document comes alone
	// Subject and ClientID, where both are set, say whose marks Page.Pushes is to hold.
	Subject, ClientID string
	Largest           int // bytes of a document that may come; 0: any. A larger one is withheld, see Page.Withheld
}

// Page is what a caller's scopes hold after Since, in version order, cut at a transaction's end where possible.
type Page struct {
	Head    Head // in the same snapshot, so floors checked against it hold for Entries
	Entries []Entry
	Last    Version // everything up to here is in Entries; above Since whenever More
	More    bool    // there is more up to Until
	Partial bool    // Entries end within a source transaction
	// Withheld is the bytes of the documents that are above Request.Largest: make room and ask again. Else the page is
	// without meaning but for the head.
	Withheld int
	// Pushes are the marks of the transactions of Entries, in the order of versions: the asking client's own; of ReadAll all
	// marks up to Last, also of transactions that changed nothing.
	Pushes []Pushed
	// Operations, of ReadAll only, are those of all scopes up to Last, in version order. One that was overtaken by a later
	// one of the same attachment and scope is missing.
	Operations []Operation
}

// MaxScopes is how many scope keys one read may name.
const MaxScopes = 1000

const entryColumns = `version, tx, scope, collection, op, size, doc_id, data, guard, changed`

// pageSQL merges the scopes' index ranges: it reads at most limit entries of each scope, however long the log is, and
// fetches no document beyond the byte limit, but every entry of the version that reaches it: a version isn't split.
const pageSQL = `SELECT version, tx, scope, collection, op, size, doc_id, CASE WHEN size <= $6 THEN data END, guard, changed FROM (
	SELECT e.*, coalesce(sum(size) OVER (ORDER BY version RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before FROM (
		SELECT x.* FROM unnest($1::uuid[]) AS s(key) CROSS JOIN LATERAL (
			SELECT ` + entryColumns + ` FROM walgate.changes c
			WHERE c.scope = s.key AND c.version > $2 AND c.version <= least((SELECT version FROM walgate.checkpoint), $3)
			ORDER BY c.version LIMIT $4) x
		ORDER BY x.version, x.scope LIMIT $4) e) p
	WHERE before < $5 ORDER BY version, scope`

// orderSQL reads every scope in version order.
const orderSQL = `SELECT ` + entryColumns + ` FROM (
	SELECT e.*, coalesce(sum(size) OVER (ORDER BY version RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before FROM (
		SELECT ` + entryColumns + ` FROM walgate.changes c
		WHERE c.version > $1 AND c.version <= least((SELECT version FROM walgate.checkpoint), $2)
		ORDER BY c.version, c.scope LIMIT $3) e) p
	WHERE before < $4 ORDER BY version, scope`

// Read returns one page of a caller's changes. It costs what it returns: what others wrote isn't touched. The caller
// checks history and floors against Page.Head. Entries hold their own memory.
func (l *Log) Read(ctx context.Context, r Request) (*Page, error) {
	if r.Until == 0 {
		r.Until = maxVersion
	}
	p, err := l.page(ctx, r, func(b *pgx.Batch, limit int) *pgx.QueuedQuery {
		return b.Queue(pageSQL, r.Scopes, int64(r.Since), int64(r.Until), limit, int64(r.MaxBytes), largest(r))
	})
	if err == nil && r.ClientID != "" && p.Withheld == 0 {
		err = l.addPushes(ctx, p, r.Subject, r.ClientID)
	}
	return p, err
}

func largest(r Request) int32 {
	if r.Largest == 0 {
		return math.MaxInt32
	}
	return int32(min(r.Largest, math.MaxInt32))
}

// ReadAll returns one page of the whole log, for the hub to close a gap.
func (l *Log) ReadAll(ctx context.Context, since, until Version, limit, maxBytes int) (*Page, error) {
	r := Request{Since: since, Until: until, Limit: limit, MaxBytes: maxBytes}
	p, err := l.page(ctx, r, func(b *pgx.Batch, limit int) *pgx.QueuedQuery {
		return b.Queue(orderSQL, int64(since), int64(until), limit, int64(maxBytes))
	})
	if err == nil {
		err = l.addAllPushes(ctx, p, since, limit)
	}
	if err == nil {
		err = l.addOperations(ctx, p, since, limit)
	}
	return p, err
}

func (l *Log) page(ctx context.Context, r Request, query func(*pgx.Batch, int) *pgx.QueuedQuery) (*Page, error) {
	limit := r.Limit
	for {
		p := &Page{}
		bytes := 0
		b := &pgx.Batch{}
		b.Queue(`BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY`)
		query(b, limit+1).Query(func(rows pgx.Rows) (err error) {
			p.Entries, bytes, p.Withheld, err = scanEntries(rows, min(limit, 4096))
			return err
		})
		queueHead(b, &p.Head)
		b.Queue(`COMMIT`)
		if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
			return nil, readError(err)
		}
		if p.Withheld > 0 {
			return p, nil
		}
		if limit > r.Limit && firstOnly(p) {
			return p, nil
		}
		full := len(p.Entries) > limit
		heavy := bytes >= r.MaxBytes && len(p.Entries) > 0
		if !full && !heavy {
			p.Last = min(p.Head.Version, r.Until)
			if p.Last < r.Since { // the caller's place is ahead of the log: for the caller to judge
				p.Last = r.Since
			}
			return p, nil
		}
		if cut(p) {
			return p, nil
		}
		// All of one version (one change in many scopes), or one giant document alone: look further to know where it ends.
		if heavy && !full && singleVersion(p.Entries) {
			return p, l.endsTransaction(ctx, r, p)
		}
		limit *= 2
	}
}

// cut ends the page before the transaction of its last entry, or, where that is the only one, before the last version.
// It says whether something is left. The last entry only shows what comes next.
func cut(p *Page) bool {
	next := p.Entries[len(p.Entries)-1]
	i := len(p.Entries) - 1
	for i > 0 && p.Entries[i-1].Tx == next.Tx {
		i--
	}
	if i > 0 {
		p.Entries, p.Last, p.More = p.Entries[:i], next.Tx-1, true
		return true
	}
	i = len(p.Entries) - 1
	for i > 0 && p.Entries[i-1].Version == next.Version {
		i--
	}
	if i > 0 {
		p.Entries = p.Entries[:i]
		p.Last, p.More, p.Partial = p.Entries[i-1].Version, true, true
		return true
	}
	return false
}

// firstOnly cuts what was read beyond the limit to find the end of a single version; false: there is nothing beyond it yet.
func firstOnly(p *Page) bool {
	i := 0
	for i < len(p.Entries) && p.Entries[i].Version == p.Entries[0].Version {
		i++
	}
	if i == len(p.Entries) {
		return false
	}
	next := p.Entries[i]
	p.Entries, p.Last, p.More = p.Entries[:i], next.Tx-1, true
	if p.Partial = next.Tx == p.Entries[0].Tx; p.Partial {
		p.Last = p.Entries[0].Version
	}
	return true
}

func singleVersion(entries []Entry) bool {
	return entries[0].Version == entries[len(entries)-1].Version
}

// endsTransaction completes a page of a single version by asking what follows it.
func (l *Log) endsTransaction(ctx context.Context, r Request, p *Page) error {
	p.Last, p.More = p.Entries[len(p.Entries)-1].Version, true
	b := &pgx.Batch{}
	var after []Entry
	var q *pgx.QueuedQuery
	if len(r.Scopes) > 0 {
		q = b.Queue(pageSQL, r.Scopes, int64(p.Last), int64(r.Until), 1, int64(1), int32(0)) // its data isn't looked at
	} else {
		q = b.Queue(orderSQL, int64(p.Last), int64(r.Until), 1, int64(1))
	}
	q.Query(func(rows pgx.Rows) (err error) {
		after, _, _, err = scanEntries(rows, 1)
		return err
	})
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return readError(err)
	}
	p.Partial = len(after) > 0 && after[0].Tx == p.Entries[0].Tx
	return nil
}

// scanEntries reads rows of entryColumns into entries that share few large buffers, and counts the bytes of documents: of
// all, and of those that were withheld.
func scanEntries(rows pgx.Rows, expect int) (out []Entry, bytes, withheld int, err error) {
	var arena []byte
	hold := func(v []byte) []byte {
		if v == nil {
			return nil
		}
		if cap(arena)-len(arena) < len(v) {
			arena = make([]byte, 0, max(len(v), min(64<<10, 512*expect)))
		}
		n := len(arena)
		arena = append(arena, v...)
		return arena[n:len(arena):len(arena)]
	}
	for rows.Next() {
		v := rows.RawValues()
		if len(v) != 10 || len(v[5]) != 4 || len(v[0]) != 8 || len(v[1]) != 8 || len(v[2]) != 16 || len(v[3]) != 4 || len(v[4]) != 1 {
			return nil, 0, 0, fmt.Errorf("read the change log: unexpected row format")
		}
		e := Entry{Version: Version(be64(v[0])), Tx: Version(be64(v[1])), Scope: [16]byte(v[2]), Collection: int32(be32(v[3])), Op: v[4][0]}
		e.DocID, e.Data, e.Guard, e.Changed = hold(v[6]), hold(v[7]), hold(v[8]), hold(v[9])
		size := int(int32(be32(v[5])))
		if bytes += size; e.Data == nil {
			withheld += size
		}
		out = append(out, e)
	}
	return out, bytes, withheld, rows.Err()
}

func be64(b []byte) uint64 { return uint64(be32(b))<<32 | uint64(be32(b[4:])) }

func be32(b []byte) uint32 {
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

// FirstInvisible returns the version of the oldest logged transaction that a snapshot of the source (its xmax and its
// running transactions) doesn't show, 0 if it shows all, and whether it shows a newer one than that; with the head, all
// in one snapshot of the log. Only this history counts: before it, transaction ids may be another server's.
func (l *Log) FirstInvisible(ctx context.Context, xmax uint64, running []uint64) (first Version, shown bool, h *Head, err error) {
	ids := make([]int64, len(running))
	for i, x := range running {
		ids[i] = int64(x)
	}
	h = &Head{}
	b := &pgx.Batch{}
	b.Queue(`BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY`)
	b.Queue(`WITH hidden AS (SELECT min(tx) AS tx FROM (SELECT tx FROM walgate.transactions WHERE xid >= $1
			UNION ALL SELECT tx FROM walgate.transactions WHERE xid = ANY ($2)) t
			WHERE tx > (SELECT floor FROM walgate.checkpoint))
		SELECT coalesce(hidden.tx, 0), EXISTS (SELECT FROM walgate.transactions t WHERE t.tx > hidden.tx AND t.xid < $1 AND t.xid <> ALL ($2))
		FROM hidden`, int64(xmax), ids).QueryRow(func(r pgx.Row) error { return r.Scan(&first, &shown) })
	queueHead(b, h)
	b.Queue(`COMMIT`)
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return 0, false, nil, readError(err)
	}
	return first, shown, h, nil
}

func readError(err error) error {
	if errors.Is(err, ErrNotInitialised) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("read the change log: %w", err)
}
