package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// writer is one connection of the application. What it does follows from its seed; how it interleaves with the others
// doesn't.
type writer struct {
	t       *testing.T
	dsn     string
	rng     *rand.Rand
	conn    *pgx.Conn
	commits *atomic.Int64
	pace    time.Duration // pause between two steps
	count   func(what string)

	role        role
	round       uint64      // part of new names
	tables      *sync.Mutex // held while a table isn't there
	altering    *sync.Mutex // see convergence
	alterations []alteration
	chosen      string       // table of the present alteration
	torn        *atomic.Bool // see convergence
	names       int
}

// role is what kind of writer it is.
type role int

const (
	ordinary  role = iota
	migrating      // changes the tables
	lingering      // keeps its transactions open
)

// run writes until ctx ends.
func (w *writer) run(ctx context.Context) {
	defer func() {
		if w.conn != nil {
			w.conn.Close(context.WithoutCancel(ctx))
		}
	}()
	for ; ctx.Err() == nil; pause(ctx, w.pace) {
		if err := w.step(ctx); err != nil && ctx.Err() == nil && !expectedOfWriter(err) {
			w.t.Errorf("the application's statement failed: %v", err)
			return
		}
	}
}

func (w *writer) step(ctx context.Context) error {
	if w.connect(ctx) != nil {
		pause(ctx, 20*time.Millisecond)
		return nil // the server is down
	}
	switch w.role {
	case migrating:
		return w.alter(ctx)
	case lingering:
		return w.linger(ctx)
	}
	if w.rng.IntN(1200) == 0 {
		return w.large(ctx)
	}
	return w.transaction(ctx)
}

// expectedOfWriter says whether an application would live with the error: contention, or a server that went away.
func expectedOfWriter(err error) bool {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return true // the connection
	}
	switch pg.Code {
	case "23505", "40P01", "40001", "55P03", "57P01", "57P02", "57P03", "53300", // contention, the server's state
		"42703", "42P01", "0A000", "22P02", "23514", "42704", "55000", "XX000": // a table that changes under it; XX000: tuple concurrently updated
		return true
	}
	return false
}

