package replication

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

// failure returns what stopped replication last.
func (s *source) failure() string {
	_, err, _ := s.stats.State()
	return err
}

func (s *source) leads() bool {
	leading, _, _ := s.stats.State()
	return leading
}

// says waits until replication is stopped for a reason that holds all the parts, and the log has them too.
func (s *source) says(what string, parts ...string) {
	s.t.Helper()
	has := func(text string) bool {
		for _, p := range parts {
			if !strings.Contains(text, p) {
				return false
			}
		}
		return true
	}
	s.await(what, func() bool { return has(s.failure()) && has(s.logged.String()) })
}

// unread waits until nobody reads the slot.
func (s *source) unread() {
	s.t.Helper()
	s.await("nobody reads the slot", func() bool {
		return !query[bool](s, `SELECT active FROM pg_replication_slots WHERE slot_name = $1`, s.slot)
	})
}

// TestUnreservedSlotGoesOn: beyond max_slot_wal_keep_size a slot is lost only once its WAL is removed. Until then it shows
// other states, which end nothing.
func TestUnreservedSlotGoesOn(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"max_slot_wal_keep_size": "1MB", "min_wal_size": "1GB", "max_wal_size": "4GB"}})
	s := newSource(t, setup{dsn: server.DSN("postgres")})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle()
	s.stop()
	s.unread()
	s.await("the slot is beyond its bound", func() bool {
		s.exec(`INSERT INTO items SELECT max(id) + 1 FROM items`)
		s.exec(`SELECT pg_switch_wal()`)
		return query[string](s, `SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1`, s.slot) == "unreserved"
	})
	rows := query[int](s, `SELECT count(*) FROM items`)
	s.start()
	if after := s.settle(); after.History != before.History {
		t.Errorf("history %s after %s: nothing was lost\n%s", after.History, before.History, s.logged)
	}
	if got := len(s.entries(0)); got != rows {
		t.Errorf("%d changes logged of %d", got, rows)
	}
}

// TestIdleSlotIsInvalidated: from 18 on a slot that nobody reads may be given up after a time.
func TestIdleSlotIsInvalidated(t *testing.T) {
	t.Parallel()
	if pgserver.ForTest(t).Version() < 18 {
		return // there is no such setting
	}
	server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"idle_replication_slot_timeout": "1s"}})
	s := newSource(t, setup{dsn: server.DSN("postgres")})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle()
	s.stop()
	s.unread()
	s.await("the slot is lost", func() bool {
		s.exec(`CHECKPOINT`)
		return query[string](s, `SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1`, s.slot) == "lost"
	})
	s.start()
	after := s.settle()
	if after.History == before.History || after.Floor <= before.Version {
		t.Errorf("after %+v comes %+v", before, after)
	}
	if !strings.Contains(s.logged.String(), "idle_replication_slot_timeout") {
		t.Errorf("the reason isn't told:\n%s", s.logged)
	}
}

// TestSlotMadeAnewByHand: a slot of the same name at a newer place hides a gap, also where it was made while the leader was
// between two connections.
func TestSlotMadeAnewByHand(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"while the gateway is away", "while the gateway runs"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{})
			s.exec(`INSERT INTO items VALUES (1)`)
			before := s.settle()
			if when == "while the gateway is away" {
				s.stop()
				s.unread()
				s.exec(`INSERT INTO items VALUES (2)`)
				s.exec(`SELECT pg_drop_replication_slot($1)`, s.slot)
				s.exec(`INSERT INTO items VALUES (3)`)
				s.exec(`SELECT pg_create_logical_replication_slot($1, 'pgoutput')`, s.slot)
				s.start()
			} else {
				// In one statement, so that the leader finds no moment between: it connects again within milliseconds.
				s.await("the slot was made anew", func() bool {
					_, err := s.conn.Exec(t.Context(), fmt.Sprintf(`DO $$BEGIN
						PERFORM pg_terminate_backend(active_pid, 1000) FROM pg_replication_slots WHERE slot_name = '%[1]s' AND active_pid IS NOT NULL;
						PERFORM pg_drop_replication_slot('%[1]s');
					END$$`, s.slot))
					return err == nil
				})
				s.exec(`INSERT INTO items VALUES (3)`)
				if _, err := s.conn.Exec(t.Context(), `SELECT pg_create_logical_replication_slot($1, 'pgoutput')`, s.slot); err != nil && !strings.Contains(err.Error(), "already exists") {
					t.Fatal(err) // else the leader was faster
				}
				s.await("it leads again", func() bool { return s.collection("items").Floor > before.Version && s.leads() })
			}
			s.exec(`INSERT INTO items VALUES (4)`)
			after := s.settle()
			if after.History == before.History || after.Floor <= before.Version || s.collection("items").Floor < after.Floor {
				t.Errorf("after %+v\ncomes %+v: a change was lost, so a new history must begin", before, after)
			}
			if got := s.changes(after.Floor - 1); !strings.HasSuffix(got, "u 4") || strings.Contains(got, "u 1") || strings.Contains(got, "u 2") {
				t.Errorf("the new history holds %s", got)
			}
		})
	}
}

