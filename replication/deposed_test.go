package replication

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/walgate/walgate/changelog"
)

// TestLateSlotMaker: an instance found no slot and goes on only when another one has made it and leads. What the source
// remembers then must stand, or the next leader would take the slot for a new one.
func TestLateSlotMaker(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	history := s.settle().History
	before := "of the slot before"
	for name, remembered := range map[string]*string{"of another history": &before, "nothing": nil} {
		slot, err := createSlot(t.Context(), s.connect(), s.slot, remembered, slog.Default(), nil)
		s.ok(err)
		if now := query[string](s, `SELECT history FROM walgate.source`); now != history || slot.Created {
			t.Errorf("who remembered %s made a slot: %t; the source remembers %s, want %s", name, slot.Created, now, history)
		}
	}
	if err := dropSlot(t.Context(), s.connect(), s.slot, `wal_status = 'lost'`); err != nil {
		t.Error(err)
	}
	s.stop()
	s.unread()
	for condition, args := range map[string][]any{`wal_status = 'lost'`: nil, `confirmed_flush_lsn <= $2`: {"0/1"}} {
		s.ok(dropSlot(t.Context(), s.connect(), s.slot, condition, args...))
	}
	s.start()
	if now := s.settle().History; now != history {
		t.Errorf("history %s after %s: nothing was lost", now, history)
	}
}

// TestDeposedLeaderNotesNothing: one that stood still while another took over must not undo what that one noted in the source,
// nor count on.
func TestDeposedLeaderNotesNothing(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	history := s.settle().History
	old := NewLeader(Options{Source: s.pool, Slot: s.slot, Log: s.log, Stats: s.stats, Logger: s.watcher.log})
	err := old.rememberHistory(t.Context(), &changelog.Claimed{History: "0ld0", Remembered: changelog.HistoryForgotten})
	if err == nil || !strings.Contains(err.Error(), "taken over") {
		t.Errorf("its history: %v", err)
	}
	epoch := query[int64](s, `SELECT epoch FROM walgate.checkpoint`)
	s.stop()
	s.unread()
	old.noted, old.notedAt = query[int64](s, `SELECT noted FROM walgate.checkpoint`), -1
	for range 3 {
		if err := old.note(t.Context(), epoch-1); err == nil || !strings.Contains(err.Error(), "taken over") {
			t.Errorf("its number: %v", err)
		}
	}
	s.start()
	if now := s.settle().History; now != history {
		t.Errorf("history %s after %s: nothing was lost", now, history)
	}
}

// TestEmptyTableWithAWriter: rows of a transaction that can't be seen yet may be in the log, or passed by it: a table that
// somebody writes to isn't empty.
func TestEmptyTableWithAWriter(t *testing.T) {
	t.Parallel()
	for kind, sql := range map[string]string{
		"plain":       itemsTable,
		"partitioned": `CREATE TABLE items (id int PRIMARY KEY, owner text) PARTITION BY RANGE (id); CREATE TABLE items_1 PARTITION OF items FOR VALUES FROM (0) TO (100);`,
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{before: sql, specs: itemsSpec()})
			s.stop()
			table := s.watcher.Current().Set.Collections[0].Table
			if !isEmpty(t.Context(), s.connect(), table) {
				t.Error("the empty table isn't")
			}
			s.exec(`BEGIN; INSERT INTO items VALUES (1)`)
			if isEmpty(t.Context(), s.connect(), table) {
				t.Error("empty, while a row is being written")
			}
			s.exec(`ROLLBACK`)
			if !isEmpty(t.Context(), s.connect(), table) {
				t.Error("not empty after the rollback")
			}
		})
	}
}

// TestSlotInTheMaking: the one who makes it holds it, and doesn't read from it.
func TestSlotInTheMaking(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.stop()
	s.unread()
	s.exec(`SELECT pg_drop_replication_slot($1)`, s.slot)
	other := s.connect()
	_, err := other.Exec(t.Context(), `BEGIN; INSERT INTO items VALUES (77)`)
	s.ok(err)
	s.launch()
	s.await("the slot is in the making", func() bool {
		st, err := ReadSlotStatus(t.Context(), s.conn, s.slot)
		return err == nil && st.InTheMaking()
	})
	_, err = other.Exec(t.Context(), `ROLLBACK`)
	s.ok(err)
	s.await("the slot is made", func() bool {
		st, err := ReadSlotStatus(t.Context(), s.conn, s.slot)
		return err == nil && st.Active && !st.InTheMaking()
	})
}
