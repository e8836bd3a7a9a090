package schema

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Ask names a document whose row a push is about to write, and what its author believes and brings.
type Ask struct {
	Key  []string // the texts of the key's columns, in key order
	Base []byte   // a JSON object: the values that the author saw; nil: none
	Data []byte   // a JSON object: the values to be written; nil: none
}

// Found is the answer to an Ask.
type Found struct {
	// Key is the row's key, or where there is none the ask's as PostgreSQL writes it: 7 where the ask said 007.
	Key []string
	// Row is the locked row in the layout of Table.Ordinary, and the caller's to keep; nil: there is none.
	Row Row
	// BaseDiffers names the columns of Base whose value is not the row's, in the table's order.
	BaseDiffers []string
	// DataEquals names the columns of Data whose value is the row's already.
	DataEquals []string
}

// BatchError says which of the asks or writes given to one call the fault lies with: one of those from From to To,
// exclusive. Classify says what it means.
type BatchError struct {
	From, To int
	Err      error
}

func (e *BatchError) Error() string { return e.Err.Error() }

// Unwrap returns the fault itself.
func (e *BatchError) Unwrap() error { return e.Err }

// LockRows locks the rows that the asks name, FOR UPDATE and in the order of their keys whatever that of the asks, so that
// concurrent calls for one table don't deadlock; over several tables the caller keeps to one order. Values are compared
// as PostgreSQL compares them after conversion, json as jsonb; types without an equality of their own as text. The
// session needs SessionSettings. One statement; an ask whose text PostgreSQL can't convert fails them all (CheckAsks).
func LockRows(ctx context.Context, q Querier, t *Table, asks []Ask) ([]Found, error) {
	if len(asks) == 0 {
		return nil, nil
	}
	l, err := newLocking(t, asks)
	if err != nil {
		return nil, err
	}
	found := make([]Found, len(asks))
	err = each(ctx, q, l.sql(), []any{l.param}, func(r pgx.Rows) error {
		var n int
		var key, row, flags []byte
		if err := r.Scan(&n, &key, &row, &flags); err != nil {
			return err
		}
		return l.read(&found[n], n, key, row, flags)
	})
	if err != nil {
		return nil, &BatchError{0, len(asks), fmt.Errorf("lock rows of %s: %w", t, err)}
	}
	return found, nil
}

// CheckAsks tells those asks whose texts PostgreSQL can't convert, after LockRows failed for one: an error for each of
// them, nil for the others. It locks nothing; q is in a
// transaction, which goes on. With ErrKey in its chain, an error is the key's.
func CheckAsks(ctx context.Context, q Querier, t *Table, asks []Ask) ([]error, error) {
	faults := make([]error, len(asks))
	var check func(from, to int, keys bool) error
	check = func(from, to int, keys bool) error {
		err := checkAsks(ctx, q, t, asks[from:to], keys)
		if err == nil || !isFaultOfInput(err) {
			return err
		}
		if to-from > 1 {
			middle := (from + to) / 2
			if err := check(from, middle, keys); err != nil {
				return err
			}
			return check(middle, to, keys)
		}
		if faults[from] = err; keys {
			faults[from] = fmt.Errorf("%w: %w", ErrKey, err)
		}
		return nil
	}
	if err := check(0, len(asks), true); err != nil {
		return nil, err
	}
	for from := 0; from < len(asks); { // what has a key, in stretches
		if faults[from] != nil {
			from++
			continue
		}
		to := from
		for to < len(asks) && faults[to] == nil {
			to++
		}
		if err := check(from, to, false); err != nil {
			return nil, err
		}
		from = to
	}
	return faults, nil
}

// checkAsks converts the asks, or their keys alone, within a savepoint.
func checkAsks(ctx context.Context, q Querier, t *Table, asks []Ask, keys bool) error {
	if len(asks) == 0 {
		return nil
	}
	if keys {
		asks = slices.Clone(asks)
		for i := range asks {
			asks[i].Base, asks[i].Data = nil, nil
		}
	}
	l, err := newLocking(t, asks)
	if err != nil {
		return err
	}
	ignore := func(pgx.Rows) error { return nil }
	if err := each(ctx, q, "SAVEPOINT walgate_check", nil, ignore); err != nil {
		return err
	}
	err = each(ctx, q, l.conversion(), []any{l.param}, ignore)
	return errors.Join(err, each(ctx, q, "ROLLBACK TO SAVEPOINT walgate_check", nil, ignore))
}

