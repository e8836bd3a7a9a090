package replication

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/policies"
)

func twoTables() map[string]policies.Spec {
	return map[string]policies.Spec{"items": {Table: "items"}, "notes": {Table: "notes"}}
}

const notesTable = `CREATE TABLE notes (id int PRIMARY KEY, body text);`

func TestRowsArriveInCommitOrder(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	other := s.connect()
	exec := func(sql string) {
		if _, err := other.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	exec(`BEGIN; INSERT INTO items VALUES (1)`)
	s.exec(`INSERT INTO items VALUES (2, 'a', 't', repeat('x', 100000))`)
	exec(`INSERT INTO items VALUES (3); COMMIT`)
	s.exec(`UPDATE items SET title = 'new' WHERE id = 2; DELETE FROM items WHERE id = 1`)
	s.exec(`BEGIN; INSERT INTO items VALUES (4); SAVEPOINT a; INSERT INTO items VALUES (5); ROLLBACK TO a; INSERT INTO items VALUES (6); COMMIT`)
	s.expect(0, "u 2, u 1, u 3, u 2, d 1, u 4, u 6")
	es := s.entries(0)
	if got := string(es[3].Data); len(got) < 100000 || !strings.Contains(got, `"title":"new"`) {
		t.Errorf("the unchanged value stored out of line is missing: %d bytes", len(got))
	}
}

func TestTruncateRaisesTheFloorsOfAllItsTables(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{before: itemsTable + notesTable, specs: twoTables()})
	s.exec(`INSERT INTO items VALUES (1); INSERT INTO notes VALUES (1)`)
	before := s.settle().Version
	s.exec(`BEGIN; TRUNCATE items, notes; INSERT INTO items VALUES (2); COMMIT`)
	s.settle()
	for _, name := range []string{"items", "notes"} {
		if c := s.collection(name); c.Floor <= before || c.FloorReason != "truncated" {
			t.Errorf("floor of %s: %d (%s), want above %d", name, c.Floor, c.FloorReason, before)
		}
	}
	s.expect(before, "u 2")
}

// TestForgedMessagesAreFencesOnly: any role can emit logical messages under our prefix.
func TestForgedMessagesAreFencesOnly(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle()
	for _, body := range []string{"", "truncate items", `{"raise":"items"}`, strings.Repeat("x", 1<<20)} {
		s.exec(`SELECT pg_logical_emit_message(true, 'walgate', $1), pg_logical_emit_message(false, 'walgate', $1), pg_logical_emit_message(true, 'walgate2', $1)`, body)
	}
	after := s.settle()
	if after.Version != before.Version || after.History != before.History || after.LSN <= before.LSN || fmt.Sprint(after.Collections) != fmt.Sprint(before.Collections) {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	s.expect(0, "u 1")
}

// TestLargeTransactionIsBoundedAndAtomic streams 300000 rows of one transaction.
func TestLargeTransactionIsBoundedAndAtomic(t *testing.T) {
	t.Parallel()
	const rows = 300_000
	s := newSource(t, setup{})
	sub := s.bus.Subscribe(t.Context())
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	before, peak := m.HeapInuse, uint64(0)
	s.exec(fmt.Sprintf(`INSERT INTO items SELECT n, 'ana', 'title of ' || n, repeat('x', 200) FROM generate_series(1, %d) n`, rows))
	s.await("the transaction is logged", func() bool {
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapInuse)
		p, err := s.log.ReadAll(t.Context(), 0, 1<<62, 1, 1000)
		s.ok(err)
		if len(p.Entries) > 0 && s.stats.Rows.Load() != rows {
			s.await("the appender has counted it", func() bool { return s.stats.Rows.Load() == rows })
		}
		return len(p.Entries) > 0
	})
	if grown := int64(peak) - int64(before); grown > 160<<20 {
		t.Errorf("memory grew by %d MB for a transaction of %d MB", grown>>20, rows*300>>20)
	}
	if n := query[int](s, `SELECT count(*) FROM walgate.changes`); n != rows {
		t.Errorf("%d rows are logged, want %d", n, rows)
	}
	if n := query[int](s, `SELECT count(DISTINCT xmin::text) FROM walgate.changes`); n != 1 {
		t.Errorf("the transaction was logged in %d parts", n)
	}
	for {
		if b := <-sub; b.Omitted && b.Last > b.Prev {
			break // announced by its position
		} else if len(b.Entries) > 0 {
			t.Fatalf("%d entries were announced", len(b.Entries))
		}
	}
}

