package gateway

import (
	"bytes"
	"context"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// assigned notes the key that the source gave to a row which its client named by a local id.
func (x *pushTx) assigned(c *pending) {
	id := localID{c.collection, c.localID}
	if c.localID == "" || x.creators[id] != c || c.result.status == policies.Rejected {
		return
	}
	x.locals[id] = c.result.docID
	x.made = append(x.made, changelog.Local{Collection: c.collection, DocID: c.result.docID, LocalID: c.localID})
}

// withheld finds out what became of rows that the database did not return: a trigger may have done something else
// instead, or nothing; row-level security may have hidden the row.
func (x *pushTx) withheld(ctx context.Context, works []pushWork, writes []schema.Write, rows []schema.Row) error {
	for i := range rows {
		w := &works[i]
		if rows[i] != nil {
			continue
		}
		var now schema.Row
		if writes[i].Key != nil {
			found, err := schema.LockRows(ctx, x, w.c.plan.t, []schema.Ask{{Key: writes[i].Key}})
			if err != nil {
				return x.suspect(err)
			}
			now = found[0].Row
		}
		if sameRow(now, w.before) {
			w.c.fail(policies.CodePermission, "the database did not let the change through")
			continue
		}
		rows[i] = now // may be nil: the row is gone
	}
	return nil
}

func sameRow(a, b schema.Row) bool {
	return (a == nil) == (b == nil) && slices.EqualFunc(a, b, func(x, y []byte) bool { return (x == nil) == (y == nil) && bytes.Equal(x, y) })
}

// examine holds the row as it was written against the write rules, and notes the change's outcome.
func (x *pushTx) examine(w *pushWork, row schema.Row) error {
	c := w.c
	if c.result.status == policies.Rejected {
		return nil
	}
	b, err := c.plan.binding()
	if err != nil {
		return err
	}
	defer c.plan.release(b)
	if row != nil && !w.deleting {
		if !b.InScope(row, x.caller) {
			c.fail(codeOutOfScope, "the row would not be in a scope of the caller")
			return nil
		}
		pass, err := b.Checks(row, x.caller)
		if err != nil {
			x.g.policyFailed(c.collection, err)
		}
		if !pass {
			c.fail(codeCheckFailed, "the row breaks a rule for writing to this collection")
			return nil
		}
	}
	r := &c.result
	r.status, r.policy, r.columns, r.written = w.d.Status, w.d.Policy, w.d.Columns, true
	if row != nil {
		id, err := b.AppendDocID(nil, row)
		if err != nil {
			return err
		}
		r.docID = string(id)
	}
	if w.d.Document && row != nil && !w.deleting {
		return x.show(c, b, row)
	}
	return nil
}

// show puts the row into the answer, if the caller may see it.
func (x *pushTx) show(c *pending, b *policies.Binding, row schema.Row) (err error) {
	if !b.InScope(row, x.caller) {
		return nil
	}
	sees, err := b.Sees(row, x.caller)
	if err != nil {
		x.g.policyFailed(c.collection, err)
	}
	if !sees {
		return nil
	}
	c.result.document, err = b.AppendDocument(nil, row)
	return err
}

// examineParents holds the rows that pushed foreign keys name: who may not see one may not refer to it.
func (x *pushTx) examineParents(ctx context.Context, works []pushWork, rows []schema.Row, now func(*pushParent) bool) error {
	type reference struct {
		parent *pushParent
		tuples [][]string
		places map[string]int
		users  [][]*pending // by tuple
	}
	var all []*reference
	by := map[*pushParent]*reference{}
	for i := range works {
		w := &works[i]
		if rows[i] == nil || w.deleting || w.c.result.status == policies.Rejected {
			continue
		}
		for j := range w.c.plan.parents {
			parent := &w.c.plan.parents[j]
			if !now(parent) || !slices.ContainsFunc(parent.fk.Columns, func(name string) bool { return slices.Contains(w.named, name) }) {
				continue
			}
			tuple := make([]string, len(parent.at))
			null := false
			for k, at := range parent.at {
				null = null || rows[i][at] == nil
				tuple[k] = string(rows[i][at])
			}
			if null {
				continue
			}
			r := by[parent]
			if r == nil {
				r = &reference{parent: parent, places: map[string]int{}}
				by[parent] = r
				all = append(all, r)
			}
			name := strings.Join(tuple, "\x00")
			at, known := r.places[name]
			if !known {
				at = len(r.tuples)
				r.places[name], r.tuples, r.users = at, append(r.tuples, tuple), append(r.users, nil)
			}
			r.users[at] = append(r.users[at], w.c)
		}
	}
	for _, r := range all {
		found, err := schema.FindRows(ctx, x, r.parent.plan.t, r.parent.fk.ParentColumns, r.tuples)
		if err != nil {
			return err
		}
		b, err := r.parent.plan.binding()
		if err != nil {
			return err
		}
		for i, row := range found {
			if x.visible(b, row) {
				continue
			}
			for _, c := range r.users[i] {
				c.fail(schema.CodeForeignKeyMissing, foreignKeyMissing)
			}
		}
		r.parent.plan.release(b)
	}
	return nil
}

// foreignKeyMissing is what schema.Classify says, too: a parent that may not be seen is one that isn't there.
var foreignKeyMissing = schema.Classify(&pgconn.PgError{Code: "23503"}).Message

// visible says whether the caller may see a row.
func (x *pushTx) visible(b *policies.Binding, row schema.Row) bool {
	if row == nil || !b.InScope(row, x.caller) {
		return false
	}
	sees, err := b.Sees(row, x.caller)
	if err != nil {
		x.g.policyFailed(b.Collection.Name, err)
	}
	return sees
}
