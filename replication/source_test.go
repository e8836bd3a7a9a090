package replication

import (
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/internal/pgserver"

	"github.com/walgate/walgate/changelog"
)

// TestSilentSourceIsAskedForLife: a source where nothing happens sends nothing of its own while statuses reach it, so the
// gateway must ask; a silence that goes on is a dead connection.
func TestSilentSourceIsAskedForLife(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{timing: quick, storage: newDatabase(t)})
	s.exec(`INSERT INTO items VALUES (1)`)
	s.settle()
	began, before := time.Now(), s.stats.Reconnects.Load()
	s.await("a silence longer than a dead connection's", func() bool { return time.Since(began) > quick.stall+2*quick.status })
	if n := s.stats.Reconnects.Load() - before; n != 0 {
		t.Errorf("reconnected %d times while nothing was wrong:\n%s", n, s.logged)
	}
}

// TestTableTakenOutOfThePublication: nothing of it arrives any more, which must not go unnoticed.
func TestTableTakenOutOfThePublication(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{every: 50 * time.Millisecond})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle().Version
	publication := s.watcher.publications.Rows
	s.exec(`ALTER PUBLICATION "` + publication + `" DROP TABLE items`)
	s.await("the collection is stopped", func() bool { return strings.Contains(s.collection("items").Stopped, "walgate init") })
	s.exec(`INSERT INTO items VALUES (2)`)
	s.exec(`ALTER PUBLICATION "` + publication + `" ADD TABLE ONLY items`)
	s.await("the collection goes on", func() bool { return s.collection("items").Stopped == "" })
	if c := s.collection("items"); c.Floor <= before {
		t.Errorf("floor %d, want above %d: row 2 was never logged", c.Floor, before)
	}
	s.exec(`INSERT INTO items VALUES (3)`)
	s.await("new rows are logged", func() bool { return strings.HasSuffix(s.changes(before), "u 3") })
}

// TestDeferrableKey: within one statement a row takes the key that another gives up afterwards, so deletes and upserts in
// their order would end with documents missing.
func TestDeferrableKey(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: itemsSpec(), before: itemsTable + `ALTER TABLE items DROP CONSTRAINT items_pkey, ADD PRIMARY KEY (id) DEFERRABLE;`})
	s.exec(`INSERT INTO items SELECT generate_series(1, 3)`)
	before := s.settle().Version
	s.exec(`UPDATE items SET title = 'the keys stay'`)
	if c := s.collection("items"); s.settle().Version <= before || c.Floor > before {
		t.Errorf("floor %d: an update that moves no key raised it above %d", c.Floor, before)
	}
	s.exec(`UPDATE items SET id = id + 1`)
	s.settle()
	s.awaitRaise("items", before)
}

// TestSynchronousStandbyIsRefused: counted as a synchronous standby, the gateway would make every commit of the
// application wait for the log, and the log's commits for themselves.
func TestSynchronousStandbyIsRefused(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{Fast: true})
	s := newSource(t, setup{server: server})
	s.exec(`INSERT INTO items VALUES (1)`)
	s.settle()
	before := s.stats.Reconnects.Load()
	s.exec(`SET synchronous_commit = local`)
	s.exec(`ALTER SYSTEM SET synchronous_standby_names = '*'`)
	s.exec(`SELECT pg_reload_conf()`)
	s.await("the gateway refuses", func() bool {
		_, err, _ := s.stats.State()
		return s.stats.Reconnects.Load() > before && strings.Contains(err, "synchronous_standby_names")
	})
	s.exec(`ALTER SYSTEM RESET synchronous_standby_names`)
	s.exec(`SELECT pg_reload_conf()`)
	s.exec(`INSERT INTO items VALUES (2)`)
	s.settle()
}

// TestPublicationGapOfAnOpenTransaction: a transaction that is open while its table is out of the publication ends after the
// gap was noticed, without the changes of the gap.
func TestPublicationGapOfAnOpenTransaction(t *testing.T) {
	t.Parallel()
	for name, leaders := range map[string]int{"one leader": 1, "another leader meanwhile": 2, "two others": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			publicationGap(t, leaders)
		})
	}
}

