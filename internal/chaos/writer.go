package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// writer is one connection of the application. What it writes follows from its seed; how it interleaves with the others
// doesn't.
type writer struct {
	w    *World
	rng  *rand.Rand
	conn *pgx.Conn
}

const (
	writerPause   = 25 * time.Millisecond // at most, between two transactions
	writerTimeout = 5 * time.Second       // of one transaction: the way to the server may be gone without a word
	longest       = 20                    // statements of a transaction
)

// run writes until ctx ends. Nothing that the database or the way to it does is an error of the run.
func (a *writer) run(ctx context.Context) {
	defer a.close()
	for ; ctx.Err() == nil; pause(ctx, upTo(a.rng, writerPause)) {
		doing, cancel := context.WithTimeout(ctx, writerTimeout)
		err := a.step(doing)
		cancel()
		var refused *pgconn.PgError
		switch {
		case err == nil:
			a.w.count("application: commits")
		case ctx.Err() != nil:
		case errors.As(err, &refused) && refused.Severity == "ERROR":
			a.w.count("application: refused " + refused.Code)
		default:
			a.w.count("application: connection lost")
			a.close()
			pause(ctx, 30*time.Millisecond)
		}
	}
}

func (a *writer) close() {
	if a.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = a.conn.Close(ctx) // it may be broken already
		a.conn = nil
	}
}

func (a *writer) step(ctx context.Context) (err error) {
	if a.conn == nil || a.conn.IsClosed() {
		config, err := pgx.ParseConfig(a.w.o.App)
		if err != nil {
			return err
		}
		config.ConnectTimeout = 2 * time.Second
		config.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
		if a.conn, err = pgx.ConnectConfig(ctx, config); err != nil {
			a.conn = nil
			return err
		}
		// Waits for locks of a transaction that lost its client would last as long as that isn't noticed.
		if _, err := a.conn.Exec(ctx, "SET lock_timeout = '1s'; SET idle_in_transaction_session_timeout = '5s'"); err != nil {
			return err
		}
	}
	switch n := a.rng.IntN(3000); {
	case n < 2:
		return a.truncate(ctx)
	case n < 8:
		return a.large(ctx)
	}
	return a.transaction(ctx)
}

// transaction runs 1 to 20 statements, each in a savepoint, and takes some of them back.
func (a *writer) transaction(ctx context.Context) error {
	begin := "BEGIN"
	if a.rng.IntN(4) == 0 {
		begin = "BEGIN; SET LOCAL synchronous_commit = off"
	}
	if _, err := a.conn.Exec(ctx, begin); err != nil {
		return err
	}
	statements := 1 + a.rng.IntN(4)
	if a.rng.IntN(8) == 0 {
		statements = 1 + a.rng.IntN(longest)
	}
	for range statements {
		end := "RELEASE s"
		if a.rng.IntN(10) == 0 {
			end = "ROLLBACK TO s"
		}
		_, err := a.conn.Exec(ctx, "SAVEPOINT s; "+a.statement()+"; "+end)
		var refused *pgconn.PgError
		if errors.As(err, &refused) && refused.Severity == "ERROR" {
			a.w.count("application: refused " + refused.Code)
			if refused.Code == "42601" || refused.Code == "22P02" {
				a.w.o.Logf("a statement of the world's own is wrong: %v", err)
			}
			_, err = a.conn.Exec(ctx, "ROLLBACK TO s")
		}
		if err != nil {
			return errors.Join(err, a.rollback(ctx))
		}
		if a.rng.IntN(60) == 0 { // rows stay locked for a while
			pause(ctx, upTo(a.rng, 200*time.Millisecond))
		}
	}
	if a.rng.IntN(12) == 0 {
		return a.rollback(ctx)
	}
	_, err := a.conn.Exec(ctx, "COMMIT")
	return err
}

func (a *writer) rollback(ctx context.Context) error {
	_, err := a.conn.Exec(ctx, "ROLLBACK")
	return err
}

// statement makes one statement over rows with small keys, which is what writers share.
func (a *writer) statement() string {
	t := pick(a.rng, a.w.tables)
	switch n := a.rng.IntN(20); {
	case n < 9 && !t.policy.Table.KeyDeferrable:
		return a.upsert(t)
	case n < 11:
		return a.insert(t)
	case n < 15:
		return a.update(t, func(c *column) bool { return !c.key && len(c.claims) == 0 })
	case n < 17:
		return a.update(t, func(c *column) bool { return len(c.claims) > 0 })
	case n == 17:
		return a.update(t, func(c *column) bool { return c.key })
	}
	return "DELETE FROM " + t.sql + " WHERE " + a.where(t)
}

