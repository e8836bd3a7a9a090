package main

import (
	"path/filepath"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

// snapshot copies the files of a server as they are when it crashes, and starts it again.
func snapshot(t *testing.T, server *pgserver.Server) (saved string) {
	t.Helper()
	saved = filepath.Join(t.TempDir(), "saved")
	must(t, server.Crash())
	must(t, server.Save(saved))
	must(t, server.Restart(t.Context()))
	return saved
}

// restore puts a server back to where the snapshot was taken: same system, same timeline.
func restore(t *testing.T, server *pgserver.Server, saved string) {
	t.Helper()
	must(t, server.Crash())
	must(t, server.Restore(saved))
	must(t, server.Restart(t.Context()))
}

// TestSourceRestoredWithItsLog: source, slot and log go back together, so that nothing in them tells; only clients know
// better. The log has long passed their cursors when the absent one comes back.
func TestSourceRestoredWithItsLog(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"while the gateway runs", "while the gateway is away"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			server := pgserver.StartForTest(t, pgserver.Options{})
			w := followSource(t, server, "")
			faithful := w.client("faithful", 3) // has seen nothing of what is lost
			w.settle(faithful)
			before := historyOf(faithful)
			saved := snapshot(t, server)
			w.use(server)
			w.lose()
			refused := func() { w.refused(w.absent.replica.cursor) }
			if when == "while the gateway runs" {
				refused = w.witness()
				end := w.during()
				defer end()
				restore(t, server, saved)
				w.use(server)
				w.goOn()
				w.settle(faithful)
				end()
			} else {
				w.stopGateway()
				restore(t, server, saved)
				w.use(server)
				w.startGateway()
				w.goOn()
				w.settle(faithful)
			}
			refused()
			w.settle(w.present, w.absent)
			if n := resynchronised(faithful); historyOf(faithful) != before || n != 0 {
				t.Errorf("who saw nothing that was lost had to start anew %d times", n)
			}
		})
	}
}

// TestSourceRestoredBehindItsLog: the log lives elsewhere and holds what the source has forgotten. The source's place in the
// WAL tells, and where it has gone on meanwhile, what the log has noted in it.
func TestSourceRestoredBehindItsLog(t *testing.T) {
	t.Parallel()
	for name, v := range map[string]struct {
		wal  bool   // it has written more WAL than was lost before the gateway comes
		says string // why
	}{
		"behind in its WAL":      {says: "the source's WAL ends at"},
		"ahead again in its WAL": {wal: true, says: "the source was restored"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := pgserver.StartForTest(t, pgserver.Options{})
			w := followSource(t, server, pgserver.ForTest(t).Database(t))
			noted := sourceQuery[int64](w, `SELECT noted FROM walgate.source`)
			saved := snapshot(t, server)
			w.use(server)
			w.lose()
			refused := func() { w.refused(w.absent.replica.cursor) }
			if v.wal {
				resyncEventually(t, "the log has noted in the source how far it has come", func() bool {
					return sourceQuery[int64](w, `SELECT noted FROM walgate.source`) > noted
				})
				w.stopGateway()
				restore(t, server, saved)
				w.use(server)
				w.exec(`SELECT pg_logical_emit_message(false, 'noise', repeat('x', 1000000)) FROM generate_series(1, 3)`)
				w.startGateway()
			} else {
				refused = w.witness()
				end := w.during()
				defer end()
				restore(t, server, saved)
				w.use(server)
				w.logged(v.says)
				end()
			}
			w.logged(v.says)
			w.goOn()
			refused()
			w.settle(w.present, w.absent)
		})
	}
}

// TestSourceMadeOfABackup: another server takes the source's place, recovered from a base backup (same system, new timeline)
// or filled from a dump (another system).
func TestSourceMadeOfABackup(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"base backup", "base backup, log elsewhere", "dump, log elsewhere"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			server, storage := pgserver.StartForTest(t, pgserver.Options{}), ""
			if what != "base backup" {
				storage = pgserver.ForTest(t).Database(t)
			}
			w := followSource(t, server, storage)
			saved := snapshot(t, server)
			w.use(server)
			w.lose()
			refused := w.witness()
			end := w.during()
			var other *pgserver.Server
			if what == "dump, log elsewhere" {
				other = pgserver.StartForTest(t, pgserver.Options{Fresh: true})
			} else {
				other = pgserver.StartCopyForTest(t, pgserver.Copy{From: saved, DropSlots: true, Recover: true})
			}
			w.link.Turn(t, other.DSN("postgres"))
			must(t, server.Crash())
			w.use(other)
			if what == "dump, log elsewhere" {
				w.exec(sourceTable)
				w.exec(`INSERT INTO docs SELECT n, 'u0', 'first' FROM generate_series(1, 3) n`)
				w.readiness("walgate init") // serve prepares nothing but when it starts
				w.prepareAnew()
			}
			w.goOn()
			refused()
			w.logged("the source is another server or timeline")
			end()
			w.settle(w.present, w.absent)
		})
	}
}

// TestLogRestored: the log's own server goes back, the source doesn't.
func TestLogRestored(t *testing.T) {
	t.Parallel()
	log := pgserver.StartForTest(t, pgserver.Options{})
	server := pgserver.StartForTest(t, pgserver.Options{})
	w := followSource(t, server, log.DSN("postgres"))
	saved := snapshot(t, log)
	w.exec(`INSERT INTO docs VALUES (4, 'u0', 'seen'); DELETE FROM docs WHERE id = 2`)
	w.settle(w.present, w.absent)
	passed := sourceQuery[string](w, `SELECT pg_current_wal_flush_lsn()::text`)
	resyncEventually(t, "it is acknowledged", func() bool {
		return sourceQuery[bool](w, `SELECT confirmed_flush_lsn >= $1::pg_lsn FROM pg_replication_slots WHERE slot_name = 'walgate'`, passed)
	})
	refused := w.witness()
	end := w.during()
	restore(t, log, saved)
	w.exec(`INSERT INTO docs VALUES (5, 'u0', 'after'); DELETE FROM docs WHERE id = 3`)
	refused()
	w.logged("the slot confirms")
	end()
	w.settle(w.present, w.absent)
}
