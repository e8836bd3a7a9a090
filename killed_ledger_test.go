package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/jackc/pgx/v5"
)

// ledgerSQL makes the tables; docs is written, more only joins.
const ledgerSQL = `
CREATE TABLE docs (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, owner_id text NOT NULL DEFAULT 'u0', n int NOT NULL DEFAULT 0, body text);
CREATE TABLE more (id bigint PRIMARY KEY, owner_id text);
`

// ledger is an application that remembers what it committed, in commit order: one goroutine commits, so it knows.
type ledger struct {
	t           *testing.T
	conn, other *pgx.Conn
	rng         *rand.Rand
	committed   []sourceTx
}

// sourceTx is one transaction of the application.
type sourceTx struct {
	xid     uint64
	changes []string // as the log should have them: "u 1", "d 1"
}

// burst commits a large transaction between small ones, and two that overlap.
func (l *ledger) burst() {
	l.t.Helper()
	for range 1 + l.rng.IntN(6) {
		l.small()
	}
	tx, done := l.begin(l.conn)
	// More than one piece by rows (2000) or by bytes (512 KB).
	l.change(tx, &done, 'u', fmt.Sprintf(`INSERT INTO docs (body) SELECT repeat('x', %d) FROM generate_series(1, %d) RETURNING id`, 10+l.rng.IntN(400), 2500+l.rng.IntN(3000)))
	l.change(tx, &done, 'd', `DELETE FROM docs WHERE id IN (SELECT id FROM docs ORDER BY id LIMIT 800) RETURNING id`)
	l.commit(tx, done)
	l.small()
	late, lateDone := l.begin(l.other)
	l.change(late, &lateDone, 'u', `INSERT INTO docs (body) VALUES ('began first'), ('commits last') RETURNING id`)
	l.small()
	l.commit(late, lateDone)
	l.small()
}

// small commits one to four changes.
func (l *ledger) small() {
	l.t.Helper()
	tx, done := l.begin(l.conn)
	l.change(tx, &done, 'u', `INSERT INTO docs (body) VALUES ('new') RETURNING id`)
	for range l.rng.IntN(3) {
		if l.rng.IntN(3) == 0 {
			l.change(tx, &done, 'd', `DELETE FROM docs WHERE id = (SELECT min(id) FROM docs) RETURNING id`)
		} else {
			l.change(tx, &done, 'u', `UPDATE docs SET n = n + 1 WHERE id = (SELECT max(id) FROM docs) RETURNING id`)
		}
	}
	l.commit(tx, done)
}

func (l *ledger) begin(conn *pgx.Conn) (pgx.Tx, sourceTx) {
	l.t.Helper()
	var done sourceTx
	tx, err := conn.Begin(l.t.Context())
	if err == nil {
		err = tx.QueryRow(l.t.Context(), `SELECT pg_current_xact_id()::text::int8`).Scan(&done.xid)
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return tx, done
}

// change runs a statement that returns the ids of its rows in the order in which it changes them.
func (l *ledger) change(tx pgx.Tx, done *sourceTx, op byte, sql string) {
	l.t.Helper()
	rows, err := tx.Query(l.t.Context(), sql)
	if err != nil {
		l.t.Fatal(err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		l.t.Fatalf("%s: %v", sql, err)
	}
	for _, id := range ids {
		done.changes = append(done.changes, fmt.Sprintf("%c %d", op, id))
	}
}

func (l *ledger) commit(tx pgx.Tx, done sourceTx) {
	l.t.Helper()
	if err := tx.Commit(context.WithoutCancel(l.t.Context())); err != nil {
		l.t.Fatal(err)
	}
	l.committed = append(l.committed, done)
}
