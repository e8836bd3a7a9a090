package gateway

import (
	"testing"
)

// TestPushMainWays pushes each operation and finds the rows in the table and in the feed.
func TestPushMainWays(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{})
	ana := tokenFor(t, "ana", nil)
	at := e.here(t, ana)
	p := e.submit(t, ana, "",
		`{"collection":"tasks","operation":"insert","doc_id":"1","data":{"title":"one","points":3}}`,
		`{"collection":"tasks","operation":"upsert","doc_id":"2","data":{"id":2,"title":"two"}}`,
		`{"collection":"words","operation":"upsert","doc_id":"[\"a\",\"en\"]","data":{"body":"ant"}}`)
	p.want(t, `accepted 1, accepted 2, accepted ["a","en"]`)
	if p.TxID == nil || p.VisibleAt == nil || p.Results[0].NewVersion == nil {
		t.Fatalf("no txid, visible_at or new_version: %+v", p)
	}
	if got := e.one(t, `SELECT string_agg(concat_ws(' ', id, owner, title, points), ', ' ORDER BY id) FROM tasks`); got != "1 ana one 3, 2 ana two" {
		t.Fatal(got)
	}
	changes, at := e.pullAll(t, ana, at)
	if got := briefs(changes); got != `upsert tasks/1, upsert tasks/2, upsert words/["a","en"]` {
		t.Fatal(got)
	}
	for i, c := range changes {
		if c.Version != *p.Results[i].NewVersion {
			t.Errorf("change %d has version %s, its push was answered %s", i, c.Version, *p.Results[i].NewVersion)
		}
	}
	e.submit(t, ana, "",
		`{"collection":"tasks","operation":"update","doc_id":"1","data":{"done":true}}`,
		`{"collection":"tasks","operation":"delete","doc_id":"2"}`,
		`{"collection":"words","operation":"delete","doc_id":"[\"a\",\"en\"]","data":null}`).
		want(t, `accepted 1, accepted 2, accepted ["a","en"]`)
	if got := e.one(t, `SELECT string_agg(concat_ws(' ', id, done, deleted_at IS NULL), ', ' ORDER BY id) FROM tasks`); got != "1 t t, 2 f f" {
		t.Fatal(got)
	}
	changes, _ = e.pullAll(t, ana, at)
	if got := briefs(changes); got != `upsert tasks/1, delete tasks/2, delete words/["a","en"]` {
		t.Fatal(got)
	}
}
