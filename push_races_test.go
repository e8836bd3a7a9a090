package main

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

const racesSQL = `
CREATE TABLE papers (id text PRIMARY KEY, owner text, title text, body text, deleted_at timestamptz);
INSERT INTO papers VALUES ('a', 'ana', 'first', 'first'), ('b', 'ana', 'first', 'first');
`

const racesCollections = `  papers: {table: public.papers, scope: {owner: claims.sub}, soft_delete: {column: deleted_at}, write: {roles: [editor]}, conflict: merge}
`

// TestPushUnseenChange pushes with a parent_version from before a row was out of everybody's sight: what was written there
// isn't in the feed, and counts.
func TestPushUnseenChange(t *testing.T) {
	t.Parallel()
	g := startPushGateway(t, pgserver.ForTest(t).Database(t), racesSQL, "", racesCollections)
	app := connect(t, g.dsn)
	for id, unseen := range map[string][2]string{
		"a": {`UPDATE papers SET deleted_at = now() WHERE id = 'a'`, `UPDATE papers SET deleted_at = NULL WHERE id = 'a'`},
		"b": {`UPDATE papers SET owner = NULL WHERE id = 'b'`, `UPDATE papers SET owner = 'ana' WHERE id = 'b'`},
	} {
		_, version := g.here(t)
		resyncExec(t, app, unseen[0])
		resyncExec(t, app, `UPDATE papers SET title = 'theirs' WHERE id = $1`, id)
		resyncExec(t, app, unseen[1])
		got := g.one(t, pushChange{Collection: "papers", Operation: "update", DocID: id, Data: map[string]any{"title": "mine"}, ParentVersion: version})
		if row := got.shown(t); got.Status != "conflict_resolved" || row == nil || row["title"] != "theirs" {
			t.Errorf("%s: %s, want the title that was written out of sight", id, got.raw)
		}
	}
}

// TestPushRowMadeAnew pushes to a row that another transaction is deleting and inserting again: it is there before and
// after, so it is there.
func TestPushRowMadeAnew(t *testing.T) {
	t.Parallel()
	g := startPushGateway(t, pgserver.ForTest(t).Database(t), racesSQL, "", racesCollections)
	app, other := connect(t, g.dsn), connect(t, g.dsn)
	for _, c := range []struct {
		operation string
		left      int
	}{{"update", 1}, {"upsert", 1}, {"delete", 0}} {
		resyncExec(t, app, `BEGIN; DELETE FROM papers WHERE id = 'a'; INSERT INTO papers VALUES ('a', 'ana', 'anew', 'anew')`)
		committed := make(chan error, 1)
		go func() { committed <- commitOnceWaitedFor(t.Context(), app, other) }()
		change := pushChange{Collection: "papers", Operation: c.operation, DocID: "a"}
		if c.operation != "delete" {
			change.Data = map[string]any{"body": "mine"}
		}
		got := g.one(t, change)
		if err := <-committed; err != nil {
			t.Fatal(err)
		}
		var left int
		resyncScan(t, app, []any{&left}, `SELECT count(*) FROM papers WHERE id = 'a' AND deleted_at IS NULL AND title = 'anew' AND body = CASE $1 WHEN 'delete' THEN body ELSE 'mine' END`, c.operation)
		if got.Status != "accepted" || got.NewVersion == nil || left != c.left {
			t.Errorf("%s: %s and %d rows, want accepted and %d", c.operation, got.raw, left, c.left)
		}
	}
}

// commitOnceWaitedFor commits what is open on a connection once somebody in the database waits for a lock.
func commitOnceWaitedFor(ctx context.Context, app, look *pgx.Conn) error {
	for waits := false; !waits; pause(ctx, 5*time.Millisecond) {
		err := look.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pid IN (SELECT pid FROM pg_stat_activity WHERE datname = current_database()))`).Scan(&waits)
		if err != nil {
			return err
		}
	}
	_, err := app.Exec(ctx, `COMMIT`)
	return err
}

// TestPushRowMadeWhileItWaits pushes to a row that was deleted, and that another transaction makes while the push waits for
// the log: it is there.
func TestPushRowMadeWhileItWaits(t *testing.T) {
	t.Parallel()
	g := startPushGateway(t, pgserver.ForTest(t).Database(t), racesSQL, "", racesCollections)
	app, other := connect(t, g.dsn), connect(t, g.dsn)
	resyncExec(t, app, `DELETE FROM papers WHERE id = 'a'`)
	resyncLogged(t, app)
	release := holdAppender(t, g.dsn)
	made := make(chan error, 1)
	go func() {
		made <- func() error {
			for waits := false; !waits; pause(t.Context(), 5*time.Millisecond) {
				err := other.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE a.datname = current_database()
					AND a.application_name = 'walgate' AND l.locktype = 'advisory' AND a.state = 'idle in transaction')
					AND EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'walgate.checkpoint'::regclass)`).Scan(&waits)
				if err != nil {
					return err
				}
			}
			_, err := app.Exec(t.Context(), `INSERT INTO papers VALUES ('a', 'ana', 'anew', 'anew')`)
			release()
			return err
		}()
	}()
	got := g.one(t, pushChange{Collection: "papers", Operation: "update", DocID: "a", Data: map[string]any{"body": "mine"}})
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	var title, body string
	resyncScan(t, app, []any{&title, &body}, `SELECT title, body FROM papers WHERE id = 'a'`)
	if got.Status != "accepted" || title != "anew" || body != "mine" {
		t.Errorf("%s; the row is %s, %s: want accepted, anew, mine", got.raw, title, body)
	}
}
