package pgserver

import (
	"path/filepath"
	"testing"
	"time"
)

// TestCopies makes a standby, promotes it, follows it with the former primary, and puts saved files back.
func TestCopies(t *testing.T) {
	eachInstall(t, func(t *testing.T, install Install) {
		ctx := t.Context()
		primary := StartForTest(t, Options{Install: install})
		exec1(t, primary.DSN("postgres"), `CREATE TABLE n (v int); SELECT pg_create_physical_replication_slot('s')`)
		saved := filepath.Join(t.TempDir(), "saved")
		if err := primary.Save(saved); err == nil {
			t.Fatal("a running server was copied")
		}
		if err := primary.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		if err := primary.Save(saved); err != nil {
			t.Fatal(err)
		}
		if err := primary.Restart(ctx); err != nil {
			t.Fatal(err)
		}
		standby := StartCopyForTest(t, Copy{From: saved, DropSlots: true, StandbyOf: primary})
		if !query[bool](t, standby.DSN("postgres"), `SELECT pg_is_in_recovery() AND NOT EXISTS (SELECT FROM pg_replication_slots)`) {
			t.Error("no standby without slots")
		}
		exec1(t, primary.DSN("postgres"), `INSERT INTO n VALUES (1)`)
		awaitRows(t, standby, 1)
		if err := primary.Stop(ctx); err != nil { // sends the rest of its WAL first
			t.Fatal(err)
		}
		if err := standby.Promote(ctx); err != nil {
			t.Fatal(err)
		}
		const state = `SELECT format('%s rows, timeline %s', (SELECT count(*) FROM n), substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))`
		if got := query[string](t, standby.DSN("postgres"), state); got != "1 rows, timeline 00000002" {
			t.Error("promoted: " + got)
		}
		if err := primary.Follow(standby); err != nil {
			t.Fatal(err)
		}
		if err := primary.Restart(ctx); err != nil {
			t.Fatal(err)
		}
		exec1(t, standby.DSN("postgres"), `INSERT INTO n VALUES (2)`)
		awaitRows(t, primary, 2)
		if err := standby.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		if err := primary.Promote(ctx); err != nil {
			t.Fatal(err)
		}
		if got := query[string](t, primary.DSN("postgres"), state); got != "2 rows, timeline 00000003" {
			t.Error("promoted back: " + got)
		}
		if err := primary.Crash(); err != nil {
			t.Fatal(err)
		}
		if err := primary.Restore(saved); err != nil {
			t.Fatal(err)
		}
		if err := primary.Restart(ctx); err != nil {
			t.Fatal(err)
		}
		if got := query[string](t, primary.DSN("postgres"), state); got != "0 rows, timeline 00000001" {
			t.Error("restored: " + got)
		}
		recovered := StartCopyForTest(t, Copy{From: saved, Recover: true})
		if got := query[string](t, recovered.DSN("postgres"), state); got != "0 rows, timeline 00000002" {
			t.Error("recovered: " + got)
		}
	})
}

// awaitRows waits until a standby has replayed so many rows.
func awaitRows(t *testing.T, standby *Server, want int64) {
	t.Helper()
	limit := time.After(30 * time.Second)
	for query[int64](t, standby.DSN("postgres"), `SELECT count(*) FROM n`) < want {
		select {
		case <-limit:
			t.Fatalf("the standby doesn't replay; its log ends with:\n%s", standby.logTail())
		case <-time.After(10 * time.Millisecond):
		}
	}
}
