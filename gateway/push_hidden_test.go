package gateway

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/policies"
)

// same pushes two changes, of which one is about what the caller may not see and the other about what doesn't exist, and
// expects answers that tell nothing apart.
func (e *env) same(t *testing.T, token, what string, hidden, absent []string) {
	t.Helper()
	for _, mode := range []string{"", `,"atomic":false`} {
		var got [2]string
		for i, changes := range [][]string{hidden, absent} {
			a := e.post(t, "/sync/push", token, fmt.Sprintf(`{"client_id":"phone"%s,"changes":[%s]}`, mode, strings.Join(changes, ",")))
			got[i] = fmt.Sprint(a.status)
			if a.status == 200 {
				p := e.submit(t, token, mode, changes...)
				for _, r := range p.Results {
					got[i] += fmt.Sprintf(" %s/%s/%s/%s/%v", r.Status, r.Code, r.Policy, r.Error, string(r.Document))
				}
			}
		}
		if got[0] != got[1] {
			t.Errorf("%s%s:\nhidden %s\nabsent %s", what, mode, got[0], got[1])
		}
	}
}

// TestPushHidden probes rows out of the caller's sight in every way that it may name them.
func TestPushHidden(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{
		before: `CREATE TABLE cards (id bigint PRIMARY KEY, list_id bigint REFERENCES lists, title text);
			CREATE TABLE graded (id bigint PRIMARY KEY, level int NOT NULL DEFAULT 0, body text, gone bool NOT NULL DEFAULT false);
			INSERT INTO lists (id, owner) VALUES (1, 'bob'); INSERT INTO graded VALUES (1, 9, 'top', true);`,
		specs: map[string]policies.Spec{
			"cards":  {Table: "public.cards", Write: &policies.WriteSpec{Check: "size(row.title) < 5"}},
			"graded": {Table: "public.graded", Where: "row.level <= claims.level", SoftDelete: "gone", Write: &policies.WriteSpec{}},
		},
	})
	ana := tokenFor(t, "ana", map[string]any{"level": 1})
	card := func(id, list int, title string) string {
		return fmt.Sprintf(`{"collection":"cards","operation":"insert","doc_id":"%d","data":{"list_id":%d,"title":%q}}`, id, list, title)
	}
	task := func(id, list int, title string) string {
		return fmt.Sprintf(`{"collection":"tasks","operation":"insert","doc_id":"%d","data":{"list_id":%d,"title":%q}}`, id, list, title)
	}
	e.same(t, ana, "a parent", []string{card(1, 1, "x")}, []string{card(1, 77, "x")})
	e.same(t, ana, "a parent, breaking a rule", []string{card(1, 1, "too long")}, []string{card(1, 77, "too long")})
	e.same(t, ana, "a parent, checked late, breaking a rule", []string{task(1, 1, strings.Repeat("x", 60))}, []string{task(1, 77, strings.Repeat("x", 60))})
	e.same(t, ana, "a parent of two", []string{card(1, 1, "x"), card(2, 1, "x")}, []string{card(1, 77, "x"), card(2, 77, "x")})
	e.same(t, ana, "a parent of two, checked late", []string{task(1, 1, "x"), task(2, 1, "x")}, []string{task(1, 77, "x"), task(2, 77, "x")})
	for _, op := range []string{`"operation":"update","data":{"body":"mine"}`, `"operation":"delete"`} {
		change := func(id int) []string {
			return []string{fmt.Sprintf(`{"collection":"graded","doc_id":"%d",%s}`, id, op)}
		}
		e.same(t, ana, "a deleted row above the caller, "+op, change(1), change(2))
	}
	if got := e.one(t, `SELECT body FROM graded WHERE id = 1`); got != "top" {
		t.Errorf("a row that was never seen now says %s", got)
	}
}

// TestPushHiddenLate probes with the log behind: whether it is asked must not depend on a row that the caller may not see.
func TestPushHiddenLate(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{
		before:  `INSERT INTO lists (id, owner) VALUES (1, 'bob');`,
		options: func(o *Options) { o.EchoTimeout = 50 * time.Millisecond },
		gateway: func(g *Gateway) { g.limits.fence = 200 * time.Millisecond },
	})
	ana := tokenFor(t, "ana", nil)
	tx, err := e.db.Begin(t.Context())
	ok(t, err)
	_, err = tx.Exec(t.Context(), `SELECT FROM walgate.checkpoint FOR UPDATE`)
	ok(t, err)
	for _, op := range []string{`"operation":"update","data":{"name":"mine"}`, `"operation":"delete"`, `"operation":"update","data":{"name":"mine"},"parent_version":"1"`, `"operation":"delete","parent_version":"1"`} {
		change := func(id int) []string {
			return []string{fmt.Sprintf(`{"collection":"lists","doc_id":"%d",%s}`, id, op)}
		}
		e.same(t, ana, op, change(1), change(2))
	}
	ok(t, tx.Rollback(t.Context()))
	e.sync(t)
}

