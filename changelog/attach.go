package changelog

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// touchedMost is how many touched pairs an open log transaction keeps in memory; more go to a temporary table.
const touchedMost = 1 << 16

// probingSession makes the appender find by index what attachments need, whatever the statistics say (see probing).
var probingSession = map[string]string{"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off", "jit": "off"}

// attachments is what the appender keeps of them. What an open log transaction touched is judged once, when it ends: where a
// reference only moves, nothing is told.
type attachments struct {
	newest  map[int32]int32 // fill of each collection
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

// writeReferences writes the net effect of the pieces' references.
func (a *Appender) writeReferences(ctx context.Context, pieces []Piece) error {
	n := 0
	for i := range pieces {
		n += len(pieces[i].References)
	}
	if n == 0 {
		return nil
	}
	var removed map[pair]struct{}
	var gone, added columns
	added.grow(n)
	for i := len(pieces) - 1; i >= 0; i-- {
		refs := pieces[i].References
		for j := len(refs) - 1; j >= 0; j-- { // from the last: it counts
			r := &refs[j]
			a.att.touched.add(r.Attachment, r.Scope, r.Version)
			key := pair{r.Attachment, r.Scope, r.Document}
			if r.Removed {
				if removed == nil {
					removed = map[pair]struct{}{}
				}
				if _, ok := removed[key]; !ok {
					removed[key] = struct{}{}
					gone.add(r, 0)
				}
				continue
			}
			if removed != nil {
				if _, ok := removed[key]; ok {
					continue
				}
			}
			added.add(r, r.Fill)
		}
	}
	b := &pgx.Batch{}
	if len(gone.fill) > 0 {
		b.Queue(`DELETE FROM walgate.attachment_references r USING unnest($1::uuid[], $2::uuid[], $3::uuid[]) AS t(attachment, scope, document)
			WHERE r.attachment = t.attachment AND r.scope = t.scope AND r.document = t.document`, gone.attachment, gone.scope, gone.document)
	}
	if len(added.fill) > 0 {
		b.Queue(`INSERT INTO walgate.attachment_references SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::int[])`, added.attachment, added.scope, added.document, added.fill)
	}
	if err := a.conn.SendBatch(ctx, b).Close(); err != nil {
		return err
	}
	return a.spill(ctx)
}

// columns are references as parameters.
type columns struct {
	attachment, scope, document [][16]byte
	fill                        []int32
}

func (c *columns) grow(n int) {
	c.attachment, c.scope, c.document, c.fill = make([][16]byte, 0, n), make([][16]byte, 0, n), make([][16]byte, 0, n), make([]int32, 0, n)
}

func (c *columns) add(r *Reference, fill int32) {
	c.attachment, c.scope, c.document, c.fill = append(c.attachment, r.Attachment), append(c.scope, r.Scope), append(c.document, r.Document), append(c.fill, fill)
}
