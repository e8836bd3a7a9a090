package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// pushChange is a change as a client sends it.
type pushChange struct {
	Collection    string             `json:"collection"`
	Operation     string             `json:"operation"`
	DocID         string             `json:"doc_id"`
	Data          map[string]rawJSON `json:"data"`
	Base          map[string]rawJSON `json:"base,omitempty"`
	ParentVersion string             `json:"parent_version,omitempty"`
	ChangeID      string             `json:"change_id"`
}

// pushResult is what became of one change.
type pushResult struct {
	DocID      string   `json:"doc_id"`
	ChangeID   string   `json:"change_id"`
	Status     string   `json:"status"`
	NewVersion *string  `json:"new_version"`
	Policy     string   `json:"policy"`
	Columns    []string `json:"columns"`
	Code       string   `json:"code"`
	Error      string   `json:"error"`
}

func (r pushResult) String() string { return strings.TrimSpace(r.Status + " " + r.Code + r.Policy) }

type answered int

const (
	unknown answered = iota
	yes
	no
)

// wrote says whether a result tells that the change's token was written.
func (r pushResult) wrote(t *table, ch *pushChange) answered {
	switch {
	case (r.Status == "accepted" || r.Status == "duplicate" && r.Policy == "") && ch.Operation != "delete":
		return yes
	case r.Status != "conflict_resolved" && r.Status != "duplicate": // which names the policy of the first answer
		return unknown
	}
	switch r.Policy {
	case policies.LastWriteWins, policies.ClientWins, policies.ResurrectOnUpdate:
		return yes
	case policies.ServerWins, policies.DeleteWins:
		return no
	case policies.Merge:
		if slices.Contains(r.Columns, t.counted) {
			return no
		}
		return yes
	}
	return unknown
}

// pushes is what a client has edited.
type pushes struct {
	queue []*batch // without an outcome
	old   []*batch // answered ones, to be sent again
	made  int
	own   []*ownDocument
}

// batch is one push, sent as often as it takes.
type batch struct {
	atomic  bool
	changes []*pushChange
	edits   []*edit
	own     *ownDocument // that its only change is of
}

// write edits something, or sends what was edited, in any order.
func (c *client) write(ctx context.Context) error {
	if !c.keepless && (c.cursor == "" || c.settles > c.cursor) {
		return nil // what it holds is newer than its position
	}
	if len(c.edits.queue) < 6 && c.rng.IntN(2) == 0 {
		c.edit()
	}
	if len(c.edits.queue) == 0 {
		return nil
	}
	again := len(c.edits.old) > 0 && c.rng.IntN(8) == 0
	if again {
		return c.send(ctx, pick(c.rng, c.edits.old), true)
	}
	return c.send(ctx, pick(c.rng, c.edits.queue), false)
}

// edit makes a batch.
func (c *client) edit() {
	var able []*table
	for _, t := range c.w.tables {
		if t.spec.Write != nil && slices.ContainsFunc([]policies.Operation{policies.PushInsert, policies.PushUpdate, policies.PushDelete}, func(op policies.Operation) bool { return t.policy.MayWrite(c.caller, op) }) {
			able = append(able, t)
		}
	}
	if len(able) == 0 {
		return
	}
	b := &batch{atomic: c.rng.IntN(3) == 0}
	if c.rng.IntN(3) == 0 && c.editOwn(b, pick(c.rng, able)) {
		c.edits.queue = append(c.edits.queue, b)
		return
	}
	for range 1 + c.rng.IntN(4) {
		c.editShared(b, pick(c.rng, able))
	}
	if len(b.changes) > 0 {
		c.edits.queue = append(c.edits.queue, b)
	}
}

func (c *client) addChange(b *batch, t *table, ch *pushChange) {
	c.edits.made++
	ch.Collection, ch.ChangeID = t.name, fmt.Sprint("c", c.edits.made)
	e := &edit{client: c, table: t, change: ch}
	if token := fmt.Sprintf("push %s %s", c.device, ch.ChangeID); t.counted != "" && ch.Operation != "delete" {
		e.token = token
		ch.Data[t.counted], _ = json.Marshal(token) // a text
	}
	b.changes, b.edits = append(b.changes, ch), append(b.edits, e)
	c.w.ledger.add(e)
}

