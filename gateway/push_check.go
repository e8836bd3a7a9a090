package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// newPush prepares a push: who asks, and everything that can be said of its changes without looking at a row.
func (g *Gateway) newPush(id *Identity, r *pushRequest) (*push, error) {
	set := g.o.Policies()
	caller, err := set.NewCaller(id.Subject, id.Roles, id.Claims)
	if errors.Is(err, policies.ErrTooManyScopes) {
		return nil, NewProblem(TooManyScopes, "the token's claims select more than %d scopes", changelog.MaxScopes)
	}
	if err != nil {
		return nil, err
	}
	head, known := g.hub.position()
	if !known {
		return nil, &Problem{Code: NotReady}
	}
	p := &push{g: g, set: set, caller: caller, head: head, r: r, plans: g.plansFor(set), claims: string(caller.ClaimsJSON()), changes: make([]pending, len(r.changes))}
	ids := map[string]bool{}
	for i := range p.changes {
		c := &p.changes[i]
		c.pushChange = &r.changes[i]
		c.data = slices.Clip(c.data)
		twice := c.changeID != "" && ids[c.changeID]
		if c.changeID != "" && !twice {
			ids[c.changeID] = true
			c.hash = c.pushChange.hash() // of what was sent: what follows depends on today's rights
		}
		if err := p.prepare(c); err != nil {
			return nil, err
		}
		if twice {
			c.reject(codeInvalidChange, "the change_id is in this push twice")
		}
	}
	return p, nil
}

// prepare finds out which collection and row the change is about, and whether the caller may do such a thing at all. The
// order matters: rights come before anything that could tell about rows.
func (p *push) prepare(c *pending) error {
	if c.fault != nil && c.fault.code != schema.CodeInvalidValue {
		return nil
	}
	if p.g.o.SourceStatus().Stopped[c.collection] != "" {
		return NewProblem(CollectionUnavailable, "collection %s is stopped", c.collection)
	}
	plan := p.plans.byName[c.collection]
	if plan == nil {
		c.fault = nil
		c.reject(codeUnknownCollection, "no collection is called %q", shorten(c.collection))
		return nil
	}
	if err := usable(plan.c, &p.head); err != nil {
		return err
	}
	if !plan.c.MayWrite(p.caller, policies.Operation(c.operation)) {
		c.fault = nil
		c.reject(policies.CodePermission, "the token's roles may not %s in this collection", c.operation)
		return nil
	}
	c.plan = plan
	if c.fault != nil {
		return nil
	}
	if c.hasDocID {
		key, err := schema.ParseDocID(plan.t, c.docID)
		if err != nil {
			c.reject(schema.CodeInvalidKey, "doc_id is not a key of this collection")
			return nil
		}
		c.key = key
	}
	p.prepareColumns(c)
	if c.hasParent {
		p.prepareParent(c)
	}
	return nil
}

// prepareColumns holds the columns that the change names against the collection, and takes the key's out of the data.
func (p *push) prepareColumns(c *pending) {
	t := c.plan.t
	kept := c.data[:0:0]
	for _, col := range c.data {
		i := t.Column(col.name)
		switch at := slices.Index(t.Key, i); {
		case i < 0 || !c.plan.c.Shown(col.name) && !c.plan.c.Writable(col.name) && !t.Columns[i].Generated:
			c.reject(schema.CodeUnknownColumn, "there is no column %q", shorten(col.name))
		case at >= 0:
			if c.key == nil || !sameKey(&t.Columns[i], c.key[at], col.value) {
				c.reject(codeKeyMismatch, "data has another value for %s than doc_id names", col.name)
			}
			continue
		case !c.plan.c.Writable(col.name):
			c.reject(codeColumnNotWritable, "the column %s is not for clients to write", col.name)
		}
		kept = append(kept, col)
	}
	c.data = kept
	for _, col := range c.base {
		if !c.plan.c.Shown(col.name) {
			c.reject(schema.CodeUnknownColumn, "there is no column %q", shorten(col.name))
		}
	}
}

// sameKey says whether the JSON of a key column is the text that doc_id names, as documents have it or as it stands.
func sameKey(col *schema.Column, text string, value []byte) bool {
	if value[0] == '"' && unquote(value) == text || string(value) == text {
		return true
	}
	for _, lossless := range []bool{false, true} {
		document, err := schema.AppendValue(nil, col.Type, []byte(text), lossless)
		if err != nil {
			return false
		}
		if bytes.Equal(document, value) || value[0] == '"' && len(document) > 0 && document[0] == '"' && unquote(document) == unquote(value) {
			return true
		}
	}
	return false
}

func (p *push) prepareParent(c *pending) {
	parent, err := changelog.ParseCursor(c.pushChange.parent)
	if err != nil {
		c.reject(policies.CodeInvalidParentVersion, "parent_version is no version: send the one that came with the row")
		return
	}
	if parent.History == "" || parent.History == p.head.History {
		c.parent, c.since = parent.Version, true
	}
}

// usable says whether the collection can be served from a log in this state.
func usable(c *policies.Collection, h *changelog.Head) error {
	st := stateOf(h, c.Name)
	switch {
	case st == nil || st.Fingerprint != c.Fingerprint:
		return NewProblem(CollectionUnavailable, "collection %s is not served by this instance yet: its policy differs from the change log's", c.Name)
	case st.Stopped != "":
		return NewProblem(CollectionUnavailable, "collection %s is stopped", c.Name)
	}
	return nil
}

// object makes a JSON object of columns.
func object(columns []pushColumn) []byte {
	size := 2
	for _, c := range columns {
		size += len(c.name) + len(c.value) + 4
	}
	b := append(make([]byte, 0, size), '{')
	for i, c := range columns {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(schema.AppendString(b, []byte(c.name)), ':'), c.value...)
	}
	return append(b, '}')
}

// withColumn returns the columns with one of them set.
func withColumn(columns []pushColumn, name string, value []byte) []pushColumn {
	out := slices.DeleteFunc(slices.Clone(columns), func(c pushColumn) bool { return c.name == name })
	return append(out, pushColumn{name, value})
}

// columnsOf returns the members of a JSON object; an unreadable one has none.
func columnsOf(document []byte) (out []pushColumn) {
	var members map[string]json.RawMessage
	if json.Unmarshal(document, &members) != nil {
		return nil
	}
	for name, value := range members {
		out = append(out, pushColumn{name, value})
	}
	slices.SortFunc(out, func(a, b pushColumn) int { return bytes.Compare([]byte(a.name), []byte(b.name)) })
	return out
}
