package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/schema"
)

// errDiffers says that a client doesn't hold what SELECT returns, which may still come.
var errDiffers = errors.New("it differs from what SELECT returns under its policy")

const shownDifferences = 4

// oracle asks the application's tables what clients must hold. Scopes, columns and marks of deletion are SQL of its own; what
// a CEL condition and an attachment's path make of a row is asked of package policies, which the gateway uses too.
type oracle struct {
	w    *World
	conn *pgx.Conn
}

func (w *World) openOracle(ctx context.Context) (*oracle, error) {
	conn, err := pgx.Connect(ctx, w.o.Oracle())
	if err != nil {
		return nil, fmt.Errorf("the oracle can't reach the source: %w", err)
	}
	for _, s := range schema.SessionSettings {
		if _, err := conn.Exec(ctx, "SELECT set_config($1, $2, false)", s.Name, s.Value); err != nil {
			return nil, errors.Join(err, conn.Close(ctx))
		}
	}
	return &oracle{w: w, conn: conn}, nil
}

func (o *oracle) close() { _ = o.conn.Close(context.Background()) } // nothing is left to do with it

// rows calls f for each row of a table that a client may see, with its doc_id, document and columns as PostgreSQL writes them.
func (o *oracle) rows(ctx context.Context, c *client, t *table, f func(id string, doc []byte, row schema.Row)) error {
	var document, all []string
	for i := range t.columns {
		col := &t.columns[i]
		all = append(all, "t."+col.quoted)
		if !col.shown {
			continue
		}
		text := "t." + col.quoted
		if u := col.Type.Underlying(); t.spec.Lossless {
			switch u.Name {
			case "bigint", "numeric":
				text += "::text"
			case "bigint[]", "numeric[]":
				text += "::text[]"
			}
		}
		document = append(document, text+" AS "+col.quoted)
	}
	sql := fmt.Sprintf("SELECT (SELECT row_to_json(d)::text FROM (SELECT %s) AS d), %s FROM %s AS t WHERE %s", strings.Join(document, ", "), strings.Join(all, ", "), t.sql, scopeSQL(c, t))
	binding, err := t.policy.Bind(t.policy.Table.Columns)
	if err != nil {
		return err
	}
	rows, err := o.conn.Query(ctx, sql, pgx.QueryResultFormats{pgx.TextFormatCode})
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		values := rows.RawValues()
		row := schema.Row(values[1:])
		if t.spec.Where != "" {
			if ok, err := binding.Passes(row, c.caller); err != nil || !ok {
				continue // fails closed
			}
		}
		var key []string
		for _, i := range t.key {
			key = append(key, string(row[i]))
		}
		f(string(schema.AppendDocID(nil, key)), slices.Clone(values[0]), row)
	}
	return rows.Err()
}

// scopeSQL is the policy as SQL, but for a where.
func scopeSQL(c *client, t *table) string {
	if !slices.Contains(c.names, t.name) {
		return "false"
	}
	var alternatives []string
	for _, alternative := range t.spec.Scope {
		var terms []string
		for name, claim := range alternative {
			var texts []string
			for _, v := range c.selected(claim) {
				texts = append(texts, quoteText(v))
			}
			terms = append(terms, fmt.Sprintf("t.%s::text = ANY (ARRAY[%s]::text[])", quoteName(name), strings.Join(texts, ",")))
		}
		alternatives = append(alternatives, "("+strings.Join(terms, " AND ")+")")
	}
	where := "true"
	if alternatives != nil {
		where = "(" + strings.Join(alternatives, " OR ") + ")"
	}
	if t.spec.SoftDelete != "" {
		if quoted := "t." + quoteName(t.spec.SoftDelete); t.column(t.spec.SoftDelete).Type.Underlying().Name == "boolean" {
			where += " AND " + quoted + " IS NOT TRUE"
		} else {
			where += " AND " + quoted + " IS NULL"
		}
	}
	return where
}

// compare holds a client's documents against the tables, byte for byte.
func (o *oracle) compare(ctx context.Context, c *client) error {
	var found []string
	for _, t := range o.w.tables {
		want := map[string][]byte{}
		if err := o.rows(ctx, c, t, func(id string, doc []byte, _ schema.Row) { want[id] = doc }); err != nil {
			return fmt.Errorf("%w: SELECT of %s: %w", errAway, t.name, err)
		}
		if d := differences(c, t.name, want); d != "" {
			found = append(found, d)
		}
	}
	if found != nil {
		return fmt.Errorf("%w:\n%s", errDiffers, strings.Join(found, "\n"))
	}
	return nil
}

