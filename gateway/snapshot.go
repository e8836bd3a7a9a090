package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

const (
	fetchBytes = 2 << 20 // what one FETCH should bring
	fetchMost  = 10_000
	firstFetch = 16   // rows, while their size isn't known
	fetchAgain = 1000 // rows, where a chunk before says how large they are
	fetchGrow  = 8    // times as many rows as the last FETCH, at most: sizes may be uneven
)

// snapshot is a short read-only transaction that holds the collection's table against changes of its shape.
type snapshot struct {
	conn    *pgxpool.Conn
	file    uint32 // the table's storage; another one after a rewrite
	xmax    uint64
	running []uint64
}

// open begins a snapshot. The lock comes first, for it must be held when the snapshot is taken: a rewrite or truncate that
// commits between the two would leave an empty table to an older snapshot.
func (x *export) open(ctx context.Context, c *policies.Collection) (*snapshot, error) {
	conn, err := x.g.o.Source.Acquire(ctx)
	if err != nil {
		return nil, (&Problem{Code: SourceUnavailable}).Because(err)
	}
	s := &snapshot{conn: conn}
	if err := s.begin(ctx, c); err != nil {
		s.close(ctx)
		return nil, sourceProblem(err)
	}
	return s, nil
}

func (s *snapshot) begin(ctx context.Context, c *policies.Collection) error {
	only := "ONLY "
	if c.Table.Kind == 'p' {
		only = ""
	}
	sql := `BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = '5s'; LOCK TABLE ` + only + c.Table.SQL() + ` IN ACCESS SHARE MODE`
	if _, err := s.conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
		return fmt.Errorf("begin a snapshot of %s: %w", c.Table, err)
	}
	var text string
	var oid uint32
	err := s.conn.QueryRow(ctx, `SELECT pg_current_snapshot()::text, coalesce(to_regclass($1)::oid, 0), coalesce(pg_relation_filenode(to_regclass($1)), 0)`, c.Table.SQL()).Scan(&text, &oid, &s.file)
	if err != nil {
		return fmt.Errorf("take a snapshot of %s: %w", c.Table, err)
	}
	if oid != c.Table.OID {
		return NewProblem(CollectionUnavailable, "the table of collection %s was made anew", c.Name)
	}
	return s.parse(text)
}

// parse reads xmin:xmax:xip_list.
func (s *snapshot) parse(text string) (err error) {
	part := strings.Split(text, ":")
	if len(part) != 3 {
		return fmt.Errorf("unexpected snapshot %q", text)
	}
	if s.xmax, err = strconv.ParseUint(part[1], 10, 64); err != nil {
		return err
	}
	for _, id := range strings.FieldsFunc(part[2], func(r rune) bool { return r == ',' }) {
		n, err := strconv.ParseUint(id, 10, 64)
		if err != nil {
			return err
		}
		s.running = append(s.running, n)
	}
	return nil
}

// close ends the snapshot; nil is let through.
func (s *snapshot) close(ctx context.Context) {
	if s == nil || s.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if _, err := s.conn.Exec(ctx, `ROLLBACK`); err != nil {
		s.conn.Conn().Close(ctx) // the pool makes another
	}
	s.conn.Release()
	s.conn = nil
}

// layout reads the table's columns as the snapshot's lock keeps them.
func (s *snapshot) layout(ctx context.Context, types *schema.Types, c *policies.Collection) ([]schema.Column, error) {
	rows, err := s.conn.Query(ctx, `SELECT attnum, attname::text, atttypid, atttypmod FROM pg_attribute
		WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum`, c.Table.OID)
	if err != nil {
		return nil, err
	}
	var oids []uint32
	cols, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (col schema.Column, err error) {
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
		if err := types.Load(ctx, s.conn, unknown...); err != nil {
			return nil, err
		}
	}
	for i, oid := range oids {
		if cols[i].Type = types.Lookup(oid); cols[i].Type == nil {
			return nil, fmt.Errorf("column %s of %s has a type that was dropped", cols[i].Name, c.Table)
		}
	}
	return cols, nil
}

// read fetches rows after the last one of the chunk before and appends the documents that the caller may see.
func (s *snapshot) read(ctx context.Context, x *export, c *policies.Collection) (ended bool, err error) {
	cols, err := s.layout(ctx, x.g.o.Types, c)
	if err != nil {
		return false, err
	}
	b, err := c.Bind(cols)
	if err != nil {
		return false, (&Problem{Code: CollectionUnavailable, Detail: "the table of collection " + c.Name + " changed"}).Because(err)
	}
	q, err := x.selection(c, cols)
	if err != nil || q == nil {
		return true, err
	}
	if q.physical {
		if err := s.keepPlaces(ctx, x, c); err != nil {
			return false, err
		}
	}
	pg := s.conn.Conn().PgConn()
	if res := pg.ExecParams(ctx, "DECLARE walgate_rows NO SCROLL CURSOR FOR "+q.sql, q.params, q.oids, nil, nil).Read(); res.Err != nil {
		var pg *pgconn.PgError
		if x.cur.Key != nil && errors.As(res.Err, &pg) && strings.HasPrefix(pg.Code, "22") { // the key is no value of its column
			return false, (&Problem{Code: InvalidCursor, Detail: "send X-Sync-Cursor as it was received"}).Because(res.Err)
		}
		return false, fmt.Errorf("read %s: %w", c.Table, res.Err)
	}
	n := firstFetch
	if x.average > 0 {
		n = min(fetchAgain, max(1, fetchBytes/x.average))
	}
	for !x.full() {
		n = min(n, fetchMost, x.rows-x.fetched)
		rows, bytes, err := s.fetch(ctx, pg, x, c, b, n, q.keyAt)
		if err != nil {
			return false, err
		}
		if rows < n && !x.ended {
			return true, nil
		}
		if x.average == 0 {
			x.handOver(false) // the first rows go ahead
		}
		x.average = max(1, bytes/max(1, rows))
		n = min(n*fetchGrow, max(1, fetchBytes/x.average))
	}
	return false, nil
}