// editShared changes a document that others write too.
func (c *client) editShared(b *batch, t *table) {
	ch := &pushChange{}
	held := slices.Sorted(maps.Keys(c.documents[t.name]))
	switch n := c.rng.IntN(20); {
	case n < 14 && len(held) > 0:
		ch.DocID = pick(c.rng, held)
	default:
		key, ok := c.sharedKey(t)
		if !ok {
			return
		}
		ch.DocID = string(schema.AppendDocID(nil, key))
	}
	if c.w.ledger.isOwned(t.name, ch.DocID) {
		return
	}
	doc, holds := c.documents[t.name][ch.DocID]
	ch.Operation = string(policies.PushUpdate)
	switch n := c.rng.IntN(20); {
	case n < 3:
		ch.Operation = string(policies.PushDelete)
	case n < 6 && !holds, n == 6:
		ch.Operation = string(policies.PushInsert)
	case n < 11:
		ch.Operation = "upsert"
	}
	if ch.Operation != string(policies.PushDelete) {
		ch.Data = c.data(t, ch.Operation != string(policies.PushUpdate))
		if len(ch.Data) == 0 {
			return
		}
	}
	if holds {
		switch c.rng.IntN(3) {
		case 0:
			row := map[string]rawJSON{}
			if json.Unmarshal(doc, &row) == nil {
				ch.Base = map[string]rawJSON{}
				for name, v := range row {
					if col := t.column(name); col != nil && !col.key && (ch.Data[name] != nil || c.rng.IntN(4) == 0) {
						ch.Base[name] = v
					}
				}
			}
		case 1:
			if !c.keepless {
				ch.ParentVersion = versionOf(c.cursor)
			}
		}
	}
	c.addChange(b, t, ch)
}

// versionOf is a position without what it says of the caller.
func versionOf(position string) string {
	const parts = 3
	part := strings.Split(position, "-")
	return strings.Join(part[:min(parts, len(part))], "-")
}

// sharedKey draws a key that writers draw too.
func (c *client) sharedKey(t *table) (key []string, ok bool) {
	for _, i := range t.key {
		col := &t.columns[i]
		v := c.w.random(c.rng, t, col)
		switch {
		case col.parent >= 0:
			if v, ok = c.parentValue(t, col); !ok {
				return nil, false
			}
		case len(col.claims) > 0:
			if v, ok = c.scopeValue(col); !ok {
				return nil, false
			}
		}
		key = append(key, v.text)
	}
	return key, true
}

// parentValue is what a foreign key may refer to, among the documents that the client holds.
func (c *client) parentValue(t *table, col *column) (value, bool) {
	p := t.parents[col.parent]
	if p.table == nil {
		return value{}, false
	}
	ids := slices.Sorted(maps.Keys(c.documents[p.table.name]))
	if len(ids) == 0 {
		return value{}, false
	}
	row := map[string]rawJSON{}
	if json.Unmarshal(c.documents[p.table.name][pick(c.rng, ids)], &row) != nil || row[p.names[col.Name]] == nil {
		return value{}, false
	}
	text := string(row[p.names[col.Name]])
	var unquoted string
	if json.Unmarshal([]byte(text), &unquoted) == nil {
		text = unquoted
	}
	return value{text: text}, text != "null"
}

// scopeValue keeps a row with the caller, if its claims allow it.
func (c *client) scopeValue(col *column) (value, bool) {
	if values := c.selected("claims." + pick(c.rng, col.claims)); len(values) > 0 {
		return value{text: pick(c.rng, values)}, true
	}
	return value{}, false
}