// isFaultOfInput says whether an error may go away with other input.
func isFaultOfInput(err error) bool {
	switch Classify(err).Code {
	case CodeInvalidValue, CodeInvalidKey, CodeUnknownColumn:
		return true
	}
	return false
}

// locking is one statement of LockRows.
type locking struct {
	t          *Table
	ordinary   []Column
	base, data compared
	record     recordset
	param      []byte
}

// compared is what is compared with the rows.
type compared struct {
	at     []int               // positions in t.Columns
	values []map[string][]byte // of each ask
}

func newLocking(t *Table, asks []Ask) (*locking, error) {
	l := &locking{t: t, ordinary: t.Ordinary()}
	for i, a := range asks {
		err := l.base.add(t, a.Base)
		if err == nil {
			err = l.data.add(t, a.Data)
		}
		if err == nil && len(a.Key) != len(t.Key) {
			err = ErrKey
		}
		if err != nil {
			return nil, &BatchError{i, i + 1, err}
		}
	}
	l.record.keys(t)
	l.record.columns(t, "b", l.base.at)
	l.record.columns(t, "d", l.data.at)
	w := recordWriter{}
	for i, a := range asks {
		w.begin(i)
		w.keys(a.Key)
		err := w.columns(t, "b", l.base.at, l.base.values[i])
		if err == nil {
			err = w.columns(t, "d", l.data.at, l.data.values[i])
		}
		if err != nil {
			return nil, &BatchError{i, i + 1, err}
		}
		w.end()
	}
	l.param = w.finish()
	return l, nil
}

// add reads the JSON object of the next ask.
func (c *compared) add(t *Table, object []byte) error {
	values, err := members(object)
	if err != nil {
		return &ValueError{"", err.Error()}
	}
	c.values = append(c.values, values)
	for name := range values {
		at := t.Column(name)
		if at < 0 {
			return &UnknownColumnError{name}
		}
		if i, known := slices.BinarySearch(c.at, at); !known {
			c.at = slices.Insert(c.at, i, at)
		}
	}
	return nil
}

// sql looks each row up by itself, in the order of the keys: the locks are taken as the lookups are made. A join could take
// them in any order, or read the whole table for a few rows.
func (l *locking) sql() string {
	var b strings.Builder
	b.WriteString("SELECT a.n, ROW(" + l.record.keyNames("a.") + ")::pg_catalog.text, CASE WHEN l.found THEN ROW(")
	for i := range l.ordinary {
		b.WriteString(comma(i) + "l.c" + strconv.Itoa(i))
	}
	b.WriteString(")::pg_catalog.text END, ROW(")
	for i, at := range l.base.at {
		b.WriteString(comma(i) + l.same(at, "a.b"+strconv.Itoa(i)))
	}
	for i, at := range l.data.at {
		b.WriteString(comma(i+len(l.base.at)) + l.same(at, "a.d"+strconv.Itoa(i)))
	}
	b.WriteString(")::pg_catalog.text FROM (SELECT * FROM " + l.record.from("r") + " ORDER BY " + l.record.keyNames("") + ") AS a LEFT JOIN LATERAL (SELECT true AS found")
	for i, c := range l.ordinary {
		b.WriteString(", w." + ident(c.Name) + " AS c" + strconv.Itoa(i))
	}
	for _, at := range l.generated() {
		b.WriteString(", w." + ident(l.t.Columns[at].Name) + " AS g" + strconv.Itoa(at))
	}
	b.WriteString(" FROM " + l.t.only() + " AS w WHERE " + l.record.match("a") + " FOR UPDATE) AS l ON true")
	return b.String()
}

// conversion converts and does no more.
func (l *locking) conversion() string {
	var b strings.Builder
	b.WriteString("SELECT ROW(" + l.record.keyNames("a."))
	for i, at := range l.base.at {
		b.WriteString(", " + l.record.value(l.t, at, "a.b"+strconv.Itoa(i)))
	}
	for i, at := range l.data.at {
		b.WriteString(", " + l.record.value(l.t, at, "a.d"+strconv.Itoa(i)))
	}
	b.WriteString(")::pg_catalog.text FROM " + l.record.from("a"))
	return b.String()
}

