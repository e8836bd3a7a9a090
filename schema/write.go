package schema

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// WriteKind is what a write does.
type WriteKind byte

// The kinds of writes.
const (
	Insert WriteKind = 'i'
	Update WriteKind = 'u'
	Delete WriteKind = 'd'
)

// Write is one row to be written.
type Write struct {
	Table *Table
	Kind  WriteKind
	// Key holds the texts of the key's columns, in key order, as Found.Key has them. An insert without one leaves the key to
	// the database.
	Key []string
	// Data is a JSON object that holds the Columns; whatever else it holds is not written.
	Data []byte
	// Columns names what is written besides the key, which only an insert writes. The database fills in the others.
	Columns []string
}

// Batcher sends statements in one round trip: a transaction of pgx.
type Batcher interface {
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
}

// ExecWrites carries out the writes in order, in one round trip, and returns the rows as they were written, in the layout of
// Table.Ordinary; of a delete, the row that was. A nil row was not written: a trigger, or row-level security, withheld
// it, or there was none. Writes of one kind that follow each other are one statement, but no document is in one twice.
// An error is a BatchError; the transaction is then broken. The session needs SessionSettings.
func ExecWrites(ctx context.Context, b Batcher, writes []Write) ([]Row, error) {
	runs, err := newRuns(writes)
	if err != nil || len(runs) == 0 {
		return nil, err
	}
	batch := &pgx.Batch{}
	for _, r := range runs {
		batch.Queue(r.sql(), r.args()...)
	}
	rows := make([]Row, len(writes))
	results := b.SendBatch(ctx, batch)
	defer results.Close()
	for _, r := range runs {
		if err := r.read(results, writes, rows); err != nil {
			return nil, &BatchError{r.from, r.to, fmt.Errorf("write to %s: %w", r.t, err)}
		}
	}
	if err := results.Close(); err != nil {
		return nil, &BatchError{0, len(writes), fmt.Errorf("write rows: %w", err)}
	}
	return rows, nil
}

// run is the writes from from to to, exclusive, that are one statement.
type run struct {
	t        *Table
	kind     WriteKind
	keyed    bool
	at       []int // positions in t.Columns of what is written
	from, to int
	keys     map[string]bool
	param    []byte
}

func newRuns(writes []Write) (runs []*run, err error) {
	var r *run
	var record recordWriter
	for i := range writes {
		w := &writes[i]
		at, err := w.columns()
		if err != nil {
			return nil, &BatchError{i, i + 1, err}
		}
		if !r.takes(w, at) {
			r.end(&record)
			r = &run{t: w.Table, kind: w.Kind, keyed: w.Key != nil, at: at, from: i, keys: map[string]bool{}}
			runs = append(runs, r)
		}
		r.to = i + 1
		r.keys[w.document()] = true
		record.begin(i)
		record.keys(w.Key)
		values, err := members(w.Data)
		if err != nil {
			err = &ValueError{"", err.Error()}
		} else {
			err = record.columns(w.Table, "v", at, values)
		}
		if err != nil {
			return nil, &BatchError{i, i + 1, err}
		}
		record.end()
	}
	r.end(&record)
	return runs, nil
}

// columns returns the positions of what is written.
func (w *Write) columns() (at []int, err error) {
	if w.Key != nil && len(w.Key) != len(w.Table.Key) || w.Key == nil && w.Kind != Insert {
		return nil, ErrKey
	}
	if w.Kind == Delete {
		return nil, nil
	}
	for _, name := range w.Columns {
		i := w.Table.Column(name)
		if i < 0 {
			return nil, &UnknownColumnError{name}
		}
		if w.Key == nil || !slices.Contains(w.Table.Key, i) {
			at = append(at, i)
		}
	}
	slices.Sort(at)
	if at = slices.Compact(at); len(at) == 0 && w.Kind == Update {
		return nil, errors.New("an update names no column; it needs no write")
	}
	return at, nil
}

func (w *Write) document() string { return string(AppendDocID(nil, append([]string{""}, w.Key...))) }

// takes says whether the write goes into the same statement. Nothing but its place tells which row an insert without a key
// became, so it goes alone.
func (r *run) takes(w *Write, at []int) bool {
	return r != nil && r.t == w.Table && r.kind == w.Kind && r.keyed && w.Key != nil && slices.Equal(r.at, at) && !r.keys[w.document()]
}

func (r *run) end(w *recordWriter) {
	if r != nil {
		r.param = w.finish()
		*w = recordWriter{}
	}
}

