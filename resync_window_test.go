package main

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// TestFullShowsNothingThatACrashTakesBack: what a full resync answered is durable, also where the application commits
// without waiting for the disk.
func TestFullShowsNothingThatACrashTakesBack(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"wal_writer_delay": "10s", "autovacuum": "off"}})
	dsn := server.Database(t)
	resyncExec(t, connect(t, dsn), `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$`)
	g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
	conn := connect(t, dsn)
	resyncExec(t, conn, `INSERT INTO items VALUES (1, 1, 'not flushed')`)
	replica := resyncReplica{}
	last, _ := g.full(t, "limit=all", replica, nil)
	if len(replica) != 1 {
		t.Fatalf("the full resync shows %v, want the row", replica)
	}
	if err := server.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn = connect(t, dsn)
	replica.requireTable(t, conn, resyncItemsQuery)
	resyncEventually(t, "the gateway has recovered", func() bool { return g.get(t, "/sync/full?limit=1").status == http.StatusOK })
	if _, ok := g.catchUp(t, conn, last, replica); !ok {
		t.Fatal("pull from L demands a full resync")
	}
	replica.requireTable(t, conn, resyncItemsQuery)
}

// holdAppender keeps the gateway from logging until the returned function is called.
func holdAppender(t *testing.T, dsn string) (release func()) {
	t.Helper()
	conn := connect(t, dsn)
	resyncExec(t, conn, `BEGIN; LOCK TABLE walgate.checkpoint IN SHARE MODE`)
	return func() { resyncExec(t, conn, `ROLLBACK`) }
}

// resyncOpenSnapshots counts the gateway's open transactions that hold a snapshot for a client.
func resyncOpenSnapshots(t *testing.T, conn *pgx.Conn) (n int) {
	t.Helper()
	resyncScan(t, conn, []any{&n}, `SELECT count(*) FROM pg_stat_activity a WHERE datname = current_database()
		AND application_name = 'walgate' AND state LIKE 'idle in transaction%'
		AND EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.relation >= 16384)`) // not the look at the catalog
	return n
}

// TestFullWaitsForTheLog: a transaction that the snapshot shows and the log doesn't hold yet is waited for; L covers it.
func TestFullWaitsForTheLog(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
	conn := connect(t, dsn)
	release := holdAppender(t, dsn)
	resyncExec(t, conn, `INSERT INTO items VALUES (1, 1, 'visible, not logged')`)
	answer := g.inBackground(t.Context(), "/sync/full")
	resyncEventually(t, "a snapshot is held while the appender waits", func() bool {
		var waits bool
		resyncScan(t, conn, []any{&waits}, `SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted
			AND relation = 'walgate.checkpoint'::regclass)`)
		return waits && resyncOpenSnapshots(t, conn) > 0
	})
	select {
	case a := <-answer:
		t.Errorf("answered %d %s before the log held what the snapshot shows", a.status, a.body)
	default:
	}
	release()
	a := <-answer
	replica := resyncReplica{}
	replica.applyLines(t, strings.NewReader(string(a.body)))
	if a.status != http.StatusOK || len(replica) != 1 || a.settles() != "" {
		t.Fatalf("%d %s (settles %q), want the row", a.status, a.body, a.settles())
	}
	var tx int64
	resyncScan(t, conn, []any{&tx}, `SELECT max(tx) FROM walgate.transactions`)
	if got := int64(resyncVersion(t, a.last())); got < tx {
		t.Errorf("L is %d, below %d, the version of a row that was sent", got, tx)
	}
}

// TestFullGivesUpOnAStuckLog: past the bound the answer is log_behind, and nothing is left behind.
func TestFullGivesUpOnAStuckLog(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
	conn := connect(t, dsn)
	release := holdAppender(t, dsn)
	resyncExec(t, conn, `INSERT INTO items VALUES (1, 1, 'visible, not logged')`)
	all := g.inBackground(t.Context(), "/sync/full?limit=all")
	page := g.get(t, "/sync/full")
	for _, a := range []resyncAnswer{page, <-all} {
		if a.status != http.StatusServiceUnavailable || a.code() != "log_behind" || a.header.Get("Retry-After") == "" {
			t.Errorf("answered %d %s with Retry-After %q, want 503 log_behind", a.status, a.body, a.header.Get("Retry-After"))
		}
	}
	if n := resyncOpenSnapshots(t, conn); n != 0 {
		t.Errorf("%d snapshots are still open", n)
	}
	resyncExec(t, conn, `BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE NOWAIT; ROLLBACK`)
	release()
	for range 3 { // More than full_concurrency: no place was lost.
		if a := g.get(t, "/sync/full"); a.status != http.StatusOK {
			t.Errorf("afterwards: %d %s", a.status, a.body)
		}
	}
}

