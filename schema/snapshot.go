package schema

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrRecreated says that a table is another one than the catalog's: it was dropped and made anew.
var ErrRecreated = errors.New("the table was made anew")

// Snapshot is a short read-only transaction that holds a table against changes of its shape.
type Snapshot struct {
	Conn    *pgxpool.Conn // nil once closed
	File    uint32        // the table's storage; another one after a rewrite
	Xmax    uint64        // the first transaction id that wasn't given out yet
	Running []uint64      // the transactions below it that were running

	table *Table
}

// OpenSnapshot begins a snapshot on a connection, which Close gives back. The lock comes first, for it must be held when
// the snapshot is taken: a rewrite or truncate that commits between the two would leave an empty table to an older snapshot.
func OpenSnapshot(ctx context.Context, conn *pgxpool.Conn, t *Table) (*Snapshot, error) {
	s := &Snapshot{Conn: conn, table: t}
	if err := s.begin(ctx); err != nil {
		s.Close(ctx)
		return nil, err
	}
	return s, nil
}

func (s *Snapshot) begin(ctx context.Context) error {
	sql := `BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = '5s'; LOCK TABLE ` + s.table.only() + ` IN ACCESS SHARE MODE`
	if _, err := s.Conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
		return fmt.Errorf("begin a snapshot of %s: %w", s.table, err)
	}
	var text string
	var oid uint32
	err := s.Conn.QueryRow(ctx, `SELECT pg_current_snapshot()::text, coalesce(to_regclass($1)::oid, 0), coalesce(pg_relation_filenode(to_regclass($1)), 0)`, s.table.SQL()).Scan(&text, &oid, &s.File)
	if err != nil {
		return fmt.Errorf("take a snapshot of %s: %w", s.table, err)
	}
	if oid != s.table.OID {
		return ErrRecreated
	}
	s.Xmax, s.Running, err = ParseSnapshot(text)
	return err
}

// ParseSnapshot reads xmin:xmax:xip_list, the text of a pg_snapshot.
func ParseSnapshot(text string) (xmax uint64, running []uint64, err error) {
	part := strings.Split(text, ":")
	if len(part) != 3 {
		return 0, nil, fmt.Errorf("unexpected snapshot %q", text)
	}
	if xmax, err = strconv.ParseUint(part[1], 10, 64); err != nil {
		return 0, nil, err
	}
	for _, id := range strings.FieldsFunc(part[2], func(r rune) bool { return r == ',' }) {
		n, err := strconv.ParseUint(id, 10, 64)
		if err != nil {
			return 0, nil, err
		}
		running = append(running, n)
	}
	return xmax, running, nil
}

// Close ends the snapshot and gives its connection back; nil is let through.
func (s *Snapshot) Close(ctx context.Context) {
	if s == nil || s.Conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if _, err := s.Conn.Exec(ctx, `ROLLBACK`); err != nil {
		s.Conn.Conn().Close(ctx) // the pool makes another
	}
	s.Conn.Release()
	s.Conn = nil
}

// Layout reads the table's columns as the snapshot's lock keeps them.
func (s *Snapshot) Layout(ctx context.Context, types *Types) ([]Column, error) {
	rows, err := s.Conn.Query(ctx, `SELECT attnum, attname::text, atttypid, atttypmod FROM pg_attribute
		WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum`, s.table.OID)
	if err != nil {
		return nil, err
	}
	var oids []uint32
	cols, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (col Column, err error) {
		var oid uint32
		err = r.Scan(&col.Num, &col.Name, &oid, &col.TypMod)
		oids = append(oids, oid)
		return col, err
	})
	if err != nil {
		return nil, err
	}
	var unknown []uint32
	for _, oid := range oids {
		if types.Lookup(oid) == nil {
			unknown = append(unknown, oid)
		}
	}
	if len(unknown) > 0 {
		if err := types.Load(ctx, s.Conn, unknown...); err != nil {
			return nil, err
		}
	}
	for i, oid := range oids {
		if cols[i].Type = types.Lookup(oid); cols[i].Type == nil {
			return nil, fmt.Errorf("column %s of %s has a type that was dropped", cols[i].Name, s.table)
		}
	}
	return cols, nil
}

// Selection is a query with its parameters, as texts.
type Selection struct {
	SQL    string
	Params [][]byte
	Types  []uint32 // of the parameters; 0: PostgreSQL finds out
	KeyAt  []int    // positions in the row of the columns that say where to go on
}

// Errors of ByKey: the table is no longer as the reader began with it.
var (
	ErrKeyGone    = errors.New("the table's key changed")
	ErrKeyChanged = errors.New("the key to go on after is of another key than the table's")
)

// ByKey selects the columns of a table's rows that a predicate lets through, in the order of its key, after one key where
// it isn't nil. The predicate's parameters come first.
func (t *Table) ByKey(cols []Column, predicate string, args []string, after []string) (*Selection, error) {
	q := &Selection{}
	for _, a := range args {
		q.Params, q.Types = append(q.Params, []byte(a)), append(q.Types, 0)
	}
	names := ColumnNames(cols)
	var keys []string
	for _, k := range t.Key {
		name := t.Columns[k].Name
		at := slices.IndexFunc(cols, func(col Column) bool { return col.Name == name })
		if at < 0 {
			return nil, ErrKeyGone
		}
		q.KeyAt, keys = append(q.KeyAt, at), append(keys, names[at])
	}
	if after != nil {
		if len(after) != len(keys) {
			return nil, ErrKeyChanged
		}
		var at []string
		for i, k := range after {
			q.Params, q.Types = append(q.Params, []byte(k)), append(q.Types, cols[q.KeyAt[i]].Type.OID)
			at = append(at, "$"+strconv.Itoa(len(q.Params)))
		}
		predicate = "(" + predicate + ") AND (" + strings.Join(keys, ", ") + ") > (" + strings.Join(at, ", ") + ")"
	}
	q.SQL = "SELECT " + strings.Join(names, ", ") + " FROM " + t.only() + " WHERE " + predicate + " ORDER BY " + strings.Join(keys, ", ")
	return q, nil
}

// ColumnNames returns the names of the columns, quoted for SQL.
func ColumnNames(cols []Column) []string {
	names := make([]string, len(cols))
	for i := range cols {
		names[i] = ident(cols[i].Name)
	}
	return names
}
