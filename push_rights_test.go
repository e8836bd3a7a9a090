package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// rightsSQL is an application with owners. Everything of bob's says so, that a leak can be seen.
const rightsSQL = `
CREATE TABLE projects (id text PRIMARY KEY, owner text NOT NULL, name text, archived bool NOT NULL DEFAULT false);
CREATE TABLE tasks (id text PRIMARY KEY, owner text NOT NULL, title text, serial_number text CONSTRAINT secret_constraint UNIQUE,
	project text CONSTRAINT secret_parent REFERENCES projects DEFERRABLE, archived bool NOT NULL DEFAULT false, internal text DEFAULT 'secret-internal',
	CONSTRAINT secret_check CHECK (title <> 'forbidden'));
CREATE TABLE fixed (id text PRIMARY KEY, owner text, title text, note text, tenant text);
CREATE FUNCTION take_away(current jsonb, incoming jsonb, base jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT '{"owner": "bob"}'::jsonb $$;
CREATE TABLE taken (id text PRIMARY KEY, owner text, title text);
CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
	IF new.title = 'give away' THEN new.owner = 'bob'; END IF;
	IF new.title = 'no more than one' THEN RAISE EXCEPTION 'No more than one of these.' USING DETAIL = 'secret-detail', HINT = 'secret-hint'; END IF;
	IF new.title = 'break' THEN new.title = (1 / (length(new.title) - 5))::text || 'secret-value'; END IF;
	IF new.title = 'cast' THEN new.archived = 'secret-value'::bool; END IF;
	RETURN new; END $$;
CREATE TRIGGER fire BEFORE INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION fire();
INSERT INTO projects VALUES ('own', 'ana', 'mine', false), ('foreign', 'bob', 'secret-project', false), ('hidden', 'ana', 'secret-hidden', true), ('used', 'ana', 'by bob', false);
INSERT INTO tasks (id, owner, title, serial_number, project) VALUES ('own', 'ana', 'mine', 'a-1', 'own'), ('foreign', 'bob', 'secret-title', 'secret-serial', 'used'), ('other', 'ana', 'mine', 'a-2', NULL);
INSERT INTO tasks (id, owner, title, archived) VALUES ('hidden', 'ana', 'secret-hidden', true);
INSERT INTO fixed VALUES ('own', 'ana', 'mine', 'mine', 't1'), ('foreign', 'bob', 'secret-title', 'secret-note', 't2');
INSERT INTO taken VALUES ('own', 'ana', 'mine');
`

const rightsCollections = `
  projects: {table: public.projects, scope: {owner: claims.sub}, where: "!row.archived", write: {roles: [editor]}}
  tasks:
    table: public.tasks
    columns: {exclude: [internal]}
    scope: {owner: claims.sub}
    where: "!row.archived"
    write: {roles: [editor, admin], check: "row.title == null || size(row.title) < 20"}
    conflict: reject
  fixed:
    table: public.fixed
    scope: {owner: claims.sub}
    write: {roles: [editor], operations: [insert, update], columns: [title, tenant], set: {owner: claims.sub}}
  taken: {table: public.taken, scope: {owner: claims.sub}, write: {roles: [editor]}, conflict: {function: public.take_away}}
`

type rights struct {
	*pushGateway
	app *pgx.Conn
}

func startRights(t *testing.T) *rights {
	t.Helper()
	dsn := pgserver.ForTest(t).Database(t)
	return &rights{startPushGateway(t, dsn, rightsSQL, "", rightsCollections), connect(t, dsn)}
}

// all is everything in the tables.
func (r *rights) all(t *testing.T) (text string) {
	t.Helper()
	resyncScan(t, r.app, []any{&text}, `SELECT concat((SELECT json_agg(t ORDER BY id) FROM projects t), (SELECT json_agg(t ORDER BY id) FROM tasks t),
		(SELECT json_agg(t ORDER BY id) FROM fixed t), (SELECT json_agg(t ORDER BY id) FROM taken t))`)
	return text
}

// refused wants a rejection that changes nothing and says nothing of others.
func (r *rights) refused(t *testing.T, c pushChange, code string) pushResult {
	t.Helper()
	before := r.all(t)
	got := r.one(t, c)
	if got.Status != "rejected" || got.Code != code || got.Error == "" || got.NewVersion != nil {
		t.Errorf("%s of %s %s %v: %s, want rejected %s", c.Operation, c.Collection, c.DocID, c.Data, got.raw, code)
	}
	if after := r.all(t); after != before {
		t.Errorf("%s of %s %s %v was rejected, but changed\n   %s\n  to\n   %s", c.Operation, c.Collection, c.DocID, c.Data, before, after)
	}
	discreet(t, got)
	return got
}

