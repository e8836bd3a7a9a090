package schema

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

func typeOID(t *testing.T, conn *pgx.Conn, name string) (oid uint32) {
	t.Helper()
	if err := conn.QueryRow(t.Context(), "SELECT $1::text::regtype::oid", name).Scan(&oid); err != nil {
		t.Fatal(err)
	}
	return oid
}

// TestBuiltinTypes holds the types known without a query against pg_type.
func TestBuiltinTypes(t *testing.T) {
	t.Parallel()
	conn := connectPinned(t, pgserver.ForTest(t).Database(t))
	defs, err := readTypes(t.Context(), conn, slices.Collect(maps.Keys(builtin)))
	if err != nil {
		t.Fatal(err)
	}
	if len(defs) != len(builtin) {
		t.Errorf("pg_type has %d types for %d built-in ones", len(defs), len(builtin))
	}
	for oid, b := range builtin {
		d := defs[oid]
		if d == nil {
			t.Errorf("%s: pg_type has no type %d", b.Name, oid)
			continue
		}
		var elem uint32
		var delim string
		if b.Elem != nil {
			elem = b.Elem.OID
		}
		if b.Kind == KindArray {
			delim = string(b.Delim)
		} else if b.Kind == KindVector {
			delim = ","
		}
		if b.OID != oid || b.Name != d.Name || elem != d.Elem || delim != d.Delim || d.Base != 0 || d.Composite {
			t.Errorf("type %d is %+v, pg_type says %+v", oid, *b, *d)
		}
	}
}

func TestTypesLoad(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	conn, err := pgx.Connect(ctx, pgserver.ForTest(t).Database(t)) // an ordinary session: names must not depend on its path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	mustExec(t, conn, differentialTypes, `CREATE SCHEMA other; CREATE TYPE other.hstore AS ENUM ('not the extension''s')`)

	var types Types
	nested, boxes, odd, hstore := typeOID(t, conn, "nested"), typeOID(t, conn, "boxes[]"), typeOID(t, conn, `"Odd Name"[]`),
		typeOID(t, conn, "other.hstore")
	const none = 4_000_000_000
	if err := types.Load(ctx, conn, nested, boxes, odd, hstore, typeOID(t, conn, "box[]"), none, 23); err != nil {
		t.Fatal(err)
	}
	if types.Lookup(none) != nil {
		t.Error("a type that doesn't exist is known")
	}
	if got := types.Lookup(23); got != builtin[23] {
		t.Errorf("integer is %+v", got)
	}
	for oid, name := range map[uint32]string{
		nested: "public.nested", boxes: "public.boxes[]", odd: `public."Odd Name"[]`, typeOID(t, conn, "box[]"): "box[]",
		typeOID(t, conn, "mood"): "public.mood", typeOID(t, conn, "pair_domain"): "public.pair_domain",
	} {
		if got := types.Lookup(oid); got == nil || got.Name != name {
			t.Errorf("type %d is %+v, want %s", oid, got, name)
		}
	}
	n := types.Lookup(nested)
	if n.Kind != KindComposite || len(n.Fields) != 8 || n.Fields[2].Type != builtin[114] || n.Fields[5].Type.Elem.Labels[2] != "NULL" {
		t.Errorf("nested is %+v", n)
	}
	if d := n.Fields[6].Type; d.Kind != KindComposite || d.Base == nil || d.Underlying() != n.Fields[0].Type {
		t.Errorf("a domain over a composite is %+v", d)
	}
	if b := types.Lookup(boxes); b.Delim != ';' || b.Elem.Base == nil || b.Kind != KindArray {
		t.Errorf("an array of a domain over box is %+v", b)
	}
	if h := types.Lookup(hstore); h.Kind != KindText {
		t.Errorf("an enum called hstore is %+v", h)
	}
}

