package gateway

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

const (
	fenceTimeout     = 10 * time.Second
	snapshotAttempts = 4
	fetchBytes       = 512 << 10 // what one FETCH should bring
	fetchMost        = 2000
	firstFetch       = 16 // rows, while their size isn't known
)

// export reads a caller's rows from the source's tables, chunk by chunk.
//
// The first chunk's snapshot S decides L: with a fence passed after S was taken, everything that S shows is durable and
// in the log, and L is the last version below the first logged transaction that S doesn't show. So S shows every
// transaction up to L, pulling from L misses nothing, and later snapshots only show more.
type export struct {
	g     *Gateway
	feed  *feed
	cur   *fullCursor
	rows  int // limits of one chunk
	bytes int
	buf   []byte
	count int // documents so far

	first   *snapshot         // of the first chunk, until its rows are read
	beyond  changelog.Version // not 0: some snapshot may show more than L
	fetched int               // rows of this chunk
	ended   bool              // the next row doesn't fit into this chunk
}

// snapshot is a short read-only transaction that holds the collection's table against changes of its shape.
type snapshot struct {
	conn    *pgxpool.Conn
	xmax    uint64
	running []uint64
}

// begin computes L, or checks the cursor of an earlier page.
func (x *export) begin(ctx context.Context, since *changelog.Cursor) error {
	if x.cur != nil {
		return x.resume(ctx)
	}
	for attempt := 1; ; attempt++ {
		s, err := x.open(ctx, x.feed.collections[0])
		if err != nil {
			return err
		}
		err = x.anchor(ctx, s, since, attempt == snapshotAttempts)
		if err == nil {
			x.first = s
			return nil
		}
		s.close(ctx)
		if !errors.Is(err, errRetry) {
			return err
		}
	}
}

// anchor finds L for a snapshot.
func (x *export) anchor(ctx context.Context, s *snapshot, since *changelog.Cursor, lastAttempt bool) error {
	if err := x.passFence(ctx); err != nil {
		return err
	}
	first, shown, h, err := x.g.o.Log.FirstInvisible(ctx, s.xmax, s.running)
	if err != nil {
		return x.g.logProblem(err)
	}
	if err := x.feed.usable(h); err != nil {
		return err
	}
	last := h.Version
	if first != 0 {
		last = first - 1
		if shown {
			if !lastAttempt {
				return errRetry
			}
			x.beyond = h.Version
		}
	}
	x.cur = &fullCursor{Last: last, History: h.History, ScopeHash: x.feed.caller.ScopeHash, Collections: x.feed.names()}
	for _, c := range x.feed.collections {
		x.cur.Floors = append(x.cur.Floors, stateOf(h, c.Name).Floor)
	}
	if since != nil && x.feed.check(*since, h) == nil && since.Version <= last {
		x.cur.Merge, x.cur.Tombstones = true, since.Version
	} else {
		x.cur.Tombstones = last
	}
	return nil
}

// passFence waits until everything that was visible when it was called is durable and logged.
func (x *export) passFence(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, x.g.limits.fence)
	defer cancel()
	lsn, err := x.g.o.Fence(ctx)
	if err != nil {
		return (&Problem{Code: SourceUnavailable}).Because(err)
	}
	if err := x.g.hub.waitLSN(ctx, lsn); err != nil {
		return (&Problem{Code: LogBehind, Detail: "the change log has not reached the source's present state in time", RetryAfter: 2 * time.Second}).Because(err)
	}
	return nil
}

// settle returns the version from which the client's replica is whole, if that isn't L: a chunk after the first, or a
// snapshot that is no prefix of the commit order, shows later states of some rows.
func (x *export) settle(ctx context.Context) (changelog.Version, error) {
	if x.beyond == 0 {
		return 0, nil
	}
	if err := x.passFence(ctx); err != nil { // what the later snapshots showed is durable and logged now
		return 0, err
	}
	h, err := x.g.o.Log.Head(ctx)
	if err != nil {
		return 0, x.g.logProblem(err)
	}
	return h.Version, nil
}

func (x *export) done() bool {
	return x.cur.Index >= len(x.cur.Collections) && x.cur.Tombstones >= x.cur.Last
}

