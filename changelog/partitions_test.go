package changelog

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

const day = 24 * time.Hour

// daily is a log with one entry on each of n days, the last one today; short is retained for 2 days, long for 4.
func daily(t *testing.T, n int) (l *Log, dsn string, days []Version) {
	t.Helper()
	l, dsn = newLog(t)
	a, c := restart(t, l, func(c *Claim) {
		short, long := testCollection("short"), testCollection("long")
		short.Retention, long.Retention = 2*day, 4*day
		c.Collections = []ClaimedCollection{short, long}
	})
	first := partitionOf(c.Version) + partitionSpan
	for i := range n {
		v := first + Version(i)*partitionSpan
		appendNow(t, a, transaction(LSN(100+i), upsert(v, v, 1, fmt.Sprint(i))))
		days = append(days, v)
	}
	return l, dsn, days
}

func TestExpireRaisesFloorsBeforeItDrops(t *testing.T) {
	t.Parallel()
	l, _, days := daily(t, 8)
	now := days[7].Time()
	next, dropped, err := l.Expire(t.Context(), now, 0)
	if err != nil || len(dropped) != 0 {
		t.Fatalf("the first call dropped %v (%v): reads that began before may need it", dropped, err)
	}
	floors := map[string]Version{}
	for _, c := range mustHead(t, l).Collections {
		floors[c.Name] = c.Floor
		if c.FloorReason != "retention" {
			t.Errorf("reason of %s: %s", c.Name, c.FloorReason)
		}
	}
	if floors["short"] != days[5] || floors["long"] != days[3] || next != days[3] {
		t.Errorf("floors %v, droppable %d; want days 5, 3 and 3 of %v", floors, next, days)
	}
	if got := documents(t, l, 1); len(got) != 8 {
		t.Errorf("after the first call the log holds %v", got)
	}
	again, dropped, err := l.Expire(t.Context(), now, next)
	want := []string{partitionName("changes", days[0]), partitionName("changes", days[1]), partitionName("changes", days[2])}
	if err != nil || !slices.Equal(dropped, want) {
		t.Errorf("the second call dropped %v (%v), want %v", dropped, err, want)
	}
	if got := documents(t, l, 1); !slices.Equal(got, []string{"u 3", "u 4", "u 5", "u 6", "u 7"}) {
		t.Errorf("after the second call the log holds %v", got)
	}
	if _, dropped, err := l.Expire(t.Context(), now, again); err != nil || len(dropped) != 0 {
		t.Errorf("nothing is left to drop, but: %v (%v)", dropped, err)
	}
	// A clock that goes back lowers no floor.
	if _, _, err := l.Expire(t.Context(), days[0].Time(), 0); err != nil || mustHead(t, l).Collections[0].Floor != days[5] {
		t.Errorf("a floor went back to %d (%v)", mustHead(t, l).Collections[0].Floor, err)
	}
}

func TestExpireGivesWayToAReader(t *testing.T) {
	t.Parallel()
	l, dsn, days := daily(t, 8)
	next, _, err := l.Expire(t.Context(), days[7].Time(), 0)
	if err != nil {
		t.Fatal(err)
	}
	reader := session(t, dsn)
	mustExec(t, reader, `BEGIN`, `SELECT count(*) FROM walgate.changes`)
	if _, dropped, err := l.Expire(t.Context(), days[7].Time(), next); err != nil || len(dropped) != 0 {
		t.Errorf("under a reader's feet %v were dropped (%v)", dropped, err)
	}
	mustExec(t, reader, `SELECT count(*) FROM walgate.changes`, `COMMIT`)
	if _, dropped, err := l.Expire(t.Context(), days[7].Time(), next); err != nil || len(dropped) != 3 {
		t.Errorf("after the reader left, %v were dropped (%v), want 3", dropped, err)
	}
}

// TestPartitionsAreMadeWithinALongTransaction: one that runs over midnight needs the next day's while it is open.
func TestPartitionsAreMadeWithinALongTransaction(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	a, c := restart(t, l, nil)
	midnight := partitionOf(c.Version) + partitionSpan
	tx := midnight - 1
	before, after := transaction(0, upsert(tx, tx, 1, "before")), transaction(100, upsert(midnight, tx, 1, "after"))
	before.Final = false
	appendNow(t, a, before)
	a.Close() // and all of it goes with the connection
	b, _ := restart(t, l, nil)
	appendNow(t, b, before)
	appendNow(t, b, after)
	appendNow(t, b, transaction(101, upsert(midnight+1, midnight+1, 1, "next day")))
	if got := documents(t, l, 1); !slices.Equal(got, []string{"u before", "u after", "u next day"}) {
		t.Errorf("the log holds %v", got)
	}
	if n := scan[int](t, session(t, dsn), `SELECT count(*) FROM walgate.transactions`); n != 2 {
		t.Errorf("%d transactions recorded, want 2", n)
	}
}

// TestPartitionsAreMadeBesideReaders: a dump of the log that is open over midnight holds up neither the appender nor those
// who come to read.
func TestPartitionsAreMadeBesideReaders(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version + 1
	appendNow(t, a, transaction(100, upsert(v, v, 1, "today")))
	mustExec(t, session(t, dsn), `BEGIN ISOLATION LEVEL REPEATABLE READ`, `SELECT FROM walgate.changes`, `SELECT FROM walgate.transactions`)
	mustExec(t, a.conn, `SET lock_timeout = '2s'`) // not for ever, where it must wait
	next := partitionOf(v) + partitionSpan
	appendNow(t, a, transaction(101, upsert(next, next, 1, "tomorrow")))
	if got := documents(t, l, 1); !slices.Equal(got, []string{"u today", "u tomorrow"}) {
		t.Errorf("the log holds %v", got)
	}
}

// TestTransactionWithoutRowsIsAppended: its only row was of a collection that stopped there, and it is the day's first.
func TestTransactionWithoutRowsIsAppended(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	next := partitionOf(c.Version) + partitionSpan
	appendNow(t, a, Piece{Tx: next, Xid: 7, LSN: 100, Final: true, Version: next, Raises: []Raise{{Collection: c.Collections[0].ID, SetStopped: true, Stopped: "can't be decoded"}}})
	if h := mustHead(t, l); h.LSN != 100 || h.Version != next || h.Collections[0].Stopped == "" {
		t.Errorf("the log stands at %+v", h)
	}
}
