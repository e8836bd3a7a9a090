package chaos

import (
	"context"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/policies"
)

// operatorsSQL is an application that the world knows nothing of.
const operatorsSQL = `
CREATE TYPE color AS ENUM ('red', 'green');
CREATE DOMAIN amount AS numeric(8,2) CHECK (VALUE >= 0);
CREATE TABLE depots (code varchar(4) PRIMARY KEY, name text);
INSERT INTO depots SELECT 'd' || g, 'depot' FROM generate_series(1, 4) g;
CREATE TABLE orders (tenant uuid, number int, depot varchar(4) NOT NULL REFERENCES depots, color color NOT NULL, total amount, tags text[], prices numeric[],
	at timestamptz, day date NOT NULL, opened time, ok boolean, raw bytea, ip inet, span int4range, big bigint, half real, place point, extra jsonb, doc json,
	made bigint GENERATED ALWAYS AS IDENTITY, twice int GENERATED ALWAYS AS (number * 2) STORED, PRIMARY KEY (tenant, number));
CREATE TABLE lines (tenant uuid, number int, line smallint, what varchar(10) NOT NULL, gone boolean NOT NULL DEFAULT false, file uuid, old jsonb,
	PRIMARY KEY (tenant, number, line), FOREIGN KEY (tenant, number) REFERENCES orders ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE flags (id bigint PRIMARY KEY, on_ boolean, day date);
`

func operatorsSpecs() map[string]policies.Spec {
	write := &policies.WriteSpec{Roles: []string{"clerk"}}
	return map[string]policies.Spec{
		"orders": {Table: "orders", Scope: []map[string]string{{"tenant": "claims.org.tenant", "color": "claims.colors"}}, Write: write, Lossless: true},
		"lines": {Table: "public.lines", Scope: []map[string]string{{"tenant": "claims.org.tenant"}}, SoftDelete: "gone", Write: write, Conflict: "merge",
			Attachments: []policies.AttachmentSpec{{Column: "file"}, {Column: "old", Path: "$['files'][0]..id"}}},
		"flags": {Table: "public.flags", Scope: []map[string]string{{"on_": "claims.on"}, {"day": "claims.day"}}, Write: write, Where: "row.id >= 0 || claims.level == 3"},
	}
}

// TestWorldReadsAnyTables runs writers alone on tables that it has never seen, and sees that hardly a statement is refused.
func TestWorldReadsAnyTables(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	conn, err := pgx.Connect(t.Context(), dsn)
	must(t, err)
	defer conn.Close(t.Context())
	_, err = conn.Exec(t.Context(), operatorsSQL)
	must(t, err)
	w, err := NewWorld(t.Context(), WorldOptions{Seed: 1, App: dsn, Oracle: func() string { return dsn }, Gateway: "http://127.0.0.1:1", Token: testToken,
		Collections: operatorsSpecs(), Clients: 4, Logf: t.Errorf})
	must(t, err)
	a := &writer{w: w, rng: w.rng(1)}
	defer a.close()
	const transactions = 150
	for range transactions {
		if err := a.step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, code := range []string{"42601", "22P02", "42703", "42804", "22001", "22003", "428C9", "22007"} { // statements that no schema would take
		if n := w.Counts()["application: refused "+code]; n > 0 {
			t.Errorf("%d statements were refused with %s", n, code)
		}
	}
	for _, name := range []string{"orders", "lines", "flags"} {
		var n int
		must(t, conn.QueryRow(t.Context(), "SELECT count(*) FROM "+name).Scan(&n))
		if n < 3 {
			t.Errorf("%s has %d rows: %v", name, n, w.Counts())
		}
	}
	// Clients are sent for rows that they may write, in a form that the database takes.
	c := w.clients[0]
	for _, name := range []string{"orders", "flags"} {
		table := w.table(name)
		if table.owns != (name == "flags") {
			t.Errorf("%s: rows of one client's own: %t", name, table.owns)
		}
		if data := c.data(table, true); name == "orders" && (data["day"] == nil || data["made"] != nil || data["twice"] != nil) {
			t.Errorf("a new row of %s is pushed as %s", name, data)
		}
	}
	if len(w.uploads) == 0 {
		t.Error("no attachment can be named")
	}
	o, err := w.openOracle(context.WithoutCancel(t.Context()))
	must(t, err)
	defer o.close()
	for _, c := range w.clients { // the oracle's SQL stands
		if err := o.compare(t.Context(), c); errors.Is(err, errAway) {
			t.Error(err)
		}
	}
}
