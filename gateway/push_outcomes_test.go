package gateway

import (
	"strings"
	"testing"

	"github.com/walgate/walgate/policies"
)

const outcomeRows = `
INSERT INTO lists (id, owner, name, slug) VALUES (1, 'ana', 'home', 'home'), (2, 'bob', 'office', 'office');
INSERT INTO tasks (id, owner, list_id, title, points, deleted_at) VALUES (1, 'ana', 1, 'one', 1, NULL), (2, 'bob', 2, 'bobs', 2, NULL), (3, 'ana', NULL, 'gone', 0, now());
INSERT INTO boards (id, owner, a) VALUES (1, 'ana', 'x'), (2, 'ana', 'y');
INSERT INTO vault VALUES (1, 'gold');
INSERT INTO rooms VALUES (1, 'ana', 'hers'), (2, 'bob', 'his');
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
	IF NEW.b = 'refuse' THEN RAISE EXCEPTION 'boards refuse that'; END IF;
	IF NEW.b = 'withhold' THEN RETURN NULL; END IF;
	IF NEW.b = 'own state' THEN RAISE EXCEPTION 'secret' USING ERRCODE = 'ZZ001'; END IF;
	RETURN NEW; END $$;
CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON boards FOR EACH ROW EXECUTE FUNCTION refuse();
`

