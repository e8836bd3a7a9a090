package gateway

import (
	"strings"
	"testing"
)

// TestPushLocalIDs lets the source assign keys: children in the same push and in later ones name their parent by its local id.
func TestPushLocalIDs(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: `INSERT INTO lists (id, owner) VALUES (1000, 'bob'); SELECT setval(pg_get_serial_sequence('lists', 'id'), 40);`})
	ana := tokenFor(t, "ana", nil)
	at := e.here(t, ana)
	p := e.submit(t, ana, "", // the child comes first
		`{"collection":"tasks","operation":"insert","local_id":"t","data":{"title":"child","list_id":"l"}}`,
		`{"collection":"lists","operation":"upsert","local_id":"l","data":{"name":"parent"}}`,
		`{"collection":"lists","operation":"update","local_id":"l","data":{"slug":"later"}}`)
	p.want(t, "accepted 1, accepted 41, accepted 41")
	if p.Results[0].LocalID != "t" || p.Results[1].LocalID != "l" || p.Results[1].NewVersion == nil {
		t.Errorf("%+v", p.Results)
	}
	if got := e.one(t, `SELECT list_id || ' ' || slug FROM tasks JOIN lists ON lists.id = list_id`); got != "41 later" {
		t.Error(got)
	}
	e.submit(t, ana, "",
		`{"collection":"tasks","operation":"update","local_id":"t","data":{"done":true}}`,
		`{"collection":"tasks","operation":"insert","local_id":"t2","change_id":"t2","data":{"list_id":"l"}}`).want(t, "accepted 1, accepted 2")
	e.submit(t, ana, "", `{"collection":"tasks","operation":"insert","local_id":"t2","change_id":"t2","data":{"list_id":"l"}}`).want(t, "duplicate 2")
	// Once more without a change_id: the row is there.
	e.submit(t, ana, "", `{"collection":"tasks","operation":"insert","local_id":"t2","data":{"list_id":"l"}}`).want(t, "rejected 2 unique_violation")
	e.submit(t, ana, "", `{"collection":"tasks","operation":"upsert","local_id":"t2","data":{"title":"up"}}`).want(t, "accepted 2")
	// To others the local ids are nothing.
	e.submit(t, tokenFor(t, "bob", nil), "", `{"collection":"tasks","operation":"update","local_id":"t","data":{"done":false}}`).want(t, "rejected - not_found")
	// A parent that isn't written takes its children along.
	e.submit(t, ana, `,"atomic":false`,
		`{"collection":"lists","operation":"insert","local_id":"bad","data":{"name":null}}`,
		`{"collection":"tasks","operation":"insert","local_id":"orphan","data":{"list_id":"bad"}}`,
		`{"collection":"tasks","operation":"insert","local_id":"fine","data":{"list_id":null}}`).
		want(t, "rejected - not_null, rejected - foreign_key_missing, accepted 3")
	if got := e.one(t, `SELECT string_agg(local_id || ':' || doc_id, ' ' ORDER BY local_id) FROM walgate.local_ids`); got != "fine:3 l:41 t:1 t2:2" {
		t.Error(got)
	}
	changes, _ := e.pullAll(t, ana, at, "client_id", "phone")
	if text := briefs(changes); !strings.Contains(text, "upsert lists/41") {
		t.Error(text)
	}
}

// TestPushParentsFirst brings parents before their children and children's deletes before their parents', and lets a circle
// of deferred constraints be.
func TestPushParentsFirst(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: `ALTER TABLE lists ADD COLUMN first_task bigint REFERENCES tasks DEFERRABLE INITIALLY IMMEDIATE;`})
	ana := tokenFor(t, "ana", nil)
	for _, mode := range []string{"", `,"atomic":false`} {
		e.submit(t, ana, mode,
			`{"collection":"tasks","operation":"insert","doc_id":"1","data":{"list_id":1}}`,
			`{"collection":"lists","operation":"insert","doc_id":"1","data":{"name":"x","first_task":1}}`).want(t, "accepted 1, accepted 1")
		e.submit(t, ana, mode, `{"collection":"lists","operation":"update","doc_id":"1","data":{"first_task":null}}`,
			`{"collection":"tasks","operation":"update","doc_id":"1","data":{"list_id":null}}`,
			`{"collection":"lists","operation":"delete","doc_id":"1"}`).want(t, "accepted 1, accepted 1, accepted 1")
		e.exec(t, `DELETE FROM tasks`)
		e.sync(t)
	}
	// In a circle that lacks something, the change at fault is found.
	e.submit(t, ana, "",
		`{"collection":"lists","operation":"insert","doc_id":"1","data":{"name":"x","first_task":7}}`,
		`{"collection":"tasks","operation":"insert","doc_id":"1","data":{"title":"fine"}}`).want(t, "rejected 1 foreign_key_missing, rejected 1 batch_rejected")
}