// discreet fails where a result tells of what is another's, or of the schema.
func discreet(t *testing.T, got pushResult) {
	t.Helper()
	for _, word := range []string{"secret", "bob", "_pkey", "constraint \"", "relation \"", "SQLSTATE", "Key ("} {
		if bytes.Contains(got.raw, []byte(word)) {
			t.Errorf("the result tells %q: %s", word, got.raw)
		}
	}
}

// alike wants the same results, byte for byte, but for the ids, and returns the first.
func (r *rights) alike(t *testing.T, changes ...pushChange) (first pushResult) {
	t.Helper()
	var want []byte
	for i, c := range changes {
		got := r.one(t, c)
		discreet(t, got)
		text := bytes.ReplaceAll(got.raw, []byte(`"doc_id":"`+c.DocID+`"`), []byte(`"doc_id":"X"`))
		if i == 0 {
			first, want = got, text
		} else if !bytes.Equal(text, want) {
			t.Errorf("%s %v: a caller can tell %s from %s:\n  %s\n  %s", c.Operation, c.Data, c.DocID, changes[0].DocID, text, want)
		}
	}
	return first
}

// TestPushRoles pushes every operation as every role.
func TestPushRoles(t *testing.T) {
	t.Parallel()
	r := startRights(t)
	type data = map[string]any
	for _, c := range []struct {
		roles      []string
		collection string
		operations []string // allowed
	}{
		{nil, "tasks", nil}, {[]string{"reader"}, "tasks", nil}, {[]string{"admin"}, "projects", nil}, {[]string{"Editor", "edit"}, "tasks", nil},
		{[]string{"reader", "admin"}, "tasks", []string{"update", "upsert", "insert", "delete"}},
		{[]string{"editor"}, "fixed", []string{"update", "upsert", "insert"}},
	} {
		caller := &rights{r.as(t, "ana", c.roles, nil), r.app}
		for _, operation := range matrixOperations {
			if slices.Contains(c.operations, operation) {
				id := "own"
				change := pushChange{Collection: c.collection, Operation: operation, DocID: id, Data: data{"title": "allowed"}}
				switch {
				case operation == "insert":
					change.DocID = "new " + c.collection
					if c.collection == "tasks" {
						change.Data["owner"] = "ana"
					}
				case operation == "delete":
					change.Data = nil
				}
				if got := caller.one(t, change); got.Status != "accepted" || got.NewVersion == nil {
					t.Errorf("%s of %s as %v: %s, want accepted", operation, c.collection, c.roles, got.raw)
				}
				continue
			}
			var all []pushChange
			for _, id := range []string{"own", "foreign", "hidden", "nowhere"} {
				change := pushChange{Collection: c.collection, Operation: operation, DocID: id, Data: data{"title": "no"}}
				if operation == "delete" {
					change.Data = nil
				}
				caller.refused(t, change, "permission")
				all = append(all, change)
			}
			caller.alike(t, all...)
		}
	}
	outsider := &rights{r.as(t, "eve", []string{"editor"}, nil), r.app}
	outsider.alike(t, pushChange{Collection: "tasks", Operation: "update", DocID: "foreign", Data: data{"title": "no"}},
		pushChange{Collection: "tasks", Operation: "update", DocID: "nowhere", Data: data{"title": "no"}})
}