func TestReconnectAfterTheWalsenderWasKilled(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	history := s.settle().History
	last := 0 // a walsender says goodbye before it lets go of the slot
	for i := 2; i < 5; i++ {
		reconnects := s.stats.Reconnects.Load()
		s.await("another walsender was killed", func() bool {
			pid, done := last, false // what a WHERE calls might be called for other tests' slots too
			err := s.conn.QueryRow(t.Context(), `SELECT active_pid, pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active_pid <> $2`, s.slot, last).Scan(&pid, &done)
			killed := err == nil && done
			if killed {
				last = pid
			}
			return killed
		})
		s.exec(`INSERT INTO items VALUES ($1)`, i)
		s.await("it reconnects", func() bool { return s.stats.Reconnects.Load() > reconnects })
	}
	s.expect(0, "u 1, u 2, u 3, u 4")
	if h := s.settle(); h.History != history {
		t.Errorf("a new history began for a broken connection")
	}
}

// TestKilledBetweenAppendAndAcknowledge: the slot is behind the log when the next leader starts: no loss, no double.
func TestKilledBetweenAppendAndAcknowledge(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	s.settle()
	s.stop()
	s.await("the walsender has taken the last status and is gone", func() bool {
		return !query[bool](s, `SELECT active FROM pg_replication_slots WHERE slot_name = $1`, s.slot)
	})
	confirmed := query[string](s, `SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1`, s.slot)
	s.exec(`INSERT INTO items VALUES (2)`)
	s.exec(`BEGIN; UPDATE items SET title = 'x'; DELETE FROM items WHERE id = 1; COMMIT`)

	// What a killed gateway leaves: appended, and no status sent.
	l := NewLeader(Options{Source: s.pool, ReplicationURL: s.linked, Slot: s.slot, Publications: s.watcher.publications, Log: s.log, Bus: s.bus,
		Watcher: s.watcher, Stats: s.stats, Logger: s.watcher.log})
	src, err := l.prepare(t.Context(), &changelog.Known{})
	s.ok(err)
	src.claim.Again = l.remembered
	conn, err := connect(t.Context(), s.dsn, src.encoding, senderTimeout)
	s.ok(err)
	s.ok(l.identify(t.Context(), conn, &src.claim))
	s.ok(start(t.Context(), conn, s.slot, s.watcher.publications))
	appender, claimed, err := s.log.NewAppender(t.Context(), s.bus, src.claim)
	s.ok(err)
	tn := &tenure{leader: l, ids: map[string]changelog.Collection{}, halted: map[string]bool{}}
	for _, c := range claimed.Collections {
		tn.ids[c.Name] = c
	}
	queue := changelog.NewQueue(queueBytes)
	var silent atomic.Uint64 // what is called logged towards the server: nothing
	silent.Store(uint64(src.claim.SlotLSN))
	st := &stream{conn: conn, timing: defaultTiming, queue: queue, logged: func() changelog.LSN { return changelog.LSN(silent.Load()) }, stats: s.stats, log: l.o.Logger,
		resolve: tn.resolve, received: claimed.LSN, handed: claimed.LSN,
		seq: &sequencer{clock: changelog.NewClock(claimed.Version), targets: map[uint32]*target{}, stats: s.stats, log: l.o.Logger, logged: claimed.LSN, widen: xidWidener{near: src.xmax}}}
	tn.stream = st
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- appender.Run(ctx, queue) }()
	go func() { ended <- st.run(ctx) }()
	s.await("all of it is appended", func() bool { return query[int](s, `SELECT count(*) FROM walgate.changes`) == 5 })
	cancel()
	s.ok(errors.Join(<-ended, <-ended))
	appender.Close()
	conn.Conn().Close()
	if now := query[string](s, `SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1`, s.slot); now != confirmed {
		t.Fatalf("the slot moved from %s to %s: the test shows nothing", confirmed, now)
	}
	s.start()
	s.exec(`INSERT INTO items VALUES (3)`)
	s.expect(0, "u 1, u 2, u 1, u 2, d 1, u 3")
}

func TestStorageInAnotherDatabase(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{storage: newDatabase(t)})
	s.exec(`INSERT INTO items VALUES (1)`)
	s.expect(0, "u 1")
	if query[bool](s, `SELECT to_regclass('walgate.changes') IS NOT NULL`) {
		t.Error("the log's tables are in the source too")
	}
	s.stop()
	s.exec(`INSERT INTO items VALUES (2)`)
	s.start()
	s.expect(0, "u 1, u 2")
}

// TestLostSlotBeginsANewHistory drops the slot by hand and lets the server invalidate it.
func TestLostSlotBeginsANewHistory(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]string{
		"dropped by hand": `SELECT pg_drop_replication_slot('%s')`,
		"advanced":        `SELECT pg_replication_slot_advance('%s', pg_current_wal_flush_lsn())`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{})
			s.exec(`INSERT INTO items VALUES (1)`)
			before := s.settle()
			s.stop()
			s.exec(`INSERT INTO items VALUES (2)`) // this one is lost to the log
			s.await("the walsender is gone", func() bool {
				return !query[bool](s, `SELECT active FROM pg_replication_slots WHERE slot_name = $1`, s.slot)
			})
			s.exec(fmt.Sprintf(lose, s.slot))
			s.start()
			s.exec(`INSERT INTO items VALUES (3)`)
			after := s.settle()
			if after.History == before.History || after.Floor <= before.Version || s.collection("items").Floor < after.Floor {
				t.Errorf("after %+v\ncomes %+v: a change was lost, so a new history must begin", before, after)
			}
			s.expect(after.Floor-1, "u 3")
		})
	}
}

