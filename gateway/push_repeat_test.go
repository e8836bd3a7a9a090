package gateway

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
)

const counted = `CREATE TABLE counts (id int PRIMARY KEY, n int NOT NULL);
CREATE FUNCTION bump() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO counts VALUES (NEW.id, 1) ON CONFLICT (id) DO UPDATE SET n = counts.n + 1; RETURN NEW; END $$;
CREATE TRIGGER bump AFTER INSERT OR UPDATE ON boards FOR EACH ROW EXECUTE FUNCTION bump();
`

// TestPushRepeated repeats a push: it is answered as before, and nothing is done again.
func TestPushRepeated(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: `INSERT INTO boards VALUES (1, 'ana', 'x', 'y', 0);` + counted})
	ana := tokenFor(t, "ana", nil)
	change := `{"collection":"boards","operation":"update","doc_id":"1","change_id":"c1","data":{"a":"z"},"base":{"a":"old"}}`
	insert := `{"collection":"boards","operation":"insert","doc_id":"2","change_id":"c2","data":{"a":"new"}}`
	first := e.submit(t, ana, "", change, insert).want(t, "conflict_resolved 1 last_write_wins, accepted 2")
	again := e.submit(t, ana, "", change, insert).want(t, "duplicate 1 last_write_wins, duplicate 2")
	for i := range first.Results {
		if a, b := first.Results[i], again.Results[i]; *a.NewVersion != *b.NewVersion || string(a.Document) != string(b.Document) || fmt.Sprint(a.Columns) != fmt.Sprint(b.Columns) {
			t.Errorf("answered %+v first and %+v then", a, b)
		}
	}
	if again.TxID != nil || again.VisibleAt == nil || *again.VisibleAt != *first.VisibleAt {
		t.Errorf("visible at %v first, and %v then (txid %v)", *first.VisibleAt, again.VisibleAt, again.TxID)
	}
	// The same change spelt otherwise, and with a new one; a replay shows the row as it now is.
	e.exec(t, `UPDATE boards SET b = 'later' WHERE id = 1`)
	p := e.submit(t, ana, "", ` { "change_id" : "c1", "base" : { "a" : "old" }, "data" : {"a" : "z"}, "doc_id":"1", "operation":"update", "collection":"boards" } `,
		`{"collection":"boards","operation":"update","doc_id":"2","change_id":"c3","data":{"b":"more"}}`).want(t, "duplicate 1 last_write_wins, accepted 2")
	if doc := string(p.Results[0].Document); !strings.Contains(doc, `"b":"later"`) {
		t.Errorf("the replay shows %s", doc)
	}
	// Another client, and another subject, have ids of their own.
	e.post(t, "/sync/push", ana, `{"client_id":"tablet","changes":[`+change+`]}`)
	e.submit(t, tokenFor(t, "bob", nil), "", change)
	if got := e.one(t, `SELECT string_agg(id || ':' || n, ' ' ORDER BY id) FROM counts`); got != "1:4 2:2" {
		t.Errorf("rows were written %s times", got)
	}
	// An id never names another change.
	a := e.post(t, "/sync/push", ana, `{"client_id":"phone","atomic":false,"changes":[{"collection":"boards","operation":"delete","doc_id":"2"},`+strings.Replace(change, `"z"`, `"other"`, 1)+`]}`)
	if body := a.problem(t, ChangeIDReused); len(body.Errors) != 1 || body.Errors[0].Field != "changes[1].change_id" {
		t.Errorf("the problem names %v", body.Errors)
	}
	// Twice in one push.
	e.submit(t, ana, `,"atomic":false`, strings.Replace(insert, `"c2"`, `"c9"`, 1), strings.Replace(insert, `"c2"`, `"c9"`, 1)).want(t, "rejected 2 unique_violation, rejected 2 invalid_change")
	if got := e.one(t, `SELECT count(*)::text FROM walgate.outcomes WHERE change_id = 'c9'`); got != "0" {
		t.Error("a rejection was remembered")
	}
}

