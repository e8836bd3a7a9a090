package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

// inputSQL has a column of every kind of trouble.
const inputSQL = `
CREATE TYPE mood AS ENUM ('calm', 'wild');
CREATE TABLE things (id int PRIMARY KEY, n int, big bigint, price numeric(6,2), name varchar(10), "order" text, doc jsonb, at timestamptz, day date,
	flag bool, mood mood, list int[], raw bytea, net inet, twice int GENERATED ALWAYS AS (n * 2) STORED, needed text NOT NULL DEFAULT 'd', secret text);
CREATE TABLE readable (id int PRIMARY KEY);
CREATE TABLE pairs (a int, b text, v text, PRIMARY KEY (a, b));
INSERT INTO things (id, n, name, secret) VALUES (1, 1, 'one', 's'), (2, 2, 'two', 's');
INSERT INTO pairs VALUES (1, 'x', 'v');
`

const inputCollections = `
  things: {table: public.things, columns: {exclude: [secret]}, write: {roles: [editor]}}
  pairs: {table: public.pairs, write: {roles: [editor]}}
  readable: {table: public.readable, write: {roles: [other]}}
`

// TestPushBadChanges sends, one by one and all in one push, changes that are wrong in themselves: each is rejected for its
// own reason and leaves the rest alone.
func TestPushBadChanges(t *testing.T) {
	t.Parallel()
	g := startPushGateway(t, pgserver.ForTest(t).Database(t), inputSQL, "", inputCollections)
	_, version := g.here(t)
	future := "2999" + version[4:]
	otherHistory := version[:len(version)-4] + map[bool]string{true: "0001", false: "0002"}[strings.HasSuffix(version, "0002")]
	cases := []struct{ what, change, code string }{
		{"an unknown operation", `{"collection":"things","operation":"merge","doc_id":"1","data":{"n":3}}`, "unknown_operation"},
		{"no operation", `{"collection":"things","doc_id":"1","data":{"n":3}}`, "unknown_operation invalid_change"},
		{"an operation that is no text", `{"collection":"things","operation":7,"doc_id":"1","data":{"n":3}}`, "unknown_operation invalid_change"},
		{"an unknown collection", `{"collection":"nothings","operation":"update","doc_id":"1","data":{"n":3}}`, "unknown_collection"},
		{"a table's name", `{"collection":"public.things","operation":"update","doc_id":"1","data":{"n":3}}`, "unknown_collection"},
		{"no collection", `{"operation":"update","doc_id":"1","data":{"n":3}}`, "unknown_collection invalid_change"},
		{"a collection without the right", `{"collection":"readable","operation":"update","doc_id":"1","data":{}}`, "permission"},
		{"an unknown column", `{"collection":"things","operation":"update","doc_id":"1","data":{"m":3}}`, "unknown_column"},
		{"a generated column", `{"collection":"things","operation":"update","doc_id":"1","data":{"twice":3}}`, "column_not_writable"},
		{"a system column", `{"collection":"things","operation":"update","doc_id":"1","data":{"xmin":3}}`, "unknown_column"},
		{"an unknown column in base", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"base":{"m":3}}`, "unknown_column"},
		{"an excluded column in base", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"base":{"secret":"s"}}`, "unknown_column"},
		{"an unknown member", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"force":true}`, "invalid_change"},
		{"a change that is a text", `"update"`, "invalid_change"},
		{"a change that is null", `null`, "invalid_change"},
		{"data that is a list", `{"collection":"things","operation":"update","doc_id":"1","data":[3]}`, "invalid_change"},
		{"an update without data", `{"collection":"things","operation":"update","doc_id":"1","data":null}`, "invalid_change"},
		{"a delete with data", `{"collection":"things","operation":"delete","doc_id":"1","data":{"n":3}}`, "invalid_change"},
		{"base that is a list", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"base":[]}`, "invalid_change"},
		{"no key", `{"collection":"things","operation":"update","data":{"n":3}}`, "invalid_change invalid_key"},
		{"both keys", `{"collection":"things","operation":"insert","doc_id":"5","local_id":"l","data":{"n":3}}`, "invalid_change"},
		{"a key that is no number", `{"collection":"things","operation":"update","doc_id":"one","data":{"n":3}}`, "invalid_key"},
		{"a key that is too large", `{"collection":"things","operation":"update","doc_id":"99999999999","data":{"n":3}}`, "invalid_key"},
		{"an empty key", `{"collection":"things","operation":"update","doc_id":"","data":{"n":3}}`, "invalid_key invalid_change"},
		{"a key that is a number", `{"collection":"things","operation":"update","doc_id":1,"data":{"n":3}}`, "invalid_change invalid_key"},
		{"a key with NUL", `{"collection":"things","operation":"update","doc_id":"1\u0000","data":{"n":3}}`, "invalid_key invalid_change"},
		{"a composite key of one part", `{"collection":"pairs","operation":"update","doc_id":"[\"1\"]","data":{"v":"w"}}`, "invalid_key"},
		{"a composite key of three", `{"collection":"pairs","operation":"update","doc_id":"[\"1\",\"x\",\"y\"]","data":{"v":"w"}}`, "invalid_key"},
		{"a composite key that is none", `{"collection":"pairs","operation":"update","doc_id":"1","data":{"v":"w"}}`, "invalid_key"},
		{"a composite key with null", `{"collection":"pairs","operation":"update","doc_id":"[\"1\",null]","data":{"v":"w"}}`, "invalid_key"},
		{"keys that differ", `{"collection":"things","operation":"update","doc_id":"1","data":{"id":2,"n":3}}`, "key_mismatch"},
		{"keys that differ on insert", `{"collection":"things","operation":"insert","doc_id":"5","data":{"id":6,"n":3}}`, "key_mismatch"},
		{"composite keys that differ", `{"collection":"pairs","operation":"upsert","doc_id":"[\"1\",\"x\"]","data":{"a":1,"b":"y"}}`, "key_mismatch"},
		{"a key that is null in data", `{"collection":"things","operation":"update","doc_id":"1","data":{"id":null,"n":3}}`, "key_mismatch"},
		{"text for a number", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":"three"}}`, "invalid_value"},
		{"a fraction for a whole number", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3.5}}`, "invalid_value"},
		{"a number out of range", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3000000000}}`, "invalid_value"},
		{"too many digits", `{"collection":"things","operation":"update","doc_id":"1","data":{"price":123456.7}}`, "invalid_value"},
		{"a text that is too long", `{"collection":"things","operation":"update","doc_id":"1","data":{"name":"longer than ten"}}`, "invalid_value"},
		{"NUL in text", `{"collection":"things","operation":"update","doc_id":"1","data":{"order":"a\u0000b"}}`, "invalid_value"},
		{"NUL in json", `{"collection":"things","operation":"update","doc_id":"1","data":{"doc":{"a":"\u0000"}}}`, "invalid_value"},
		{"half a surrogate", `{"collection":"things","operation":"update","doc_id":"1","data":{"order":"\ud800"}}`, "invalid_value"},
		{"no such day", `{"collection":"things","operation":"update","doc_id":"1","data":{"day":"2026-02-30"}}`, "invalid_value"},
		{"no such label", `{"collection":"things","operation":"update","doc_id":"1","data":{"mood":"sad"}}`, "invalid_value"},
		{"an object for a number", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":{"a":1}}}`, "invalid_value"},
		{"an object for a list", `{"collection":"things","operation":"update","doc_id":"1","data":{"list":{"a":1}}}`, "invalid_value"},
		{"json that is too deep", `{"collection":"things","operation":"update","doc_id":"1","data":{"doc":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + `}}`, "invalid_value"},
		{"text for an address", `{"collection":"things","operation":"update","doc_id":"1","data":{"net":"nowhere"}}`, "invalid_value"},
		{"a wrong type in base", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"base":{"n":"one"}}`, "invalid_value"},
		{"null where the table forbids it", `{"collection":"things","operation":"update","doc_id":"1","data":{"needed":null}}`, "not_null"},
		{"a parent_version from the future", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"parent_version":"` + future + `"}`, "invalid_parent_version"},
		{"a parent_version that is none", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"parent_version":"yesterday"}`, "invalid_parent_version"},
		{"a parent_version that is a number", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"parent_version":{}}`, "invalid_parent_version invalid_change"},
		{"an empty change_id", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"change_id":""}`, "invalid_change"},
		{"a change_id that is too long", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"change_id":"` + strings.Repeat("c", 300) + `"}`, "invalid_change"},
		{"a change_id that is a number", `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3},"change_id":7}`, "invalid_change"},
	}
	table := func() string {
		var all string
		resyncScan(t, connect(t, g.dsn), []any{&all}, `SELECT concat((SELECT json_agg(t ORDER BY id) FROM things t), (SELECT json_agg(t) FROM pairs t))`)
		return all
	}
	before := table()
	wrong := func(what string, r pushResult, codes string) {
		t.Helper()
		if r.Status != "rejected" || !slices.Contains(strings.Fields(codes), r.Code) || r.Error == "" || r.NewVersion != nil || r.Retryable {
			t.Errorf("%s: %s, want rejected %s", what, r.raw, codes)
		}
	}
	for _, atomic := range []bool{true, false} {
		for _, c := range cases {
			a := g.post(t, fmt.Appendf(nil, `{"client_id":"d","atomic":%t,"changes":[%s]}`, atomic, c.change))
			if a.status != http.StatusOK || len(a.Results) != 1 || a.TxID != nil || a.VisibleAt != nil {
				t.Errorf("%s: %d %s, want a rejected change and no transaction", c.what, a.status, a.body)
				continue
			}
			wrong(c.what, a.Results[0], c.code)
		}
	}
	if after := table(); after != before {
		t.Errorf("rejected changes changed the table from\n%s\nto\n%s", before, after)
	}

	old := pushChange{Collection: "things", Operation: "update", DocID: "1", Data: map[string]any{"n": 4}, ParentVersion: otherHistory}
	if got := g.one(t, old); got.Status != "conflict_resolved" || len(got.Columns) < 10 {
		t.Errorf("a parent_version of another history: %s, want a conflict of all columns", got.raw)
	}
	list := []string{`{"collection":"things","operation":"update","doc_id":"1","data":{"n":10}}`}
	for _, c := range cases {
		list = append(list, c.change)
	}
	list = append(list, `{"collection":"things","operation":"update","doc_id":"2","data":{"n":20}}`)
	body := `{"client_id":"d","atomic":%t,"changes":[` + strings.Join(list, ",") + `]}`
	a := g.post(t, fmt.Appendf(nil, body, false))
	if a.status != http.StatusOK || len(a.Results) != len(list) {
		t.Fatalf("all at once: %d %.500s", a.status, a.body)
	}
	for i, c := range cases {
		wrong(c.what+" among others", a.Results[i+1], c.code)
	}
	if a.Results[0].Status != "accepted" || a.Results[len(list)-1].Status != "accepted" {
		t.Errorf("the good ones among bad ones: %s and %s", a.Results[0].raw, a.Results[len(list)-1].raw)
	}
	before = table()
	a = g.post(t, fmt.Appendf(nil, body, true))
	if a.status != http.StatusOK || len(a.Results) != len(list) || a.Results[0].Code != "batch_rejected" || a.Results[len(list)-1].Code != "batch_rejected" || table() != before {
		t.Errorf("an atomic push with bad changes: %d %.500s", a.status, a.body)
	}
}

// TestPushBadRequests sends bodies that are no push: each is a problem that says what is wrong.
func TestPushBadRequests(t *testing.T) {
	t.Parallel()
	g := startPushGateway(t, pgserver.ForTest(t).Database(t), inputSQL, "", inputCollections)
	const good = `{"collection":"things","operation":"update","doc_id":"1","data":{"n":3}}`
	many := func(n int) string {
		return `{"client_id":"d","changes":[` + strings.TrimSuffix(strings.Repeat(good+",", n), ",") + `]}`
	}
	for _, c := range []struct {
		what, body string
		status     int
	}{
		{"nothing", ``, 422}, {"no JSON", `{"client_id":`, 422}, {"a list", `[]`, 422}, {"null", `null`, 422}, {"two values", `{"client_id":"d","changes":[` + good + `]} {}`, 422},
		{"no client_id", `{"changes":[` + good + `]}`, 422}, {"an empty client_id", `{"client_id":"","changes":[` + good + `]}`, 422},
		{"a long client_id", `{"client_id":"` + strings.Repeat("d", 256) + `","changes":[` + good + `]}`, 422},
		{"a client_id that is a number", `{"client_id":7,"changes":[` + good + `]}`, 422},
		{"a client_id with NUL", `{"client_id":"d\u0000","changes":[` + good + `]}`, 422},
		{"no changes", `{"client_id":"d"}`, 422}, {"an empty list", `{"client_id":"d","changes":[]}`, 422}, {"an object of changes", `{"client_id":"d","changes":{}}`, 422},
		{"an unknown member", `{"client_id":"d","force":true,"changes":[` + good + `]}`, 422},
		{"atomic that is a text", `{"client_id":"d","atomic":"yes","changes":[` + good + `]}`, 422},
		{"a member twice", `{"client_id":"d","client_id":"e","changes":[` + good + `]}`, 422},
		{"changes twice", `{"client_id":"d","changes":[` + good + `],"changes":[` + good + `]}`, 422},
		{"bytes that are no UTF-8", "{\"client_id\":\"\xff\",\"changes\":[" + good + "]}", 422},
		{"1001 changes", many(1001), 422},
		{"too deep", `{"client_id":` + strings.Repeat("[", 100000) + strings.Repeat("]", 100000) + `}`, 422},
		{"a body over the limit", `{"client_id":"d","changes":[{"collection":"things","operation":"update","doc_id":"1","data":{"order":"` + strings.Repeat("x", 5<<20) + `"}}]}`, 413},
	} {
		a := g.post(t, []byte(c.body))
		if a.status != c.status && (c.status != 422 || a.status != 400) || a.Code == "" || a.Detail == "" || len(a.Results) > 0 {
			t.Errorf("%s: %d %.300s, want a problem of %d", c.what, a.status, a.body, c.status)
		}
	}
	if a := g.post(t, []byte(many(1000))); a.status != http.StatusOK || len(a.Results) != 1000 || a.Results[999].Status != "accepted" {
		t.Errorf("1000 changes: %d %.300s", a.status, a.body)
	}
	for _, header := range [][]string{{"Content-Type", "text/plain"}, {"Content-Type", "application/x-www-form-urlencoded"}, {"Content-Encoding", "br"}} {
		if a := g.post(t, []byte(many(1)), header...); a.status != http.StatusUnsupportedMediaType || a.Code == "" {
			t.Errorf("%v: %d %s, want 415", header, a.status, a.body)
		}
	}

	id := func(change, id string) string {
		return strings.Replace(change, `"data"`, `"change_id":"`+id+`","data"`, 1)
	}
	body := func(changes ...string) []byte {
		return []byte(`{"client_id":"d","atomic":false,"changes":[` + strings.Join(changes, ",") + `]}`)
	}
	if a := g.post(t, body(id(good, "c1"))); a.status != 200 || a.Results[0].Status != "accepted" {
		t.Fatalf("%d %s", a.status, a.body)
	}
	other := strings.Replace(good, `"n":3`, `"n":4`, 1)
	a := g.post(t, body(other, id(other, "c1")))
	var n int
	resyncScan(t, connect(t, g.dsn), []any{&n}, `SELECT n FROM things WHERE id = 1`)
	if a.status != http.StatusConflict || a.Code != "change_id_reused" || a.Retryable || !bytes.Contains(a.body, []byte("c1")) || n != 3 {
		t.Errorf("a change_id with other content: %d %s and n is %d, want 409 change_id_reused and nothing written", a.status, a.body, n)
	}
	if a := g.post(t, body(`{ "data": {"n" : 3}, "change_id": "c1", "doc_id": "1", "operation": "update", "collection": "things" }`)); a.status != 200 || a.Results[0].Status != "duplicate" {
		t.Errorf("the same change in another order and spacing: %d %s, want duplicate", a.status, a.body)
	}
	if a := g.post(t, body(id(good, "c2"), id(good, "c2"))); a.status != 200 || a.Results[0].Status != "accepted" || a.Results[1].Code != "invalid_change" {
		t.Errorf("a change_id twice in a push: %d %s, want accepted and invalid_change", a.status, a.body)
	}
	var problem struct{ Type string }
	if a := g.post(t, []byte(`{}`)); json.Unmarshal(a.body, &problem) != nil || len(a.Errors) == 0 || !strings.HasSuffix(problem.Type, "#"+a.Code) {
		t.Errorf("a problem without its errors or type: %s", a.body)
	}
}
