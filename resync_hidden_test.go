//go:build unix

package main

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// The tests of this file make transactions that are committed, decoded and logged, but that no new snapshot shows: a
// backend writes its commit record and only then leaves the list of running transactions. Waiting for a synchronous
// standby happens in between, and a process that is stopped there stays there.

// hiddenTransaction is a transaction in that state.
type hiddenTransaction struct {
	conn *pgx.Conn
	pid  int
	xid  int64
	done chan error // What its commit returned.
}

// reveal lets the commit end and waits for it.
func (h *hiddenTransaction) reveal(t *testing.T) {
	t.Helper()
	if err := syscall.Kill(h.pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := <-h.done; err != nil {
		t.Fatalf("the hidden commit: %v", err)
	}
}

// commitUnacknowledged runs the statements and leaves their commit waiting for a standby that doesn't exist. The standby
// is asked for only now, so that everybody else could commit until here.
func commitUnacknowledged(t *testing.T, admin *pgx.Conn, dsn, statements, commit string) *hiddenTransaction {
	t.Helper()
	h := &hiddenTransaction{conn: connect(t, dsn), done: make(chan error, 1)}
	resyncExec(t, h.conn, "BEGIN; "+statements)
	resyncScan(t, h.conn, []any{&h.pid, &h.xid}, `SELECT pg_backend_pid(), pg_current_xact_id()::text::int8`)
	if before, last, ok := strings.Cut(commit, ";"); ok {
		resyncExec(t, h.conn, before)
		commit = last
	}
	demandStandby(t, admin, dsn)
	go func() {
		_, err := h.conn.Exec(t.Context(), commit)
		h.done <- err
	}()
	resyncEventually(t, "the commit waits for a standby", func() bool { return waitingForStandby(t, admin, h.pid) })
	return h
}

// hide leaves a transaction logged and unseen, and everybody else free to commit.
func hide(t *testing.T, admin *pgx.Conn, dsn, statements, commit string) *hiddenTransaction {
	t.Helper()
	h := commitUnacknowledged(t, admin, dsn, statements, commit)
	if err := syscall.Kill(h.pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(h.pid, syscall.SIGCONT) }) // It may be gone.
	releaseStandby(t, admin)
	resyncEventually(t, "the hidden commit is logged", func() bool {
		var logged bool
		resyncScan(t, admin, []any{&logged}, `SELECT EXISTS (SELECT FROM walgate.transactions WHERE xid = $1)`, h.xid)
		return logged
	})
	var hidden bool
	resyncScan(t, admin, []any{&hidden}, `SELECT NOT pg_visible_in_snapshot($1::xid8, pg_current_snapshot())`, strconv.FormatInt(h.xid, 10))
	if !hidden {
		t.Fatal("the commit is visible: the test has lost its window")
	}
	return h
}

// demandStandby makes commits wait for a standby that doesn't exist, and returns once they do: a reload reaches each
// process in its own time, so a probe commits until it has to wait.
func demandStandby(t *testing.T, admin *pgx.Conn, dsn string) {
	t.Helper()
	probe := connect(t, dsn)
	var pid int
	resyncScan(t, probe, []any{&pid}, `SELECT pg_backend_pid()`)
	t.Cleanup(func() { // After a failure others could not even clean up.
		_, _ = admin.Exec(context.Background(), `ALTER SYSTEM SET synchronous_standby_names = ''`)
		_, _ = admin.Exec(context.Background(), `SELECT pg_reload_conf()`)
	})
	resyncExec(t, admin, `ALTER SYSTEM SET synchronous_standby_names = 'nobody'`)
	resyncExec(t, admin, `SELECT pg_reload_conf()`)
	stop, stopped := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { <-stopped }) // Before its connection is closed.
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := probe.Exec(t.Context(), `SELECT pg_logical_emit_message(true, 'probe', '')`); err != nil {
				return
			}
		}
	}()
	defer close(stop)
	resyncEventually(t, "commits wait for a standby", func() bool { return waitingForStandby(t, admin, pid) })
}