func publicationGap(t *testing.T, leaders int) {
	s := newSource(t, setup{before: itemsTable, specs: itemsSpec(), every: 20 * time.Millisecond})
	s.exec(`INSERT INTO items VALUES (1), (2)`)
	before := s.settle().Version
	s.exec(`ALTER PUBLICATION walgate DROP TABLE items`)
	open := s.connect()
	exec := func(sql string) {
		t.Helper()
		if _, err := open.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	exec(`BEGIN; DELETE FROM items WHERE id = 1`)
	s.exec(`ALTER PUBLICATION walgate ADD TABLE items`)
	s.awaitRaise("items", before)
	s.await("the collection goes on", func() bool { return s.collection("items").Stopped == "" })
	for range leaders - 1 {
		s.stop()
		s.start()
		s.settle()
	}
	noticed := s.collection("items").Floor
	exec(`INSERT INTO items VALUES (3); COMMIT`)
	committed := s.settle().Version
	if c := s.awaitRaise("items", max(noticed, committed-1)); !strings.Contains(c.FloorReason, "transactions were open") {
		t.Errorf("the floor rose because %s", c.FloorReason)
	}
	s.exec(`INSERT INTO items VALUES (4)`)
	last := s.settle().Version
	if floor := s.collection("items").Floor; floor >= last {
		t.Errorf("the floor %d rises again and again past %d", floor, last)
	}
}

// TestUndecodableWALIsALostSlot: PostgreSQL may fail to decode what it wrote, and then fails again and again.
func TestUndecodableWALIsALostSlot(t *testing.T) {
	t.Parallel()
	s := &stream{received: 0x12}
	for code, lost := range map[string]bool{"22P03": true, "XX000": true, "57P01": false, "53100": false, "58030": false, "": true} {
		l := &Leader{o: Options{Stats: &Stats{}}}
		err := s.ended(&pgconn.PgError{Code: code})
		for n := range undecodableTries {
			if l.unreadable != "" {
				t.Errorf("%q counts as lost after %d failures", code, n)
			}
			l.judgeSlot(err)
			l.judgeSlot(errStalled) // says nothing about the WAL
		}
		if (l.unreadable != "") != lost {
			t.Errorf("%q: unreadable because %q", code, l.unreadable)
		}
	}
	l := &Leader{o: Options{Stats: &Stats{}}}
	for n := range 3 * undecodableTries {
		l.judgeSlot(s.ended(&pgconn.PgError{Code: "XX000", Message: []string{"a", "b"}[n%2]}))
	}
	if l.unreadable != "" {
		t.Error("failures of different kinds count together")
	}
}

// TestLostSlotIsMadeAnewOnce: several instances may find that a slot can't be read on. One makes a new one; the others, whenever
// they come to lead, leave that one alone.
func TestLostSlotIsMadeAnewOnce(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	history := s.settle().History
	for _, made := range []bool{true, false} { // anew by another instance after this one had found it unreadable
		logged := s.settle().LSN
		s.stop()
		confirmed := changelog.LSN(query[int64](s, `SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = $1`, s.slot))
		s.lost = func(l *Leader) {
			if l.unreadable, l.unreadTo = "its WAL can't be decoded", confirmed-1; !made {
				l.unreadTo = logged // the slot may confirm as much by its last leader's last word
			}
		}
		s.launch()
		s.exec(`INSERT INTO items VALUES (2)`)
		s.await("it leads", s.leads)
		now := s.settle().History
		if (now == history) != made {
			t.Errorf("made anew by another: %t; history %s after %s", made, now, history)
		}
		s.exec(`DELETE FROM items WHERE id = 2`)
	}

	// What was counted so far outlives a session: it takes several to tell.
	s.stop()
	var leader *Leader
	s.lost = func(l *Leader) { leader, l.failures = l, 3 }
	s.launch()
	s.await("it leads", s.leads)
	s.stop()
	if leader.failures != 3 {
		t.Errorf("%d failures are remembered, want 3", leader.failures)
	}
}
