package main

import (
	"bufio"
	"encoding/json"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// resyncDDL are changes that PostgreSQL doesn't keep older snapshots from seeing half of.
var resyncDDL = []struct {
	name, sql string
	raises    bool // The log can't carry it, so clients from before must resynchronise.
}{
	{"truncate", `TRUNCATE items`, true},
	{"truncate and insert", `TRUNCATE items; INSERT INTO items VALUES (1, 1, 'only'), (2, 2, 'two')`, true},
	{"rewrite", `ALTER TABLE items ALTER COLUMN n TYPE bigint`, true},
	{"column with default", `ALTER TABLE items ADD COLUMN extra text DEFAULT 'x'`, true},
	{"column with volatile default", `ALTER TABLE items ADD COLUMN extra double precision DEFAULT random()`, true},
	{"nullable column, filled", `ALTER TABLE items ADD COLUMN extra text; UPDATE items SET extra = 'filled' WHERE id <= 3`, false},
	{"column dropped", `ALTER TABLE items DROP COLUMN body`, true},
	{"vacuum full alike", `CLUSTER items USING items_pkey`, false},
}

// TestFullWaitsForDDL: a resync that meets an uncommitted change of the table waits, and then sees all of it.
func TestFullWaitsForDDL(t *testing.T) {
	t.Parallel()
	for _, ddl := range resyncDDL {
		t.Run(ddl.name, func(t *testing.T) {
			t.Parallel()
			dsn := pgserver.ForTest(t).Database(t)
			g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
			conn, app := connect(t, dsn), connect(t, dsn)
			resyncExec(t, conn, `INSERT INTO items SELECT i, i, 'row' FROM generate_series(1, 10) i`)
			resyncExec(t, app, `BEGIN; `+ddl.sql)
			answer := g.inBackground(t.Context(), "/sync/full")
			resyncEventually(t, "the resync waits for the table", func() bool {
				var waits bool
				resyncScan(t, conn, []any{&waits}, `SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted
					AND mode = 'AccessShareLock' AND relation = 'items'::regclass)`)
				return waits
			})
			resyncExec(t, app, `COMMIT`)
			a := <-answer
			if a.status != http.StatusOK {
				t.Fatalf("%d %s", a.status, a.body)
			}
			replica := resyncReplica{}
			replica.applyLines(t, strings.NewReader(string(a.body)))
			replica.requireTable(t, conn, resyncItemsQuery)
		})
	}
}

// TestFullBrokenByDDL: what changes the table between two pages ends the resync, or lifts the floor above its L; never
// does a client take an emptied table, or rows of two shapes, for the data.
func TestFullBrokenByDDL(t *testing.T) {
	t.Parallel()
	for _, ddl := range resyncDDL {
		t.Run(ddl.name, func(t *testing.T) {
			t.Parallel()
			dsn := pgserver.ForTest(t).Database(t)
			g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
			conn := connect(t, dsn)
			resyncExec(t, conn, `INSERT INTO items SELECT i, i, 'row' FROM generate_series(1, 10) i`)
			first := g.get(t, "/sync/full?limit=4")
			resyncExec(t, conn, ddl.sql)
			next := g.get(t, "/sync/full?limit=4&cursor="+url.QueryEscape(first.cursor()))
			if next.status != http.StatusOK && next.code() != "cursor_expired" && next.code() != "collection_unavailable" {
				t.Errorf("the next page: %d %s", next.status, next.body)
			}
			replica := resyncReplica{}
			if !ddl.raises {
				last, _ := g.full(t, "limit=4", replica, nil)
				if _, ok := g.catchUp(t, conn, first.last(), resyncReplica{}); !ok {
					t.Error("pull from L demands a full resync, though the log carries this change")
				}
				if _, ok := g.catchUp(t, conn, last, replica); !ok {
					t.Fatal("pull from the newer L demands a full resync")
				}
				replica.requireTable(t, conn, resyncItemsQuery)
				return
			}
			resyncEventually(t, "pull from L demands a full resync", func() bool {
				_, ok := g.pull(t, first.last(), resyncReplica{})
				return !ok
			})
			a := g.get(t, "/sync/full?limit=4&cursor="+url.QueryEscape(first.cursor()))
			if a.status != http.StatusGone || a.code() != "cursor_expired" {
				t.Errorf("the old cursor: %d %s, want 410 cursor_expired", a.status, a.body)
			}
			resyncEventually(t, "the collection is served again", func() bool { return g.get(t, "/sync/full?limit=1").status == http.StatusOK })
			last, _ := g.full(t, "limit=4", replica, nil)
			if _, ok := g.catchUp(t, conn, last, replica); !ok {
				t.Fatal("pull from the new L demands a full resync")
			}
			replica.requireTable(t, conn, resyncItemsQuery)
		})
	}
}

// TestFullInBoundedMemory is not parallel: it measures the heap of the whole process. A client reads slowly, and stands
// still for a while.
func TestFullInBoundedMemory(t *testing.T) {
	const (
		rows  = 300_000
		bound = 64 << 20 // The answer is three times as large.
	)
	dsn := pgserver.ForTest(t).Database(t)
	g := startResyncGateway(t, dsn, resyncItems+`; INSERT INTO items SELECT i, i, repeat('x', 600) FROM generate_series(1, 300000) i`, resyncItemsPolicy)
	conn := connect(t, dsn)
	answer := g.open(t, "/sync/full?limit=all")
	defer answer.Body.Close()
	awaitNothingHeld(t, conn)
	lines := bufio.NewReaderSize(answer.Body, 64<<10)
	most, count := uint64(0), 0
	began := time.Now()
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			t.Fatalf("after %d rows: %v", count, err)
		}
		if count%20_000 == 0 {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			most = max(most, m.HeapAlloc)
		}
		if strings.HasPrefix(string(line[:7]), `{"end":`) {
			var end struct{ Count int }
			if err := json.Unmarshal(line, &end); err != nil || end.Count != rows || count != rows {
				t.Errorf("%d rows came, the end line says %d (%v), want %d", count, end.Count, err, rows)
			}
			break
		}
		count++
	}
	t.Logf("%d rows in %s, at most %d MB of heap", count, time.Since(began).Round(time.Millisecond), most>>20)
	if most > bound {
		t.Errorf("the heap grew to %d MB, want at most %d MB", most>>20, bound>>20)
	}
}

// awaitNothingHeld waits until the gateway has filled the sockets to a client that reads nothing, and then holds neither a
// lock of items nor a snapshot.
func awaitNothingHeld(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	quiet := 0
	resyncEventually(t, "the gateway holds nothing while its client stands still", func() bool {
		_, err := conn.Exec(t.Context(), `BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE NOWAIT; ROLLBACK`)
		if err != nil {
			resyncExec(t, conn, `ROLLBACK`)
		}
		if quiet++; err != nil || resyncOpenSnapshots(t, conn) > 0 {
			quiet = 0
		}
		return quiet == 100 // Half a second: a chunk takes far less.
	})
}
