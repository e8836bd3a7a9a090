package changelog

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Push says that a source transaction was a client's push.
type Push struct {
	ID       int64 // walgate.pushes.id in the source
	Subject  string
	ClientID string
	Locals   []Local
}

// Local is a key that the source gave to a row which the client had named by an id of its own.
type Local struct {
	Collection string `json:"collection"`
	DocID      string `json:"doc_id"`
	LocalID    string `json:"local_id"`
}

// Size returns how many bytes it holds, about.
func (p *Push) Size() int {
	n := 100 + len(p.Subject) + len(p.ClientID)
	for i := range p.Locals {
		l := &p.Locals[i]
		n += 60 + len(l.Collection) + len(l.DocID) + len(l.LocalID)
	}
	return n
}

// Pushed is where a push stands in the log.
type Pushed struct {
	Tx, Last Version // of its transaction
	Push
}

// PushedChanges is what a push changed.
type PushedChanges struct {
	Pushed
	Changes []PushedChange
}

// PushedChange is the last state that a push gave to one document.
type PushedChange struct {
	Collection int32
	DocID      string
	Version    Version
	Op         byte // policies.Op: the strongest that its scopes hold
}

// pushedMost bounds the changes that Pushed returns: triggers may write any number of rows in a push's transaction.
const pushedMost = 20000

// strongest orders what the scopes of one version say: the document is there, it is gone, it left.
const strongest = `CASE op WHEN 'u' THEN 0 WHEN 'd' THEN 1 ELSE 2 END`

const pushColumns = `tx, last, push, subject, client_id, locals`

// transactionsOfPushes finds one transaction at a time. PostgreSQL can't see that push = ANY ($1) implies the index's
// condition, for the array might be empty, and takes a join for cheaper than a search: it would read the whole table.
const transactionsOfPushes = `unnest($1::bigint[]) AS p(id) CROSS JOIN LATERAL (SELECT ` + pushColumns + ` FROM walgate.transactions
	WHERE push = p.id AND tx > (SELECT floor FROM walgate.checkpoint) LIMIT 1) t`

// Pushed returns those of the pushes that this history's log holds, and their changes in the order of versions. One of a
// transaction of very many changes may lack the newest of them.
func (l *Log) Pushed(ctx context.Context, ids []int64) ([]PushedChanges, error) {
	var out []PushedChanges
	at := map[Version]int{}
	b := &pgx.Batch{}
	b.Queue(`BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY`)
	b.Queue(`SELECT `+pushColumns+` FROM `+transactionsOfPushes+` ORDER BY tx`, ids).Query(func(rows pgx.Rows) error {
		pushes, err := scanPushes(rows)
		for _, p := range pushes {
			at[p.Tx] = len(out)
			out = append(out, PushedChanges{Pushed: p})
		}
		return err
	})
	b.Queue(`SELECT DISTINCT ON (c.version, c.collection, c.doc_id) c.tx, c.version, c.collection, c.doc_id, c.op::text FROM `+transactionsOfPushes+`
		JOIN LATERAL (SELECT tx, version, collection, doc_id, op FROM walgate.changes WHERE version BETWEEN t.tx AND t.last ORDER BY version LIMIT $2) c ON true
		ORDER BY c.version, c.collection, c.doc_id, `+strongest, ids, pushedMost).Query(func(rows pgx.Rows) error {
		var tx Version
		var c PushedChange
		var op string
		_, err := pgx.ForEachRow(rows, []any{&tx, &c.Version, &c.Collection, &c.DocID, &op}, func() error {
			c.Op = op[0]
			p := &out[at[tx]]
			p.Changes = append(p.Changes, c)
			return nil
		})
		return err
	})
	b.Queue(`COMMIT`)
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return nil, readError(err)
	}
	for i := range out {
		out[i].Changes = lastOfEach(out[i].Changes)
	}
	return out, nil
}