// fill adds the next chunk to buf: tombstones first, then documents, until a limit is reached or all is read.
func (x *export) fill(ctx context.Context) error {
	x.fetched, x.ended = 0, false
	defer func() {
		x.first.close(ctx)
		x.first = nil
	}()
	if x.cur.Tombstones < x.cur.Last {
		if err := x.tombstones(ctx); err != nil {
			return err
		}
	}
	for x.cur.Tombstones >= x.cur.Last && x.cur.Index < len(x.cur.Collections) && !x.full() {
		ended, err := x.documents(ctx, x.feed.collections[x.cur.Index])
		if err != nil {
			return err
		}
		if ended {
			x.cur.Index++
			x.cur.Key = nil
		}
	}
	return nil
}

func (x *export) full() bool { return x.ended || x.fetched >= x.rows || len(x.buf) >= x.bytes }

// tombstones adds what was deleted for the caller between its since and L.
func (x *export) tombstones(ctx context.Context) error {
	for x.cur.Tombstones < x.cur.Last && !x.full() {
		p, err := x.g.readAdmitted(ctx, changelog.Request{Scopes: x.feed.scopes, Since: x.cur.Tombstones, Until: x.cur.Last, Limit: min(pullMost, x.rows-x.fetched), MaxBytes: x.g.limits.page})
		if err != nil {
			return err
		}
		if x.feed.check(changelog.Cursor{Version: x.cur.Tombstones, History: x.cur.History}, &p.Head) != nil {
			return &Problem{Code: CursorExpired, Detail: "the log no longer reaches back to where the resync began"}
		}
		for _, c := range lastStates(x.feed.judge(p.Entries, &p.Head, x.g.policyFailed)) {
			if c.op == policies.Upsert {
				continue
			}
			x.buf = append(x.buf, `{"collection":"`...)
			x.buf = append(x.buf, c.collection...)
			x.buf = append(x.buf, `","doc_id":`...)
			x.buf = schema.AppendString(x.buf, c.entry.DocID)
			x.buf = append(x.buf, `,"deleted":true,"version":"`...)
			x.buf = c.entry.Version.AppendText(x.buf, x.cur.History)
			x.buf = append(x.buf, "\"}\n"...)
			x.fetched++
		}
		x.cur.Tombstones = p.Last
	}
	return nil
}

// documents adds rows of one collection in key order; true: the collection is read to its end.
func (x *export) documents(ctx context.Context, c *policies.Collection) (ended bool, err error) {
	s := x.first
	x.first = nil
	if s == nil {
		if s, err = x.open(ctx, c); err != nil {
			return false, err
		}
		x.beyond = max(x.beyond, 1)
	}
	defer s.close(ctx)
	ended, err = s.read(ctx, x, c)
	if err != nil {
		return false, sourceProblem(err)
	}
	return ended, nil
}

