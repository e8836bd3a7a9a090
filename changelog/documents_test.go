package changelog

import (
	"crypto/rand"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// TestDocuments holds what is known of documents against a log written by hand.
func TestDocuments(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	a, c := lead(t, l, testClaim())
	v := c.Version
	entry := func(at Version, sc byte, op byte, id, data string, changed ...byte) Entry {
		e := Entry{Version: v + at, Tx: v + at, Scope: scope(sc), Collection: 1, Op: op, DocID: []byte(id), Changed: changed}
		if op == 'u' {
			e.Data = []byte(data)
		}
		return e
	}
	appendNow(t, a,
		transaction(101, entry(1, 1, 'u', "moved", `1`), entry(2, 1, 'u', "gone", `2`)),
		transaction(102, entry(3, 1, 'u', "moved", `3`, 1), entry(4, 1, 'u', "moved", `4`, 0, 4)),
		transaction(103, entry(5, 1, 'l', "moved", "", 2), entry(5, 2, 'u', "moved", `5`, 2)),
		transaction(104, entry(6, 3, 'u', "gone", `6`, 8), entry(6, 4, 'u', "gone", `6`, 8)),
		transaction(105, entry(7, 3, 'd', "gone", "")),
		transaction(106, entry(8, 5, 'd', "born dead", "")))
	ask := func(collection int32, id string, since Version) DocumentKnown {
		t.Helper()
		got, h, err := l.Documents(t.Context(), []DocumentAsk{{Collection: 77, DocID: []byte("moved")}, {Collection: collection, DocID: []byte(id), Since: since}})
		if err != nil || len(got) != 2 || h.Version != v+8 || got[0].Latest != 0 {
			t.Fatalf("asked for two documents, the first unknown: %+v %+v (%v)", got, h, err)
		}
		return got[1]
	}
	for _, c := range []struct {
		name  string
		id    string
		since Version
		want  DocumentKnown
	}{
		{"one after another", "moved", v + 2, DocumentKnown{Latest: v + 5, LatestOp: 'u', Scopes: [][16]byte{scope(1), scope(2)}, Changed: []byte{3, 4}}},
		{"since the last but one", "moved", v + 4, DocumentKnown{Latest: v + 5, LatestOp: 'u', Scopes: [][16]byte{scope(1), scope(2)}, Changed: []byte{2}}},
		{"nothing since", "moved", v + 5, DocumentKnown{Latest: v + 5, LatestOp: 'u', Scopes: [][16]byte{scope(1), scope(2)}}},
		{"since its insert", "moved", v, DocumentKnown{Latest: v + 5, LatestOp: 'u', Scopes: [][16]byte{scope(1), scope(2)}, Changed: []byte{3, 4}, All: true}},
		{"deleted", "gone", v + 6, DocumentKnown{Latest: v + 7, LatestOp: 'd', Scopes: [][16]byte{scope(3)}, All: true, Image: []byte("6"), ImageScopes: [][16]byte{scope(3), scope(4)}}},
		{"deleted, no image", "born dead", v + 8, DocumentKnown{Latest: v + 8, LatestOp: 'd', Scopes: [][16]byte{scope(5)}}},
		{"unknown", "elsewhere", v, DocumentKnown{}},
	} {
		if got := ask(1, c.id, c.since); !sameKnown(got, c.want) {
			t.Errorf("%s: %+v\nwant %+v", c.name, got, c.want)
		}
	}
	mustExec(t, session(t, dsn), fmt.Sprintf(`UPDATE walgate.collections SET floor = %d`, v+7))
	if got := ask(1, "moved", v+4); got.Latest != 0 || !got.All || got.Changed != nil {
		t.Errorf("what lies below the collection's floor counts: %+v", got)
	}
	if got := ask(1, "born dead", v+7); got.Latest != v+8 {
		t.Errorf("what lies above the floor doesn't count: %+v", got)
	}
}

// TestDocumentsThatShareAHash are told apart, and an id may be of any length.
func TestDocumentsThatShareAHash(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	a, c := lead(t, l, testClaim())
	v := c.Version
	long := rand.Text()
	for len(long) < 10000 {
		long += rand.Text()
	}
	appendNow(t, a, transaction(101, upsert(v+1, v+1, 1, long)), transaction(102, upsert(v+2, v+2, 1, "b")))
	mustExec(t, session(t, dsn), fmt.Sprintf(`UPDATE walgate.changes SET document = %d`, documentHash(1, []byte(long))))
	got, _, err := l.Documents(t.Context(), []DocumentAsk{{Collection: 1, DocID: []byte(long)}, {Collection: 2, DocID: []byte(long)}})
	if err != nil || got[0].Latest != v+1 || got[1].Latest != 0 {
		t.Errorf("%+v (%v)", got, err)
	}
}

// TestDocumentsCostTheirChanges: the plan finds each by the index, whatever else the log holds.
func TestDocumentsCostTheirChanges(t *testing.T) {
	t.Parallel()
	l, dsn, _, _ := filled(t, 4000)
	conn := session(t, dsn)
	mustExec(t, conn, `ANALYZE walgate.changes`, `SET enable_bitmapscan = off`)
	rows, err := conn.Query(t.Context(), `EXPLAIN (ANALYZE, FORMAT TEXT) `+documentsSQL, []int32{1, 1}, []string{"7.1", "3999.2"},
		[]int64{documentHash(1, []byte("7.1")), documentHash(1, []byte("3999.2"))}, []int64{0, 0})
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	plan := strings.Join(lines, "\n")
	if err != nil || strings.Contains(plan, "Seq Scan on changes") || !strings.Contains(plan, "_document_version_idx") || strings.Contains(plan, "Rows Removed by Filter") {
		t.Errorf("%v\n%s", err, plan)
	}
	if got, _, err := l.Documents(t.Context(), []DocumentAsk{{Collection: 1, DocID: []byte("7.1")}}); err != nil || got[0].Latest == 0 {
		t.Errorf("%+v (%v)", got, err)
	}
}

func sameKnown(a, b DocumentKnown) bool {
	for _, d := range []*DocumentKnown{&a, &b} {
		if len(d.Scopes) == 0 {
			d.Scopes = nil
		}
		if len(d.ImageScopes) == 0 {
			d.ImageScopes = nil
		}
	}
	return reflect.DeepEqual(a, b)
}