// TestPushStaysInScope tries to write to rows of another, to take them, and to give own rows away.
func TestPushStaysInScope(t *testing.T) {
	t.Parallel()
	r := startRights(t)
	type data = map[string]any
	change := func(operation, collection, id string, d data) pushChange {
		return pushChange{Collection: collection, Operation: operation, DocID: id, Data: d}
	}
	for _, id := range []string{"foreign", "hidden", "nowhere"} {
		r.refused(t, change("update", "tasks", id, data{"title": "x"}), "not_found")
		r.refused(t, change("update", "tasks", id, data{"owner": "ana", "archived": false}), "not_found")
		withBase := change("update", "tasks", id, data{"title": "x"})
		withBase.Base = data{"title": "secret-title", "owner": "bob"}
		r.refused(t, withBase, "not_found")
	}
	for _, id := range []string{"foreign", "hidden"} {
		for _, operation := range []string{"insert", "upsert"} {
			if got := r.refused(t, change(operation, "tasks", id, data{"title": "x", "owner": "ana"}), "unique_violation"); got.shown(t) != nil || got.Version != nil {
				t.Errorf("%s onto %s shows %s", operation, id, got.raw)
			}
		}
		before := r.all(t)
		if got := r.one(t, change("delete", "tasks", id, nil)); got.Status != "accepted" || got.NewVersion != nil || r.all(t) != before {
			t.Errorf("delete of %s: %s; before and after\n%s\n%s", id, got.raw, before, r.all(t))
		}
	}

	r.refused(t, change("update", "tasks", "own", data{"owner": "bob"}), "out_of_scope")
	r.refused(t, change("upsert", "tasks", "own", data{"owner": "bob"}), "out_of_scope")
	r.refused(t, change("update", "tasks", "own", data{"title": "give away"}), "out_of_scope") // by a trigger
	r.refused(t, change("insert", "tasks", "new", data{"owner": "bob"}), "out_of_scope")
	r.refused(t, change("upsert", "tasks", "new", data{"owner": "bob"}), "out_of_scope")
	r.refused(t, change("insert", "tasks", "new", data{"owner": "ana", "title": "give away"}), "out_of_scope")
	stale := change("update", "taken", "own", data{"title": "x"})
	stale.Base = data{"title": "not so"}
	r.refused(t, stale, "out_of_scope") // by a conflict function
	resyncExec(t, r.app, `INSERT INTO projects VALUES ('gone', 'ana', 'gone'); DELETE FROM projects WHERE id = 'gone'`)
	r.here(t)
	r.refused(t, change("update", "projects", "gone", data{"owner": "bob"}), "out_of_scope") // a resurrection

	r.refused(t, change("update", "tasks", "own", data{"title": strings.Repeat("long", 9)}), "check_failed")
	if got := r.one(t, change("update", "tasks", "other", data{"archived": true})); got.Status != "accepted" || got.shown(t) != nil {
		t.Errorf("an own row that leaves by where: %s, want accepted without a row", got.raw)
	}
	r.refused(t, change("update", "tasks", "other", data{"archived": false}), "not_found")
}

// TestPushTellsNothing compares the answers to changes of rows that are hidden with those to rows that don't exist.
func TestPushTellsNothing(t *testing.T) {
	t.Parallel()
	r := startRights(t)
	type data = map[string]any
	_, version := r.here(t)
	for _, base := range []data{nil, {"title": "secret-title"}, {"title": "other"}} {
		for _, parent := range []string{"", version} {
			var updates, deletes []pushChange
			for _, id := range []string{"nowhere", "foreign", "hidden"} {
				updates = append(updates, pushChange{Collection: "tasks", Operation: "update", DocID: id, Data: data{"title": "x"}, Base: base, ParentVersion: parent})
				deletes = append(deletes, pushChange{Collection: "tasks", Operation: "delete", DocID: id, Base: base, ParentVersion: parent})
			}
			r.alike(t, updates...)
			r.alike(t, deletes...)
		}
	}
	for _, c := range []pushChange{ // values that no column could hold
		{Data: data{"archived": "perhaps"}}, {Data: data{"title": "x"}, Base: data{"archived": "perhaps"}},
		{Data: data{"archived": "perhaps"}, Base: data{"title": "secret-title"}}, {Data: data{"archived": "perhaps"}, ParentVersion: version},
		{Data: data{"title": "forbidden"}}, {Data: data{"title": "break"}, Base: data{"archived": false}}, {Data: data{"archived": nil}}, {Data: data{"owner": "bob"}},
	} {
		var all []pushChange
		for _, id := range []string{"nowhere", "foreign", "hidden"} {
			c.Collection, c.Operation, c.DocID = "tasks", "update", id
			all = append(all, c)
		}
		r.alike(t, all...)
	}
	for _, c := range []struct {
		what string
		data data
		code string
	}{
		{"a unique value of another's row", data{"serial_number": "secret-serial"}, "unique_violation"},
		{"a unique value of an own row", data{"serial_number": "a-2"}, "unique_violation"},
		{"a check", data{"title": "forbidden"}, "check_violation"},
		{"null", data{"archived": nil}, "not_null"},
		{"an error in a trigger", data{"title": "break"}, "invalid_value"},
		{"a cast in a trigger", data{"title": "cast"}, "invalid_value"},
		{"a base of an excluded column", nil, "unknown_column"},
		{"an excluded column", data{"internal": "x"}, ""},
	} {
		change := pushChange{Collection: "tasks", Operation: "update", DocID: "own", Data: c.data}
		if c.data == nil {
			change.Data, change.Base = data{"title": "x"}, data{"internal": "secret-internal"}
		}
		got := r.one(t, change)
		if got.Status != "rejected" || c.code != "" && got.Code != c.code {
			t.Errorf("%s: %s, want rejected %s", c.what, got.raw, c.code)
		}
		if c.code != "unknown_column" && c.data["internal"] == nil {
			discreet(t, got)
		}
	}
	got := r.one(t, pushChange{Collection: "tasks", Operation: "update", DocID: "own", Data: data{"title": "no more than one"}})
	if discreet(t, got); got.Code != "application_error" || !strings.Contains(got.Error, "No more than one of these.") {
		t.Errorf("an exception of the application: %s, want its message", got.raw)
	}
	if got := r.one(t, pushChange{Collection: "projects", Operation: "delete", DocID: "used"}); got.Code != "still_referenced" {
		t.Errorf("deleting the parent of another's row: %s, want still_referenced", got.raw)
	} else {
		discreet(t, got)
	}

	for _, operation := range []string{"insert", "update"} { // foreign keys
		var parents []pushChange
		for i, parent := range []string{"nowhere", "foreign", "hidden"} {
			change := pushChange{Collection: "tasks", Operation: operation, DocID: "own", Data: data{"project": parent}}
			if operation == "insert" {
				change.DocID, change.Data["owner"] = fmt.Sprint("new-", i), "ana"
			}
			parents = append(parents, change)
		}
		before := r.all(t)
		if got := r.alike(t, parents...); got.Code != "foreign_key_missing" || !got.Retryable || r.all(t) != before {
			t.Errorf("%s with a parent that is hidden: %s", operation, got.raw)
		}
	}
	if got := r.one(t, pushChange{Collection: "tasks", Operation: "update", DocID: "own", Data: data{"project": "used"}}); got.Status != "accepted" {
		t.Errorf("a visible parent: %s, want accepted", got.raw)
	}
}