func sourceProblem(err error) error {
	var p *Problem
	if errors.As(err, &p) {
		return err
	}
	return (&Problem{Code: SourceUnavailable}).Because(err)
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
	err := s.conn.QueryRow(ctx, `SELECT pg_current_snapshot()::text, coalesce(to_regclass($1)::oid, 0)`, c.Table.SQL()).Scan(&text, &oid)
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

// read fetches rows after the cursor's key and appends the documents that the caller may see.
func (s *snapshot) read(ctx context.Context, x *export, c *policies.Collection) (ended bool, err error) {
	cols, err := s.layout(ctx, x.g.o.Types, c)
	if err != nil {
		return false, err
	}
	b, err := c.Bind(cols)
	if err != nil {
		return false, (&Problem{Code: CollectionUnavailable, Detail: "the table of collection " + c.Name + " changed"}).Because(err)
	}
	sql, params, oids, keyAt, err := selectSQL(x, c, cols)
	if err != nil || sql == "" {
		return true, err
	}
	pg := s.conn.Conn().PgConn()
	if res := pg.ExecParams(ctx, "DECLARE walgate_rows NO SCROLL CURSOR FOR "+sql, params, oids, nil, nil).Read(); res.Err != nil {
		var pg *pgconn.PgError
		if x.cur.Key != nil && errors.As(res.Err, &pg) && strings.HasPrefix(pg.Code, "22") { // the key is no value of its column
			return false, (&Problem{Code: InvalidCursor, Detail: "send X-Sync-Cursor as it was received"}).Because(res.Err)
		}
		return false, fmt.Errorf("read %s: %w", c.Table, res.Err)
	}
	size, had := 0, 0
	for !x.full() {
		n := min(fetchMost, x.rows-x.fetched)
		if had > 0 {
			n = min(n, max(1, fetchBytes*had/max(1, size)))
		} else {
			n = min(n, firstFetch)
		}
		rows, bytes, err := s.fetch(ctx, pg, x, c, b, n, keyAt)
		if err != nil {
			return false, err
		}
		had, size = had+rows, size+bytes
		if rows < n && !x.ended {
			return true, nil
		}
	}
	return false, nil
}

// fetch reads n rows and returns how many there were and their size. It keeps those that fit into the chunk; what comes
// behind them is read again with the next one.
func (s *snapshot) fetch(ctx context.Context, pg *pgconn.PgConn, x *export, c *policies.Collection, b *policies.Binding, n int, keyAt []int) (rows, bytes int, err error) {
	rr := pg.ExecParams(ctx, "FETCH "+strconv.Itoa(n)+" FROM walgate_rows", nil, nil, nil, nil)
	var failed error
	kept, key := 0, make([][]byte, len(keyAt))
	for rr.NextRow() {
		row := schema.Row(rr.Values())
		rows++
		for _, v := range row {
			bytes += len(v)
		}
		if failed != nil || x.ended {
			continue
		}
		if failed = x.appendRow(c, b, row); failed != nil || x.ended {
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

// appendRow appends the document of a row that the caller may see. One that exceeds the chunk's bytes ends it, unless it
// is the first.
func (x *export) appendRow(c *policies.Collection, b *policies.Binding, row schema.Row) error {
	sees, err := b.Sees(row, x.feed.caller)
	if err != nil {
		x.g.policyFailed(c.Name, err)
	}
	if !sees {
		return nil
	}
	from := len(x.buf)
	x.buf = append(x.buf, `{"collection":"`...)
	x.buf = append(x.buf, c.Name...)
	x.buf = append(x.buf, `","doc_id":`...)
	if x.buf, err = appendDocIDString(x.buf, b, row); err == nil {
		x.buf = append(x.buf, `,"data":`...)
		x.buf, err = b.AppendDocument(x.buf, row)
	}
	if err != nil {
		x.buf = x.buf[:from]
		return err
	}
	x.buf = append(x.buf, "}\n"...)
	if len(x.buf) > x.bytes && from > 0 {
		x.buf, x.ended = x.buf[:from], true
		return nil
	}
	x.count++
	return nil
}

// appendDocIDString appends the document's id as a JSON string.
func appendDocIDString(dst []byte, b *policies.Binding, row schema.Row) ([]byte, error) {
	var room [128]byte
	id, err := b.AppendDocID(room[:0], row)
	return schema.AppendString(dst, id), err
}

// selectSQL makes the query of a collection's rows after the cursor's key; "" where the caller's scopes match nothing.
func selectSQL(x *export, c *policies.Collection, cols []schema.Column) (sql string, params [][]byte, oids []uint32, keyAt []int, err error) {
	var names, keys []string
	for _, col := range cols {
		names = append(names, pgx.Identifier{col.Name}.Sanitize())
	}
	for _, k := range c.Table.Key {
		name := c.Table.Columns[k].Name
		at := -1
		for i := range cols {
			if cols[i].Name == name {
				at = i
			}
		}
		if at < 0 {
			return "", nil, nil, nil, NewProblem(CollectionUnavailable, "the key of collection %s changed", c.Name)
		}
		keyAt = append(keyAt, at)
		keys = append(keys, names[at])
	}
	predicate, args := x.feed.caller.ScopeSQL(c, 1)
	if predicate == "false" {
		return "", nil, nil, nil, nil
	}
	for _, a := range args {
		params, oids = append(params, []byte(a)), append(oids, 0)
	}
	if key := x.cur.Key; key != nil {
		if len(key) != len(keys) {
			return "", nil, nil, nil, &Problem{Code: CursorExpired, Detail: "the key of a collection changed since the first page"}
		}
		var at []string
		for i, k := range key {
			params, oids = append(params, []byte(k)), append(oids, cols[keyAt[i]].Type.OID)
			at = append(at, "$"+strconv.Itoa(len(params)))
		}
		predicate = "(" + predicate + ") AND (" + strings.Join(keys, ", ") + ") > (" + strings.Join(at, ", ") + ")"
	}
	from := " FROM ONLY "
	if c.Table.Kind == 'p' {
		from = " FROM "
	}
	return "SELECT " + strings.Join(names, ", ") + from + c.Table.SQL() + " WHERE " + predicate + " ORDER BY " + strings.Join(keys, ", "), params, oids, keyAt, nil
}