func (a *writer) insert(t *table) string {
	var names, values []string
	for i := range t.columns {
		if c := &t.columns[i]; c.made && (c.NotNull || c.key || len(c.claims) > 0 || a.rng.IntN(4) > 0) && (!c.HasDefault || c.key || a.rng.IntN(2) == 0) {
			names, values = append(names, c.quoted), append(values, a.w.random(a.rng, t, c).literal())
		}
	}
	return fmt.Sprintf("INSERT INTO %s (%s) VALUES (%s)", t.sql, strings.Join(names, ", "), strings.Join(values, ", "))
}

func (a *writer) upsert(t *table) string {
	var key, set []string
	for _, i := range t.key {
		key = append(key, t.columns[i].quoted)
	}
	for i := range t.columns {
		if c := &t.columns[i]; c.made && !c.key && a.rng.IntN(2) == 0 {
			set = append(set, c.quoted+" = "+a.w.random(a.rng, t, c).literal())
		}
	}
	do := "NOTHING"
	if len(set) > 0 {
		do = "UPDATE SET " + strings.Join(set, ", ")
	}
	return fmt.Sprintf("%s ON CONFLICT (%s) DO %s", a.insert(t), strings.Join(key, ", "), do)
}

// update writes some of the columns that of allows, in one row.
func (a *writer) update(t *table, of func(*column) bool) string {
	var set []string
	for i := range t.columns {
		if c := &t.columns[i]; c.made && of(c) && (len(set) == 0 || a.rng.IntN(3) == 0) {
			set = append(set, c.quoted+" = "+a.w.random(a.rng, t, c).literal())
		}
	}
	if len(set) == 0 {
		return a.insert(t)
	}
	return fmt.Sprintf("UPDATE %s SET %s WHERE %s", t.sql, strings.Join(set, ", "), a.where(t))
}

// where selects the row of one small key, if there is one.
func (a *writer) where(t *table) string {
	var terms []string
	for _, i := range t.key {
		c := &t.columns[i]
		terms = append(terms, c.quoted+" = "+a.w.random(a.rng, t, c).literal())
	}
	return strings.Join(terms, " AND ")
}

// large writes many rows of a table whose key is one whole number, between two statements of other tables.
func (a *writer) large(ctx context.Context) error {
	var able []*table
	for _, t := range a.w.tables {
		if k := &t.columns[t.key[0]]; len(t.key) == 1 && slices.Contains([]string{"integer", "bigint"}, k.Type.Underlying().Name) && k.parent < 0 && len(k.claims) == 0 &&
			!slices.ContainsFunc(t.columns, func(c column) bool { return c.NotNull && !c.key && c.parent >= 0 }) {
			able = append(able, t)
		}
	}
	if len(able) == 0 {
		return a.transaction(ctx)
	}
	t := pick(a.rng, able)
	key := t.columns[t.key[0]].quoted
	end := largeKeys + 500 + a.rng.IntN(4000)
	many := fmt.Sprintf("DELETE FROM %s WHERE %s BETWEEN %d AND %d", t.sql, key, largeKeys, 2*largeKeys)
	if a.rng.IntN(3) > 0 {
		names, values := []string{key}, []string{"g"}
		for i := range t.columns {
			if c := &t.columns[i]; c.made && !c.key && c.parent < 0 && (c.NotNull || len(c.claims) > 0 || a.rng.IntN(2) == 0) {
				names, values = append(names, c.quoted), append(values, a.w.random(a.rng, t, c).literal())
			}
		}
		many = fmt.Sprintf("INSERT INTO %s (%s) SELECT %s FROM generate_series(%d, %d) g ON CONFLICT DO NOTHING", t.sql, strings.Join(names, ", "), strings.Join(values, ", "), largeKeys, end)
	}
	_, err := a.conn.Exec(ctx, "BEGIN; SAVEPOINT s; "+a.statement()+"; "+many+"; COMMIT")
	if err != nil {
		return errors.Join(err, a.rollback(ctx))
	}
	a.w.count("application: large transactions")
	return nil
}

// truncate empties a table that no other refers to; where one does, the database refuses.
func (a *writer) truncate(ctx context.Context) error {
	t := pick(a.rng, a.w.tables)
	a.w.ledger.emptied(t)
	_, err := a.conn.Exec(ctx, "BEGIN; TRUNCATE "+t.sql+"; COMMIT")
	if err != nil {
		return errors.Join(err, a.rollback(ctx))
	}
	a.w.count("application: TRUNCATE")
	return nil
}

// pause is somebody who is away; nothing is concluded from how long.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

func upTo(rng *rand.Rand, d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }

func sorted(list []string) []string {
	slices.Sort(list)
	return list
}
