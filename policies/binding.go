package policies

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/cel-go/common/types/ref"

	"github.com/walgate/walgate/schema"
)

// Binding ties a collection to the layout of the rows that one reader delivers. Not safe for concurrent use.
type Binding struct {
	Collection *Collection

	columns  []schema.Column
	key      []int
	document []documentColumn
	soft     int // -1: none
	scopes   [][]int
	eval     *evaluation // nil: no filter
	verify   *evaluation // of write.check; nil: none, or its columns are gone, which stops writes only

	text             []byte // scratch of scope keys
	oldKeys, newKeys []ScopeKey
	references       references
}

type documentColumn struct {
	at     int
	prefix []byte // `{"name":` or `,"name":`
	typ    *schema.Type
}

// Bind prepares the collection for rows of this layout. It fails where the layout lacks a column that the policy needs,
// and where an excluded column may have been renamed, so that its new name would show it.
func (c *Collection) Bind(cols []schema.Column) (*Binding, error) {
	b := &Binding{Collection: c, columns: slices.Clone(cols), soft: -1}
	l := layout{table: c.Table, at: make(map[string]int, len(cols))}
	for i := range cols {
		l.at[cols[i].Name] = i
	}
	for _, i := range c.Table.Key {
		b.key = append(b.key, l.find(i))
	}
	if c.soft >= 0 {
		b.soft = l.find(c.soft)
	}
	for _, alt := range c.scopes {
		at := make([]int, len(alt.columns))
		for i := range alt.columns {
			at[i] = l.find(alt.columns[i].table)
		}
		b.scopes = append(b.scopes, at)
	}
	if c.filter != nil {
		at := make([]int, len(c.filter.columns))
		for i := range c.filter.columns {
			at[i] = l.find(c.filter.columns[i].table)
		}
		b.eval = newEvaluation(c.filter, at)
	}
	for i := range c.attachments {
		b.references.at = append(b.references.at, l.find(c.attachments[i].table))
	}
	if len(l.missing) > 0 {
		slices.Sort(l.missing)
		return nil, fmt.Errorf("collection %s: its policy needs the columns %s of %s, which rows no longer have: correct the collection and restart",
			c.Name, strings.Join(slices.Compact(l.missing), ", "), c.Table)
	}
	if c.check != nil {
		at := make([]int, len(c.check.columns))
		for i := range c.check.columns {
			at[i] = l.find(c.check.columns[i].table)
		}
		if len(l.missing) == 0 {
			b.verify = newEvaluation(c.check, at)
		}
	}
	return b, b.bindDocument(l)
}

// layout finds table columns in a reader's layout and notes those that are missing.
type layout struct {
	table   *schema.Table
	at      map[string]int
	missing []string
}

func (l *layout) find(column int) int {
	name := l.table.Columns[column].Name
	at, ok := l.at[name]
	if !ok {
		l.missing = append(l.missing, name)
	}
	return at
}

func (b *Binding) bindDocument(l layout) error {
	c, separator, unknown := b.Collection, byte('{'), ""
	for _, i := range documentOrder(c.Table, b.columns) {
		col := b.columns[i]
		known := c.Table.Column(col.Name)
		if known < 0 {
			unknown = col.Name
		}
		if c.exclude[col.Name] || col.Generated || known >= 0 && c.Table.Columns[known].Generated {
			continue
		}
		if col.Type == nil {
			return fmt.Errorf("collection %s: column %s of %s has no type: load the catalog again", c.Name, col.Name, c.Table)
		}
		prefix := append(schema.AppendString([]byte{separator}, []byte(col.Name)), ':')
		b.document = append(b.document, documentColumn{at: i, prefix: prefix, typ: col.Type})
		separator = ','
	}
	for name := range c.exclude {
		if _, ok := l.at[name]; !ok && unknown != "" {
			return fmt.Errorf("collection %s: excluded column %s of %s is gone and column %s is new, which may be the same one renamed: correct columns.exclude and restart",
				c.Name, name, c.Table, unknown)
		}
	}
	return nil
}

