package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// alteration is something that a migration or an administrator does to the tables. With back it is undone after a while;
// back does nothing where that was done already.
type alteration struct {
	name string
	do   func(w *writer) []string
	back func(w *writer) []string
	away bool // no gateway may start meanwhile: a table isn't there
	torn bool // what is published meanwhile is not whole transactions
}

// alterations are what the altering writer chooses from.
var alterations = []alteration{
	{name: "truncate", do: func(w *writer) []string {
		return []string{"TRUNCATE " + []string{"softs", "goods, keyed", "events", "events_north", "items"}[w.rng.IntN(5)]}
	}},
	{name: "truncate and insert", do: func(*writer) []string {
		return []string{"TRUNCATE softs", "INSERT INTO softs (id, owner_id, name) SELECT g, 'u' || g % 5, 'after' FROM generate_series(1, 30) g"}
	}},
	{name: "add column", do: func(w *writer) []string {
		table, column := w.anyTable(), w.newName("extra")
		return []string{fmt.Sprintf("ALTER TABLE %s ADD %s text", table, column), fmt.Sprintf("UPDATE %s SET %s = 'set' WHERE ctid IN (SELECT ctid FROM %[1]s LIMIT 10)", table, column)}
	}},
	{name: "add column with default", do: func(w *writer) []string {
		return []string{fmt.Sprintf("ALTER TABLE %s ADD %s int NOT NULL DEFAULT 7", w.anyTable(), w.newName("extra"))}
	}},
	{name: "drop column", do: func(*writer) []string { return []string{onColumn("extra", `ALTER TABLE %s DROP %I`)} }},
	{name: "rename column", do: func(w *writer) []string {
		return []string{onColumn("label", `ALTER TABLE %s RENAME %I TO `+w.newName("label"))}
	}},
	{name: "retype column", do: func(w *writer) []string {
		return []string{onColumn("size", `ALTER TABLE %s ALTER %I TYPE `+[]string{"int", "bigint", "numeric(12,2)"}[w.rng.IntN(3)])}
	}},
	{name: "add enum value", do: func(w *writer) []string { return []string{"ALTER TYPE mood ADD VALUE '" + w.newName("mood") + "'"} },
		back: func(*writer) []string { // in a transaction of its own: a new value can't be used in the one that adds it
			return []string{"UPDATE levels SET mood = (SELECT enumlabel::text::mood FROM pg_enum WHERE enumtypid = 'mood'::regtype ORDER BY enumsortorder DESC LIMIT 1) WHERE id % 7 = 0"}
		}},
	// The oldest one: a value that is added, used and renamed between two looks at the catalog is a known limit.
	{name: "rename enum value", do: func(w *writer) []string {
		return []string{`DO $$ DECLARE l text; BEGIN SELECT enumlabel INTO l FROM pg_enum WHERE enumtypid = 'mood'::regtype ORDER BY enumsortorder LIMIT 1;
			EXECUTE format('ALTER TYPE mood RENAME VALUE %L TO %L', l, '` + w.newName("mood") + `'); END $$`}
	}},
	{name: "detach and attach a partition", do: func(*writer) []string { return []string{"ALTER TABLE events DETACH PARTITION events_south"} },
		back: func(*writer) []string {
			return []string{`DO $$ BEGIN IF NOT (SELECT relispartition FROM pg_class WHERE oid = 'events_south'::regclass) THEN
				LOCK events; DELETE FROM events_rest WHERE region = 'south'; ALTER TABLE events ATTACH PARTITION events_south FOR VALUES IN ('south'); END IF; END $$`}
		}},
	{name: "add a partition", do: func(w *writer) []string {
		region := w.newName("pole")
		return []string{fmt.Sprintf("CREATE TABLE events_%s PARTITION OF events FOR VALUES IN ('%[1]s')", region),
			fmt.Sprintf("INSERT INTO events (region, id, owner_id) SELECT '%s', g, 'u' || g %% 5 FROM generate_series(1, 20) g", region)}
	}},
	{name: "rename table and back", away: true, do: func(*writer) []string { return []string{"ALTER TABLE softs RENAME TO softs_away"} },
		back: func(*writer) []string { return []string{"ALTER TABLE IF EXISTS softs_away RENAME TO softs"} }},
	{name: "table out of the publication and in", do: func(w *writer) []string {
		return []string{"ALTER PUBLICATION walgate DROP TABLE " + w.unpaired()}
	}, back: func(w *writer) []string {
		return []string{fmt.Sprintf(`DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_publication_tables WHERE pubname = 'walgate' AND tablename = '%[1]s')
			THEN ALTER PUBLICATION walgate ADD TABLE %[1]s; END IF; END $$`, w.chosen)}
	}},
	{name: "publication of inserts only", torn: true, do: func(*writer) []string { return []string{"ALTER PUBLICATION walgate SET (publish = 'insert')"} },
		back: func(*writer) []string {
			return []string{"ALTER PUBLICATION walgate SET (publish = 'insert, update, delete, truncate')"}
		}},
	{name: "replica identity taken away", do: func(w *writer) []string {
		return []string{"ALTER TABLE " + w.unpaired() + " REPLICA IDENTITY DEFAULT"}
	}, back: func(w *writer) []string {
		if w.chosen == "keyed" { // its policy needs the key only
			return []string{"SELECT 1"}
		}
		return []string{"ALTER TABLE " + w.chosen + " REPLICA IDENTITY FULL"}
	}},
	{name: "table made anew", do: func(*writer) []string {
		return []string{"DROP TABLE goods", goodsSQL, "INSERT INTO goods (id, name) SELECT g, 'again ' || g FROM generate_series(1, 100) g"}
	}},
}