// TestPushGuesses lets callers guess values of columns, and of rows, that they may write and not read.
func TestPushGuesses(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{
		before: `CREATE TABLE sealed (id bigint PRIMARY KEY, a text, pin text); INSERT INTO sealed VALUES (1, 'a', '1234');
			CREATE TABLE dropbox (id bigint PRIMARY KEY, a text); INSERT INTO dropbox VALUES (1, '1234');`,
		specs: map[string]policies.Spec{
			"sealed":  {Table: "public.sealed", Columns: policies.ColumnsSpec{Exclude: []string{"pin"}}, Conflict: policies.Reject, Write: &policies.WriteSpec{Columns: []string{"a", "pin"}}},
			"dropbox": {Table: "public.dropbox", Read: policies.ReadSpec{Roles: []string{"clerk"}}, Conflict: policies.Reject, Write: &policies.WriteSpec{}},
		},
	})
	ana := tokenFor(t, "ana", nil)
	at := e.here(t, ana)
	at = at[:strings.LastIndex(at, "-")]
	e.exec(t, `UPDATE sealed SET pin = '9876'; UPDATE dropbox SET a = '9876'`)
	for _, c := range []struct{ right, wrong string }{
		{`{"collection":"sealed","operation":"update","doc_id":"1","data":{"pin":"9876"},"parent_version":"` + at + `"}`, "9876"},
		{`{"collection":"dropbox","operation":"update","doc_id":"1","data":{},"base":{"a":"9876"}}`, "9876"},
		{`{"collection":"dropbox","operation":"update","doc_id":"1","data":{"a":"9876"},"parent_version":"` + at + `"}`, "9876"},
		{`{"collection":"dropbox","operation":"delete","doc_id":"1","base":{"a":"9876"}}`, "9876"},
	} {
		e.same(t, ana, "guess", []string{c.right}, []string{strings.ReplaceAll(c.right, `"9876"`, `"0000"`)})
	}
}

// TestPushKeySpelling names rows by keys that are spelled otherwise than PostgreSQL writes them.
func TestPushKeySpelling(t *testing.T) {
	t.Parallel()
	const lower = "6c1e3cf2-6ab0-4f5e-9d4c-2a9f4bb0d001"
	e := newPushEnv(t, setup{
		before: `CREATE TABLE prices (id numeric PRIMARY KEY, a text); INSERT INTO prices VALUES (1.00, 'a');
			CREATE TABLE things (id uuid PRIMARY KEY, a text); INSERT INTO things VALUES ('` + lower + `', 'a');`,
		specs: map[string]policies.Spec{
			"prices": {Table: "public.prices", Write: &policies.WriteSpec{}, Conflict: policies.Reject},
			"things": {Table: "public.things", Write: &policies.WriteSpec{}, Conflict: policies.Reject},
		},
	})
	ana := tokenFor(t, "ana", nil)
	at := e.here(t, ana)
	at = at[:strings.LastIndex(at, "-")]
	e.exec(t, `UPDATE prices SET a = 'theirs'`)
	e.submit(t, ana, "", `{"collection":"prices","operation":"update","doc_id":"1.0","data":{"a":"mine"},"parent_version":"`+at+`"}`).want(t, "rejected 1.00 reject conflict")
	p := e.submit(t, ana, "", `{"collection":"prices","operation":"update","doc_id":"1.0","data":{"a":"mine"}}`).want(t, "accepted 1.00")
	if p.Results[0].NewVersion == nil {
		t.Error("no version")
	}
	e.submit(t, ana, `,"atomic":false`, `{"collection":"things","operation":"update","doc_id":"`+lower+`","data":{"a":"b"},"base":{"a":"a"}}`,
		`{"collection":"things","operation":"update","doc_id":"`+strings.ToUpper(lower)+`","data":{"a":"c"},"base":{"a":"a"}}`).
		want(t, "accepted "+lower+", rejected "+lower+" reject conflict")
}