// sql is the same text for all runs of a kind, so that it is planned once. A limit tells the planner that the rows are few.
func (r *run) sql() string {
	s := recordset{t: r.t}
	if r.keyed {
		s.keys(r.t)
	} else {
		s.defs = []string{"n pg_catalog.int4"}
	}
	s.columns(r.t, "v", r.at)
	var returned strings.Builder
	returned.WriteString("ROW(")
	for i, c := range r.t.Ordinary() {
		returned.WriteString(comma(i) + "w." + ident(c.Name))
	}
	returned.WriteString(")::pg_catalog.text")
	if r.kind == Insert {
		return r.insert(&s) + " RETURNING " + returned.String()
	}
	limit := "1"
	if r.to-r.from > 1 {
		limit = "$2"
	}
	from := "(SELECT * FROM " + s.from("r") + " LIMIT " + limit + ") AS r WHERE " + s.match("r") + " RETURNING r.n, " + returned.String()
	if r.kind == Delete {
		return "DELETE FROM " + r.t.only() + " AS w USING " + from
	}
	var set strings.Builder
	for i, at := range r.at {
		set.WriteString(comma(i) + ident(r.t.Columns[at].Name) + " = " + s.value(r.t, at, "r.v"+strconv.Itoa(i)))
	}
	return "UPDATE " + r.t.only() + " AS w SET " + set.String() + " FROM " + from
}

// args are the values of what sql leaves open.
func (r *run) args() []any {
	switch {
	case r.kind == Insert && !r.keyed && len(r.at) == 0:
		return nil
	case r.kind != Insert && r.to-r.from > 1:
		return []any{r.param, r.to - r.from}
	}
	return []any{r.param}
}

func (r *run) insert(s *recordset) string {
	var names, values []string
	if r.keyed {
		for i, at := range r.t.Key {
			names, values = append(names, ident(r.t.Columns[at].Name)), append(values, "r.k"+strconv.Itoa(i))
		}
	}
	for i, at := range r.at {
		names, values = append(names, ident(r.t.Columns[at].Name)), append(values, s.value(r.t, at, "r.v"+strconv.Itoa(i)))
	}
	if len(names) == 0 {
		return "INSERT INTO " + r.t.sql() + " AS w DEFAULT VALUES"
	}
	return "INSERT INTO " + r.t.sql() + " AS w (" + strings.Join(names, ", ") + ") SELECT " + strings.Join(values, ", ") + " FROM " + s.from("r")
}

// read takes over the statement's rows.
func (r *run) read(results pgx.BatchResults, writes []Write, rows []Row) error {
	q, err := results.Query()
	if err != nil {
		return err
	}
	defer q.Close()
	width := len(r.t.Ordinary())
	var inserted []Row
	for q.Next() {
		var n int
		var text []byte
		to := []any{&n, &text}
		if r.kind == Insert {
			to = to[1:]
		}
		if err := q.Scan(to...); err != nil {
			return err
		}
		row, err := parseRecord(text, width)
		if err != nil {
			return err
		}
		if r.kind == Insert {
			inserted = append(inserted, row)
		} else {
			rows[n] = row
		}
	}
	if err := q.Err(); err != nil {
		return err
	}
	return r.place(inserted, writes, rows)
}

// ErrUnmatched says that a trigger kept some rows of a statement from being inserted and gave others another key, so that
// nothing tells which is which. Writes made one by one have no such doubt.
var ErrUnmatched = errors.New("some rows were not inserted, and others have another key than was given")

// place tells which insert each row is of: they come in the order of the writes, but for those that a trigger took away.
func (r *run) place(inserted []Row, writes []Write, rows []Row) error {
	if len(inserted) == r.to-r.from {
		copy(rows[r.from:r.to], inserted)
		return nil
	}
	at := make([]int, len(r.t.Key)) // of the key in a row
	cols := r.t.Ordinary()
	for i, k := range r.t.Key {
		at[i] = slices.IndexFunc(cols, func(c Column) bool { return c.Num == r.t.Columns[k].Num })
	}
	next := r.from
	for _, row := range inserted {
		for next < r.to && !hasKey(row, at, writes[next].Key) {
			next++
		}
		if next == r.to {
			return ErrUnmatched
		}
		rows[next] = row
		next++
	}
	return nil
}

func hasKey(row Row, at []int, key []string) bool {
	for i, k := range key {
		if string(row[at[i]]) != k {
			return false
		}
	}
	return true
}