// anyTable is a table that gets and loses columns.
func (w *writer) anyTable() string {
	return []string{"notes", "items", "levels", "events", "softs", "exact"}[w.rng.IntN(6)]
}

// unpaired chooses a table whose rows no other table's rows have to match, and remembers it.
func (w *writer) unpaired() string {
	w.chosen = []string{"items", "levels", "softs", "keyed"}[w.rng.IntN(4)]
	return w.chosen
}

func (w *writer) newName(prefix string) string {
	w.names++
	return fmt.Sprintf("%s_%d_%d", prefix, w.round, w.names)
}

// onColumn applies a statement, a format of table and column, to one of the columns whose name begins so, if there is any.
func onColumn(prefix, statement string) string {
	return fmt.Sprintf(`DO $$ DECLARE c record; BEGIN
		SELECT attrelid::regclass AS rel, attname INTO c FROM pg_attribute JOIN pg_class k ON k.oid = attrelid
		WHERE attname LIKE '%s%%' AND NOT attisdropped AND attnum > 0 AND relkind IN ('r', 'p') AND NOT relispartition AND relnamespace = 'public'::regnamespace ORDER BY md5(attname) LIMIT 1;
		IF FOUND THEN EXECUTE format('%s', c.rel, c.attname); END IF; END $$`, prefix, statement)
}

// alter changes the tables in one way, and back where that way is a detour.
func (w *writer) alter(ctx context.Context) error {
	pause(ctx, time.Duration(100+w.rng.IntN(500))*time.Millisecond+20*w.pace)
	if len(w.alterations) == 0 {
		for _, i := range w.rng.Perm(len(alterations)) {
			w.alterations = append(w.alterations, alterations[i])
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	a := w.alterations[0]
	w.alterations = w.alterations[1:]
	if a.away {
		w.tables.Lock()
		defer w.tables.Unlock()
	}
	if a.torn {
		w.torn.Store(true)
	}
	err := w.migrate(ctx, a.do(w))
	if a.back != nil && (err == nil || !refused(err)) { // a connection that broke may have committed
		pause(ctx, time.Duration(w.rng.IntN(900))*time.Millisecond)
		err = errors.Join(err, w.undo(ctx, a.back(w)))
	}
	if err == nil {
		w.count(a.name)
	}
	return err
}

// undo runs the way back until it succeeds, whatever else goes on.
func (w *writer) undo(ctx context.Context, statements []string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), convergenceLimit)
	defer cancel()
	for {
		err := w.connect(ctx)
		if err == nil {
			err = w.migrate(ctx, statements)
		}
		if err == nil || !expectedOfWriter(err) || ctx.Err() != nil {
			return err
		}
		pause(ctx, 20*time.Millisecond)
	}
}

// migrate runs statements in one transaction, as migrations do, with a limit on waiting for locks.
func (w *writer) migrate(ctx context.Context, statements []string) error {
	w.altering.Lock()
	defer w.altering.Unlock()
	tx, err := w.conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	for _, s := range append([]string{"SET LOCAL lock_timeout = '500ms'"}, statements...) {
		if _, err := tx.Exec(ctx, s); err != nil {
			return err
		}
	}
	return tx.Commit(ctx)
}

func (w *writer) connect(ctx context.Context) (err error) {
	if w.conn == nil || w.conn.IsClosed() {
		if w.conn, err = pgx.Connect(ctx, w.dsn); err != nil {
			w.conn = nil
		}
	}
	return err
}

// refused says whether the server answered with an error and goes on.
func refused(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && !strings.HasPrefix(pg.Code, "57P")
}
