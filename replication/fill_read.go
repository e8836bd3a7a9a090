package replication

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// chunk reads the next rows of a collection and places what they refer to.
//
// What a snapshot S shows is merged with the stream without a gap: with a fence passed after S was taken, everything that S
// shows is durable and logged. L is the first logged transaction that S doesn't show, or where it shows all, the next version.
// A document that the log holds a change of from L on is passed over, for that change has replaced its references; any other
// is in S as the log's last change of it below L has left it. Changes from L on do replace them only if L lies after the
// fill's start. Changes that nobody sees are in no log: the sequencer remembers those since the step before, and S shows all
// until then, for L lies after that step, too.
func (f *filler) chunk(ctx context.Context, t *fillTask) error {
	o := &f.tenure.leader.o
	c := o.Watcher.Current().Set.ByName(t.name)
	if c == nil {
		return errNotNow // it is stopped; going on, it begins anew
	}
	conn, err := o.Source.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("connect to the source: %w", err)
	}
	s, err := schema.OpenSnapshot(ctx, conn, c.Table)
	if err != nil {
		return err
	}
	defer s.Close(ctx)
	r := chunkReader{most: f.rows, fill: t.fill, collection: t.collection}
	if err := r.read(ctx, s, o.Watcher.Types(), c, t.position); err != nil {
		return err
	}
	if err := f.passFence(ctx); err != nil {
		return err
	}
	first, _, h, err := o.Log.FirstInvisible(ctx, s.Xmax, s.Running)
	s.Close(ctx)
	if err != nil {
		return err
	}
	if first == 0 {
		first = h.Version + 1
	}
	if now := h.Collection(t.collection); first <= t.after || now == nil || now.Refill > t.version {
		return errNotNow
	}
	if r.looked > 0 {
		step := changelog.FillStep{Rows: r.rows, Looked: r.looked, Position: r.key, From: first, Estimate: r.estimate}
		if err := f.put(ctx, t, step, nil); err != nil {
			return err
		}
		t.position, t.rows, t.estimate = r.key, t.rows+r.looked, max(t.estimate, r.estimate)
	}
	if !r.ended {
		return nil
	}
	return f.finish(ctx, t)
}

// chunkReader reads a bounded number of a collection's rows in the order of the key.
type chunkReader struct {
	most             int
	fill, collection int32
	estimate         int64
	rows             []changelog.FillRow // those that refer to something
	looked           int64
	bytes            int
	key              []string // of the last row
	ended            bool

	effects []policies.Effect
	pairs   []policies.Pair
}

func (r *chunkReader) read(ctx context.Context, s *schema.Snapshot, types *schema.Types, c *policies.Collection, after []string) error {
	cols, err := s.Layout(ctx, types)
	if err != nil {
		return err
	}
	b, err := c.Bind(cols)
	if err != nil {
		return err
	}
	q, err := c.Table.ByKey(cols, "true", nil, after)
	if err != nil {
		return err
	}
	if after == nil {
		if r.estimate, err = estimate(ctx, s.Conn.Conn(), c.Table); err != nil {
			return err
		}
	}
	pg := s.Conn.Conn().PgConn()
	if res := pg.ExecParams(ctx, "DECLARE walgate_fill NO SCROLL CURSOR FOR "+q.SQL, q.Params, q.Types, nil, nil).Read(); res.Err != nil {
		return fmt.Errorf("read %s: %w", c.Table, res.Err)
	}
	for n := min(16, r.most); !r.ended && n > 0; n = r.room(n) {
		before := r.looked
		rr := pg.ExecParams(ctx, "FETCH "+strconv.Itoa(n)+" FROM walgate_fill", nil, nil, nil, nil)
		for rr.NextRow() {
			if err == nil {
				err = r.add(b, rr.Values(), q.KeyAt)
			}
		}
		if _, failed := rr.Close(); failed != nil {
			return fmt.Errorf("read %s: %w", c.Table, failed)
		}
		if err != nil {
			return err
		}
		r.ended = int(r.looked-before) < n
	}
	return nil
}

// room returns how many rows may be fetched after n were: not many more than before, for sizes may be uneven.
func (r *chunkReader) room(n int) int {
	average := max(1, r.bytes/max(1, int(r.looked)))
	return min(8*n, r.most-int(r.looked), (fillBytes-r.bytes)/average)
}

