package changelog

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// marked is a transaction that is a push of ana's phone.
func marked(p Piece, id int64, locals ...Local) Piece {
	p.Push = &Push{ID: id, Subject: `an'a\`, ClientID: "phone", Locals: locals}
	return p
}

// pushesLog holds, from the version after the returned one: a plain change, a push of two documents (one with a local id), a
// push that changed nothing, and a push by another subject with the same client id.
func pushesLog(t *testing.T) (*Log, Version, []Pushed, *Batch) {
	t.Helper()
	l, _ := newLog(t)
	a, c := lead(t, l, testClaim())
	batches := a.bus.Subscribe(t.Context())
	v := c.Version
	local := Local{"tasks", "7", "örtlich \"1\""}
	empty := marked(transaction(103), 12)
	empty.Tx, empty.Version = v+5, v+5
	bob := marked(transaction(104, upsert(v+6, v+6, 1, "8")), 13)
	bob.Push.Subject = "bob"
	appendNow(t, a, transaction(101, upsert(v+1, v+1, 1, "6")),
		marked(transaction(102, upsert(v+2, v+2, 1, "7"), Entry{Version: v + 3, Tx: v + 2, Scope: scope(2), Collection: 1, Op: 'd', DocID: []byte("6")},
			Entry{Version: v + 4, Tx: v + 2, Scope: scope(2), Collection: 1, Op: 'l', DocID: []byte("7")}, upsert(v+4, v+2, 1, "7")), 11, local), empty, bob)
	ana := Push{Subject: `an'a\`, ClientID: "phone"}
	want := []Pushed{{v + 2, v + 4, ana}, {v + 5, v + 5, ana}, {v + 6, v + 6, Push{Subject: "bob", ClientID: "phone"}}}
	for i := range want {
		want[i].ID = int64(11 + i)
	}
	want[0].Locals = []Local{local}
	return l, v, want, <-batches
}

func TestPushesAreLoggedAndAnnounced(t *testing.T) {
	t.Parallel()
	l, v, want, batch := pushesLog(t)
	if !reflect.DeepEqual(batch.Pushes, want) {
		t.Errorf("announced %+v\nwant %+v", batch.Pushes, want)
	}
	p, err := l.ReadAll(t.Context(), v, v+100, 100, 1<<20)
	if err != nil || !reflect.DeepEqual(p.Pushes, want) || p.Last != v+6 {
		t.Errorf("the whole log to %d has %+v (%v)\nwant %+v", p.Last, p.Pushes, err, want)
	}
	p, err = l.ReadAll(t.Context(), v+3, v+100, 100, 1<<20) // from within the first push
	if err != nil || !reflect.DeepEqual(p.Pushes, want) {
		t.Errorf("from within a push the log has %+v (%v)\nwant %+v", p.Pushes, err, want)
	}
	p, err = l.ReadAll(t.Context(), v+4, v+100, 100, 1<<20)
	if err != nil || !reflect.DeepEqual(p.Pushes, want[1:]) {
		t.Errorf("after a push the log has %+v (%v)\nwant %+v", p.Pushes, err, want[1:])
	}
}

// TestMarksAreTheAskingClients: those of its subject and client id only.
func TestMarksAreTheAskingClients(t *testing.T) {
	t.Parallel()
	l, v, want, _ := pushesLog(t)
	for _, c := range []struct {
		subject, client string
		want            []Pushed
	}{
		{`an'a\`, "phone", want[:1]}, // of the push without entries the page tells nothing
		{"bob", "phone", want[2:]},
		{"bob", "tablet", nil},
		{"bob", "", nil},
		{"", "phone", nil},
	} {
		p := mustRead(t, l, Request{Scopes: [][16]byte{scope(1), scope(2)}, Since: v, Limit: 100, MaxBytes: 1 << 20, Subject: c.subject, ClientID: c.client})
		if len(p.Pushes) != len(c.want) || len(c.want) > 0 && !reflect.DeepEqual(p.Pushes, c.want) {
			t.Errorf("%s on %q is told %+v, want %+v", c.subject, c.client, p.Pushes, c.want)
		}
		if len(p.Entries) != 6 {
			t.Errorf("%d entries, want 6", len(p.Entries))
		}
	}
}

// TestAllMarksAreBounded: a page of the whole log ends before a mark that is too many, and nothing is left out.
func TestAllMarksAreBounded(t *testing.T) {
	t.Parallel()
	l, v, want, _ := pushesLog(t)
	for limit := 1; limit <= 4; limit++ {
		var got []Pushed
		var entries []string
		since := v
		for more := true; more; {
			p, err := l.ReadAll(t.Context(), since, v+100, limit, 1<<20)
			if err != nil || p.More && p.Last <= since || len(p.Pushes) > limit {
				t.Fatalf("limit %d from %d: %d marks, last %d (%v)", limit, since, len(p.Pushes), p.Last, err)
			}
			for _, m := range p.Pushes {
				if !slices.ContainsFunc(got, func(g Pushed) bool { return g.ID == m.ID }) { // told for each part of its transaction
					got = append(got, m)
				}
			}
			entries = append(entries, names(p)...)
			since, more = p.Last, p.More
		}
		if !reflect.DeepEqual(got, want) || fmt.Sprint(entries) != "[u 6 u 7 d 6 u 7 l 7 u 8]" {
			t.Errorf("limit %d: %+v, %v\nwant %+v", limit, got, entries, want)
		}
	}
}

func TestPushedTellsTheLastStates(t *testing.T) {
	t.Parallel()
	l, v, want, _ := pushesLog(t)
	got, err := l.Pushed(t.Context(), []int64{13, 12, 99, 11})
	if err != nil {
		t.Fatal(err)
	}
	wanted := []PushedChanges{
		{want[0], []PushedChange{{1, "6", v + 3, 'd'}, {1, "7", v + 4, 'u'}}},
		{want[1], nil},
		{want[2], []PushedChange{{1, "8", v + 6, 'u'}}},
	}
	for i := range got {
		if len(got[i].Changes) == 0 {
			got[i].Changes = nil
		}
	}
	if !reflect.DeepEqual(got, wanted) {
		t.Errorf("got %+v\nwant %+v", got, wanted)
	}
}

// TestPushedIsOfThisHistory: a source that was restored from a backup gives ids a second time.
func TestPushedIsOfThisHistory(t *testing.T) {
	t.Parallel()
	l, _, _, _ := pushesLog(t)
	restart(t, l, func(c *Claim) { c.Source.Timeline++ })
	if got, err := l.Pushed(t.Context(), []int64{11, 12, 13}); err != nil || len(got) > 0 {
		t.Errorf("the new history knows pushes of the old one: %+v (%v)", got, err)
	}
}

// TestPushedCostsItsPushes: the plan finds a push by the index, also while nothing is known of how the table is filled.
func TestPushedCostsItsPushes(t *testing.T) {
	t.Parallel()
	_, dsn, _, _ := filled(t, 4000)
	conn := session(t, dsn)
	mustExec(t, conn, `UPDATE walgate.transactions SET push = xid`, `SET enable_bitmapscan = off`, `SET plan_cache_mode = force_generic_plan`)
	mustExec(t, conn, `PREPARE pushed (bigint[]) AS SELECT `+pushColumns+` FROM `+transactionsOfPushes)
	rows, err := conn.Query(t.Context(), `EXPLAIN (ANALYZE, FORMAT TEXT) EXECUTE pushed ('{7}')`)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	plan := strings.Join(lines, "\n")
	if err != nil || strings.Contains(plan, "Seq Scan on transactions") || !strings.Contains(plan, "_push_idx") || strings.Contains(plan, "Rows Removed by Filter") {
		t.Errorf("%v\n%s", err, plan)
	}
}
