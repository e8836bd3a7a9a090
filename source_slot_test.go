package main

import (
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/pgserver"
)

// TestSlotLostUnderClients: whatever took the slot away, the gateway makes another by itself, and every client starts anew by
// itself.
func TestSlotLostUnderClients(t *testing.T) {
	t.Parallel()
	for name, v := range map[string]struct {
		away bool // the gateway, while it happens
		lose func(w *followedSource)
		says string
	}{
		"dropped by hand while the gateway runs":     {lose: (*followedSource).dropSlot, says: "the replication slot was lost"},
		"dropped by hand while the gateway is away":  {away: true, lose: (*followedSource).dropSlot, says: "the replication slot was lost"},
		"invalidated while the gateway is away":      {away: true, lose: (*followedSource).outrunSlot, says: "max_slot_wal_keep_size"},
		"invalidated while the gateway reads slowly": {lose: func(w *followedSource) { w.link.Slow(100_000); w.outrunSlot(); w.link.Slow(0) }, says: "max_slot_wal_keep_size"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{
				"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}})
			w := followSource(t, server, "")
			since := w.absent.replica.cursor
			refused := func() { w.refused(since) }
			if v.away {
				w.stopGateway()
				v.lose(w)
				w.startGateway()
			} else {
				refused = w.witness()
				end := w.during()
				defer end()
				v.lose(w)
				defer w.settle(w.present, w.absent)
				defer end()
			}
			w.logged(v.says)
			w.logged("the replication slot was lost")
			w.exec(`INSERT INTO docs VALUES (7, 'u0', 'after'); DELETE FROM docs WHERE id = 1`)
			refused()
			w.settle(w.absent)
		})
	}
}

// dropSlot drops the slot, from under its reader if there is one, which may come back at any moment.
func (w *followedSource) dropSlot() {
	w.t.Helper()
	w.exec(`DELETE FROM docs WHERE id = 2`)
	resyncEventually(w.t, "the slot is dropped", func() bool {
		_, err := w.conn.Exec(w.t.Context(), `DO $$BEGIN
			PERFORM pg_terminate_backend(active_pid, 1000) FROM pg_replication_slots WHERE slot_name = 'walgate' AND active_pid IS NOT NULL;
			PERFORM pg_drop_replication_slot('walgate');
		END$$`)
		return err == nil
	})
	w.exec(`INSERT INTO docs VALUES (6, 'u0', 'meanwhile')`)
}

// outrunSlot writes until the server has given the slot up.
func (w *followedSource) outrunSlot() {
	w.t.Helper()
	w.exec(`DELETE FROM docs WHERE id = 2`)
	id := 1000
	resyncEventually(w.t, "the slot is invalidated", func() bool {
		w.exec(`INSERT INTO docs VALUES ($1, 'u0', repeat('x', 200000))`, id)
		id++
		w.exec(`SELECT pg_switch_wal()`)
		w.exec(`CHECKPOINT`)
		said, err := os.ReadFile(w.gateway.log)
		return err == nil && strings.Contains(string(said), "the slot was invalidated") ||
			sourceQuery[bool](w, `SELECT coalesce((SELECT wal_status = 'lost' FROM pg_replication_slots WHERE slot_name = 'walgate'), false)`)
	})
}

// TestFrozenGateway: a gateway stands still without a word, as its host may. Another one says who holds the slot, serves
// meanwhile, and takes over within the walsender's time. The frozen one wakes, and neither harms the log nor leads its
// clients astray.
func TestFrozenGateway(t *testing.T) {
	t.Parallel()
	w := followSource(t, pgserver.StartForTest(t, pgserver.Options{}), "")
	frozen, frozenClient := w.gateway, w.present
	must(t, frozen.cmd.Process.Signal(syscall.SIGSTOP))
	began := time.Now()
	second, _ := newGatewayProcess(t, strings.NewReplacer("URL", w.link.DSN(t, w.server.DSN("postgres")), "STORAGE", "").Replace(sourceConfig))
	w.gateway = second
	w.startGateway()
	w.present = w.client("of the second gateway", 4)
	w.absent.base = second.base
	w.readiness(`"status":"ready"`)
	w.readiness("is held by process")
	w.readiness("application walgate, client 127.0.0.1:")
	if status, _ := w.get("/sync/pull", map[string][]string{"since": {w.absent.replica.cursor}}); status != http.StatusOK {
		t.Errorf("pull while waiting for the slot: %d", status)
	}
	w.exec(`INSERT INTO docs VALUES (4, 'u0', 'while the first gateway is frozen')`)
	w.settle(w.present, w.absent)
	t.Logf("took over after %s", time.Since(began).Round(time.Millisecond))
	before := historyOf(w.absent)
	must(t, frozen.cmd.Process.Signal(syscall.SIGCONT))
	w.exec(`INSERT INTO docs VALUES (5, 'u0', 'after it woke'); DELETE FROM docs WHERE id = 1`)
	w.settle(frozenClient, w.present, w.absent)
	if n := resynchronised(frozenClient) + resynchronised(w.absent); n != 0 || historyOf(frozenClient) != before {
		t.Errorf("clients had to start anew %d times (history %s, then %s): nothing was lost", n, before, historyOf(frozenClient))
	}
}