// TestPushAnswersAsOfToday looks at what conflicts and repeated pushes show after a row has changed hands.
func TestPushAnswersAsOfToday(t *testing.T) {
	t.Parallel()
	r := startRights(t)
	type data = map[string]any
	conflicting := pushChange{Collection: "tasks", Operation: "update", DocID: "own", Data: data{"title": "x"}, Base: data{"title": "not so"}}
	got := r.refused(t, conflicting, "conflict")
	if row := got.shown(t); row == nil || row["title"] != "mine" || len(row) != 6 {
		t.Errorf("a conflict shows %s, want the row without its excluded column", got.raw)
	}
	change := pushChange{Collection: "tasks", Operation: "update", DocID: "own", Data: data{"title": "pushed"}, ChangeID: "c1"}
	if got := r.one(t, change); got.Status != "accepted" {
		t.Fatalf("the push: %s", got.raw)
	}
	stolen := r.as(t, "bob", []string{"editor"}, nil)
	if got := stolen.one(t, change); got.Status != "rejected" || got.Code != "not_found" {
		t.Errorf("another subject with the same client_id and change_id: %s, want not_found", got.raw)
	}
	resyncExec(t, r.app, `UPDATE tasks SET owner = 'bob', title = 'secret-title' WHERE id = 'own'`)
	got = r.one(t, change)
	if discreet(t, got); got.Status != "duplicate" || got.shown(t) != nil {
		t.Errorf("a repeated push of a row that is another's now: %s, want duplicate without a document", got.raw)
	}
	r.refused(t, conflicting, "not_found")
}

// TestPushColumns tries columns that a collection does not let clients write.
func TestPushColumns(t *testing.T) {
	t.Parallel()
	r := startRights(t)
	type data = map[string]any
	for _, d := range []data{{"owner": "ana"}, {"note": "x"}, {"title": "x", "note": nil}, {"owner": "bob"}} {
		r.refused(t, pushChange{Collection: "fixed", Operation: "update", DocID: "own", Data: d}, "column_not_writable")
		r.refused(t, pushChange{Collection: "fixed", Operation: "insert", DocID: "new", Data: d}, "column_not_writable")
	}
	for _, d := range []data{{"nothing": 1}, {"Title": "x"}, {"title\x00": "x"}, {`title" = 'x'; --`: "x"}, {"ctid": "(0,1)"}, {"": 1}} {
		got := r.one(t, pushChange{Collection: "fixed", Operation: "update", DocID: "own", Data: d})
		if got.Status != "rejected" || got.Code != "unknown_column" {
			t.Errorf("%q: %s, want unknown_column", d, got.raw)
		}
	}
	if got := r.one(t, pushChange{Collection: "fixed", Operation: "insert", DocID: "new", Data: data{"title": "x"}}); got.Status != "accepted" {
		t.Errorf("an insert with set: %s", got.raw)
	}
	var owner string
	resyncScan(t, r.app, []any{&owner}, `SELECT owner FROM fixed WHERE id = 'new'`)
	if owner != "ana" {
		t.Errorf("set made the owner %q, want ana", owner)
	}
}