// TestPushReturned changes a column while the row is out of sight: who saw it before hasn't seen that.
func TestPushReturned(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{
		before: `CREATE TABLE shelved (id bigint PRIMARY KEY, a text, b text, archived bool NOT NULL DEFAULT false); INSERT INTO shelved VALUES (1, 'a', 'b');`,
		specs:  map[string]policies.Spec{"shelved": {Table: "public.shelved", Where: "!row.archived", Write: &policies.WriteSpec{}, Conflict: policies.Merge}},
	})
	ana := tokenFor(t, "ana", nil)
	at := e.here(t, ana)
	at = at[:strings.LastIndex(at, "-")]
	e.exec(t, `UPDATE shelved SET archived = true`)
	e.exec(t, `UPDATE shelved SET a = 'theirs'`)
	e.exec(t, `UPDATE shelved SET archived = false`)
	e.submit(t, ana, "", `{"collection":"shelved","operation":"update","doc_id":"1","data":{"a":"mine"},"parent_version":"`+at+`"}`).want(t, "conflict_resolved 1 merge")
	if got := e.one(t, `SELECT a FROM shelved`); got != "theirs" {
		t.Errorf("a column that was changed on both sides is now %s", got)
	}
}

// TestPushRepeatedWithoutRight repeats a push after its caller lost the right to make it: it was made.
func TestPushRepeatedWithoutRight(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: `CREATE TABLE edited (id bigint PRIMARY KEY, a text);`,
		specs: map[string]policies.Spec{"edited": {Table: "public.edited", Write: &policies.WriteSpec{Roles: []string{"editor"}}}}})
	change := `{"collection":"edited","operation":"upsert","doc_id":"1","change_id":"c","data":{"id":1,"a":"x"}}`
	e.submit(t, tokenFor(t, "ana", map[string]any{"roles": []string{"editor"}}), "", change).want(t, "accepted 1")
	e.submit(t, tokenFor(t, "ana", nil), "", change).want(t, "duplicate 1")
}

// TestPushDeferredTriggers lets a push, and a conflict function, write what a deferred trigger follows up: it runs as the
// end user too.
func TestPushDeferredTriggers(t *testing.T) {
	t.Parallel()
	var role string
	e := newPushEnv(t, setup{
		before: `CREATE TABLE argued (id int PRIMARY KEY, a text); CREATE TABLE disputes (id int); CREATE TABLE seen (role text); INSERT INTO argued VALUES (1, 'theirs');
			CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NULL; END $$;
			CREATE CONSTRAINT TRIGGER late AFTER INSERT ON disputes DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION late();
			CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON argued DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION late();
			CREATE FUNCTION argue(current jsonb, incoming jsonb, base jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN INSERT INTO disputes VALUES (1); RETURN current; END $$;
			DO $$ BEGIN EXECUTE format('CREATE ROLE %I NOLOGIN; GRANT SELECT, INSERT, UPDATE, DELETE ON argued, disputes, seen TO %1$I', 'arguer_' || current_database()); END $$;`,
		specs: map[string]policies.Spec{"argued": {Table: "public.argued", Write: &policies.WriteSpec{}, Conflict: policies.Function, ConflictFunction: "public.argue"}},
		options: func(o *Options) {
			ok(t, o.Source.QueryRow(context.Background(), `SELECT 'arguer_' || current_database()`).Scan(&role))
			o.PushRole = role
		},
	})
	t.Cleanup(func() {
		name := pgx.Identifier{role}.Sanitize()
		if _, err := e.db.Exec(context.Background(), `DROP OWNED BY `+name+`; DROP ROLE `+name); err != nil {
			t.Error(err)
		}
	})
	ana := tokenFor(t, "ana", nil)
	for _, mode := range []string{"", `,"atomic":false`} {
		for _, change := range []struct{ more, want string }{{`"data":{"a":"theirs"}`, "accepted 1"}, {`"data":{"a":"mine"},"base":{"a":"old"}`, "conflict_resolved 1 function"}} {
			e.submit(t, ana, mode, `{"collection":"argued","operation":"update","doc_id":"1",`+change.more+`}`).want(t, change.want)
			if got := e.one(t, `WITH all_of_it AS (DELETE FROM seen RETURNING role) SELECT string_agg(role, ' ') FROM all_of_it`); got != role {
				t.Errorf("%s%s: the trigger ran as %s", change.want, mode, got)
			}
		}
	}
}

