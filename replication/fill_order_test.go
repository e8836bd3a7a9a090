package replication

import (
	"testing"
	"time"
)

// TestFillWaitsForWhatItDoesNotSee: a transaction that the log holds from before a fill began, and that a snapshot of the source
// doesn't show yet, has left its references under the fill before, which the sweep removes: so rows read in that snapshot don't
// count. Here an open transaction stands for one that is logged and not yet seen.
func TestFillWaitsForWhatItDoesNotSee(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: oneThing})
	s.exec(`UPDATE things SET photo = 'f8'`)
	s.sameHeld()
	unseen := s.connect()
	var xid int64
	_, err := unseen.Exec(t.Context(), `BEGIN`)
	s.ok(err)
	s.ok(unseen.QueryRow(t.Context(), `SELECT pg_current_xact_id()::text::int8`).Scan(&xid))
	s.exec(`INSERT INTO walgate.transactions (tx, xid) SELECT version, $1 FROM walgate.checkpoint`, xid)
	scans := func() int64 {
		return query[int64](s, `SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relid = 'things'::regclass`)
	}
	before, floor := scans(), s.collection("things").Floor
	s.exec(`ALTER TABLE things ALTER body TYPE varchar(50)`)
	s.ok(s.watcher.Reload(t.Context()))
	s.awaitRaise("things", floor)
	s.await("rows were read again and again, or once and for good", func() bool { return scans() >= before+4 || s.fillOf("things").Done })
	if f := s.fillOf("things"); f.Done || f.Rows > 0 {
		t.Errorf("rows count that were read without a transaction that the log holds: %+v", f)
	}
	s.exec(`DELETE FROM walgate.transactions WHERE xid = $1`, xid)
	_, err = unseen.Exec(t.Context(), `COMMIT`)
	s.ok(err)
	s.sameHeld()
}

// TestRowsAreFilledBeforeBytes: what an upload withholds is decided by the rows that name it.
func TestRowsAreFilledBeforeBytes(t *testing.T) {
	t.Parallel()
	f := &filler{tasks: map[int32]*fillTask{bytesFill: {collection: bytesFill}, 1: {collection: 1, done: true}, 2: {collection: 2}, 3: {collection: 3, swept: true}}}
	for _, want := range []int32{2, bytesFill, 1} {
		got, _ := f.pick(time.Now())
		if got == nil || got.collection != want {
			t.Fatalf("picked %+v, want collection %d", got, want)
		}
		if done := f.tasks[want]; want == 2 || want == bytesFill {
			done.done, done.next = true, time.Now().Add(time.Hour)
		}
	}
}