// TestPushRepeatedAtOnce sends one push many times at once, as a client that gave up waiting does.
func TestPushRepeatedAtOnce(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: counted})
	ana := tokenFor(t, "ana", nil)
	var wg sync.WaitGroup
	var mu sync.Mutex
	statuses := map[string]int{}
	for range 16 {
		wg.Go(func() {
			p := e.submit(t, ana, "", `{"collection":"boards","operation":"upsert","doc_id":"1","change_id":"c1","data":{"n":1}}`)
			mu.Lock()
			defer mu.Unlock()
			statuses[p.Results[0].Status]++
			if p.Results[0].NewVersion == nil || p.VisibleAt == nil {
				t.Errorf("no version: %+v", p)
			}
		})
	}
	wg.Wait()
	if statuses["accepted"] != 1 || statuses["duplicate"] != 15 {
		t.Errorf("ended as %v", statuses)
	}
	if got := e.one(t, `SELECT string_agg(id || ':' || n, ' ') FROM counts`); got != "1:1" {
		t.Errorf("written %s times", got)
	}
}

// TestPushSameRows lets 200 clients push to the same ten rows, in different orders: nobody hears of deadlocks.
func TestPushSameRows(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: `INSERT INTO boards SELECT i, 'ana', '', '', 0 FROM generate_series(1, 8) i;`})
	const clients = 200
	var wg sync.WaitGroup
	for c := range clients {
		token := tokenFor(t, fmt.Sprintf("c%d", c), nil)
		wg.Go(func() {
			var changes []string
			for k := range 10 {
				changes = append(changes, fmt.Sprintf(`{"collection":"boards","operation":"upsert","doc_id":"%d","change_id":"%d","data":{"n":%d,"a":"%d"}}`, (c*3+k*7)%10+1, k, c, k))
			}
			p := e.submit(t, token, "", changes...)
			for i := range p.Results {
				if p.Results[i].Status != "accepted" || p.Results[i].NewVersion == nil {
					t.Errorf("client %d: %s", c, p.briefs())
					break
				}
			}
		})
	}
	wg.Wait()
	if got := e.one(t, `SELECT count(*) || ' ' || count(DISTINCT n) FROM boards`); got != "10 1" {
		t.Errorf("rows and their last writers: %s", got)
	}
	if got := e.one(t, `SELECT count(*)::text FROM walgate.outcomes`); got != fmt.Sprint(clients*10) {
		t.Errorf("%s outcomes", got)
	}
}

// TestPushInsertsRace lets clients insert the same new rows at once: one of each wins, the others see its row.
func TestPushInsertsRace(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for c := range 12 {
		token := tokenFor(t, fmt.Sprintf("c%d", c), nil)
		wg.Go(func() {
			var changes []string
			for k := range 20 {
				changes = append(changes, fmt.Sprintf(`{"collection":"boards","operation":"insert","doc_id":"%d","data":{"n":%d}}`, k, c))
			}
			p := e.submit(t, token, `,"atomic":false`, changes...)
			mu.Lock()
			defer mu.Unlock()
			for _, r := range p.Results {
				switch {
				case r.Status == "accepted":
					won++
				case r.Code != "unique_violation" || r.Document == nil || string(r.Document) == "null" || r.Version == nil:
					t.Errorf("lost with %s and document %s, version %v", r.brief(), r.Document, r.Version)
				}
			}
		})
	}
	wg.Wait()
	if won != 20 {
		t.Errorf("%d inserts won, want 20", won)
	}
}

