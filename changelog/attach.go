package changelog

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

// touchedMost is how many touched pairs an open log transaction keeps in memory; more go to a temporary table.
const touchedMost = 1 << 16

// probingSession makes the appender find by index what attachments need, whatever the statistics say (see probing).
var probingSession = map[string]string{"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off", "jit": "off", "plan_cache_mode": "force_generic_plan"}

// attachments is what the appender keeps of them. What an open log transaction touched is judged once, when it ends: where a
// reference only moves, nothing is told.
type attachments struct {
	newest  map[int32]int32 // fill of each collection
	bytes   bool            // of any attachment are known
	touched touches
	most    int  // of them in memory
	spilled bool // some are in the temporary table
}

// touches are pairs whose operation may have changed. The zero scope stands for all of an attachment's.
type touches struct {
	attachment, scope [][16]byte
	version           []int64
}

func (t *touches) add(attachment, scope [16]byte, v Version) {
	t.attachment, t.scope, t.version = append(t.attachment, attachment), append(t.scope, scope), append(t.version, int64(v))
}

func (t *touches) reset() {
	t.attachment, t.scope, t.version = t.attachment[:0], t.scope[:0], t.version[:0]
	if cap(t.version) > 2*touchedMost {
		*t = touches{}
	}
}

func (s *attachments) load(ctx context.Context, conn *pgx.Conn) error {
	s.newest, s.most = map[int32]int32{}, touchedMost
	if _, err := conn.Prepare(ctx, touchName, touchStatement); err != nil {
		return err
	}
	if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM walgate.attachment_bytes)`).Scan(&s.bytes); err != nil {
		return err
	}
	rows, err := conn.Query(ctx, `SELECT collection, max(fill) FROM walgate.attachment_fills GROUP BY collection`)
	if err != nil {
		return err
	}
	var collection, fill int32
	_, err = pgx.ForEachRow(rows, []any{&collection, &fill}, func() error { s.newest[collection] = fill; return nil })
	return err
}

// writeAttachments writes what the pieces say of attachments, in their order.
func (a *Appender) writeAttachments(ctx context.Context, pieces []Piece) error {
	from := 0
	for i := range pieces {
		p := &pieces[i]
		if len(p.Files) == 0 && len(p.Fills) == 0 {
			continue
		}
		if err := a.writeReferences(ctx, pieces[from:i+1]); err != nil {
			return err
		}
		from = i + 1
		if err := a.writeFiles(ctx, p.Files); err != nil {
			return err
		}
		for j := range p.Fills {
			if err := a.writeFill(ctx, &p.Fills[j]); err != nil {
				return err
			}
		}
	}
	return a.writeReferences(ctx, pieces[from:])
}

// pair is a reference's key.
type pair struct{ attachment, scope, document [16]byte }

// writeReferences writes the net effect of the pieces' references, and touches what they name where its bytes are known.
func (a *Appender) writeReferences(ctx context.Context, pieces []Piece) error {
	n, removals := 0, 0
	for i := range pieces {
		for j := range pieces[i].References {
			if n++; pieces[i].References[j].Removed {
				removals++
			}
		}
	}
	if n == 0 {
		return nil
	}
	var gone map[pair]struct{}
	if removals > 0 {
		gone = make(map[pair]struct{}, removals)
	}
	adds := a.adds[:0]
	for i := len(pieces) - 1; i >= 0; i-- { // from the last: it counts
		refs := pieces[i].References
		for j := len(refs) - 1; j >= 0; j-- {
			r := &refs[j]
			if r.Removed {
				gone[pair{r.Attachment, r.Scope, r.Document}] = struct{}{}
				continue
			}
			if gone != nil {
				if _, ok := gone[pair{r.Attachment, r.Scope, r.Document}]; ok {
					continue
				}
			}
			adds = append(adds, r)
		}
	}
	// In the index's order: neighbours are found where the one before has gone, and not each in another page.
	slices.SortFunc(adds, func(a, b *Reference) int { return bytes.Compare(a.Attachment[:], b.Attachment[:]) })
	a.buf = append(a.buf[:0], copyHeader...)
	for i, r := range adds {
		a.buf = appendReferenceRow(a.buf, r)
		adds[i] = nil
	}
	a.buf, a.adds = append(a.buf, 0xff, 0xff), adds
	if removals > 0 {
		if err := a.removeReferences(ctx, gone); err != nil {
			return err
		}
	}
	if len(adds) > 0 {
		const sql = `COPY walgate.attachment_references (attachment, scope, document, fill) FROM STDIN BINARY`
		if _, err := a.conn.PgConn().CopyFrom(ctx, bytes.NewReader(a.buf), sql); err != nil {
			return err
		}
	}
	if err := a.touch(ctx, pieces, n); err != nil {
		return err
	}
	return a.spill(ctx)
}

func appendReferenceRow(b []byte, r *Reference) []byte {
	b = append(b, 0, 4, 0, 0, 0, 16)
	b = append(b, r.Attachment[:]...)
	b = append(b, 0, 0, 0, 16)
	b = append(b, r.Scope[:]...)
	b = append(b, 0, 0, 0, 16)
	b = append(b, r.Document[:]...)
	b = append(b, 0, 0, 0, 4)
	return binary.BigEndian.AppendUint32(b, uint32(r.Fill))
}

func (a *Appender) removeReferences(ctx context.Context, gone map[pair]struct{}) error {
	attachments, scopes, documents := make([][16]byte, 0, len(gone)), make([][16]byte, 0, len(gone)), make([][16]byte, 0, len(gone))
	for k := range gone {
		attachments, scopes, documents = append(attachments, k.attachment), append(scopes, k.scope), append(documents, k.document)
	}
	_, err := a.conn.Exec(ctx, removeSQL, attachments, scopes, documents)
	return err
}

const removeSQL = `DELETE FROM walgate.attachment_references r USING unnest($1::uuid[], $2::uuid[], $3::uuid[]) AS t(attachment, scope, document)
	WHERE r.attachment = t.attachment AND r.scope = t.scope AND r.document = t.document`

// touchStatement answers the places of those attachments whose bytes somebody sent, ever.
const touchName, touchStatement = "touch", `SELECT place::int FROM unnest($1::uuid[]) WITH ORDINALITY AS t(key, place)
	WHERE (SELECT true FROM walgate.attachment_bytes WHERE key = t.key LIMIT 1)`

// touch remembers the pairs of the pieces' n references whose bytes are known. As long as nobody sent any, nothing is asked.
func (a *Appender) touch(ctx context.Context, pieces []Piece, n int) error {
	if !a.att.bytes {
		return nil
	}
	be := binary.BigEndian
	b := append(a.buf[:0], 0, 0, 0, 1, 0, 0, 0, 0) // one dimension, no nulls
	b = be.AppendUint32(b, pgtype.UUIDOID)
	b = be.AppendUint32(b, uint32(n))
	b = append(b, 0, 0, 0, 1)
	for i := range pieces {
		for j := range pieces[i].References {
			b = append(b, 0, 0, 0, 16)
			b = append(b, pieces[i].References[j].Attachment[:]...)
		}
	}
	a.buf = b
	answer := a.conn.PgConn().ExecPrepared(ctx, touchName, [][]byte{b}, []int16{1}, []int16{1})
	i, before := 0, 0 // the piece, and the references before it: places rise
	for answer.NextRow() {
		place := int(be32(answer.Values()[0])) - 1
		for place-before >= len(pieces[i].References) {
			before += len(pieces[i].References)
			i++
		}
		r := &pieces[i].References[place-before]
		a.att.touched.add(r.Attachment, r.Scope, r.Version)
	}
	_, err := answer.Close()
	return err
}
