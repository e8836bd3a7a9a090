package changelog

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5"
)

// writeFiles writes a piece's events, as many at once as name different attachments.
func (a *Appender) writeFiles(ctx context.Context, files []FileEvent) error {
	for len(files) > 0 {
		seen := map[[16]byte]bool{}
		n := 0
		for n < len(files) && !seen[files[n].Key] {
			seen[files[n].Key] = true
			n++
		}
		if err := a.writeEvents(ctx, files[:n]); err != nil {
			return err
		}
		files = files[n:]
	}
	return nil
}

// stored is what the log knows of an attachment's bytes.
type storedBytes struct {
	event  int64
	fill   int32
	sha256 []byte
}

func (a *Appender) storedBytes(ctx context.Context, files []FileEvent) (map[[16]byte]storedBytes, error) {
	keys := make([][16]byte, len(files))
	for i := range files {
		keys[i] = files[i].Key
	}
	out := map[[16]byte]storedBytes{}
	rows, err := a.conn.Query(ctx, `SELECT b.* FROM unnest($1::uuid[]) AS t(key)
		CROSS JOIN LATERAL (SELECT key, event, fill, sha256 FROM walgate.attachment_bytes WHERE key = t.key LIMIT 1) b`, keys)
	if err != nil {
		return nil, err
	}
	var key [16]byte
	var s storedBytes
	_, err = pgx.ForEachRow(rows, []any{&key, &s.event, &s.fill, &s.sha256}, func() error { out[key], s.sha256 = s, nil; return nil })
	return out, err
}

// writeEvents writes events of different attachments. An upload ends what was withheld before, and withholds the attachment from
// scopes that name it by now though its uploader may not write there: naming an id before its bytes come must not be a way
// to read them. While no document names it, it is held by its uploader's scope.
func (a *Appender) writeEvents(ctx context.Context, files []FileEvent) error {
	known, err := a.storedBytes(ctx, files)
	if err != nil {
		return err
	}
	fill := a.att.newest[0]
	b := &pgx.Batch{}
	for i := range files {
		e := &files[i]
		old, was := known[e.Key]
		if was && old.fill == fill && old.event >= e.ID {
			continue // a fill's row that was read before what the log holds by now
		}
		// A fill found what the log holds: who may read it stays. The events of a restored source count from an earlier number on.
		again := was && old.event == e.ID && (e.state() != FileUploaded || bytes.Equal(old.sha256, e.SHA256))
		b.Queue(writeEventSQL, e.Key, e.AttachmentID, e.ID, string(rune(e.state())), e.Size, e.ContentType, digest(e), createdAt(e), e.Home, int64(e.Version), fill, again)
		a.att.touched.add(e.Key, [16]byte{}, e.Version)
		if again || e.state() != FileUploaded || e.Event == FileReturned && was {
			continue
		}
		if was {
			b.Queue(`DELETE FROM walgate.attachment_withheld WHERE attachment = $1`, e.Key)
		}
		if e.Scopes != nil {
			b.Queue(`INSERT INTO walgate.attachment_withheld SELECT $1, scope FROM `+naming("$1")+` n WHERE scope <> ALL ($2::uuid[])`, e.Key, e.Scopes)
		}
	}
	if b.Len() == 0 {
		return nil
	}
	a.att.bytes = true
	if err := a.conn.SendBatch(ctx, b).Close(); err != nil {
		return err
	}
	return a.spill(ctx)
}

// state is what the event makes of the bytes.
func (e *FileEvent) state() byte {
	if e.Event == FileReturned {
		return FileUploaded
	}
	return e.Event
}

// writeEventSQL keeps what a deletion doesn't tell: what it was that is deleted.
var writeEventSQL = `INSERT INTO walgate.attachment_bytes AS b (key, id, event, state, size, content_type, sha256, created_at, home, version, fill)
	SELECT $1, $2, $3, $4::text::"char", $5, $6, $7, $8, CASE WHEN $4 <> 'd' AND ` + anywhere("$1") + ` IS NULL THEN $9::uuid END, $10, $11
	ON CONFLICT (key) DO UPDATE SET event = excluded.event, state = excluded.state, version = excluded.version, fill = excluded.fill,
		home = CASE WHEN $12 OR excluded.state = 'm' THEN b.home ELSE excluded.home END,
		size = CASE WHEN excluded.state = 'u' THEN excluded.size ELSE b.size END,
		content_type = CASE WHEN excluded.state = 'u' THEN excluded.content_type ELSE b.content_type END,
		sha256 = CASE WHEN excluded.state = 'u' THEN excluded.sha256 ELSE b.sha256 END,
		created_at = CASE WHEN excluded.state = 'u' THEN excluded.created_at ELSE b.created_at END`

func digest(e *FileEvent) []byte {
	if len(e.SHA256) == 0 {
		return nil
	}
	return e.SHA256
}

func createdAt(e *FileEvent) time.Time {
	if e.CreatedAt.IsZero() {
		return e.Version.Time()
	}
	return e.CreatedAt
}

