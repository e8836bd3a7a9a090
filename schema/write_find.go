package schema

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// FindRows returns the first row, in the layout of Table.Ordinary, whose columns have each tuple's values, and nil where
// there is none. It locks nothing. The tuples are distinct and hold no NULL.
func FindRows(ctx context.Context, q Querier, t *Table, columns []string, tuples [][]string) ([]Row, error) {
	s := recordset{t: t, defs: []string{"n pg_catalog.int4"}}
	at := make([]int, len(columns))
	for i, name := range columns {
		if at[i] = t.Column(name); at[i] < 0 {
			return nil, &UnknownColumnError{name}
		}
	}
	s.columns(t, "v", at)
	var b strings.Builder
	b.WriteString("SELECT r.n, l.row FROM " + s.from("r") + " CROSS JOIN LATERAL (SELECT ROW(")
	for i, c := range t.Ordinary() {
		b.WriteString(comma(i) + "w." + ident(c.Name))
	}
	b.WriteString(")::pg_catalog.text AS row FROM " + t.only() + " AS w WHERE ")
	for i, c := range at {
		if i > 0 {
			b.WriteString(" AND ")
		}
		b.WriteString(s.equals(c, "r.v"+strconv.Itoa(i)))
	}
	b.WriteString(" LIMIT 1) AS l")
	w := recordWriter{}
	for n, tuple := range tuples {
		w.begin(n)
		for i, text := range tuple {
			w.member("v", i, []byte(text))
		}
		w.end()
	}
	rows := make([]Row, len(tuples))
	err := each(ctx, q, b.String(), []any{w.finish()}, func(r pgx.Rows) error {
		var n int
		var text []byte
		err := r.Scan(&n, &text)
		if err == nil {
			rows[n], err = parseRecord(text, len(t.Ordinary()))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find rows of %s: %w", t, err)
	}
	return rows, nil
}

// equals compares a column of the table w with a value of the recordset.
func (s *recordset) equals(at int, value string) string {
	column := "w." + ident(s.t.Columns[at].Name)
	for i, k := range s.t.Key {
		if k == at && i < len(s.t.keyEquals) {
			return column + " " + s.t.keyEquals[i] + " " + value
		}
	}
	if s.t.Columns[at].Type.hasEquality() {
		return column + " OPERATOR(pg_catalog.=) " + value
	}
	return column + "::pg_catalog.text OPERATOR(pg_catalog.=) " + value + "::pg_catalog.text"
}

// RowJSON returns the row with this key as to_jsonb makes it, with all of its columns; nil: there is none.
func RowJSON(ctx context.Context, q Querier, t *Table, key []string) (text []byte, err error) {
	s := recordset{}
	s.keys(t)
	w := recordWriter{}
	w.begin(0)
	w.keys(key)
	w.end()
	sql := "SELECT pg_catalog.to_jsonb(w)::pg_catalog.text FROM " + s.from("r") + " JOIN " + t.only() + " AS w ON " + s.match("r")
	err = each(ctx, q, sql, []any{w.finish()}, func(r pgx.Rows) error { return r.Scan(&text) })
	if err != nil {
		return nil, fmt.Errorf("read a row of %s as jsonb: %w", t, err)
	}
	return text, nil
}