// TestTypesReload alters types that others are made of, drops one, and loads only the altered ones.
func TestTypesReload(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	conn := connectPinned(t, pgserver.ForTest(t).Database(t))
	mustExec(t, conn, differentialTypes)
	var types Types
	nested, pair, mood, grown := typeOID(t, conn, "public.nested"), typeOID(t, conn, "public.pair"),
		typeOID(t, conn, "public.mood"), typeOID(t, conn, "public.grown")
	if err := types.Load(ctx, conn, nested, grown); err != nil {
		t.Fatal(err)
	}
	before := types.Lookup(nested)
	text := []byte(`("(1,x,y)",,,,,,,)`)
	if _, err := AppendValue(nil, before, text, false); err == nil {
		t.Fatal("a field more than the type has is no error")
	}

	mustExec(t, conn, "ALTER TYPE public.pair ADD ATTRIBUTE c text", "ALTER TYPE public.mood RENAME VALUE 'NULL' TO 'none'",
		"DROP TYPE public.grown")
	if err := types.Load(ctx, conn, pair, mood, grown); err != nil {
		t.Fatal(err)
	}
	after := types.Lookup(nested)
	if got, err := AppendValue(nil, after, text, false); err != nil {
		t.Errorf("%s, %v", got, err)
	}
	if after.Fields[0].Type != types.Lookup(pair) || after.Fields[5].Type.Elem != types.Lookup(mood) {
		t.Error("nested is still made of the types of before")
	}
	if labels := types.Lookup(mood).Labels; labels[2] != "none" {
		t.Errorf("the labels are %q", labels)
	}
	if len(before.Fields[0].Type.Fields) != 2 {
		t.Error("a type handed out earlier has changed")
	}
	if types.Lookup(grown) != nil {
		t.Error("a dropped type is still known")
	}
}

func TestTypesConcurrently(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connectPinned(t, dsn)
	mustExec(t, conn, differentialTypes)
	nested, pair := typeOID(t, conn, "public.nested"), typeOID(t, conn, "public.pair")
	var types Types
	var group sync.WaitGroup
	for range 3 {
		own := connectPinned(t, dsn)
		group.Go(func() {
			for range 20 {
				if err := types.Load(context.Background(), own, pair, nested); err != nil {
					t.Error(err)
				}
				if n := types.Lookup(nested); n == nil || len(n.Fields) != 8 {
					t.Errorf("nested is %+v while others load", n)
				}
			}
		})
	}
	group.Wait()
	if types.Lookup(nested).Fields[0].Type != types.Lookup(pair) {
		t.Error("nested is made of another pair than the known one")
	}
}

// TestTypesLoadFails leaves what was known as it was.
func TestTypesLoadFails(t *testing.T) {
	t.Parallel()
	conn := connectPinned(t, pgserver.ForTest(t).Database(t))
	mustExec(t, conn, differentialTypes)
	mood := typeOID(t, conn, "public.mood")
	var types Types
	if err := types.Load(t.Context(), conn, mood); err != nil {
		t.Fatal(err)
	}
	known := types.Lookup(mood)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := types.Load(over, conn, mood); err == nil {
		t.Error("a load with an ended context is no error")
	}
	if types.Lookup(mood) != known {
		t.Error("a load that failed has changed what is known")
	}
}

// TestClientEncoding reads bytes that aren't UTF-8 from a database without an encoding.
func TestClientEncoding(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	server := pgserver.ForTest(t)
	admin := connectPinned(t, server.Database(t))
	name := fmt.Sprintf("ascii_%d", admin.PgConn().PID())
	mustExec(t, admin, "CREATE DATABASE "+name+" TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'")
	t.Cleanup(func() {
		if _, err := admin.Exec(context.Background(), "DROP DATABASE "+name+" WITH (FORCE)"); err != nil {
			t.Error(err)
		}
	})
	const sql = `SELECT convert_from('\x41ff42', 'SQL_ASCII')`

	conn := connectPinned(t, server.DSN(name))
	if _, err := conn.PgConn().Exec(ctx, sql).ReadAll(); err == nil {
		t.Error("with client_encoding UTF8 the server sends what isn't UTF-8: ClientEncoding is needless")
	}
	encoding := ClientEncoding(conn.PgConn().ParameterStatus("server_encoding"))
	mustExec(t, conn, "SET client_encoding = '"+encoding+"'")
	results, err := conn.PgConn().Exec(ctx, sql).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if got := AppendString(nil, results[0].Rows[0][0]); string(got) != "\"A\ufffdB\"" {
		t.Errorf("the JSON is %q", got)
	}
}
