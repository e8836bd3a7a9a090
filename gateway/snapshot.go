package gateway

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

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

// snapshot is the part of a snapshot that reads for an export.
type snapshot struct{ *schema.Snapshot }

// open begins a snapshot.
func (x *export) open(ctx context.Context, c *policies.Collection) (*snapshot, error) {
	conn, err := x.g.o.Source.Acquire(ctx)
	if err != nil {
		return nil, (&Problem{Code: SourceUnavailable}).Because(err)
	}
	s, err := schema.OpenSnapshot(ctx, conn, c.Table)
	switch {
	case errors.Is(err, schema.ErrRecreated):
		return nil, NewProblem(CollectionUnavailable, "the table of collection %s was made anew", c.Name)
	case err != nil:
		return nil, sourceProblem(err)
	}
	return &snapshot{s}, nil
}

// close ends the snapshot; nil is let through.
func (s *snapshot) close(ctx context.Context) {
	if s != nil {
		s.Close(ctx)
	}
}

// read fetches rows after the last one of the chunk before and appends the documents that the caller may see.
func (s *snapshot) read(ctx context.Context, x *export, c *policies.Collection) (ended bool, err error) {
	cols, err := s.Layout(ctx, x.g.o.Types)
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
	pg := s.Conn.Conn().PgConn()
	if res := pg.ExecParams(ctx, "DECLARE walgate_rows NO SCROLL CURSOR FOR "+q.SQL, q.Params, q.Types, nil, nil).Read(); res.Err != nil {
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
		rows, bytes, err := s.fetch(ctx, pg, x, c, b, n, q.KeyAt)
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
	_, err := s.Conn.Exec(ctx, `SET LOCAL synchronize_seqscans = off; SET LOCAL enable_seqscan = off`, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return err
	}
	if x.cur.Key != nil && x.file != s.File {
		return &Problem{Code: CursorExpired, Detail: "the table of collection " + c.Name + " was rewritten while it was read"}
	}
	x.file = s.File
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
	schema.Selection
	physical bool // in stored order
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
	if q.physical {
		q.KeyAt, q.Params, q.Types = []int{len(cols)}, [][]byte{[]byte("(0,0)")}, []uint32{pgtype.TIDOID}
		if x.cur.Key != nil {
			q.Params[0] = []byte(x.cur.Key[0])
		}
		q.SQL = "SELECT " + strings.Join(schema.ColumnNames(cols), ", ") + ", ctid FROM ONLY " + c.Table.SQL() + " WHERE ctid > $1"
		return q, nil
	}
	byKey, err := c.Table.ByKey(cols, predicate, args, x.cur.Key)
	switch {
	case errors.Is(err, schema.ErrKeyGone):
		return nil, NewProblem(CollectionUnavailable, "the key of collection %s changed", c.Name)
	case err != nil:
		return nil, (&Problem{Code: CursorExpired, Detail: "the key of a collection changed since the first page"}).Because(err)
	}
	q.Selection = *byKey
	return q, nil
}