// writeFill writes one step of a fill.
func (a *Appender) writeFill(ctx context.Context, s *FillStep) error {
	if s.Start {
		a.att.newest[s.Collection] = s.Fill
		if _, err := a.conn.Exec(ctx, `INSERT INTO walgate.attachment_fills (fill, collection, version, estimate) VALUES ($1, $2, $3, $4)`, s.Fill, s.Collection, int64(s.Version), s.Estimate); err != nil {
			return fmt.Errorf("begin fill %d: %w", s.Fill, err)
		}
	}
	if a.att.newest[s.Collection] != s.Fill {
		return nil // overtaken by a newer one
	}
	if err := a.writeFillRows(ctx, s); err != nil {
		return err
	}
	if s.Swept && s.Collection == 0 {
		s.SweepFrom, s.SweepTo = 0, math.MaxUint32 // once more: a row that was written meanwhile may have moved behind the sweep
	}
	if s.SweepTo > s.SweepFrom {
		if err := a.sweep(ctx, s); err != nil {
			return err
		}
	}
	looked := s.Looked
	if looked == 0 {
		looked = int64(len(s.Rows))
	}
	b := &pgx.Batch{}
	if s.Position != nil || looked > 0 || s.Done || s.Swept {
		b.Queue(`UPDATE walgate.attachment_fills SET position = coalesce($2::text[], position), rows = rows + $3, done = done OR $4, swept = swept OR $5 WHERE fill = $1`,
			s.Fill, s.Position, looked, s.Done, s.Swept)
	}
	if s.Swept {
		b.Queue(`DELETE FROM walgate.attachment_fills WHERE collection = $1 AND (fill < $2 OR fill = ANY ($3::int[]))`, s.Collection, s.Fill, s.Stale)
	}
	if b.Len() == 0 {
		return nil
	}
	return a.conn.SendBatch(ctx, b).Close()
}

// writeFillRows writes the references of the rows that the log knows nothing newer of.
func (a *Appender) writeFillRows(ctx context.Context, s *FillStep) error {
	if len(s.Rows) == 0 {
		return nil
	}
	ids, hashes := make([]string, len(s.Rows)), make([]int64, len(s.Rows))
	for i := range s.Rows {
		ids[i], hashes[i] = string(s.Rows[i].DocID), documentHash(s.Collection, s.Rows[i].DocID)
	}
	rows, err := a.conn.Query(ctx, `SELECT place FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS t(doc_id, document, place)
		WHERE (SELECT true FROM walgate.changes c WHERE c.document = t.document AND c.version >= $3 AND c.version < $5 AND c.collection = $4 AND c.doc_id = t.doc_id LIMIT 1)`,
		ids, hashes, int64(s.From), s.Collection, int64(s.Version))
	if err != nil {
		return err
	}
	newer, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return err
	}
	skip := make([]bool, len(s.Rows))
	for _, place := range newer {
		skip[place-1] = true
	}
	p := Piece{}
	for i := range s.Rows {
		row := &s.Rows[i]
		for j := range row.References {
			if r := row.References[j]; !skip[i] {
				r.Document, r.Version, r.Fill = row.Document, row.Version, s.Fill
				p.References = append(p.References, r)
			}
		}
	}
	return a.writeReferences(ctx, []Piece{p})
}

// sweep removes, from a range of heap blocks, what the fills before wrote: references, or, of the bytes, what the newest fill
// didn't find. Rows are never moved between blocks by anybody but VACUUM FULL and CLUSTER.
func (a *Appender) sweep(ctx context.Context, s *FillStep) error {
	const blocks = ` WHERE ctid >= format('(%s,0)', $1::bigint)::tid AND ctid < format('(%s,0)', $2::bigint)::tid `
	if s.Collection == 0 {
		rows, err := a.conn.Query(ctx, `UPDATE walgate.attachment_bytes SET state = 'd', home = NULL, version = $4`+blocks+`AND fill <> $3 AND state <> 'd' RETURNING key`, s.SweepFrom, s.SweepTo, s.Fill, int64(s.Version))
		if err != nil {
			return err
		}
		var key [16]byte
		if _, err = pgx.ForEachRow(rows, []any{&key}, func() error { a.att.touched.add(key, [16]byte{}, s.Version); return nil }); err != nil {
			return err
		}
		return a.spill(ctx)
	}
	rows, err := a.conn.Query(ctx, `DELETE FROM walgate.attachment_references`+blocks+`AND fill = ANY ($3::int[]) RETURNING attachment, scope`, s.SweepFrom, s.SweepTo, s.Stale)
	if err != nil {
		return err
	}
	var attachment, scope [16]byte
	if _, err = pgx.ForEachRow(rows, []any{&attachment, &scope}, func() error { a.att.touched.add(attachment, scope, s.Version); return nil }); err != nil {
		return err
	}
	return a.spill(ctx)
}