// releaseStandby lets everybody commit again who isn't stopped.
func releaseStandby(t *testing.T, admin *pgx.Conn) {
	t.Helper()
	resyncExec(t, admin, `ALTER SYSTEM SET synchronous_standby_names = ''`)
	resyncExec(t, admin, `SELECT pg_reload_conf()`)
	resyncExec(t, admin, `SELECT pg_logical_emit_message(true, 'released', '')`) // Waits, if it must, until that has happened.
}

func waitingForStandby(t *testing.T, admin *pgx.Conn, pid int) bool {
	t.Helper()
	var waiting bool
	resyncScan(t, admin, []any{&waiting}, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'SyncRep')`, pid)
	return waiting
}

// hiddenKinds are the ways in which a transaction writes row 1 and commits.
var hiddenKinds = []struct{ name, statements, commit string }{
	{"plain", `INSERT INTO items VALUES (1, 1, 'hidden')`, `COMMIT`},
	{"update and delete", `UPDATE items SET n = 1 WHERE id = 100; DELETE FROM items WHERE id = 101`, `COMMIT`},
	{"changed key", `UPDATE items SET id = 1 WHERE id = 100`, `COMMIT`},
	{"savepoint", `SAVEPOINT a; INSERT INTO items VALUES (1, 1, 'in a savepoint'); RELEASE a`, `COMMIT`},
	{"rolled back savepoint", `SAVEPOINT a; INSERT INTO items VALUES (1, 1, 'rolled back'); ROLLBACK TO a; INSERT INTO items VALUES (1, 2, 'kept')`, `COMMIT`},
	{"hundred subtransactions", `DO $$ BEGIN FOR i IN 1..100 LOOP BEGIN INSERT INTO items VALUES (i + 200, 1, 'sub'); EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$`, `COMMIT`},
	{"prepared", `SAVEPOINT a; INSERT INTO items VALUES (1, 1, 'prepared')`, `PREPARE TRANSACTION 'walgate'; COMMIT PREPARED 'walgate'`},
}

// TestFullBelowLoggedButInvisible: L lies below a logged transaction that the snapshot doesn't show, and pulling from L
// brings it.
func TestFullBelowLoggedButInvisible(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{})
	dsn := server.Database(t)
	g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
	admin := connect(t, dsn)
	for _, kind := range hiddenKinds {
		for _, query := range []string{"", "limit=all", "limit=1"} {
			t.Run(kind.name+" "+query, func(t *testing.T) {
				resyncExec(t, admin, `DELETE FROM items; INSERT INTO items VALUES (100, 0, 'a'), (101, 0, 'b'), (102, 0, 'c')`)
				resyncLogged(t, admin)
				h := hide(t, admin, dsn, kind.statements, kind.commit)
				replica := resyncReplica{}
				last, _ := g.full(t, query, replica, nil)
				if len(replica) != 3 {
					t.Errorf("the full resync shows %d rows while the commit is hidden, want 3", len(replica))
				}
				requireBelow(t, admin, last, h.xid)
				h.reveal(t)
				if _, ok := g.catchUp(t, admin, last, replica); !ok {
					t.Fatal("pull from L demands a full resync")
				}
				replica.requireTable(t, admin, resyncItemsQuery)
			})
		}
	}
}

// requireBelow fails unless L lies below the transaction.
func requireBelow(t *testing.T, conn *pgx.Conn, last string, xid int64) {
	t.Helper()
	var tx int64
	resyncScan(t, conn, []any{&tx}, `SELECT tx FROM walgate.transactions WHERE xid = $1`, xid)
	if got := int64(resyncVersion(t, last)); got >= tx {
		t.Errorf("L is %d, not below %d, the version of a transaction that the snapshot doesn't show", got, tx)
	}
}

// TestFullOfSnapshotThatIsNoPrefix: where later transactions are visible and an earlier one isn't, L lies below the
// earlier one and the client is told from which version on its replica is whole.
func TestFullOfSnapshotThatIsNoPrefix(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{})
	dsn := server.Database(t)
	g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
	admin := connect(t, dsn)
	for _, query := range []string{"", "limit=all", "limit=1"} {
		t.Run(query, func(t *testing.T) {
			resyncExec(t, admin, `DELETE FROM items; INSERT INTO items VALUES (5, 0, 'first')`)
			resyncLogged(t, admin)
			h := hide(t, admin, dsn, `INSERT INTO items VALUES (1, 1, 'hidden')`, `COMMIT`)
			resyncExec(t, admin, `SET synchronous_commit = local; INSERT INTO items VALUES (2, 1, 'later')`)
			resyncExec(t, admin, `UPDATE items SET n = 7 WHERE id = 5; RESET synchronous_commit`)
			resyncLogged(t, admin)
			var newest int64
			resyncScan(t, admin, []any{&newest}, `SELECT version FROM walgate.checkpoint`)

			replica := resyncReplica{}
			last, settles := "", ""
			if query == "limit=all" {
				a := g.get(t, "/sync/full?limit=all")
				end := replica.applyLines(t, strings.NewReader(string(a.body)))
				last, settles = a.last(), end.Settles
				if a.status != http.StatusOK || end.LastSeq != last {
					t.Errorf("status %d, end line with L %q, header with %q", a.status, end.LastSeq, last)
				}
			} else {
				last, settles = g.full(t, query, replica, nil)
			}
			if _, ok := replica["items/2"]; !ok || len(replica) != 2 {
				t.Errorf("the snapshot shows %v, want the later row and not the hidden one", replica)
			}
			requireBelow(t, admin, last, h.xid)
			if settles == "" {
				t.Error("nobody says that the replica is ahead of L")
			} else if v := resyncVersion(t, settles); int64(v) < newest {
				t.Errorf("settles at %d, but what was shown goes up to %d", v, newest)
			}
			h.reveal(t)
			if _, ok := g.catchUp(t, admin, last, replica); !ok {
				t.Fatal("pull from L demands a full resync")
			}
			replica.requireTable(t, admin, resyncItemsQuery)
		})
	}
}

// TestFullWaitsForStandby: a snapshot taken while a commit waits for its standby, whose fence passes only after that
// commit is visible to others, still has an L below it.
func TestFullWaitsForStandby(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{})
	dsn := server.Database(t)
	g := startResyncGateway(t, dsn, resyncItems, resyncItemsPolicy)
	admin := connect(t, dsn)
	h := commitUnacknowledged(t, admin, dsn, `INSERT INTO items VALUES (1, 1, 'hidden')`, `COMMIT`)
	answer := g.inBackground(t.Context(), "/sync/full")
	resyncEventually(t, "the fence waits for a standby", func() bool {
		var waiting bool
		// The appender waits too, but its statement is a longer one. The fence begins when the snapshot was taken.
		resyncScan(t, admin, []any{&waiting}, `SELECT EXISTS (SELECT FROM pg_stat_activity
			WHERE wait_event = 'SyncRep' AND application_name = 'walgate' AND lower(query) = 'commit')`)
		return waiting
	})
	releaseStandby(t, admin)
	if err := <-h.done; err != nil {
		t.Fatal(err)
	}
	a := <-answer
	if a.status != http.StatusOK || len(a.body) != 0 {
		t.Fatalf("the full resync answers %d %s, want no row: its snapshot is older than the commit's end", a.status, a.body)
	}
	requireBelow(t, admin, a.last(), h.xid)
	replica := resyncReplica{}
	if _, ok := g.catchUp(t, admin, a.last(), replica); !ok {
		t.Fatal("pull from L demands a full resync")
	}
	replica.requireTable(t, admin, resyncItemsQuery)
}
