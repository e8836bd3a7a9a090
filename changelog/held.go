package changelog

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// probing is what reads of attachments say first. They cost what they return, by index, whatever the statistics say: these
// may be older than a bulk load, and a table that was empty when a plan was made may hold millions of rows when it is used.
const probing = `SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL jit = off; SET LOCAL plan_cache_mode = force_custom_plan`

func queueProbing(b *pgx.Batch) {
	b.Queue(`BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY`)
	for set := range strings.SplitSeq(probing, "; ") {
		b.Queue(set)
	}
}

// heldSQL asks for one scope after another, never for all documents of one: an attachment may be named by millions.
var heldSQL = `SELECT
	EXISTS (SELECT FROM walgate.attachment_references WHERE attachment = a.key),
	coalesce(w.named, false), coalesce(o.is, false),
	coalesce(b.state = 'u' AND (w.readable OR b.home = ANY ($2::uuid[])), false),
	coalesce(w.readable OR b.home = ANY ($2::uuid[]), false) OR EXISTS (
		SELECT FROM unnest($2::uuid[]) AS s(key) CROSS JOIN LATERAL (SELECT version FROM walgate.attachment_operations WHERE attachment = a.key AND scope = s.key LIMIT 1) h
		WHERE h.version > b.version AND (SELECT true FROM walgate.attachment_withheld WHERE attachment = a.key AND scope = s.key LIMIT 1) IS NULL)
	FROM unnest($1::uuid[]) WITH ORDINALITY AS a(key, place)
	LEFT JOIN LATERAL (SELECT state, home, version FROM walgate.attachment_bytes WHERE key = a.key LIMIT 1) b ON true
	CROSS JOIN LATERAL (
		SELECT bool_or(true) AS named, coalesce(bool_or((SELECT true FROM walgate.attachment_withheld WHERE attachment = a.key AND scope = s.key LIMIT 1) IS NULL), false) AS readable
		FROM unnest($2::uuid[]) AS s(key) WHERE ` + named("a.key", "s.key") + `) w
	LEFT JOIN LATERAL (SELECT true AS is FROM ` + naming("a.key") + ` n WHERE scope <> ALL ($2::uuid[]) LIMIT 1) o ON true
	ORDER BY a.place`

// Held says how each of the attachments stands to the scopes, all in one snapshot.
func (l *Log) Held(ctx context.Context, keys, scopes [][16]byte) ([]Held, error) {
	var out []Held
	if scopes == nil {
		scopes = [][16]byte{}
	}
	b := &pgx.Batch{}
	queueProbing(b)
	b.Queue(heldSQL, keys, scopes).Query(func(rows pgx.Rows) (err error) {
		out, err = pgx.CollectRows(rows, func(r pgx.CollectableRow) (h Held, err error) {
			return h, r.Scan(&h.Any, &h.Within, &h.Outside, &h.Readable, &h.Known)
		})
		return err
	})
	b.Queue(`COMMIT`)
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return nil, readError(err)
	}
	return out, nil
}

// Unwithheld returns, of each attachment, which event of its bytes the log holds; 0 where there is none, or where it withholds
// them from a scope.
func (l *Log) Unwithheld(ctx context.Context, keys [][16]byte) (events []int64, err error) {
	b := &pgx.Batch{}
	queueProbing(b)
	b.Queue(`SELECT coalesce((SELECT event FROM walgate.attachment_bytes WHERE key = a.key AND NOT EXISTS (SELECT FROM walgate.attachment_withheld WHERE attachment = a.key) LIMIT 1), 0)
		FROM unnest($1::uuid[]) WITH ORDINALITY AS a(key, place) ORDER BY a.place`, keys).Query(func(rows pgx.Rows) (err error) {
		events, err = pgx.CollectRows(rows, pgx.RowTo[int64])
		return err
	})
	b.Queue(`COMMIT`)
	return events, wrapRead(l.pool.SendBatch(ctx, b).Close())
}

const operationColumns = `version, attachment, scope, id, op::text, size, content_type, sha256, created_at`

func scanOperation(r pgx.CollectableRow) (o Operation, err error) {
	var op string
	err = r.Scan(&o.Version, &o.Attachment, &o.Scope, &o.ID, &op, &o.Size, &o.ContentType, &o.SHA256, &o.CreatedAt)
	o.Delete, o.Missing = op == "d", op == "m"
	return o, err
}

// ErrListOrder: ListRequest.Order or After isn't one.
var ErrListOrder = errors.New("not an order of attachments, or a place in another one")

// listOrders is what each order sorts by, as text that a place in it is told by, and its type.
var listOrders = map[string]struct{ column, kind string }{
	"date": {"created_at", "timestamptz"}, "id": {"id", "text"}, "size": {"size", "bigint"},
}

// listPlace is what List.Next holds.
type listPlace struct {
	Order string `json:"o"`
	Value string `json:"v"`
	ID    string `json:"i"`
}

