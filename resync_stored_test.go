package main

import (
	"io"
	"strings"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

// resyncStored has more rows than the sockets between gateway and client hold, and room for other rows where a stream in
// stored order begins.
const resyncStored = `CREATE TABLE items (id bigint PRIMARY KEY, n integer NOT NULL DEFAULT 0, secret int, body text) WITH (autovacuum_enabled = off);
	INSERT INTO items SELECT i, i, i, repeat('x', 900) FROM generate_series(1, 60000) i;
	DELETE FROM items WHERE id <= 3000`

const resyncStoredPolicy = "  items: {table: public.items, columns: {exclude: [secret]}}\n"

// TestFullOfRowsThatMove: a stream goes in the order in which rows are stored. Rows that updates move to a place already
// read are missing in it, and the feed brings them, also where a client sees nothing of what was updated.
func TestFullOfRowsThatMove(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	g := startResyncGateway(t, dsn, resyncStored, resyncStoredPolicy)
	conn := connect(t, dsn)
	resyncExec(t, conn, `VACUUM items`)
	answer := g.open(t, "/sync/full?limit=all")
	defer answer.Body.Close()
	awaitNothingHeld(t, conn)
	resyncExec(t, conn, `UPDATE items SET n = -n WHERE id > 59000 AND id <= 59500; UPDATE items SET secret = 0 WHERE id > 59500`)
	var moved int
	resyncScan(t, conn, []any{&moved}, `SELECT count(*) FROM items WHERE id > 59000 AND ctid < '(300,0)'`)
	if moved != 1000 {
		t.Fatalf("%d rows moved to the front, want 1000: the test forces nothing", moved)
	}
	replica := resyncReplica{}
	end := replica.applyLines(t, answer.Body)
	if !end.End || end.Settles == "" {
		t.Fatalf("the end line is %+v", end)
	}
	missing := 0
	for _, id := range []string{"59001", "59500", "59501", "60000"} {
		if _, ok := replica["items/"+id]; !ok {
			missing++
		}
	}
	if missing != 4 {
		t.Fatalf("the stream had %d of 4 rows that moved: the test forces nothing", 4-missing)
	}
	if _, ok := g.catchUp(t, conn, end.LastSeq, replica); !ok {
		t.Fatal("pulling from L demands a full resync")
	}
	replica.requireTable(t, conn, `SELECT 'items/' || id, row_to_json(d)::text FROM (SELECT id, n, body FROM items) d`)
}

// TestFullOfRewrittenTable: after a rewrite all rows are elsewhere, so that a stream in stored order ends without its end
// line; the next one is whole.
func TestFullOfRewrittenTable(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	g := startResyncGateway(t, dsn, resyncStored, resyncStoredPolicy)
	conn := connect(t, dsn)
	answer := g.open(t, "/sync/full?limit=all")
	defer answer.Body.Close()
	awaitNothingHeld(t, conn)
	resyncExec(t, conn, `VACUUM FULL items`)
	if body, err := io.ReadAll(answer.Body); err == nil || strings.Contains(string(body[max(0, len(body)-300):]), `"end"`) {
		t.Errorf("the stream of a rewritten table ended as if it were whole (%d bytes, %v)", len(body), err)
	}
	again := g.open(t, "/sync/full?limit=all")
	defer again.Body.Close()
	replica := resyncReplica{}
	end := replica.applyLines(t, again.Body)
	if _, ok := g.catchUp(t, conn, end.LastSeq, replica); !end.End || !ok {
		t.Errorf("the next stream: %+v, pull on %v", end, ok)
	}
	replica.requireTable(t, conn, `SELECT 'items/' || id, row_to_json(d)::text FROM (SELECT id, n, body FROM items) d`)
}