// keepPlaces prepares for reading in the order in which rows are stored. A scan that is to go on at a place may not begin
// where another session's scan is, nor filter its way there; and after a rewrite, rows are elsewhere.
func (s *snapshot) keepPlaces(ctx context.Context, x *export, c *policies.Collection) error {
	_, err := s.conn.Exec(ctx, `SET LOCAL synchronize_seqscans = off; SET LOCAL enable_seqscan = off`, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return err
	}
	if x.cur.Key != nil && x.file != s.file {
		return &Problem{Code: CursorExpired, Detail: "the table of collection " + c.Name + " was rewritten while it was read"}
	}
	x.file = s.file
	return nil
}

// fetch reads n rows and returns how many there were and their size. It keeps those that fit into the chunk; what comes
// behind them is read again with the next one.
func (s *snapshot) fetch(ctx context.Context, pg *pgconn.PgConn, x *export, c *policies.Collection, b *policies.Binding, n int, keyAt []int) (rows, bytes int, err error) {
	rr := pg.ExecParams(ctx, "FETCH "+strconv.Itoa(n)+" FROM walgate_rows", nil, nil, nil, nil)
	var failed error
	kept, key, width := 0, make([][]byte, len(keyAt)), b.Width()
	for rr.NextRow() {
		row := schema.Row(rr.Values())
		rows++
		for _, v := range row {
			bytes += len(v)
		}
		if failed != nil || x.ended {
			continue
		}
		if failed = x.appendRow(c, b, row[:width]); failed != nil || x.ended {
			continue
		}
		kept++
		for i, at := range keyAt {
			key[i] = append(key[i][:0], row[at]...)
		}
	}
	if _, err := rr.Close(); err != nil {
		return rows, bytes, fmt.Errorf("read %s: %w", c.Table, err)
	}
	if kept > 0 {
		x.cur.Key = make([]string, len(key))
		for i, k := range key {
			x.cur.Key[i] = string(k)
		}
	}
	x.fetched += kept
	return rows, bytes, failed
}

// selection reads a collection's rows after the last one read.
type selection struct {
	sql      string
	params   [][]byte
	oids     []uint32
	keyAt    []int // of the columns that say where to go on
	physical bool  // in stored order
}

// selection makes the query of what is left of a collection; nil where the caller's scopes match nothing.
//
// Pages go by key. A stream of a whole table goes in the order in which rows are stored, which costs a fraction: a row that
// an update moves meanwhile to a place already read is missing then, but that update's version lies above L, so that the
// feed brings the row; the same holds for what a later snapshot shows of any row.
func (x *export) selection(c *policies.Collection, cols []schema.Column) (*selection, error) {
	predicate, args := x.feed.caller.ScopeSQL(c, 1)
	if predicate == "false" {
		return nil, nil
	}
	q := &selection{physical: x.parts != nil && predicate == "true" && c.Table.Kind == 'r'}
	for _, a := range args {
		q.params, q.oids = append(q.params, []byte(a)), append(q.oids, 0)
	}
	var names []string
	for _, col := range cols {
		names = append(names, pgx.Identifier{col.Name}.Sanitize())
	}
	if q.physical {
		q.keyAt, q.params, q.oids = []int{len(cols)}, [][]byte{[]byte("(0,0)")}, []uint32{pgtype.TIDOID}
		if x.cur.Key != nil {
			q.params[0] = []byte(x.cur.Key[0])
		}
		q.sql = "SELECT " + strings.Join(names, ", ") + ", ctid FROM ONLY " + c.Table.SQL() + " WHERE ctid > $1"
		return q, nil
	}
	var keys []string
	for _, k := range c.Table.Key {
		name := c.Table.Columns[k].Name
		at := slices.IndexFunc(cols, func(col schema.Column) bool { return col.Name == name })
		if at < 0 {
			return nil, NewProblem(CollectionUnavailable, "the key of collection %s changed", c.Name)
		}
		q.keyAt, keys = append(q.keyAt, at), append(keys, names[at])
	}
	if key := x.cur.Key; key != nil {
		if len(key) != len(keys) {
			return nil, &Problem{Code: CursorExpired, Detail: "the key of a collection changed since the first page"}
		}
		var at []string
		for i, k := range key {
			q.params, q.oids = append(q.params, []byte(k)), append(q.oids, cols[q.keyAt[i]].Type.OID)
			at = append(at, "$"+strconv.Itoa(len(q.params)))
		}
		predicate = "(" + predicate + ") AND (" + strings.Join(keys, ", ") + ") > (" + strings.Join(at, ", ") + ")"
	}
	from := " FROM ONLY "
	if c.Table.Kind == 'p' {
		from = " FROM "
	}
	q.sql = "SELECT " + strings.Join(names, ", ") + from + c.Table.SQL() + " WHERE " + predicate + " ORDER BY " + strings.Join(keys, ", ")
	return q, nil
}