// Attachments lists what the scopes hold. It costs what they hold, however little is asked for.
func (l *Log) Attachments(ctx context.Context, r ListRequest) (*List, error) {
	const all = `SELECT DISTINCT ON (attachment) ` + operationColumns + ` FROM unnest($1::uuid[]) AS s(key)
		JOIN walgate.attachment_operations o ON o.scope = s.key WHERE op = 'u' AND starts_with(content_type, $2) AND starts_with(id, $3)
		ORDER BY attachment, version DESC`
	if r.Scopes == nil {
		r.Scopes = [][16]byte{}
	}
	out := &List{}
	if r.CountOnly {
		err := l.pool.QueryRow(ctx, `SELECT count(*) FROM (`+all+`) x`, r.Scopes, r.ContentType, r.IDPrefix).Scan(&out.Count)
		return out, wrapRead(err)
	}
	name, descending := strings.CutPrefix(r.Order, "-")
	order, ok := listOrders[name]
	var after listPlace
	if ok && r.After != "" {
		text, err := base64.RawURLEncoding.DecodeString(r.After)
		ok = err == nil && json.Unmarshal(text, &after) == nil && after.Order == r.Order && after.ID != ""
	}
	if !ok {
		return nil, ErrListOrder
	}
	direction, beyond := "ASC", ">"
	if descending {
		direction, beyond = "DESC", "<"
	}
	column := "x." + order.column
	if order.kind == "text" {
		column += ` COLLATE "C"`
	}
	sql := fmt.Sprintf(`SELECT x.*, (%[1]s)::text AS value FROM (`+all+`) x
		WHERE NOT $4 OR (%[1]s, x.id COLLATE "C") %[2]s ($5::text::%[3]s, $6) ORDER BY %[1]s %[4]s, x.id COLLATE "C" %[4]s LIMIT $7`, column, beyond, order.kind, direction)
	var values []string
	b := &pgx.Batch{}
	queueProbing(b)
	b.Queue(sql, r.Scopes, r.ContentType, r.IDPrefix, r.After != "", defaultText(after.Value, order.kind), after.ID, r.Limit+1).Query(func(rows pgx.Rows) (err error) {
		out.Attachments, err = pgx.CollectRows(rows, func(r pgx.CollectableRow) (o Operation, err error) {
			var op, value string
			err = r.Scan(&o.Version, &o.Attachment, &o.Scope, &o.ID, &op, &o.Size, &o.ContentType, &o.SHA256, &o.CreatedAt, &value)
			values = append(values, value)
			return o, err
		})
		return err
	})
	b.Queue(`COMMIT`)
	err := l.pool.SendBatch(ctx, b).Close()
	var pg *pgconn.PgError
	if errors.As(err, &pg) && strings.HasPrefix(pg.Code, "22") { // no value of the kind: nobody got this place from here
		return nil, fmt.Errorf("%w: %w", ErrListOrder, err)
	}
	if err != nil {
		return nil, readError(err)
	}
	if n := r.Limit; len(out.Attachments) > n {
		out.Attachments = out.Attachments[:n]
		text, err := json.Marshal(listPlace{r.Order, values[n-1], out.Attachments[n-1].ID})
		if err != nil {
			return nil, err
		}
		out.Next = base64.RawURLEncoding.EncodeToString(text)
	}
	return out, nil
}

// defaultText is a value of the kind where none was given.
func defaultText(v, kind string) string {
	switch {
	case v != "":
		return v
	case kind == "bigint":
		return "0"
	case kind == "timestamptz":
		return "-infinity"
	}
	return ""
}

func wrapRead(err error) error {
	if err == nil {
		return nil
	}
	return readError(err)
}

// Fills returns the fills that the log knows, by number. The one with the highest number of a collection is its newest.
func (l *Log) Fills(ctx context.Context) ([]Fill, error) {
	rows, err := l.pool.Query(ctx, `SELECT fill, collection, version, position, rows, estimate, done, swept, started_at FROM walgate.attachment_fills ORDER BY fill`)
	if err != nil {
		return nil, readError(err)
	}
	out, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (f Fill, err error) {
		return f, r.Scan(&f.Fill, &f.Collection, &f.Version, &f.Position, &f.Rows, &f.Estimate, &f.Done, &f.Swept, &f.StartedAt)
	})
	return out, wrapRead(err)
}

// SweepBlocks returns how many heap blocks a sweep for a fill of the collection goes through, as of now: what older fills wrote lies
// within them, once the fill has begun.
func (l *Log) SweepBlocks(ctx context.Context, collection int32) (n int64, err error) {
	table := "walgate.attachment_references"
	if collection == 0 {
		table = "walgate.attachment_bytes"
	}
	err = l.pool.QueryRow(ctx, `SELECT pg_relation_size($1::text::regclass) / current_setting('block_size')::bigint`, table).Scan(&n)
	return n, wrapRead(err)
}