// linger keeps a transaction open for a while between its operations, and goes back to a savepoint.
func (w *writer) linger(ctx context.Context) error {
	tx, err := w.conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	for range 2 + w.rng.IntN(3) {
		if err := w.operation(ctx, tx); err != nil {
			return err
		}
		inner, err := tx.Begin(ctx)
		if err != nil {
			return err
		}
		if err := w.operation(ctx, inner); err != nil {
			return err
		}
		pause(ctx, time.Duration(w.rng.IntN(500))*time.Millisecond)
		if err := inner.Rollback(ctx); err != nil {
			return err
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	w.commits.Add(1)
	w.count("long transaction")
	return nil
}

// pause is a client or writer that is away; nothing is concluded from how long.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// transaction does some operations, with savepoints, and commits most of the time.
func (w *writer) transaction(ctx context.Context) error {
	tx, err := w.conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	if w.rng.IntN(4) == 0 {
		if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
			return err
		}
	}
	for range 1 + w.rng.IntN(5) {
		if w.rng.IntN(5) > 0 {
			if err := w.operation(ctx, tx); err != nil {
				return err
			}
			continue
		}
		inner, err := tx.Begin(ctx) // a savepoint
		if err != nil {
			return err
		}
		if err := w.operation(ctx, inner); err != nil {
			return err
		}
		if w.rng.IntN(2) == 0 {
			err = inner.Rollback(ctx)
		} else {
			err = inner.Commit(ctx)
		}
		if err != nil {
			return err
		}
	}
	if w.rng.IntN(10) == 0 {
		return tx.Rollback(ctx)
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	w.commits.Add(1)
	return nil
}

func (w *writer) note() string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", w.rng.IntN(80)) }
func (w *writer) small() int   { return 1 + w.rng.IntN(60) }

func (w *writer) owner() any {
	if n := w.rng.IntN(6); n < 5 {
		return fmt.Sprintf("u%d", n)
	}
	return nil
}

func (w *writer) team() any {
	if n := w.rng.IntN(7); n > 0 {
		return n
	}
	return nil
}

func (w *writer) word() string { return fmt.Sprintf("w%d \"é\\\n", w.rng.IntN(100)) }

// body is long enough to be stored out of line, most of the time.
func (w *writer) body() any {
	switch w.rng.IntN(6) {
	case 0:
		return nil
	case 1:
		return w.word()
	}
	return strings.Repeat(fmt.Sprintf("%08x", w.rng.Uint32()), 300+w.rng.IntN(1500))
}

func (w *writer) region() string { return []string{"north", "south", "east", "west"}[w.rng.IntN(4)] }

func (w *writer) json() string {
	return fmt.Sprintf(`{"n" : %d, "a":[1, null, "x"], "n": 2.50}`, w.rng.IntN(100))
}

// statement is an operation's SQL with its arguments.
type statement struct {
	sql  string
	args []any
}

// operation does one thing that an application would do.
func (w *writer) operation(ctx context.Context, tx pgx.Tx) error {
	for _, s := range w.choose() {
		if _, err := tx.Exec(ctx, s.sql, s.args...); err != nil {
			return err
		}
	}
	return nil
}

func one(sql string, args ...any) []statement { return []statement{{sql, args}} }

func (w *writer) choose() []statement {
	switch w.rng.IntN(9) {
	case 0, 1:
		return w.onNotes()
	case 2:
		return w.onItems()
	case 3:
		return w.onLevels()
	case 4:
		return w.onSofts()
	case 5:
		return w.onEvents()
	case 6:
		return w.onKeyed()
	case 7:
		return w.onExact()
	}
	return w.pair()
}

func (w *writer) onNotes() []statement {
	id := w.note()
	switch w.rng.IntN(9) {
	case 0: // the body, if it was there, stays as it was
		return one(`UPDATE notes SET title = $2 WHERE id = $1`, id, w.word())
	case 1:
		return one(`UPDATE notes SET body = $2 WHERE id = $1`, id, w.body())
	case 2: // a scope move with an unchanged body
		return one(`UPDATE notes SET owner_id = $2 WHERE id = $1`, id, w.owner())
	case 3: // a key change
		return one(`UPDATE notes SET id = $2 WHERE id = $1`, id, w.note())
	case 4:
		return one(`DELETE FROM notes WHERE id = $1`, id)
	case 5: // one document goes and comes in one transaction
		return []statement{{`DELETE FROM notes WHERE id = $1`, []any{id}},
			{`INSERT INTO notes (id, owner_id, title, body, meta) VALUES ($1, $2, $3, $4, $5)`, []any{id, w.owner(), w.word(), w.body(), w.json()}}}
	}
	return one(`INSERT INTO notes (id, owner_id, title, body, meta, at) VALUES ($1, $2, $3, $4, $5, now()) ON CONFLICT (id)
		DO UPDATE SET title = excluded.title, owner_id = excluded.owner_id, meta = excluded.meta`, id, w.owner(), w.word(), w.body(), w.json())
}

func (w *writer) onItems() []statement {
	list, lang := w.small(), []string{"en", "de"}[w.rng.IntN(2)]
	switch w.rng.IntN(6) {
	case 0:
		return one(`UPDATE items SET team_id = $3, n = n + 1 WHERE list_id = $1 AND lang = $2`, list, lang, w.team())
	case 1:
		return one(`UPDATE items SET owner_id = $3 WHERE list_id = $1 AND lang = $2`, list, lang, w.owner())
	case 2:
		return one(`UPDATE items SET list_id = $3 WHERE list_id = $1 AND lang = $2`, list, lang, w.small())
	case 3:
		return one(`DELETE FROM items WHERE list_id = $1 AND lang = $2`, list, lang)
	}
	return one(`INSERT INTO items (list_id, lang, owner_id, team_id, body) VALUES ($1, $2, $3, $4, $5) ON CONFLICT (list_id, lang)
		DO UPDATE SET n = items.n + 1, team_id = excluded.team_id`, list, lang, w.owner(), w.team(), w.body())
}

func (w *writer) onLevels() []statement {
	id := w.small()
	switch w.rng.IntN(7) {
	case 0:
		return one(`UPDATE levels SET level = $2 WHERE id = $1`, id, w.rng.IntN(5))
	case 1:
		return one(`UPDATE levels SET archived = NOT archived WHERE id = $1`, id)
	case 2:
		return one(`UPDATE levels SET level = NULLIF((level + 1) % 6, 5) WHERE id BETWEEN $1 AND $1 + 20`, id)
	case 3:
		return one(`DELETE FROM levels WHERE id = $1`, id)
	case 4:
		return one(`UPDATE levels SET id = $2 WHERE id = $1`, id, w.small())
	}
	return one(`INSERT INTO levels (id, level, name) VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE SET name = excluded.name, tag = levels.tag + 1`, id, w.rng.IntN(5), w.word())
}

func (w *writer) onSofts() []statement {
	id := w.small()
	switch w.rng.IntN(6) {
	case 0:
		return one(`UPDATE softs SET deleted_at = now() WHERE id = $1`, id)
	case 1:
		return one(`UPDATE softs SET deleted_at = NULL, owner_id = $2 WHERE id = $1`, id, w.owner())
	case 2: // moved to another table under the same key
		return []statement{{`DELETE FROM softs WHERE id = $1`, []any{id}},
			{`INSERT INTO goods (id, name) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET name = excluded.name`, []any{id, w.word()}}}
	case 3: // and back
		return []statement{{`DELETE FROM goods WHERE id = $1`, []any{id}},
			{`INSERT INTO softs (id, owner_id) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET owner_id = excluded.owner_id`, []any{id, w.owner()}}}
	}
	return one(`INSERT INTO softs (id, owner_id, name) VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE SET name = excluded.name`, id, w.owner(), w.word())
}

func (w *writer) onEvents() []statement {
	region, id := w.region(), w.small()
	switch w.rng.IntN(6) {
	case 0: // a key change that moves the row to another partition
		return one(`UPDATE events SET region = $3 WHERE region = $1 AND id = $2`, region, id, w.region())
	case 1:
		return one(`UPDATE events SET owner_id = $3 WHERE region = $1 AND id = $2`, region, id, w.owner())
	case 2:
		return one(`DELETE FROM events WHERE region = $1 AND id = $2`, region, id)
	}
	return one(`INSERT INTO events (region, id, owner_id, body) VALUES ($1, $2, $3, $4) ON CONFLICT (region, id) DO UPDATE SET body = excluded.body`,
		region, id, w.owner(), w.word())
}

func (w *writer) onKeyed() []statement {
	owner, id := w.rng.IntN(5), w.small()
	switch w.rng.IntN(6) {
	case 0:
		return one(`UPDATE keyed SET n = n + 1, on_ = NOT on_ WHERE owner_id = $1 AND id = $2`, owner, id)
	case 1: // a scope move is a key change here
		return one(`UPDATE keyed SET owner_id = $3 WHERE owner_id = $1 AND id = $2`, owner, id, w.rng.IntN(5))
	case 2:
		return one(`DELETE FROM keyed WHERE owner_id = $1 AND id = $2`, owner, id)
	}
	return one(`INSERT INTO keyed VALUES ($1, $2, 0, true, now()) ON CONFLICT (owner_id, id) DO UPDATE SET at = excluded.at`, owner, id)
}

func (w *writer) onExact() []statement {
	id := w.small()
	switch w.rng.IntN(4) {
	case 0:
		return one(`UPDATE exact SET amount = amount * 1.10, big = $2 WHERE id = $1`, id, w.rng.Int64())
	case 1:
		return one(`DELETE FROM exact WHERE id = $1`, id)
	}
	return one(`INSERT INTO exact (id, owner_id, amount, big, meta) VALUES ($1, $2, $3::int / 7.0, 9007199254740993, $4) ON CONFLICT (id)
		DO UPDATE SET owner_id = excluded.owner_id`, id, w.owner(), w.rng.IntN(1000), w.json())
}

// pair gives two rows of different tables and one owner the same tag: no client may ever see one without the other.
func (w *writer) pair() []statement {
	n := w.pairNumber()
	return []statement{
		{`WITH t AS (SELECT nextval('tags') AS tag) UPDATE notes SET tag = t.tag FROM t WHERE id = $1`, []any{pairNote(n)}},
		{`UPDATE exact SET tag = (SELECT tag FROM notes WHERE id = $1) WHERE id = $2`, []any{pairNote(n), 900000 + n}},
	}
}

func (w *writer) pairNumber() int { return w.rng.IntN(5)*10 + 1 + w.rng.IntN(3) }

func pairNote(n int) string { return fmt.Sprintf("00000000-0000-4000-9000-%012d", n) }

// large writes many rows between the two halves of a pair.
func (w *writer) large(ctx context.Context) error {
	tx, err := w.conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	halves := w.pair()
	many := fmt.Sprintf(`INSERT INTO levels (id, level, name) SELECT g, g %% 7, 'large' FROM generate_series(1000000, 1000000 + %d) g ON CONFLICT (id) DO UPDATE SET level = (levels.level + 1) %% 7`, 3000+w.rng.IntN(27000))
	switch w.rng.IntN(3) {
	case 0:
		many = `DELETE FROM levels WHERE id >= 1000000`
	case 1:
		many = fmt.Sprintf(`INSERT INTO levels (id, level, name) SELECT g, 1, 'large' FROM generate_series(1000000, 1000000 + %d) g ON CONFLICT (id) DO NOTHING`, 3000+w.rng.IntN(10000))
	}
	for _, s := range []statement{halves[0], {many, nil}, halves[1]} {
		if _, err := tx.Exec(ctx, s.sql, s.args...); err != nil {
			return err
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	w.commits.Add(1)
	return nil
}
