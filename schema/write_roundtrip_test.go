package schema

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// sourcePool is a pool as the gateway has it.
func sourcePool(t testing.TB, dsn string) *pgxpool.Pool {
	t.Helper()
	pool, err := OpenPool(t.Context(), dsn, 4)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func loadTable(t testing.TB, q Querier, name string) *Table {
	t.Helper()
	var types Types
	c, err := LoadCatalog(context.Background(), q, &types, testPublications.Rows, []string{name})
	if err != nil || len(c.Tables) != 1 {
		t.Fatalf("load %s: %v %v", name, c, err)
	}
	return c.Tables[0]
}

// document is the row's JSON object as a client reads it.
func document(t testing.TB, table *Table, row Row, lossless bool) string {
	t.Helper()
	if row == nil {
		return "none"
	}
	doc := []byte{'{'}
	for i, c := range table.Ordinary() {
		if i > 0 {
			doc = append(doc, ',')
		}
		doc = append(AppendString(doc, []byte(c.Name)), ':')
		if row[i] == nil {
			doc = append(doc, "null"...)
			continue
		}
		var err error
		if doc, err = AppendValue(doc, c.Type, row[i], lossless); err != nil {
			t.Fatalf("%s.%s %q: %v", table, c.Name, row[i], err)
		}
	}
	return string(append(doc, '}'))
}

func columnNames(table *Table) (names []string) {
	for _, c := range table.Ordinary() {
		names = append(names, c.Name)
	}
	return names
}

// inTx runs f in a transaction, which is committed where it succeeds.
func inTx(t testing.TB, pool *pgxpool.Pool, f func(tx pgx.Tx) error) error {
	t.Helper()
	return pgx.BeginFunc(context.Background(), pool, f)
}

// write carries out the writes in a transaction of their own.
func write(t testing.TB, pool *pgxpool.Pool, writes ...Write) ([]Row, error) {
	t.Helper()
	var rows []Row
	err := inTx(t, pool, func(tx pgx.Tx) (err error) {
		rows, err = ExecWrites(context.Background(), tx, writes)
		return err
	})
	return rows, err
}

// lock asks for rows in a transaction that ends at once.
func lock(t testing.TB, pool *pgxpool.Pool, table *Table, asks ...Ask) ([]Found, error) {
	t.Helper()
	var found []Found
	err := inTx(t, pool, func(tx pgx.Tx) (err error) {
		found, err = LockRows(context.Background(), tx, table, asks)
		return err
	})
	return found, err
}

// TestEveryTypeWritesBack reads rows of every family as JSON and writes that JSON back, by insert into an empty copy of the
// table and by update over a row of nulls, alone, in arrays and in composites; the documents must be the same bytes. The
// rows read must also equal themselves, by LockRows.
func TestEveryTypeWritesBack(t *testing.T) {
	t.Parallel()
	dsn, conn := database(t, differentialTypes)
	extensions := installExtensions(t, conn)
	r := seededRand(t)
	families := allFamilies(extensions, supportsXML(t.Context(), conn), conn.PgConn().ParameterStatus("server_version"))
	for i, f := range families {
		f.create(t, conn, i)
		f.fill(t, conn, i, r)
		mustExec(t, conn, fmt.Sprintf("CREATE TABLE public.copy_%[1]d (LIKE public.family_%[1]d INCLUDING ALL)", i))
	}
	mustExec(t, conn, hostileSettings)
	pool := sourcePool(t, dsn)
	for i, f := range families {
		for _, lossless := range []bool{false, true} {
			writesBack(t, pool, f, loadTable(t, pool, fmt.Sprintf("public.family_%d", i)), loadTable(t, pool, fmt.Sprintf("public.copy_%d", i)), lossless)
		}
	}
}

func writesBack(t *testing.T, pool *pgxpool.Pool, f family, from, to *Table, lossless bool) {
	t.Helper()
	var asks []Ask
	if err := each(t.Context(), pool, "SELECT id::text FROM "+from.SQL()+" ORDER BY id", nil, func(r pgx.Rows) error {
		asks = append(asks, Ask{Key: []string{""}})
		return r.Scan(&asks[len(asks)-1].Key[0])
	}); err != nil {
		t.Fatal(err)
	}
	found, err := lock(t, pool, from, asks...)
	if err != nil {
		t.Errorf("%s: %v", f.typ, err)
		return
	}
	want := make([]string, len(found))
	inserts, updates := make([]Write, len(found)), make([]Write, len(found))
	names := columnNames(from)
	for i, have := range found {
		want[i] = document(t, from, have.Row, lossless)
		asks[i].Base, asks[i].Data = []byte(want[i]), []byte(want[i])
		inserts[i] = Write{Table: to, Kind: Insert, Key: have.Key, Data: []byte(want[i]), Columns: names}
		updates[i] = Write{Table: to, Kind: Update, Key: have.Key, Data: []byte(want[i]), Columns: names[1:]}
	}
	if again, err := lock(t, pool, from, asks...); err != nil {
		t.Errorf("%s: compared with itself: %v", f.typ, err)
	} else {
		for i, same := range again {
			if len(same.BaseDiffers) > 0 || len(same.DataEquals) != len(names) {
				t.Errorf("%s, row %d: differs from itself in %v, equals itself in %v: %s", f.typ, i, same.BaseDiffers, same.DataEquals, want[i])
			}
		}
	}
	for _, writes := range [][]Write{inserts, updates} {
		rows, err := write(t, pool, writes...)
		if err != nil {
			t.Errorf("%s: write back %c: %v", f.typ, writes[0].Kind, err)
			rows = oneByOne(t, pool, writes)
		}
		for i, row := range rows {
			if got := document(t, to, row, lossless); got != want[i] && (f.typ != "json" && f.typ != "jsonb[]" || compact(got) != compact(want[i])) {
				t.Errorf("%s, row %d, %c:\n got %s\nwant %s", f.typ, i, writes[i].Kind, got, want[i])
			}
		}
		if _, err := pool.Exec(t.Context(), "UPDATE "+to.SQL()+" SET v = NULL, a = NULL, c = NULL, ca = NULL"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := pool.Exec(t.Context(), "TRUNCATE "+to.SQL()); err != nil {
		t.Fatal(err)
	}
}

// compact takes out the space around values: a document doesn't say which is a json column's own, nor whether arrays within
// arrays are jsonb values or dimensions.
func compact(doc string) string {
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(doc)); err != nil {
		return err.Error()
	}
	return b.String()
}

// oneByOne finds the writes that fail, for the message.
func oneByOne(t *testing.T, pool *pgxpool.Pool, writes []Write) (rows []Row) {
	t.Helper()
	for _, w := range writes {
		got, err := write(t, pool, w)
		if err != nil {
			t.Errorf("%.300s: %v", strings.TrimSpace(string(w.Data)), err)
			got = []Row{nil}
		}
		rows = append(rows, got...)
	}
	return rows
}