// TestPushEffectless pushes what changes no row: its client still learns when it has been seen.
func TestPushEffectless(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{})
	ana := tokenFor(t, "ana", nil)
	at := e.here(t, ana)
	p := e.submit(t, ana, "", `{"collection":"tasks","operation":"delete","doc_id":"1","change_id":"x"}`).want(t, "accepted 1")
	if p.VisibleAt == nil || p.TxID == nil || p.Results[0].NewVersion != nil {
		t.Fatalf("%+v", p)
	}
	changes, last := e.pullAll(t, ana, at)
	if len(changes) != 0 || last < *p.VisibleAt {
		t.Errorf("the cursor is %s after %v, the push visible at %s", last, briefs(changes), *p.VisibleAt)
	}
}

// TestPushBatches pushes 1000 changes with a bad one among them, and one of 10 MB.
func TestPushBatches(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{})
	ana := tokenFor(t, "ana", nil)
	changes := make([]string, 1000)
	for i := range changes {
		changes[i] = fmt.Sprintf(`{"collection":"tasks","operation":"upsert","doc_id":"%d","change_id":"%d","data":{"title":"t%d","points":%d}}`, i+1, i, i, i)
	}
	good := changes[500]
	changes[500] = strings.Replace(good, `"points":500`, `"points":-1`, 1)
	p := e.submit(t, ana, "", changes...)
	for i := range p.Results {
		want := "batch_rejected"
		if i == 500 {
			want = "check_violation"
		}
		if p.Results[i].Code != want {
			t.Fatalf("change %d: %s", i, p.Results[i].brief())
		}
	}
	if got := e.one(t, `SELECT count(*)::text FROM tasks`); got != "0" {
		t.Fatalf("%s rows of an atomic push that failed", got)
	}
	p = e.submit(t, ana, `,"atomic":false`, changes...)
	for i := range p.Results {
		if r := &p.Results[i]; (r.Status == "accepted") != (i != 500) || (r.NewVersion == nil) != (i == 500) {
			t.Fatalf("change %d: %s", i, r.brief())
		}
	}
	changes[500] = good
	p = e.submit(t, ana, "", changes...)
	if p.Results[500].Status != "accepted" || p.Results[499].Status != "duplicate" || *p.Results[999].NewVersion == "" {
		t.Fatal(p.Results[499:502])
	}
	large := strings.Repeat("é\\n", 5<<20/2)
	e.submit(t, ana, "", `{"collection":"words","operation":"insert","doc_id":"[\"big\",\"fr\"]","data":{"body":"`+large+`"}}`).want(t, `accepted ["big","fr"]`)
	if got := e.one(t, `SELECT length(body)::text FROM words`); got != fmt.Sprint(5<<20) {
		t.Errorf("%s characters arrived", got)
	}
	if a := e.post(t, "/sync/push", ana, `{"client_id":"phone","changes":[`+strings.Repeat("0,", 1000)+`0]}`); a.status != http.StatusUnprocessableEntity {
		t.Errorf("1001 changes: %d", a.status)
	}
}

// TestPushInOrder pushes several changes of one document: each meets what the one before left.
func TestPushInOrder(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{})
	ana := tokenFor(t, "ana", nil)
	e.submit(t, ana, "",
		`{"collection":"boards","operation":"insert","doc_id":"1","data":{"a":"1"}}`,
		`{"collection":"boards","operation":"update","doc_id":"1","data":{"a":"2"},"base":{"a":"1"}}`,
		`{"collection":"boards","operation":"update","doc_id":"1","data":{"a":"3"},"base":{"a":"1"}}`,
		`{"collection":"boards","operation":"delete","doc_id":"1","base":{"a":"3"}}`,
		`{"collection":"boards","operation":"upsert","doc_id":"1","data":{"b":"anew"}}`,
		`{"collection":"boards","operation":"insert","doc_id":"2","data":{"a":"1"}}`).
		want(t, "accepted 1, accepted 1, conflict_resolved 1 last_write_wins, accepted 1, accepted 1, accepted 2")
	if got := e.one(t, `SELECT string_agg(concat_ws(' ', id, a, b), ', ' ORDER BY id) FROM boards`); got != "1 anew, 2 1" {
		t.Error(got)
	}
}