// data makes the columns of a change; whole names all that a new row needs.
func (c *client) data(t *table, whole bool) map[string]rawJSON {
	data := map[string]rawJSON{}
	for i := range t.columns {
		col := &t.columns[i]
		if !col.pushed || !(whole && col.NotNull) && c.rng.IntN(3) > 0 && (!whole || len(col.claims) == 0) {
			continue
		}
		v := c.w.random(c.rng, t, col)
		ok := true
		switch {
		case col.parent >= 0:
			v, ok = c.parentValue(t, col)
		case len(col.claims) > 0 && c.rng.IntN(12) > 0: // else perhaps into a scope that isn't the caller's
			v, ok = c.scopeValue(col)
		}
		if !ok || v.sql != "" {
			continue
		}
		if text, ok := v.json(col, t.spec.Lossless); ok {
			data[col.Name] = text
		}
	}
	return data
}

// editOwn changes a document of the client's own, or makes one.
func (c *client) editOwn(b *batch, t *table) bool {
	if !t.owns || !slices.Contains(c.names, t.name) || t.spec.Where != "" { // it might not see it
		return false
	}
	c.edits.own = slices.DeleteFunc(c.edits.own, func(d *ownDocument) bool { return d.vague || !d.there && !d.busy })
	ch := &pushChange{Operation: string(policies.PushUpdate)}
	for _, d := range c.edits.own {
		if d.busy || d.table != t || c.rng.IntN(3) == 0 {
			continue
		}
		if c.rng.IntN(5) == 0 {
			ch.Operation = string(policies.PushDelete)
		} else if ch.Data = c.ownData(t, false); len(ch.Data) == 0 {
			return false
		}
		ch.DocID, b.own, d.busy = d.id, d, true
		c.addChange(b, t, ch)
		return true
	}
	d := &ownDocument{client: c, table: t, values: map[string]rawJSON{}, busy: true, losses: c.w.lossCount()}
	for _, i := range t.key {
		col := &t.columns[i]
		v := value{text: ownKey(col, c.n, c.edits.made)}
		if len(col.claims) > 0 {
			var ok bool
			if v, ok = c.scopeValue(col); !ok {
				return false
			}
		} else if !slices.Contains([]string{"text", "uuid", "integer", "bigint"}, col.Type.Underlying().Name) {
			v = c.w.random(c.rng, t, col)
		}
		d.key = append(d.key, v.text)
	}
	ch.Operation, ch.Data = string(policies.PushInsert), c.ownData(t, true)
	if ch.Data == nil {
		return false
	}
	d.id = string(schema.AppendDocID(nil, d.key))
	ch.DocID, b.own = d.id, d
	c.addChange(b, t, ch)
	c.edits.own = append(c.edits.own, d)
	c.w.ledger.own(d)
	return true
}

// ownData makes columns that keep the row with the caller and apart from all others; nil where its claims don't allow it.
func (c *client) ownData(t *table, whole bool) map[string]rawJSON {
	data := map[string]rawJSON{}
	scoped := len(t.spec.Scope) == 0
	for _, alternative := range t.spec.Scope { // new rows are put into the first one that the claims fill
		if scoped {
			break
		}
		scoped = true
		for name, claim := range alternative {
			values := c.selected(claim)
			col := t.column(name)
			_, set := t.spec.Write.Set[name]
			switch {
			case len(values) == 0 || !set && !col.key && !col.pushed:
				scoped = false
			case whole && !set && !col.key:
				data[name], scoped = c.asJSON(t, col, values[0])
			}
			if !scoped {
				break
			}
		}
	}
	if !scoped {
		return nil
	}
	for i := range t.columns {
		col := &t.columns[i]
		if !col.pushed || data[col.Name] != nil || len(col.claims) > 0 || col.parent >= 0 || len(col.files) > 0 || !(whole && col.NotNull) && c.rng.IntN(2) == 0 {
			continue
		}
		if v, ok := c.w.random(c.rng, t, col).json(col, t.spec.Lossless); ok {
			data[col.Name] = v
		}
	}
	return data
}

func (c *client) asJSON(t *table, col *column, text string) (rawJSON, bool) {
	if col.Type.Underlying().Name == "boolean" {
		text = text[:1]
	}
	return value{text: text}.json(col, t.spec.Lossless)
}

