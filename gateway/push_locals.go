package gateway

import (
	"strconv"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// queueLocals looks up the keys that the source gave earlier to rows which the changes name by local ids.
func (x *pushTx) queueLocals(b *pgx.Batch) {
	x.locals = map[localID]string{}
	var collections, ids []string
	asked := map[localID]bool{}
	for i := range x.changes {
		c := &x.changes[i]
		if c.fault != nil || c.plan == nil {
			continue
		}
		refs := x.references(c)
		if c.localID != "" {
			refs = append(refs, localID{c.collection, c.localID})
		}
		for _, id := range refs {
			if !asked[id] {
				asked[id] = true
				collections, ids = append(collections, id.collection), append(ids, id.id)
			}
		}
	}
	if len(ids) == 0 {
		return
	}
	b.Queue(`SELECT collection, local_id, doc_id FROM walgate.local_ids JOIN unnest($3::text[], $4::text[]) AS a(collection, local_id) USING (collection, local_id)
		WHERE subject = $1 AND client_id = $2`, x.caller.Subject, x.r.client, collections, ids).Query(func(rows pgx.Rows) error {
		var id localID
		var doc string
		_, err := pgx.ForEachRow(rows, []any{&id.collection, &id.id, &doc}, func() error {
			x.locals[id] = doc
			return nil
		})
		return err
	})
}

// references returns the rows that the change's foreign keys may name by local ids.
func (x *pushTx) references(c *pending) (out []localID) {
	if len(c.plan.parents) == 0 {
		return nil
	}
	for _, list := range [][]pushColumn{c.data, c.base} {
		for _, col := range list {
			parent := c.plan.localParent(col.name)
			if parent == nil || col.value[0] != '"' {
				continue
			}
			if id := unquote(col.value); !looksLikeKey(parent, id) {
				out = append(out, localID{parent.c.Name, id})
			}
		}
	}
	return out
}

// looksLikeKey says that a text is a key of the table by its form, so that it can't be a local id as well.
func looksLikeKey(p *pushPlan, text string) bool {
	switch p.cols[p.keyAt[0]].Type.Underlying().Name {
	case "smallint", "integer", "bigint":
		_, err := strconv.ParseInt(text, 10, 64)
		return err == nil
	}
	return false
}

// findCreators notes which change makes the row that others name by its local id.
func (x *pushTx) findCreators(todo []*pending) {
	x.creators = map[localID]*pending{}
	for _, c := range todo {
		id := localID{c.collection, c.localID}
		if c.localID == "" || c.operation != "insert" && c.operation != "upsert" {
			continue
		}
		if _, made := x.locals[id]; !made && x.creators[id] == nil {
			x.creators[id] = c
		}
	}
}

// resolve puts keys in the place of local ids, as far as they are known, and rejects a change that names a row which
// neither this push nor an earlier one made.
func (x *pushTx) resolve(c *pending) {
	if c.result.status != "" || c.resolved {
		return
	}
	waiting := false
	if c.localID != "" {
		id := localID{c.collection, c.localID}
		doc, made := x.locals[id]
		switch creator := x.creators[id]; {
		case made:
			key, err := schema.ParseDocID(c.plan.t, doc)
			if err != nil {
				c.fail(schema.CodeInvalidKey, "the row's key has another form now")
				return
			}
			c.key, c.result.docID = key, doc
		case creator == c: // the database assigns it
		case creator == nil || creator.result.status != "":
			c.fail(policies.CodeNotFound, "no row was made under this local_id")
			return
		default:
			waiting = true
		}
	}
	c.values, c.believed = c.data, c.base
	for _, id := range x.references(c) {
		doc, made := x.locals[id]
		creator := x.creators[id]
		switch {
		case made:
			c.values, c.believed = substituted(c.plan, c.values, id, doc), substituted(c.plan, c.believed, id, doc)
		case creator != nil && creator.result.status != "":
			c.fail(schema.CodeForeignKeyMissing, foreignKeyMissing)
			return
		case creator != nil:
			waiting = true
		}
	}
	c.resolved = !waiting
}

// substituted returns the columns with a key in the place of a local id.
func substituted(p *pushPlan, columns []pushColumn, id localID, doc string) []pushColumn {
	for i, col := range columns {
		if col.value[0] == '"' && unquote(col.value) == id.id {
			if parent := p.localParent(col.name); parent != nil && parent.c.Name == id.collection {
				columns = append(append(columns[:i:i], pushColumn{col.name, schema.AppendString(nil, []byte(doc))}), columns[i+1:]...)
			}
		}
	}
	return columns
}