// differences tells the first documents that a client lacks, has wrongly, or shouldn't have, and when it was last told of each.
func differences(c *client, collection string, want map[string][]byte) string {
	have := c.documents[collection]
	var lines []string
	missing, wrong, extra := 0, 0, 0
	tell := func(id, what string) {
		if len(lines) < shownDifferences {
			lines = append(lines, fmt.Sprintf("    %s/%s %s; last told of it at %q, of all at %q", collection, id, what, c.history.docs[collection][id], c.history.fulls[collection]))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(want)) {
		if got, ok := have[id]; !ok {
			missing++
			tell(id, fmt.Sprintf("is missing: wants %.500s", want[id]))
		} else if !bytes.Equal(got, want[id]) {
			wrong++
			tell(id, fmt.Sprintf("differs:\n      has   %.500s\n      wants %.500s", got, want[id]))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(have)) {
		if want[id] == nil {
			extra++
			tell(id, fmt.Sprintf("should not be there: has %.500s", have[id]))
		}
	}
	if lines == nil {
		return ""
	}
	return fmt.Sprintf("  %s: has %d documents, wants %d: %d missing, %d differ, %d too many\n%s", collection, len(have), len(want), missing, wrong, extra, strings.Join(lines, "\n"))
}

// compareFiles holds the files that a client's manifests left it with against those that its rows name and that are there. Its
// own subject's uploads that no row names may be among them.
func (o *oracle) compareFiles(ctx context.Context, c *client) error {
	stored, own := map[string]bool{}, map[string]bool{}
	rows, err := o.conn.Query(ctx, `SELECT attachment_id, subject = $1 FROM walgate.files WHERE state = 'u'`, c.subject)
	if err != nil {
		return fmt.Errorf("%w: the records of files: %w", errAway, err)
	}
	var id string
	var mine bool
	if _, err := pgx.ForEachRow(rows, []any{&id, &mine}, func() error { stored[id], own[id] = true, mine; return nil }); err != nil {
		return fmt.Errorf("%w: the records of files: %w", errAway, err)
	}
	want := map[string]string{}
	for _, t := range o.w.tables {
		if !t.policy.HasAttachments() {
			continue
		}
		binding, err := t.policy.Bind(t.policy.Table.Columns)
		if err != nil {
			return err
		}
		err = o.rows(ctx, c, t, func(doc string, _ []byte, row schema.Row) {
			for _, id := range binding.ReferencedIDs(row) {
				if stored[id] {
					want[id] = t.name + "/" + doc
				}
			}
		})
		if err != nil {
			return fmt.Errorf("%w: SELECT of %s: %w", errAway, t.name, err)
		}
	}
	return c.files.compare(want, func(id string) bool { return stored[id] && own[id] }, func(id string) bool { return !own[id] && c.refused(ctx, id) })
}

// edits counts the pushes that the table edits notes.
func (o *oracle) edits(ctx context.Context) (map[string]int, error) {
	applied := map[string]int{}
	if !o.w.counted() {
		return applied, nil
	}
	rows, err := o.conn.Query(ctx, `SELECT token, count(*)::int FROM public.edits GROUP BY 1`)
	if err != nil {
		return nil, err
	}
	var token string
	var n int
	_, err = pgx.ForEachRow(rows, []any{&token, &n}, func() error { applied[token] = n; return nil })
	return applied, err
}

// row returns the row of a key as JSON members, nil if there is none.
func (o *oracle) row(ctx context.Context, t *table, key []string) (map[string]rawJSON, error) {
	var terms []string
	for n, i := range t.key {
		terms = append(terms, "t."+t.columns[i].quoted+" = "+quoteText(key[n]))
	}
	var text string
	err := o.conn.QueryRow(ctx, fmt.Sprintf("SELECT row_to_json(t)::text FROM %s AS t WHERE %s", t.sql, strings.Join(terms, " AND "))).Scan(&text)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	row := map[string]rawJSON{}
	return row, json.Unmarshal([]byte(text), &row)
}
