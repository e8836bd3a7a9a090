package changelog

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// DocumentAsk names a document, and the version from which its changes count.
type DocumentAsk struct {
	Collection int32
	DocID      []byte
	Since      Version
}

// DocumentKnown is what the log holds of a document above the floors of its collection and of the log.
type DocumentKnown struct {
	Latest   Version // 0: nothing
	LatestOp byte    // policies.Op: the strongest that its scopes hold
	Scopes   [][16]byte
	Changed  []byte // columns changed above Since: bit set by attnum - 1
	All      bool   // something above Since may have changed any column, or Since lies below a floor
	// Where LatestOp is a delete: the last document before it and its scopes, nil if the log has none.
	Image       []byte
	ImageScopes [][16]byte
}

// documentsSQL looks each document up by its key: it costs the changes that the document had, whatever else the log holds.
const documentsSQL = `SELECT coalesce(l.version, 0), coalesce(l.op, ''), coalesce(l.scopes, '{}'), coalesce(s.sets, '{}'), coalesce(s.whole, false), i.data, coalesce(i.scopes, '{}')
	FROM unnest($1::int[], $2::text[], $3::bigint[], $4::bigint[]) WITH ORDINALITY AS a(collection, doc_id, document, since, place)
	CROSS JOIN (SELECT version, floor FROM walgate.checkpoint) p
	CROSS JOIN LATERAL (SELECT greatest(p.floor, (SELECT floor FROM walgate.collections WHERE id = a.collection)) AS floor) k
	LEFT JOIN LATERAL (
		SELECT v.version, (array_agg(c.op::text ORDER BY ` + strongest + `))[1] AS op, array_agg(c.scope ORDER BY c.scope) AS scopes
		FROM (SELECT version FROM walgate.changes WHERE document = a.document AND collection = a.collection AND doc_id = a.doc_id AND version > k.floor AND version <= p.version
			ORDER BY version DESC LIMIT 1) v
		JOIN walgate.changes c ON c.document = a.document AND c.collection = a.collection AND c.doc_id = a.doc_id AND c.version = v.version GROUP BY v.version) l ON true
	LEFT JOIN LATERAL (
		SELECT array_agg(DISTINCT c.changed) FILTER (WHERE c.changed IS NOT NULL) AS sets, bool_or(c.changed IS NULL) AS whole
		FROM walgate.changes c WHERE c.document = a.document AND c.collection = a.collection AND c.doc_id = a.doc_id AND c.version > greatest(a.since, k.floor) AND c.version <= p.version) s ON true
	LEFT JOIN LATERAL (
		SELECT (array_agg(c.data::text))[1] AS data, array_agg(c.scope ORDER BY c.scope) AS scopes
		FROM (SELECT version FROM walgate.changes WHERE document = a.document AND collection = a.collection AND doc_id = a.doc_id AND op = 'u' AND version > k.floor AND version < l.version
			ORDER BY version DESC LIMIT 1) v
		JOIN walgate.changes c ON c.document = a.document AND c.collection = a.collection AND c.doc_id = a.doc_id AND c.version = v.version AND c.op = 'u' GROUP BY v.version) i ON l.op = 'd'
	ORDER BY a.place`

// Documents returns what the log holds of each document asked for, in their order, and the head, all in one snapshot.
func (l *Log) Documents(ctx context.Context, asks []DocumentAsk) ([]DocumentKnown, *Head, error) {
	n := len(asks)
	collections, ids, hashes, since := make([]int32, n), make([]string, n), make([]int64, n), make([]int64, n)
	for i, a := range asks {
		collections[i], ids[i], hashes[i], since[i] = a.Collection, string(a.DocID), documentHash(a.Collection, a.DocID), int64(a.Since)
	}
	out := make([]DocumentKnown, 0, n)
	h := &Head{}
	b := &pgx.Batch{}
	b.Queue(`BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY`)
	b.Queue(documentsSQL, collections, ids, hashes, since).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var d DocumentKnown
			var op string
			var sets [][]byte
			if err := rows.Scan(&d.Latest, &op, &d.Scopes, &sets, &d.All, &d.Image, &d.ImageScopes); err != nil {
				return err
			}
			if op != "" {
				d.LatestOp = op[0]
			}
			for _, s := range sets {
				d.Changed = union(d.Changed, s)
			}
			out = append(out, d)
		}
		return rows.Err()
	})
	queueHead(b, h)
	b.Queue(`COMMIT`)
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return nil, nil, readError(err)
	}
	for i := range asks {
		c := h.Collection(asks[i].Collection)
		out[i].All = out[i].All || asks[i].Since < h.Floor || c != nil && asks[i].Since < c.Floor
	}
	return out, h, nil
}

// documentHash is walgate.changes.document: FNV-1a of both. Documents that share one are told apart by their ids.
func documentHash(collection int32, docID []byte) int64 {
	h := uint64(14695981039346656037)
	for shift := 0; shift < 32; shift += 8 {
		h = (h ^ uint64(byte(collection>>shift))) * 1099511628211
	}
	for _, c := range docID {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return int64(h)
}

// union returns the bits of both sets.
func union(a, b []byte) []byte {
	if len(a) < len(b) {
		a = append(a, make([]byte, len(b)-len(a))...)
	}
	for i, v := range b {
		a[i] |= v
	}
	return a
}