// NewestPush returns the newest of a client's pushes that ends at or before upTo, nil where this history's log holds none.
func (l *Log) NewestPush(ctx context.Context, subject, clientID string, upTo Version) (*Pushed, error) {
	rows, err := l.pool.Query(ctx, `SELECT `+pushColumns+` FROM walgate.transactions WHERE subject = $1 AND client_id = $2 AND push IS NOT NULL
		AND tx <= $3 AND last <= $3 AND tx > (SELECT floor FROM walgate.checkpoint) ORDER BY tx DESC LIMIT 1`, subject, clientID, int64(upTo))
	if err != nil {
		return nil, readError(err)
	}
	found, err := scanPushes(rows)
	switch {
	case err != nil:
		return nil, readError(err)
	case len(found) == 0:
		return nil, nil
	}
	return &found[0], nil
}

// lastOfEach keeps each document's newest change, in the order of versions.
func lastOfEach(changes []PushedChange) []PushedChange {
	type document struct {
		collection int32
		id         string
	}
	newest := map[document]Version{}
	for _, c := range changes {
		newest[document{c.Collection, c.DocID}] = c.Version
	}
	n := 0
	for _, c := range changes {
		if newest[document{c.Collection, c.DocID}] == c.Version {
			changes[n] = c
			n++
		}
	}
	return changes[:n]
}

func scanPushes(rows pgx.Rows) ([]Pushed, error) {
	return pgx.CollectRows(rows, func(r pgx.CollectableRow) (p Pushed, err error) {
		var locals []byte
		if err = r.Scan(&p.Tx, &p.Last, &p.ID, &p.Subject, &p.ClientID, &locals); err == nil && locals != nil {
			err = json.Unmarshal(locals, &p.Locals)
		}
		return p, err
	})
}

// addPushes reads the marks of the page's transactions: the caller's own.
func (l *Log) addPushes(ctx context.Context, p *Page, subject, clientID string) error {
	var txs []int64
	for i := range p.Entries {
		if tx := int64(p.Entries[i].Tx); len(txs) == 0 || txs[len(txs)-1] != tx {
			txs = append(txs, tx)
		}
	}
	if len(txs) == 0 {
		return nil
	}
	rows, err := l.pool.Query(ctx, `SELECT `+pushColumns+` FROM walgate.transactions WHERE subject = $1 AND client_id = $2 AND push IS NOT NULL AND tx = ANY ($3) ORDER BY tx`, subject, clientID, txs)
	if err == nil {
		p.Pushes, err = scanPushes(rows)
	}
	if err != nil {
		return readError(err)
	}
	return nil
}

// addAllPushes reads all marks of the page's range, at most limit: the page ends before the next.
func (l *Log) addAllPushes(ctx context.Context, p *Page, since Version, limit int) error {
	from := since + 1
	if len(p.Entries) > 0 {
		from = min(from, p.Entries[0].Tx)
	}
	rows, err := l.pool.Query(ctx, `SELECT `+pushColumns+` FROM walgate.transactions WHERE tx BETWEEN $1 AND $2 AND push IS NOT NULL ORDER BY tx LIMIT $3`, int64(from), int64(p.Last), limit+1)
	if err == nil {
		p.Pushes, err = scanPushes(rows)
	}
	if err != nil {
		return readError(err)
	}
	if len(p.Pushes) > limit {
		p.Last, p.More, p.Partial = p.Pushes[limit].Tx-1, true, false
		p.Pushes = p.Pushes[:limit]
		n := len(p.Entries)
		for n > 0 && p.Entries[n-1].Version > p.Last {
			n--
		}
		p.Entries = p.Entries[:n]
	}
	return nil
}

// appendPush appends a marked transaction's row to an INSERT.
func appendPush(b []byte, p *Piece) ([]byte, error) {
	locals := "NULL"
	if len(p.Push.Locals) > 0 {
		text, err := json.Marshal(p.Push.Locals)
		if err != nil {
			return b, err
		}
		locals = quote(string(text))
	}
	return fmt.Appendf(b, `(%d,%d,%d,%d,%s,%s,%s)`, p.Tx, p.Xid, p.Version, p.Push.ID, quote(p.Push.Subject), quote(p.Push.ClientID), locals), nil
}