// TestSlotMadeByAnotherProcess: who made the slot may end before it leads. Then the slot's place alone can't tell, where the
// source was restored to an older state and has gone on.
func TestSlotMadeByAnotherProcess(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle()
	s.stop()
	s.unread()
	s.exec(`SELECT pg_drop_replication_slot($1)`, s.slot)
	if _, err := EnsureSlot(t.Context(), s.conn, s.slot, s.watcher.log, nil); err != nil {
		t.Fatal(err)
	}
	s.exec(`SELECT pg_logical_emit_message(true, 'noise', 'x')`)
	s.exec(`UPDATE walgate.checkpoint SET lsn = pg_current_wal_flush_lsn()`) // the log of a server that had been further
	s.start()
	if after := s.settle(); after.History == before.History || after.Floor <= before.Version {
		t.Errorf("after %+v comes %+v", before, after)
	}
}

// TestSlotHeldByAnotherProcess: the leader says who holds the slot, and takes it once it is free.
func TestSlotHeldByAnotherProcess(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle()
	s.stop()
	s.unread()
	cfg, err := pgx.ParseConfig(s.dsn)
	s.ok(err)
	cfg.RuntimeParams["replication"] = "database"
	cfg.RuntimeParams["application_name"] = "pg_recvlogical"
	other, err := pgx.ConnectConfig(t.Context(), cfg)
	s.ok(err)
	s.ok(start(t.Context(), other.PgConn(), s.slot, s.watcher.publications))
	s.launch()
	s.says("the holder is named", fmt.Sprintf("process %d ", other.PgConn().PID()), "user postgres", "application pg_recvlogical", "client 127.0.0.1:", "takes over")
	s.exec(`INSERT INTO items VALUES (2)`)
	other.PgConn().Conn().Close()
	s.await("the leader takes over", s.leads)
	s.expect(before.Version, "u 2")
	if after := s.settle(); after.History != before.History {
		t.Errorf("history %s after %s: nothing was lost", after.History, before.History)
	}
	if n := strings.Count(s.logged.String(), "holds the slot; waiting"); n > 3 {
		t.Errorf("the same reason was logged %d times", n)
	}
}

// TestSlotOfAForgottenConnection: the leader's host is gone without a word. The next leader takes over within the time
// that the walsender was given.
func TestSlotOfAForgottenConnection(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	link := badlink.To(t, s.dsn)
	s.stop()
	s.unread()
	direct := s.linked
	s.linked = link.DSN(t, s.dsn)
	s.start()
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle()
	link.Strand()
	began := time.Now()
	s.linked = direct
	gone := s.stop // the first leader stays as it is: it doesn't know
	s.launch()
	s.says("the holder is named", "is held by process", "application walgate")
	s.await("the second leader takes over", s.leads)
	t.Logf("took over after %s", time.Since(began).Round(time.Millisecond))
	s.exec(`INSERT INTO items VALUES (2)`)
	s.expect(before.Version, "u 2")
	if after := s.settle(); after.History != before.History {
		t.Errorf("history %s after %s: nothing was lost", after.History, before.History)
	}
	gone()
}

// TestSlotOfSomebodyElse: a slot that can't be ours is left alone; the leader says so and goes on once it is gone.
func TestSlotOfSomebodyElse(t *testing.T) {
	t.Parallel()
	for name, theirs := range map[string]string{
		"physical":                `SELECT pg_create_physical_replication_slot('%s')`,
		"another database's":      `SELECT pg_create_logical_replication_slot('%s', 'pgoutput')`,
		"another output plugin's": `SELECT pg_create_logical_replication_slot('%s', 'test_decoding')`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{})
			s.stop()
			s.unread()
			s.exec(`SELECT pg_drop_replication_slot($1)`, s.slot)
			maker := s
			if strings.Contains(name, "database") {
				maker = newSourceConn(t, newDatabase(t))
			}
			if _, err := maker.conn.Exec(t.Context(), fmt.Sprintf(theirs, s.slot)); err != nil {
				if strings.Contains(theirs, "test_decoding") && strings.Contains(err.Error(), "test_decoding") {
					return // these binaries come without another plugin; the two others show the same
				}
				t.Fatal(err)
			}
			s.launch()
			s.says("the owner is named", "belongs to somebody else", "replication.slot")
			maker.exec(`SELECT pg_drop_replication_slot($1)`, s.slot)
			s.await("the leader goes on", s.leads)
			s.exec(`INSERT INTO items VALUES (1)`)
			s.settle()
		})
	}
}

