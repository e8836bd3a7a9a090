package main

import (
	"maps"
	"path/filepath"
	"testing"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

// standbyOf makes a streaming standby of the present source; its way of WAL is the link.
func (w *followedSource) standby(slots bool, settings map[string]string) (*pgserver.Server, *badlink.Link) {
	w.t.Helper()
	saved := filepath.Join(w.t.TempDir(), "saved")
	must(w.t, w.server.Stop(w.t.Context()))
	must(w.t, w.server.Save(saved))
	must(w.t, w.server.Restart(w.t.Context()))
	w.use(w.server)
	link := badlink.To(w.t, w.server.DSN("postgres"))
	all := map[string]string{"primary_conninfo": link.DSN(w.t, w.server.DSN("postgres"))}
	maps.Copy(all, settings)
	standby := pgserver.StartCopyForTest(w.t, pgserver.Copy{From: saved, DropSlots: !slots, StandbyOf: w.server, Settings: all})
	return standby, link
}

// replayed waits until the standby shows as many rows as the source.
func (w *followedSource) replayed(standby *pgserver.Server) {
	w.t.Helper()
	conn := connect(w.t, standby.DSN("postgres"))
	want := sourceQuery[string](w, `SELECT pg_current_wal_flush_lsn()::text`)
	resyncEventually(w.t, "the standby has replayed "+want, func() (done bool) {
		resyncScan(w.t, conn, []any{&done}, `SELECT pg_last_wal_replay_lsn() >= $1::pg_lsn`, want)
		return done
	})
}

// lose commits changes that only the present source, and the clients, will ever see.
func (w *followedSource) lose() {
	w.t.Helper()
	w.exec(`INSERT INTO docs SELECT n, 'u0', 'lost' FROM generate_series(4, 5) n; UPDATE docs SET body = 'lost' WHERE id = 1; DELETE FROM docs WHERE id = 2`)
	w.settle(w.present, w.absent)
}

// goOn commits what comes after a loss, with ids that were used for what was lost.
func (w *followedSource) goOn() {
	w.t.Helper()
	w.exec(`INSERT INTO docs VALUES (4, 'u0', 'after'), (7, 'u0', 'after')`)
}

// TestStandbyPromotedBehind: clients have seen commits that the promoted standby never got. Whatever slot there is on it,
// and although positions may fit, a new history begins; nobody keeps a row of the lost timeline.
func TestStandbyPromotedBehind(t *testing.T) {
	t.Parallel()
	const makeSlot = `SELECT pg_create_logical_replication_slot('walgate', 'pgoutput')`
	for name, v := range map[string]struct {
		from     int // the first major version that can
		copied   bool
		settings map[string]string
		before   string // in the promoted server, before it is used
		wal      bool   // it has written more WAL than was lost
		zombie   bool   // the former primary lives on, and so do the connections to it
	}{
		"without a slot":                 {},
		"with a slot made by hand":       {before: makeSlot},
		"with a copied slot, far on":     {copied: true, wal: true},
		"with a synchronised slot":       {from: 17, settings: map[string]string{"sync_replication_slots": "on", "hot_standby_feedback": "on", "primary_slot_name": "standby"}},
		"while the former primary lives": {zombie: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"wal_keep_size": "1GB"}})
			if server.Version() < v.from {
				return // it has no such slots
			}
			w := followSource(t, server, "")
			w.exec(`SELECT pg_create_physical_replication_slot('standby', true)`)
			standby, wal := w.standby(v.copied, v.settings)
			w.replayed(standby)
			if v.settings != nil {
				w.synchronised(standby)
			}
			wal.Down()
			w.lose()
			refused := w.witness()
			end := w.during()
			if !v.zombie {
				must(t, server.Crash())
			}
			must(t, standby.Promote(t.Context()))
			w.use(standby)
			if v.before != "" {
				w.exec(v.before)
			}
			if v.wal {
				w.exec(`SELECT pg_logical_emit_message(false, 'noise', repeat('x', 1000000)) FROM generate_series(1, 3)`)
			}
			w.link.Turn(t, standby.DSN("postgres"))
			w.goOn()
			if v.zombie { // only the walsender goes; what the gateway's pool is connected to stays
				former := connect(t, server.DSN("postgres"))
				resyncExec(t, former, `SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'walgate'`)
			}
			refused()
			w.logged("another server or timeline")
			end()
			w.settle(w.present, w.absent)
			if v.zombie {
				former := connect(t, server.DSN("postgres"))
				resyncEventually(t, "nobody of the gateway is connected to the former primary", func() (gone bool) {
					resyncScan(t, former, []any{&gone}, `SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'walgate')`)
					return gone
				})
			}
			w.exec(`INSERT INTO docs VALUES (8, 'u0', 'later')`)
			w.settle(w.present, w.absent)
		})
	}
}

// synchronised waits until the standby keeps the gateway's slot.
func (w *followedSource) synchronised(standby *pgserver.Server) {
	w.t.Helper()
	conn := connect(w.t, standby.DSN("postgres"))
	id := 100
	resyncEventually(w.t, "the slot is synchronised", func() (done bool) {
		w.exec(`INSERT INTO docs VALUES ($1, 'u0', 'so that the slot moves')`, id)
		id++
		w.exec(`SELECT pg_log_standby_snapshot()`) // lets the slot's restart position pass the standby's
		resyncScan(w.t, conn, []any{&done}, `SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'walgate' AND synced AND NOT temporary)`)
		return done
	})
}

// TestSwitchoverForthAndBack: two servers change places twice, and nothing is lost: still, no timeline is taken for another.
// A standby isn't followed before it is promoted, and gets no slot.
func TestSwitchoverForthAndBack(t *testing.T) {
	t.Parallel()
	first := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"wal_keep_size": "1GB"}})
	w := followSource(t, first, "")
	second, _ := w.standby(false, map[string]string{"primary_conninfo": first.DSN("postgres")})
	w.replayed(second)
	end := w.during()
	histories := map[string]bool{historyOf(w.absent): true}
	for i, next := range []*pgserver.Server{second, first} {
		former := w.server
		w.exec(`INSERT INTO docs VALUES ($1, 'u0', 'before the switch')`, 10+i)
		w.replayed(next)
		w.link.Turn(t, next.DSN("postgres"))
		must(t, former.Stop(t.Context()))
		w.readiness("the source is a standby")
		must(t, next.Promote(t.Context()))
		w.use(next)
		if i == 0 {
			must(t, former.Follow(next))
			must(t, former.Restart(t.Context()))
		}
		w.exec(`INSERT INTO docs VALUES ($1, 'u0', 'after the switch')`, 20+i)
		w.settle(w.absent)
		histories[historyOf(w.absent)] = true
	}
	end()
	w.settle(w.present, w.absent)
	if len(histories) != 3 {
		t.Errorf("histories %v, want one for each of three timelines", histories)
	}
}