// outcomeCases are changes and how each ends on outcomeRows; ana pushes them.
var outcomeCases = []struct{ name, change, want string }{
	{"insert of a key that is there", `{"collection":"tasks","operation":"insert","doc_id":"1","data":{}}`, "rejected 1 unique_violation"},
	{"insert of a foreign key", `{"collection":"tasks","operation":"insert","doc_id":"2","data":{}}`, "rejected 2 unique_violation"},
	{"upsert of a foreign row", `{"collection":"tasks","operation":"upsert","doc_id":"2","data":{"title":"mine"}}`, "rejected 2 unique_violation"},
	{"update of a foreign row", `{"collection":"tasks","operation":"update","doc_id":"2","data":{"title":"mine"}}`, "rejected 2 not_found"},
	{"update of no row", `{"collection":"tasks","operation":"update","doc_id":"99","data":{"title":"mine"}}`, "rejected 99 not_found"},
	{"delete of a foreign row", `{"collection":"tasks","operation":"delete","doc_id":"2"}`, "accepted 2"},
	{"delete of no row", `{"collection":"tasks","operation":"delete","doc_id":"99"}`, "accepted 99"},
	{"update of a marked row", `{"collection":"tasks","operation":"update","doc_id":"3","data":{"title":"back"}}`, "conflict_resolved 3 resurrect_on_update"},
	{"no such collection", `{"collection":"nope","operation":"delete","doc_id":"1"}`, "rejected 1 unknown_collection"},
	{"no right to write", `{"collection":"news","operation":"delete","doc_id":"1"}`, "rejected 1 permission"},
	{"no right to write comes before what is wrong", `{"collection":"vault","operation":"update","doc_id":"1","data":{"nope":1}}`, "rejected 1 permission"},
	{"no such operation", `{"collection":"tasks","operation":"merge","doc_id":"1"}`, "rejected 1 unknown_operation"},
	{"no such column", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"nope":1}}`, "rejected 1 unknown_column"},
	{"excluded column", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"secret":"x"}}`, "rejected 1 unknown_column"},
	{"base of an excluded column", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"x"},"base":{"secret":null}}`, "rejected 1 unknown_column"},
	{"set column", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"owner":"ana"}}`, "rejected 1 column_not_writable"},
	{"soft-delete column", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"deleted_at":null}}`, "rejected 1 column_not_writable"},
	{"other key in data", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"id":2,"title":"x"}}`, "rejected 1 key_mismatch"},
	{"same key in data", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"id":1,"title":"x"}}`, "accepted 1"},
	{"no key", `{"collection":"tasks","operation":"update","doc_id":"one","data":{"title":"x"}}`, "rejected one invalid_key"},
	{"no composite key", `{"collection":"words","operation":"delete","doc_id":"a"}`, "rejected a invalid_key"},
	{"wrong type", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"points":"many"}}`, "rejected 1 invalid_value"},
	{"wrong type in base", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"points":1},"base":{"points":"many"}}`, "rejected 1 invalid_value"},
	{"out of range", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"points":99999999999}}`, "rejected 1 invalid_value"},
	{"NUL", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"a\u0000b"}}`, "rejected 1 invalid_value"},
	{"half a surrogate pair", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"\ud800"}}`, "rejected 1 invalid_value"},
	{"not null", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":null}}`, "rejected 1 not_null"},
	{"check of the table", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"points":-1}}`, "rejected 1 check_violation"},
	{"check of the policy", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"` + strings.Repeat("x", 50) + `"}}`, "rejected 1 check_failed"},
	{"unique", `{"collection":"lists","operation":"insert","doc_id":"9","data":{"slug":"office"}}`, "rejected 9 unique_violation"},
	{"foreign key to nothing", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"list_id":99}}`, "rejected 1 foreign_key_missing"},
	{"foreign key to a foreign row", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"list_id":2}}`, "rejected 1 foreign_key_missing"},
	{"into another scope", `{"collection":"rooms","operation":"update","doc_id":"1","data":{"owner":"bob"}}`, "rejected 1 out_of_scope"},
	{"new in another scope", `{"collection":"rooms","operation":"insert","doc_id":"9","data":{"owner":"bob"}}`, "rejected 9 out_of_scope"},
	{"new in no scope", `{"collection":"rooms","operation":"insert","doc_id":"9","data":{"name":"x"}}`, "rejected 9 out_of_scope"},
	{"out of another scope", `{"collection":"rooms","operation":"update","doc_id":"2","data":{"owner":"ana"}}`, "rejected 2 not_found"},
	{"still referenced", `{"collection":"lists","operation":"delete","doc_id":"1"}`, "rejected 1 still_referenced"},
	{"trigger refuses", `{"collection":"boards","operation":"update","doc_id":"1","data":{"b":"refuse"}}`, "rejected 1 application_error"},
	{"trigger refuses with a state of its own", `{"collection":"boards","operation":"update","doc_id":"1","data":{"b":"own state"}}`, "rejected 1 application_error"},
	{"trigger withholds", `{"collection":"boards","operation":"update","doc_id":"1","data":{"b":"withhold"}}`, "rejected 1 permission"},
	{"both ids", `{"collection":"tasks","operation":"upsert","doc_id":"1","local_id":"l","data":{}}`, "rejected 1 invalid_change"},
	{"no id", `{"collection":"tasks","operation":"upsert","data":{}}`, "rejected - invalid_change"},
	{"unknown local id", `{"collection":"tasks","operation":"update","local_id":"nope","data":{}}`, "rejected - not_found"},
	{"data of a delete", `{"collection":"tasks","operation":"delete","doc_id":"1","data":{}}`, "rejected 1 invalid_change"},
	{"no data", `{"collection":"tasks","operation":"update","doc_id":"1"}`, "rejected 1 invalid_change"},
	{"data is a list", `{"collection":"tasks","operation":"update","doc_id":"1","data":[]}`, "rejected 1 invalid_change"},
	{"unknown member", `{"collection":"tasks","operation":"update","doc_id":"1","data":{},"force":true}`, "rejected 1 invalid_change"},
	{"member twice", `{"collection":"tasks","operation":"update","doc_id":"1","doc_id":"2","data":{}}`, "rejected 2 invalid_change"},
	{"column twice", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"a","title":"b"}}`, "rejected 1 invalid_change"},
	{"no object", `7`, "rejected - invalid_change"},
	{"no version", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"x"},"parent_version":"soon"}`, "rejected 1 invalid_parent_version"},
	{"a version of the future", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"x"},"parent_version":"4000000000000000"}`, "rejected 1 invalid_parent_version"},
	{"a version of another history", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"x"},"parent_version":"20260502T150000.000Z-0005-zzzz"}`, "rejected 1 invalid_parent_version"},
	{"blind update", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"x"}}`, "accepted 1"},
	{"believed rightly", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"x"},"base":{"title":"one","points":1}}`, "accepted 1"},
	{"believed wrongly", `{"collection":"tasks","operation":"update","doc_id":"1","data":{"title":"x"},"base":{"title":"uno"}}`, "conflict_resolved 1 last_write_wins"},
	{"nothing to write", `{"collection":"tasks","operation":"update","doc_id":"1","data":{}}`, "accepted 1"},
}

