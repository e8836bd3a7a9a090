package replication

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// upload makes an event as an upload or deletion does.
const uploadSQL = `WITH e AS (INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject, created_at)
		VALUES ($1, $2::text::"char", 3, 'image/png', sha256(convert_to($1, 'UTF8')), 'ana', clock_timestamp()) RETURNING id)
	INSERT INTO walgate.files (attachment_id, event_id, state, storage_key, size, content_type, sha256, subject)
	SELECT $1, id, $2::text::"char", $1 || '/' || id, 3, 'image/png', sha256(convert_to($1, 'UTF8')), 'ana' FROM e
	ON CONFLICT (attachment_id) DO UPDATE SET event_id = excluded.event_id, state = excluded.state`

// upload locks the id first: the events of one are numbered in the order of their commits.
func upload(ctx context.Context, tx pgx.Tx, id string, event string) error {
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtext($1))`, id); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, uploadSQL, id, event)
	return err
}

// upload makes an event by itself.
func (s *source) upload(id string, event string) {
	s.t.Helper()
	s.ok(pgx.BeginFunc(s.t.Context(), s.conn, func(tx pgx.Tx) error { return upload(s.t.Context(), tx, id, event) }))
}

// writer changes things at random. Its errors are conflicts with the others.
type writer struct {
	conn *pgx.Conn
	rng  *rand.Rand
}

func (w *writer) id() string {
	if w.rng.IntN(20) == 0 {
		return []string{"", ".", "a..b", "no good", strings.Repeat("x", 256), "ä"}[w.rng.IntN(6)]
	}
	return "f" + strconv.Itoa(w.rng.IntN(60))
}

func (w *writer) owner() any {
	if w.rng.IntN(12) == 0 {
		return nil
	}
	return []string{"ana", "bob", "eve"}[w.rng.IntN(3)]
}

// extra is stored out of line.
func (w *writer) extra() string {
	var photos []string
	for range w.rng.IntN(4) {
		photos = append(photos, fmt.Sprintf(`{"id": %q}`, w.id()))
	}
	if w.rng.IntN(4) == 0 {
		photos = append(photos, fmt.Sprintf(`{"id": %d}, {"id": null}, {"id": ["f1"]}, 7`, w.rng.IntN(9)))
	}
	return fmt.Sprintf(`{"photos": [%s], "pad": %q}`, strings.Join(photos, ","), strings.Repeat("0123456789", 300))
}

func (w *writer) tags() []string {
	var tags []string
	for range w.rng.IntN(3) {
		tags = append(tags, w.id())
	}
	return tags
}

// change makes one change of some row.
func (w *writer) change(ctx context.Context, tx pgx.Tx, rows int) error {
	a, b := w.rng.IntN(rows), []string{"x", "y"}[w.rng.IntN(2)]
	do := func(sql string, args ...any) error {
		_, err := tx.Exec(ctx, sql, append([]any{a, b}, args...)...)
		return err
	}
	const at = ` WHERE a = $1 AND b = $2`
	switch w.rng.IntN(14) {
	case 0, 1:
		return do(`INSERT INTO things (a, b, owner, photo, extra, tags) VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING`, w.owner(), w.id(), w.extra(), w.tags())
	case 2:
		return do(`UPDATE things SET photo = $3`+at, w.id())
	case 3:
		return do(`UPDATE things SET extra = $3`+at, w.extra())
	case 4:
		return do(`UPDATE things SET tags = $3`+at, w.tags())
	case 5:
		return do(`UPDATE things SET body = $3`+at, w.id())
	case 6:
		return do(`UPDATE things SET owner = $3`+at, w.owner())
	case 7:
		return do(`UPDATE things SET hidden = NOT hidden` + at)
	case 8:
		return do(`UPDATE things SET gone = CASE WHEN gone IS NULL THEN now() END` + at)
	case 9:
		return do(`DELETE FROM things` + at)
	case 10:
		return do(`UPDATE things SET a = $3`+at+` AND NOT EXISTS (SELECT FROM things WHERE a = $3 AND b = $2)`, w.rng.IntN(rows))
	case 11: // delete and insert
		if err := do(`DELETE FROM things` + at); err != nil {
			return err
		}
		return do(`INSERT INTO things (a, b, owner, photo, extra) VALUES ($1, $2, $3, $4, $5)`, w.owner(), w.id(), w.extra())
	case 12: // a reference moves to another row
		_, err := tx.Exec(ctx, `WITH m AS (UPDATE things SET photo = NULL WHERE a = $1 AND b = $2 RETURNING a) UPDATE things SET photo = $3 WHERE a = $1 + 1 AND b = $2`, a, b, w.id())
		return err
	default:
		_, err := tx.Exec(ctx, `INSERT INTO cards VALUES ($1, gen_random_uuid()) ON CONFLICT (id) DO UPDATE SET image = CASE WHEN cards.image IS NULL THEN gen_random_uuid() END`, a)
		return err
	}
}

// run writes until done is closed, and then a few more times.
func (w *writer) run(ctx context.Context, done <-chan struct{}, rows int) error {
	for rest := 20; rest > 0; {
		select {
		case <-done:
			rest--
		default:
		}
		n := 1 + w.rng.IntN(4)
		if w.rng.IntN(40) == 0 {
			n = 200
		}
		keep := w.rng.IntN(8) > 0
		err := pgx.BeginFunc(ctx, w.conn, func(tx pgx.Tx) error {
			for range n {
				if err := w.change(ctx, tx, rows); err != nil {
					return err
				}
			}
			if w.rng.IntN(4) == 0 {
				if err := upload(ctx, tx, "f"+strconv.Itoa(w.rng.IntN(60)), []string{"u", "u", "u", "d", "m"}[w.rng.IntN(5)]); err != nil {
					return err
				}
			}
			if !keep {
				return errRolledBack
			}
			return nil
		})
		if err != nil && !strings.Contains(err.Error(), "deadlock") && !strings.Contains(err.Error(), "duplicate key") && err != errRolledBack {
			return err
		}
	}
	return nil
}

var errRolledBack = errors.New("rolled back on purpose")