// send sends a batch; again is one that had its answer.
func (c *client) send(ctx context.Context, b *batch, again bool) error {
	body, err := json.Marshal(map[string]any{"client_id": c.device, "atomic": b.atomic, "changes": b.changes})
	if err != nil {
		c.violation("pushes can be written", "%v", err)
		return errWrong
	}
	if !again {
		b.edits[0].client.note("push %s…, %d changes, atomic %t", b.changes[0].ChangeID, len(b.changes), b.atomic)
	}
	for _, e := range b.edits {
		e.sent++
	}
	losses := c.w.lossCount() // before: what was committed and lost may be answered after
	a, err := c.ask(ctx, http.MethodPost, "/sync/push", nil, body, "Content-Type", "application/json")
	if err != nil {
		c.w.count("pushes: without an answer")
		return err
	}
	var answer struct {
		Results   []pushResult `json:"results"`
		VisibleAt *string      `json:"visible_at"`
	}
	if a.status != http.StatusOK || json.Unmarshal(a.body, &answer) != nil || len(answer.Results) != len(b.changes) {
		return c.wrong(fmt.Sprintf("push of %d changes: %.1500s", len(b.changes), body), a)
	}
	for i, r := range answer.Results {
		e := b.edits[i]
		c.w.count("pushes: " + r.String())
		if r.ChangeID != e.change.ChangeID || r.DocID != e.change.DocID {
			c.violation("results are in the order of the changes", "%s was answered with %s of %s", e, r.ChangeID, r.DocID)
		}
		e.results, e.losses = append(e.results, r), append(e.losses, losses)
		c.promise(b, i, r, answer.VisibleAt, losses)
	}
	c.note("push %s… answered: %v, visible at %s%s", b.changes[0].ChangeID, answer.Results, text(answer.VisibleAt), from(a.header))
	if again {
		return nil
	}
	if b.own != nil {
		b.own.took(b.changes[0], answer.Results[0], b.edits[0].sent != len(b.edits[0].results), losses)
	}
	c.edits.queue = slices.DeleteFunc(c.edits.queue, func(o *batch) bool { return o == b })
	if b.own != nil && answer.Results[0].Status == "rejected" {
		return nil // sent again it would be judged anew
	}
	const keep = 5
	c.edits.old = append(c.edits.old, b)
	c.edits.old = c.edits.old[max(0, len(c.edits.old)-keep):]
	return nil
}

func text(s *string) string {
	if s == nil {
		return "null"
	}
	return *s
}

// promise remembers what a result says of the feed.
func (c *client) promise(b *batch, i int, r pushResult, visible *string, losses int) {
	t, ch := b.edits[i].table, b.changes[i]
	for _, later := range b.changes[i+1:] {
		if later.Collection == ch.Collection && later.DocID == ch.DocID {
			return
		}
	}
	if visible == nil || r.NewVersion == nil || r.Status == "rejected" || !slices.Contains(c.names, t.name) || t.policy.HasGuard() || c.keepless {
		return
	}
	w := wants{visible: *visible, change: ch.ChangeID, doc: promised{collection: t.name, id: ch.DocID, version: *r.NewVersion}, lost: losses}
	if r.Status == "accepted" && ch.Operation != string(policies.PushDelete) && b.edits[i].token != "" && !t.rewrite {
		w.doc.column, w.doc.value = t.counted, b.edits[i].token
	}
	c.promises = append(c.promises, w)
	c.w.count("pushes: promises")
}

// settlePushes sends what is left until every outcome is known.
func (c *client) settlePushes(ctx context.Context) {
	for len(c.edits.queue) > 0 {
		err := c.send(ctx, c.edits.queue[0], false)
		if ctx.Err() != nil {
			c.violation("pushes get an outcome", "%d are left without one", len(c.edits.queue))
			return
		}
		if err == errWrong {
			c.edits.queue = c.edits.queue[1:]
		} else if err != nil {
			pause(ctx, 30*time.Millisecond)
		}
	}
}