// TestFullAcrossLongTransaction: a transaction that is open during the whole resync, in savepoints or prepared, comes by
// pull when it commits.
func TestFullAcrossLongTransaction(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
	conn, long, prepared := connect(t, dsn), connect(t, dsn), connect(t, dsn)
	resyncExec(t, conn, `INSERT INTO items VALUES (10, 0, 'a'), (11, 0, 'b'), (12, 0, 'c')`)
	resyncExec(t, long, `BEGIN; INSERT INTO items VALUES (1, 1, 'open'); SAVEPOINT a; UPDATE items SET n = 2 WHERE id = 10; SAVEPOINT b`)
	resyncExec(t, prepared, `BEGIN; DELETE FROM items WHERE id = 12; SAVEPOINT a; INSERT INTO items VALUES (2, 1, 'prepared');
		PREPARE TRANSACTION 'walgate across'`)
	replica := resyncReplica{}
	last, _ := g.full(t, "limit=1", replica, func(page int) {
		resyncExec(t, conn, `INSERT INTO items SELECT max(id) + 1, 5, 'meanwhile' FROM items HAVING max(id) < 15`)
	})
	resyncExec(t, long, `RELEASE a; COMMIT`)
	resyncExec(t, prepared, `COMMIT PREPARED 'walgate across'`)
	if _, ok := g.catchUp(t, conn, last, replica); !ok {
		t.Fatal("pull from L demands a full resync")
	}
	replica.requireTable(t, conn, resyncItemsQuery)
}

// TestFullOfMovingRows: rows that move behind or ahead of the cursor between pages are neither lost nor kept.
func TestFullOfMovingRows(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
	conn := connect(t, dsn)
	resyncExec(t, conn, `INSERT INTO items SELECT i * 10, 0, 'row ' || i FROM generate_series(1, 12) i`)
	moves := []string{
		`UPDATE items SET id = 5 WHERE id = 100`,                      // From ahead of the cursor to behind it.
		`UPDATE items SET id = 95 WHERE id = 10`,                      // From behind to ahead.
		`INSERT INTO items VALUES (1, 1, 'behind')`,                   //
		`DELETE FROM items WHERE id IN (20, 120)`,                     // One sent, one not yet.
		`UPDATE items SET n = n + 1`,                                  // All.
		`DELETE FROM items WHERE id = 70`,                             //
		`INSERT INTO items VALUES (70, 9, 'again'), (71, 9, 'ahead')`, //
	}
	replica := resyncReplica{}
	last, settles := g.full(t, "limit=2", replica, func(page int) {
		if page-2 < len(moves) {
			resyncExec(t, conn, moves[page-2])
		}
	})
	if settles == "" {
		t.Error("later pages showed later states, and nobody said so")
	}
	if _, ok := g.catchUp(t, conn, last, replica); !ok {
		t.Fatal("pull from L demands a full resync")
	}
	replica.requireTable(t, conn, resyncItemsQuery)

	resyncExec(t, conn, `DELETE FROM items WHERE id = 95; UPDATE items SET id = 6 WHERE id = 5; INSERT INTO items VALUES (200, 1, 'new')`)
	a := g.get(t, "/sync/full?limit=3&since="+url.QueryEscape(last))
	if mode := a.header.Get("X-Sync-Mode"); mode != "merge" {
		t.Errorf("X-Sync-Mode is %q for a valid since, want merge", mode)
	}
	last, _ = g.full(t, "limit=3&since="+url.QueryEscape(last), replica, func(page int) {
		resyncExec(t, conn, `DELETE FROM items WHERE id = (SELECT max(id) FROM items) AND id > 90`)
	})
	if _, ok := g.catchUp(t, conn, last, replica); !ok {
		t.Fatal("pull from L demands a full resync")
	}
	replica.requireTable(t, conn, resyncItemsQuery)
}

// TestFullAcrossANewBeginning: the log, or the collection in it, begins anew while a full resync waits for its fence. What
// was committed between its snapshot and the beginning is in neither: it must be read again.
func TestFullAcrossANewBeginning(t *testing.T) {
	t.Parallel()
	const endReader = `SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = current_database() AND active_pid IS NOT NULL`
	for name, begin := range map[string][2]string{
		"a lost slot": {endReader, `DO $$BEGIN
			PERFORM pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE database = current_database() AND active_pid IS NOT NULL;
			PERFORM pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database(); END$$`},
		"a table that left the publication": {`ALTER PUBLICATION walgate DROP TABLE items`, `ALTER PUBLICATION walgate ADD TABLE items`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dsn := pgserver.ForTest(t).Database(t)
			g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
			conn := connect(t, dsn)
			resyncExec(t, conn, `INSERT INTO items VALUES (1, 1, 'before')`)
			release := holdAppender(t, dsn)
			answer := g.inBackground(t.Context(), "/sync/full")
			resyncEventually(t, "a snapshot is held", func() bool { return resyncOpenSnapshots(t, conn) > 0 })
			resyncExec(t, conn, begin[0])
			resyncExec(t, conn, `INSERT INTO items VALUES (2, 1, 'between')`)
			resyncEventually(t, "there is a new beginning", func() bool {
				_, err := conn.Exec(t.Context(), begin[1])
				return err == nil
			})
			release()
			a := <-answer
			replica := resyncReplica{}
			last := "0"
			if a.status == http.StatusOK {
				replica.applyLines(t, strings.NewReader(string(a.body)))
				last = a.last()
			}
			told := false
			resyncEventually(t, "the client is told, or has the row", func() bool {
				if !told {
					cursor, ok := g.catchUp(t, conn, last, replica)
					last, told = cursor, !ok
				}
				return told || len(replica) == 2
			})
		})
	}
}