// TestSlotCreationHeldUp: making a slot waits for the transactions that are open. The leader says for which, ends at once
// when told to, leaves nothing waiting behind, and goes on when the transaction has ended.
func TestSlotCreationHeldUp(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ open, end, names string }{
		"open":     {`BEGIN; SET LOCAL application_name = 'nightly report'; CREATE TABLE n (v int)`, `COMMIT`, "application nightly report, client 127.0.0.1:"},
		"prepared": {`BEGIN; CREATE TABLE n (v int); PREPARE TRANSACTION '%s'`, `ROLLBACK PREPARED '%s'`, "the prepared transaction '%s' of postgres in database"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{server: pgserver.StartForTest(t, pgserver.Options{})})
			before := s.settle()
			s.stop()
			s.unread()
			s.exec(`SELECT pg_drop_replication_slot($1)`, s.slot)
			fill := func(text string) string { return strings.ReplaceAll(text, "%s", s.slot) }
			other := s.connect()
			do := func(sql string) {
				if _, err := other.Exec(t.Context(), fill(sql)); err != nil {
					t.Fatal(err)
				}
			}
			do(tc.open)
			s.launch()
			s.says("the transaction is named", fill(tc.names))
			if name == "open" && !strings.Contains(s.failure(), fmt.Sprintf("process %d ", other.PgConn().PID())) {
				t.Errorf("the process isn't named: %s", s.failure())
			}
			began := time.Now()
			s.stop()
			t.Logf("took %s to stop", time.Since(began).Round(time.Millisecond))
			s.await("nothing waits any more", func() bool {
				return query[int](s, `SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1`, s.slot) == 0
			})
			s.launch()
			s.says("it waits again", fill(tc.names))
			do(tc.end)
			s.await("the leader goes on", s.leads)
			if after := s.settle(); after.History == before.History {
				t.Error("the slot was lost, and the history goes on")
			}
		})
	}
}

// TestOrphanedSlotCreation: a gateway that is killed while its slot is made leaves a process that goes on waiting; the next
// one says so.
func TestOrphanedSlotCreation(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{server: pgserver.StartForTest(t, pgserver.Options{})})
	s.stop()
	s.unread()
	s.exec(`SELECT pg_drop_replication_slot($1)`, s.slot)
	other, orphan := s.connect(), s.connect()
	if _, err := other.Exec(t.Context(), `BEGIN; CREATE TABLE n (v int)`); err != nil {
		t.Fatal(err)
	}
	made := make(chan struct{})
	go func() {
		defer close(made)
		_, _ = orphan.Exec(context.Background(), `SELECT pg_create_logical_replication_slot($1, 'pgoutput')`, s.slot) // its end is not its own
	}()
	s.await("the slot is being made", func() bool {
		return query[int](s, `SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1 AND active_pid = $2`, s.slot, orphan.PgConn().PID()) == 1
	})
	s.launch()
	s.says("both are named", fmt.Sprintf("process %d ", orphan.PgConn().PID()), "still making the slot", fmt.Sprintf("process %d ", other.PgConn().PID()))
	if _, err := other.Exec(t.Context(), `COMMIT`); err != nil {
		t.Fatal(err)
	}
	<-made
	s.await("the leader goes on", s.leads)
	s.settle()
}

// TestSlotLagIsWarnedOf: at half of limits.max_slot_lag, also while there is nobody who could lead.
func TestSlotLagIsWarnedOf(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.stop()
	s.unread()
	grow := func() { // the slot's place is behind a transaction that is open
		s.exec(`SELECT pg_logical_emit_message(false, 'noise', repeat('x', 1000000))`)
	}
	other := s.connect()
	if _, err := other.Exec(t.Context(), `BEGIN; SELECT pg_current_xact_id()`); err != nil {
		t.Fatal(err)
	}
	warned := func() int { return strings.Count(s.logged.String(), "holds back much WAL") }
	s.maxLag = 100 << 20
	s.start()
	for range 30 {
		grow()
	}
	s.stop()
	s.start() // looks at once
	s.await("the slot was looked at", func() bool { _, _, h := s.stats.State(); return h.LagBytes > 30e6 })
	if n := warned(); n != 0 {
		t.Errorf("warned %d times below the half", n)
	}
	for range 30 {
		grow()
	}
	s.stop()
	s.start()
	s.await("it is warned of", func() bool { return warned() == 1 })
	s.stop()
	s.unread()
	s.exec(`ALTER TABLE walgate.checkpoint RENAME TO gone`) // nobody can lead
	s.launch()
	s.await("it is warned of while nobody leads", func() bool { return warned() == 2 })
	s.exec(`ALTER TABLE walgate.gone RENAME TO checkpoint`)
	s.await("it leads again", s.leads)
}