// add notes one row and what it refers to.
func (r *chunkReader) add(b *policies.Binding, row schema.Row, keyAt []int) error {
	r.looked++
	for _, v := range row {
		r.bytes += len(v)
	}
	r.key = make([]string, len(keyAt))
	for i, at := range keyAt {
		r.key[i] = string(row[at])
	}
	// A policy that fails makes the row invisible, as in the stream, which counts it.
	r.effects, _ = b.Route(r.effects[:0], nil, row)
	if r.pairs = b.AppendReferences(r.pairs[:0], nil, row, false); len(r.pairs) == 0 {
		return nil
	}
	id, err := b.AppendDocID(nil, row)
	if err != nil {
		return err
	}
	out := changelog.FillRow{DocID: id, Document: policies.DocumentKey(r.collection, id), References: make([]changelog.Reference, len(r.pairs))}
	for i, p := range r.pairs {
		out.References[i] = changelog.Reference{Attachment: p.Attachment, Scope: p.Scope, Document: out.Document, Fill: r.fill}
	}
	r.bytes += len(id) + changelog.ReferenceBytes*len(r.pairs)
	r.rows = append(r.rows, out)
	return nil
}

// estimate returns about how many rows the table has.
func estimate(ctx context.Context, conn *pgx.Conn, t *schema.Table) (n int64, err error) {
	err = conn.QueryRow(ctx, `SELECT coalesce(sum(greatest(reltuples, 0)), 0)::int8 FROM pg_class
		WHERE oid = $1::oid AND relkind <> 'p' OR oid IN (SELECT relid FROM pg_partition_tree($1::oid) WHERE isleaf)`, t.OID).Scan(&n)
	return n, err
}

// filesSQL reads the present state of files as events, in the order of eventColumns.
const filesSQL = `SELECT event_id::text, attachment_id, state::text, size::text, content_type, sha256::text, subject, client_id, scopes::text, created_at::text
	FROM walgate.files WHERE attachment_id > $1 ORDER BY attachment_id LIMIT $2`

// files places the state of the next files. No version is needed to merge them with the stream: the events of one file are
// numbered in the order of their commits, and the log takes none that is older than what it holds.
func (f *filler) files(ctx context.Context, t *fillTask) error {
	after := ""
	if len(t.position) > 0 {
		after = t.position[0]
	}
	out, ended, err := readFiles(ctx, f.tenure.leader.o.Source, after, f.rows)
	if err != nil {
		return fmt.Errorf("read walgate.files: %w", err)
	}
	if f.rowsLeft() && slices.ContainsFunc(out, func(e changelog.FileEvent) bool { return e.Scopes != nil }) {
		return errNotNow // a scope that names such a file, and may not have it, must be known by then
	}
	if len(out) > 0 {
		if err := f.passFence(ctx); err != nil { // what was read is on the source's disk
			return err
		}
		last := []string{out[len(out)-1].AttachmentID}
		step := changelog.FillStep{Looked: int64(len(out)), Position: last}
		if err := f.put(ctx, t, step, out); err != nil {
			return err
		}
		t.position, t.rows = last, t.rows+int64(len(out))
	}
	if !ended {
		return nil
	}
	return f.finish(ctx, t)
}

// readFiles reads the next files, not many more bytes than a step may hold: each may name thousands of scopes.
func readFiles(ctx context.Context, source *pgxpool.Pool, after string, most int) (out []changelog.FileEvent, ended bool, err error) {
	size := 0
	for n := min(16, most); n > 0; {
		rows, err := source.Query(ctx, filesSQL, after, n)
		if err != nil {
			return nil, false, err
		}
		defer rows.Close()
		before := len(out)
		for rows.Next() {
			var field [len(eventColumns)][]byte
			for i, v := range rows.RawValues() {
				field[i] = v
				size += len(v)
			}
			e, err := readEvent(field)
			if err != nil {
				return nil, false, fmt.Errorf("which must be as walgate init made it: %w", err)
			}
			out = append(out, *e)
		}
		if err := rows.Err(); err != nil || len(out) < before+n {
			return out, true, err
		}
		after = out[len(out)-1].AttachmentID
		n = min(8*n, most-len(out), (fillBytes-size)/max(1, size/len(out)))
	}
	return out, false, nil
}