// generated returns the generated columns that are compared.
func (l *locking) generated() (at []int) {
	for _, i := range slices.Concat(l.base.at, l.data.at) {
		if l.t.Columns[i].Generated {
			at = append(at, i)
		}
	}
	slices.Sort(at)
	return slices.Compact(at)
}

// same compares a column of the locked row with a value.
func (l *locking) same(at int, value string) string {
	column := "l.g" + strconv.Itoa(at)
	for i, c := range l.ordinary {
		if c.Num == l.t.Columns[at].Num {
			column = "l.c" + strconv.Itoa(i)
		}
	}
	t := l.t.Columns[at].Type.Underlying()
	column = l.t.Columns[at].asBase(column)
	switch {
	case t.Name == "json":
		// What jsonb can't hold, the row may: such values are compared by their bytes.
		other := column + "::pg_catalog.text"
		odd := " OPERATOR(pg_catalog.~) '" + oddJSON + "'"
		return "CASE WHEN " + other + odd + " OR " + value + odd + " THEN " + other + " IS NOT DISTINCT FROM " + value +
			" ELSE " + column + "::pg_catalog.jsonb IS NOT DISTINCT FROM " + value + "::pg_catalog.jsonb END"
	case t.Name == "jsonb":
		return column + " IS NOT DISTINCT FROM " + value + "::pg_catalog.jsonb"
	case t.hasEquality():
		return column + " IS NOT DISTINCT FROM " + value
	}
	return column + "::pg_catalog.text IS NOT DISTINCT FROM " + value + "::pg_catalog.text"
}

// oddJSON matches json that may not convert to jsonb: U+0000, surrogates, and numbers beyond numeric.
const oddJSON = `\\u(0000|[dD][89a-fA-F])|[eE][+-]?[0-9]{4}`

// read takes over one row of the statement's result.
func (l *locking) read(f *Found, n int, key, row, flags []byte) error {
	parts, err := parseRecord(key, len(l.t.Key))
	if err != nil {
		return err
	}
	f.Key = make([]string, len(parts))
	for i, p := range parts {
		f.Key[i] = string(p)
	}
	if row == nil {
		return nil
	}
	if f.Row, err = parseRecord(row, len(l.ordinary)); err != nil {
		return err
	}
	for i, at := range l.t.Key { // 1.00 equals 1.0, and only one of them is in the log
		if c := slices.IndexFunc(l.ordinary, func(c Column) bool { return c.Num == l.t.Columns[at].Num }); c >= 0 {
			f.Key[i] = string(f.Row[c])
		}
	}
	same, err := parseRecord(flags, len(l.base.at)+len(l.data.at))
	if err != nil {
		return err
	}
	for i, at := range l.base.at {
		if v := l.base.values[n][l.t.Columns[at].Name]; v != nil && string(same[i]) != "t" && !l.reads(f.Row, at, v) {
			f.BaseDiffers = append(f.BaseDiffers, l.t.Columns[at].Name)
		}
	}
	for i, at := range l.data.at {
		if v := l.data.values[n][l.t.Columns[at].Name]; v != nil && (string(same[len(l.base.at)+i]) == "t" || l.reads(f.Row, at, v)) {
			f.DataEquals = append(f.DataEquals, l.t.Columns[at].Name)
		}
	}
	return nil
}

// reads says whether a column of the row reads as the JSON v. So a value of a type that PostgreSQL can't compare, or in which
// a client can't tell null from null within json, is still the one that its reader saw.
func (l *locking) reads(row Row, at int, v []byte) bool {
	col := &l.t.Columns[at]
	i := slices.IndexFunc(l.ordinary, func(c Column) bool { return c.Num == col.Num })
	if i < 0 || row[i] == nil {
		return false
	}
	for _, lossless := range []bool{false, true} {
		var have, want bytes.Buffer
		text, err := AppendValue(nil, col.Type, row[i], lossless)
		if err == nil && json.Compact(&have, text) == nil && json.Compact(&want, v) == nil && bytes.Equal(have.Bytes(), want.Bytes()) {
			return true
		}
	}
	return false
}