// TestPushOutcomes pushes each case alone, in both modes: it must end the same, and a rejected one leave no trace.
func TestPushOutcomes(t *testing.T) {
	t.Parallel()
	for _, mode := range []struct{ name, extra string }{{"atomic", ""}, {"alone", `,"atomic":false`}} {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			e := newPushEnv(t, setup{before: outcomeRows})
			ana := tokenFor(t, "ana", nil)
			const state = `SELECT md5(string_agg(t, ';' ORDER BY t)) FROM (SELECT 'l' || l::text FROM lists l UNION ALL SELECT 't' || t::text FROM tasks t UNION ALL SELECT 'b' || b::text FROM boards b UNION ALL SELECT 'r' || r::text FROM rooms r
				UNION ALL SELECT 'o' || o::text FROM walgate.outcomes o UNION ALL SELECT 'p' || p::text FROM walgate.pushes p) AS all_of_it(t)`
			for _, c := range outcomeCases {
				before := e.one(t, state)
				p := e.submit(t, ana, mode.extra, c.change)
				if got := p.briefs(); got != c.want {
					t.Errorf("%s: got %q, want %q (%s)", c.name, got, c.want, p.Results[0].Error)
				}
				rejected := strings.HasPrefix(c.want, "rejected")
				if rejected && before != e.one(t, state) {
					t.Errorf("%s: it was rejected and left something behind", c.name)
				}
				if rejected != (p.TxID == nil) || rejected != (p.VisibleAt == nil) {
					t.Errorf("%s: txid %v, visible_at %v", c.name, p.TxID, p.VisibleAt)
				}
				if !rejected { // the next case finds the rows as they were
					e.exec(t, `TRUNCATE lists, tasks, boards, vault, rooms; `+outcomeRows[:strings.Index(outcomeRows, "CREATE FUNCTION")])
					e.sync(t)
				}
			}
		})
	}
}

// TestPushMixed pushes all cases at once: each that stands alone ends as it does alone, and in an atomic batch nothing is
// written.
func TestPushMixed(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: outcomeRows, specs: map[string]policies.Spec{}})
	ana := tokenFor(t, "ana", nil)
	var changes []string
	var rejected []string
	for _, c := range outcomeCases {
		if strings.HasPrefix(c.want, "rejected") && !strings.HasPrefix(c.want, "rejected 9 ") {
			changes, rejected = append(changes, c.change), append(rejected, c.want)
		}
	}
	good := `{"collection":"boards","operation":"update","doc_id":"2","data":{"b":"written"}}`
	p := e.submit(t, ana, "", append(changes, good)...)
	if last := p.Results[len(changes)].brief(); last != "rejected 2  batch_rejected" {
		t.Errorf("the good one of an atomic batch: %s", last)
	}
	p = e.submit(t, ana, `,"atomic":false`, append(changes, good)...)
	p.want(t, strings.Join(append(rejected, "accepted 2"), ", "))
	if got := e.one(t, `SELECT string_agg(b, ',') FROM boards`); got != "written" {
		t.Errorf("boards hold %s", got)
	}
}
