package main

import (
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

// resolverSQL has a conflict function that does what the current row's title tells it to.
const resolverSQL = `
CREATE TABLE sheets (id text PRIMARY KEY, title text, body text, n int, secret text DEFAULT 's', twice int GENERATED ALWAYS AS (n * 2) STORED);
CREATE FUNCTION obey(current jsonb, incoming jsonb, base jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
	CASE current->>'title'
	WHEN 'null' THEN RETURN NULL;
	WHEN 'json null' THEN RETURN 'null';
	WHEN 'list' THEN RETURN '[]';
	WHEN 'text' THEN RETURN '"x"';
	WHEN 'nothing' THEN RETURN '{}';
	WHEN 'same' THEN RETURN current;
	WHEN 'unknown' THEN RETURN '{"nowhere": 1}';
	WHEN 'key' THEN RETURN '{"id": "other"}';
	WHEN 'generated' THEN RETURN '{"twice": 7}';
	WHEN 'wrong type' THEN RETURN '{"n": "many"}';
	WHEN 'error' THEN RAISE EXCEPTION 'secret reason';
	WHEN 'divide' THEN RETURN jsonb_build_object('n', 1 / 0);
	WHEN 'arguments' THEN RETURN jsonb_build_object('body', concat_ws('|', current->>'body', coalesce(incoming::text, 'none'), coalesce(base::text, 'none'), current ? 'secret'));
	ELSE RETURN '{"body": "resolved", "n": 5}';
	END CASE; END $$;
`

// TestPushResolver has a conflict function return everything that it may and may not return.
func TestPushResolver(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	g := startPushGateway(t, dsn, resolverSQL, "", "  sheets: {table: public.sheets, columns: {exclude: [secret]}, write: {roles: [editor]}, conflict: {function: public.obey}}\n")
	app := connect(t, dsn)
	_, version := g.here(t)
	for i, c := range []struct{ title, operation, outcome, body string }{ // body: "": gone; what the row then holds
		{"null", "update", "rejected conflict", "b"}, {"null", "delete", "rejected conflict", "b"},
		{"json null", "delete", "conflict_resolved", ""}, {"json null", "update", "rejected resolver_failed", "b"},
		{"list", "update", "rejected resolver_failed", "b"}, {"text", "delete", "rejected resolver_failed", "b"},
		{"nothing", "update", "conflict_resolved", "b"}, {"nothing", "delete", "conflict_resolved", "b"},
		{"same", "update", "conflict_resolved", "b"},
		{"unknown", "update", "rejected resolver_failed", "b"}, {"key", "update", "rejected resolver_failed", "b"},
		{"generated", "update", "rejected resolver_failed", "b"}, {"wrong type", "update", "rejected resolver_failed", "b"},
		{"error", "update", "rejected resolver_failed", "b"}, {"divide", "delete", "rejected resolver_failed", "b"},
		{"arguments", "update", "conflict_resolved", `b|{"n": 3}|{"body": "old"}|t`}, {"arguments", "delete", "conflict_resolved", `b|none|{"body": "old"}|t`},
		{"anything", "upsert", "conflict_resolved", "resolved"}, {"anything", "delete", "conflict_resolved", "resolved"},
	} {
		resyncExec(t, app, `DELETE FROM sheets`)
		resyncExec(t, app, `INSERT INTO sheets VALUES ('s', $1, 'b', 1)`, c.title)
		change := pushChange{Collection: "sheets", Operation: c.operation, DocID: "s", Base: map[string]any{"body": "old"}}
		if c.operation != "delete" {
			change.Data = map[string]any{"n": 3}
		}
		got := g.push(t, i%2 == 0, change).Results[0]
		body := ""
		for _, row := range tableRows(t.Context(), t, dsn, `SELECT id, row_to_json(t)::text FROM sheets t`) {
			body = row["body"].(string)
		}
		if got.String() != c.outcome || body != c.body {
			t.Errorf("%s when told %q: %s and the body %q, want %s and %q", c.operation, c.title, got.raw, body, c.outcome, c.body)
		}
		if got.Status == "conflict_resolved" && (got.Policy != "function" || (got.shown(t) == nil) != (body == "")) {
			t.Errorf("%s when told %q: %s, want the policy and the row", c.operation, c.title, got.raw)
		}
		discreet(t, got)
		if c.title == "arguments" {
			change.Base, change.ParentVersion = nil, version
			resyncLogged(t, app)
			got = g.one(t, change)
			if row := got.shown(t); row == nil || row["body"] == c.body {
				t.Errorf("without a base: %s", got.raw)
			}
		}
	}
}