// documentOrder lists the layout's columns in the table's order, which that of a partition may not be; those that the table
// doesn't have come last.
func documentOrder(table *schema.Table, cols []schema.Column) []int {
	order := make([]int, len(cols))
	place := make([]int, len(cols))
	for i := range cols {
		order[i] = i
		if place[i] = table.Column(cols[i].Name); place[i] < 0 {
			place[i] = len(table.Columns)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int { return place[a] - place[b] })
	return order
}

// AppendDocID appends the document's id: the key column's text or, of several, the JSON array of their texts.
func (b *Binding) AppendDocID(dst []byte, row schema.Row) ([]byte, error) {
	if err := b.check(row); err != nil {
		return dst, err
	}
	for _, at := range b.key {
		if row[at] == nil {
			return dst, fmt.Errorf("collection %s: key column %s is NULL: the row can't be named", b.Collection.Name, b.columns[at].Name)
		}
	}
	if len(b.key) == 1 {
		return append(dst, row[b.key[0]]...), nil
	}
	separator := byte('[')
	for _, at := range b.key {
		dst = schema.AppendString(append(dst, separator), row[at])
		separator = ','
	}
	return append(dst, ']'), nil
}

// AppendDocument appends the row's document: a JSON object of all columns of the layout but excluded and generated
// ones, in the table's order. With an error, dst is returned as it was.
func (b *Binding) AppendDocument(dst []byte, row schema.Row) ([]byte, error) {
	if err := b.check(row); err != nil {
		return dst, err
	}
	if len(b.document) == 0 {
		return append(dst, "{}"...), nil
	}
	out := dst
	for i := range b.document {
		col := &b.document[i]
		out = append(out, col.prefix...)
		text := row[col.at]
		if text == nil {
			out = append(out, "null"...)
			continue
		}
		var err error
		if out, err = schema.AppendValue(out, col.typ, text, b.Collection.Spec.Lossless); err != nil {
			return dst, fmt.Errorf("column %s: %w", b.columns[col.at].Name, err)
		}
	}
	return append(out, '}'), nil
}

// Width is the number of columns of the rows that it reads.
func (b *Binding) Width() int { return len(b.columns) }

func (b *Binding) check(row schema.Row) error {
	if len(row) != len(b.columns) {
		return fmt.Errorf("collection %s: a row has %d columns where its layout has %d: bind the new layout first",
			b.Collection.Name, len(row), len(b.columns))
	}
	return nil
}

// Route appends what the change means in each scope. old is nil for an insert, new for a delete; a changed key is two
// calls, a delete and an insert. A filter that names claims is left to Judge. The error is the policy's (the filter
// failed or cost too much): the effects hold even so, the failing side counting as invisible.
func (b *Binding) Route(dst []Effect, old, new schema.Row) ([]Effect, error) {
	err := errors.Join(b.checkSide(&old), b.checkSide(&new))
	oldLive, newLive := b.Live(old), b.Live(new)
	before, after := oldLive, newLive
	if b.eval != nil && !b.Collection.HasGuard() {
		var e error
		if newLive {
			after, e = b.passes(new, nil)
		}
		if oldLive {
			// The same columns give the same answer; a failure is reported once.
			if newLive && b.sameFilter(old, new) {
				before = after
			} else {
				var e2 error
				before, e2 = b.passes(old, nil)
				e = firstError(e, e2)
			}
		}
		err = firstError(err, e)
	}
	return b.effects(dst, old, new, before, after, newLive), err
}

func firstError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// checkSide drops a row that doesn't fit the layout: it can't be judged, so it is invisible.
func (b *Binding) checkSide(row *schema.Row) error {
	if *row == nil {
		return nil
	}
	err := b.check(*row)
	if err != nil {
		*row = nil
	}
	return err
}

func (b *Binding) effects(dst []Effect, old, new schema.Row, before, after, live bool) []Effect {
	b.oldKeys, b.newKeys = b.oldKeys[:0], b.newKeys[:0]
	if before {
		b.oldKeys = b.appendKeys(b.oldKeys, old)
	}
	if after {
		if before && b.sameScopes(old, new) {
			b.newKeys = append(b.newKeys, b.oldKeys...)
		} else {
			b.newKeys = b.appendKeys(b.newKeys, new)
		}
	}
	for _, key := range b.newKeys {
		dst = append(dst, Effect{Scope: key, Op: Upsert, Entered: !slices.Contains(b.oldKeys, key)})
	}
	op := Leave
	if !live {
		op = Delete
	}
	for _, key := range b.oldKeys {
		if !slices.Contains(b.newKeys, key) {
			dst = append(dst, Effect{Scope: key, Op: op})
		}
	}
	return dst
}

// Live says whether the row is there: not absent and not soft-deleted.
func (b *Binding) Live(row schema.Row) bool {
	if row == nil {
		return false
	}
	if b.soft < 0 || row[b.soft] == nil {
		return true
	}
	return b.Collection.softBool && string(row[b.soft]) != "t"
}

func (b *Binding) passes(row schema.Row, claims ref.Val) (bool, error) {
	pass, err := b.eval.run(row, claims)
	if err != nil {
		err = b.Collection.filterError(err)
	}
	return pass, err
}

func (c *Collection) filterError(err error) error {
	return fmt.Errorf("collection %s: where can't be decided, so the row counts as invisible: %w", c.Name, err)
}

// appendKeys appends the keys of the scopes that the row is in, each once.
func (b *Binding) appendKeys(dst []ScopeKey, row schema.Row) []ScopeKey {
	if len(b.scopes) == 0 {
		return append(dst, b.Collection.everyone)
	}
next:
	for i, at := range b.scopes {
		b.text = append(b.text[:0], b.Collection.scopes[i].prefix...)
		for _, column := range at {
			if row[column] == nil {
				continue next // NULL equals nothing
			}
			b.text = appendSized(b.text, row[column])
		}
		if key := hashScope(b.text); !slices.Contains(dst, key) {
			dst = append(dst, key)
		}
	}
	return dst
}

func (b *Binding) sameScopes(old, new schema.Row) bool {
	for _, at := range b.scopes {
		if !same(at, old, new) {
			return false
		}
	}
	return true
}

func (b *Binding) sameFilter(old, new schema.Row) bool { return same(b.eval.at, old, new) }

// same says whether two rows hold the same texts in the given columns.
func same(at []int, old, new schema.Row) bool {
	for _, i := range at {
		if (old[i] == nil) != (new[i] == nil) || !bytes.Equal(old[i], new[i]) {
			return false
		}
	}
	return true
}

// Sees says whether the caller may see a row that is in its scopes: the scopes themselves are ScopeSQL's. With an error
// it may not.
func (b *Binding) Sees(row schema.Row, c *Caller) (bool, error) {
	v := c.view(b.Collection)
	if v == nil || !v.mayRead {
		return false, nil
	}
	if err := b.check(row); err != nil {
		return false, err
	}
	if !b.Live(row) {
		return false, nil
	}
	return b.Passes(row, c)
}

// Passes says whether where lets the caller see the row, be it marked as deleted or not. With an error it doesn't.
func (b *Binding) Passes(row schema.Row, c *Caller) (bool, error) {
	if err := b.check(row); err != nil || b.eval == nil {
		return err == nil, err
	}
	return b.passes(row, c.claims)
}