// TestPushRoleBesideParents refers to a collection that the role which writes has nothing to do with.
func TestPushRoleBesideParents(t *testing.T) {
	t.Parallel()
	var role string
	e := newPushEnv(t, setup{
		before: `CREATE SCHEMA beside; CREATE TABLE beside.kinds (id int PRIMARY KEY); INSERT INTO beside.kinds VALUES (1);
			CREATE TABLE items (id int PRIMARY KEY, kind int REFERENCES beside.kinds);
			DO $$ BEGIN EXECUTE format('CREATE ROLE %I NOLOGIN; GRANT SELECT, INSERT, UPDATE, DELETE ON items TO %1$I', 'aside_' || current_database()); END $$;`,
		specs: map[string]policies.Spec{"kinds": {Table: "beside.kinds"}, "items": {Table: "public.items", Write: &policies.WriteSpec{}}},
		options: func(o *Options) {
			ok(t, o.Source.QueryRow(context.Background(), `SELECT 'aside_' || current_database()`).Scan(&role))
			o.PushRole = role
		},
	})
	t.Cleanup(func() {
		name := pgx.Identifier{role}.Sanitize()
		if _, err := e.db.Exec(context.Background(), `DROP OWNED BY `+name+`; DROP ROLE `+name); err != nil {
			t.Error(err)
		}
	})
	e.submit(t, tokenFor(t, "ana", nil), "", `{"collection":"items","operation":"insert","doc_id":"1","change_id":"1","data":{"kind":1}}`).want(t, "accepted 1")
}

// TestPushLongRows names more long rows than one push may make the gateway hold: it is refused whole, in fewer it is done.
func TestPushLongRows(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: `INSERT INTO boards SELECT i, 'ana', repeat('x', 5000), '', 0 FROM generate_series(1, 5) i;`,
		options: func(o *Options) { o.PushBody = 2 << 10 }})
	ana := tokenFor(t, "ana", nil)
	var changes []string
	for i := range 5 {
		changes = append(changes, fmt.Sprintf(`{"collection":"boards","operation":"update","doc_id":"%d","data":{"n":1}}`, i+1))
	}
	for _, mode := range []string{"", `,"atomic":false`} {
		a := e.post(t, "/sync/push", ana, fmt.Sprintf(`{"client_id":"phone"%s,"changes":[%s]}`, mode, strings.Join(changes, ",")))
		a.problem(t, RequestTooLarge)
	}
	if got := e.one(t, `SELECT sum(n)::text FROM boards`); got != "0" {
		t.Errorf("%s rows were written", got)
	}
	e.submit(t, ana, "", changes[:3]...).want(t, "accepted 1, accepted 2, accepted 3")
	e.exec(t, `UPDATE boards SET a = repeat('x', 50000) WHERE id = 4`)
	e.submit(t, ana, "", changes[3]).want(t, "accepted 4") // one alone is never too long
}

// TestPushLeavesSettings lets a trigger change the session's settings, as triggers shouldn't: nobody else's rows are read so,
// and neither this commit nor another's is less durable.
func TestPushLeavesSettings(t *testing.T) {
	t.Parallel()
	for _, set := range []string{"SET TIME ZONE ''Asia/Tokyo''", "SET synchronous_commit = off", "SET search_path = public", "SET row_security = on", "SET LOCAL synchronous_commit = off"} {
		t.Run(set, func(t *testing.T) {
			t.Parallel()
			e := newPushEnv(t, setup{before: `CREATE TABLE moments (id int PRIMARY KEY, at timestamptz); INSERT INTO moments VALUES (1, '2026-05-02 15:00+00'); CREATE TABLE commits (durable text);
				CREATE FUNCTION home() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN EXECUTE '` + set + `'; RETURN NEW; END $$;
				CREATE TRIGGER home BEFORE INSERT ON moments FOR EACH ROW EXECUTE FUNCTION home();
				CREATE FUNCTION told() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.commits VALUES (current_setting('synchronous_commit')); RETURN NEW; END $$;`,
				specs: map[string]policies.Spec{"moments": {Table: "public.moments", Write: &policies.WriteSpec{}}}})
			e.exec(t, `CREATE CONSTRAINT TRIGGER told AFTER INSERT ON walgate.outcomes DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.told()`)
			e.submit(t, tokenFor(t, "ana", nil), "", `{"change_id":"1","collection":"moments","operation":"insert","doc_id":"2","data":{}}`).want(t, "accepted 2")
			if got := e.one(t, `SELECT string_agg(durable, ' ') FROM commits`); got != "on" {
				t.Errorf("the commit went by synchronous_commit = %s", got)
			}
			for _, c := range e.g.o.Source.AcquireAllIdle(t.Context()) {
				var now string
				err := c.QueryRow(t.Context(), `SELECT concat_ws(' ', current_setting('TimeZone'), current_setting('synchronous_commit'), current_setting('search_path'), current_setting('row_security'))`).Scan(&now)
				c.Release()
				if err != nil || now != "UTC on pg_catalog off" {
					t.Errorf("a connection of the pool is left with %s (%v)", now, err)
				}
			}
		})
	}
}