func TestInvalidatedSlotHeals(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}})
	s := newSource(t, setup{dsn: server.DSN("postgres")})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle()
	s.stop()
	s.await("the slot is lost", func() bool {
		s.exec(`SELECT pg_switch_wal()`)
		s.exec(`INSERT INTO items SELECT coalesce(max(id), 0) + 1 FROM items`)
		s.exec(`CHECKPOINT`)
		return query[string](s, `SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1`, s.slot) == "lost"
	})
	s.start()
	after := s.settle()
	if after.History == before.History || after.Floor <= before.Version {
		t.Errorf("after %+v comes %+v", before, after)
	}
	if !strings.Contains(s.logged.String(), "max_slot_wal_keep_size") {
		t.Errorf("the reason isn't told:\n%s", s.logged)
	}
	s.exec(`INSERT INTO items VALUES (100000)`)
	s.expect(after.Floor, "u 100000")
}

// TestOtherServerBeginsANewHistory: a log of one server meets a source that is another.
func TestOtherServerBeginsANewHistory(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle()
	s.stop()
	s.exec(`UPDATE walgate.checkpoint SET source_timeline = source_timeline + 1`)
	s.start()
	if after := s.settle(); after.History == before.History || after.Floor <= before.Version {
		t.Errorf("after %+v comes %+v", before, after)
	}
	if !strings.Contains(s.logged.String(), "another server or timeline") {
		t.Errorf("the reason isn't told:\n%s", s.logged)
	}
}

// TestUndecodableInputStopsWithItsPlace injects what no server should send.
func TestUndecodableInputStopsWithItsPlace(t *testing.T) {
	t.Parallel()
	s, pieces := bareStream(bareTarget(t))
	frame := func(at byte, body string) []byte {
		b := make([]byte, 25)
		b[0], b[8] = 'w', at
		return append(b, body...)
	}
	for name, body := range map[string]string{
		"unknown message": "?", "empty column mark": "I\x00\x00\x00\x64N\x00\x01x", "cut short": "I\x00\x00\x00\x64N\x00\x04t\x00\x00\x00\xffx",
		"row of an undescribed relation": "I\x00\x00\x00\x07N\x00\x00",
	} {
		err := s.handle(t.Context(), frame(0x2a, body))
		var lost *DecodeError
		if !errors.As(err, &lost) || lost.LSN != 0x2a || !strings.Contains(err.Error(), "0/2A") {
			t.Errorf("%s: error %v, want one that carries LSN 0/2A", name, err)
		}
	}
	// A row that can't become a document stops its collection only, with relation and place.
	s.seq.begin(&message{kind: msgBegin, commit: time.Now(), begins: 50})
	if err := s.handle(t.Context(), frame(0x2b, "U\x00\x00\x00\x64N\x00\x04t\x00\x00\x00\x011t\x00\x00\x00\x03anat\x00\x00\x00\x01tu")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.seq.commit(&message{kind: msgCommit, end: 60}); err != nil {
		t.Fatal(err)
	}
	r := (*pieces)[0].Raises
	if len(r) != 1 || !r[0].SetStopped || !strings.Contains(r[0].Stopped, "0/2B") || !strings.Contains(r[0].Stopped, "public.items") {
		t.Errorf("raised %+v, want a stop that names 0/2B and public.items", r)
	}
}

// TestKeepaliveInsideATransactionSaysNothing: its end of WAL may lie beyond the transaction that is being read.
func TestKeepaliveInsideATransactionSaysNothing(t *testing.T) {
	t.Parallel()
	s, _ := bareStream(bareTarget(t))
	s.seq.begin(&message{kind: msgBegin, commit: time.Now(), begins: 50})
	if err := s.keepalive(t.Context(), 1000, false); err != nil || s.received != 0 {
		t.Errorf("within the transaction %s counts as received (%v)", s.received, err)
	}
	if err := s.commit(t.Context(), &message{kind: msgCommit, end: 60}); err != nil || s.received != 60 {
		t.Errorf("after the commit %s counts as received (%v), want 0/3C", s.received, err)
	}
	if err := s.keepalive(t.Context(), 1000, false); err != nil || s.received != 1000 {
		t.Errorf("after a keepalive %s counts as received (%v), want 0/3E8", s.received, err)
	}
}
