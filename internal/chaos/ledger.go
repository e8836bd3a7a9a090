package chaos

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// ledger remembers every push, and holds it at the end against what the application's tables tell.
type ledger struct {
	mu      sync.Mutex
	edits   []*edit
	byToken map[string]*edit // of all that ever were
	owned   []*ownDocument
	names   map[string]bool // of all that ever were owned, by collection and document
	empty   map[*table]bool // somebody tried to TRUNCATE it since the last Settle
}

func newLedger() *ledger {
	return &ledger{empty: map[*table]bool{}, names: map[string]bool{}, byToken: map[string]*edit{}}
}

// emptied notes an attempt to TRUNCATE; when it takes effect, if it does, nobody knows.
func (l *ledger) emptied(t *table) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.empty[t] = true
}

func (l *ledger) add(e *edit) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.edits = append(l.edits, e)
	if e.token != "" {
		l.byToken[e.token] = e
	}
}

func (l *ledger) own(d *ownDocument) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.owned, l.names[d.table.name+" "+d.id] = append(l.owned, d), true
}

// isOwned says whether a document is one client's alone, so that the subject's other devices keep off it.
func (l *ledger) isOwned(collection, id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.names[collection+" "+id]
}

// edit is one pushed change.
type edit struct {
	client  *client
	table   *table
	change  *pushChange
	token   string // what the application's table edits has if it was applied; empty: it doesn't count this one
	sent    int
	results []pushResult
	losses  []int // World.losses when each result came
}

// verdict says how often the change must have been applied: at least and at most.
func (e *edit) verdict(losses int) (least, most int, why string) {
	most = 1
	why = fmt.Sprintf("sent %d times, answered %d times", e.sent, len(e.results))
	rejected := 0
	for i, r := range e.results {
		switch wrote := r.wrote(e.table, e.change); {
		case r.Status == "rejected":
			rejected++
		case e.losses[i] != losses:
			why += fmt.Sprintf("; %s, before commits were lost", r)
		case wrote == yes:
			least = 1
			why += "; answered " + r.String()
		case wrote == no && e.sent == len(e.results):
			most = 0
			why += "; answered " + r.String()
		}
	}
	if rejected == e.sent {
		most = 0
		why += "; always rejected: " + e.results[rejected-1].String()
	}
	return least, most, why
}

// judge holds each change against how often it was applied.
func (l *ledger) judge(applied map[string]int, losses int, broken func(e *edit, rule, text string)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for token, n := range applied { // also those of earlier rounds, which may have come again
		if e := l.byToken[token]; n > 1 && e != nil {
			_, _, why := e.verdict(losses)
			broken(e, "a push is applied at most once", fmt.Sprintf("%s was applied %d times (%s)", e, n, why))
		}
	}
	for _, e := range l.edits {
		if e.token == "" {
			continue
		}
		n := applied[e.token]
		least, most, why := e.verdict(losses)
		switch {
		case n < least:
			broken(e, "an acknowledged push is applied", fmt.Sprintf("%s is nowhere (%s)", e, why))
		case n == 1 && most == 0:
			broken(e, "what wasn't written has no effect", fmt.Sprintf("%s was applied (%s)", e, why))
		}
	}
	// Those that have no request under way can't change any more.
	l.edits = slices.DeleteFunc(l.edits, func(e *edit) bool { return e.sent == len(e.results) })
}

func (e *edit) String() string {
	return fmt.Sprintf("the push %s of client %d, %s %s/%s", e.change.ChangeID, e.client.n, e.change.Operation, e.change.Collection, e.change.DocID)
}

// ownDocument is a document that only one client writes, so that its state follows from what that client was answered.
type ownDocument struct {
	client *client
	table  *table
	key    []string
	id     string
	there  bool
	values map[string]rawJSON // by column, of those whose text can be compared
	losses int                // World.losses when it was last acknowledged
	busy   bool               // a change of it has no outcome yet
	vague  bool               // its state can't be told any more
	trail  []string           // what was answered
}

// took notes the outcome of a change; unsure says that some request of it was not answered.
func (d *ownDocument) took(ch *pushChange, r pushResult, unsure bool, losses int) {
	d.busy = false
	d.trail = append(d.trail, fmt.Sprintf("%s %s %s", ch.ChangeID, ch.Operation, r))
	switch {
	case r.Status == "rejected":
		d.vague = d.vague || unsure
		return
	case d.losses != losses && ch.Operation != "insert":
		d.vague = true // it builds on what may be gone
	}
	d.losses = losses
	d.there = ch.Operation != "delete"
	for name, v := range ch.Data {
		if c := d.table.column(name); c != nil && comparable(c) {
			d.values[name] = v
		}
	}
}

// comparable says whether a column's values are compared: those whose JSON is the same whoever writes it.
func comparable(c *column) bool {
	u := c.Type.Underlying()
	return len(u.Labels) > 0 || slices.Contains([]string{"text", "character varying", "smallint", "integer", "bigint", "boolean", "uuid"}, u.Name)
}

// audit looks for every push in the tables.
func (w *World) audit(ctx context.Context) error {
	o, err := w.openOracle(ctx)
	if err != nil {
		return err
	}
	defer o.close()
	applied, err := o.edits(ctx)
	if err != nil {
		return err
	}
	losses := w.lossCount()
	w.ledger.judge(applied, losses, func(e *edit, rule, text string) { e.client.violation(rule, "%s", text) })
	w.ledger.mu.Lock()
	empty := w.ledger.empty
	w.ledger.empty = map[*table]bool{}
	w.ledger.owned = slices.DeleteFunc(w.ledger.owned, func(d *ownDocument) bool {
		gone := empty[d.table] || d.vague || !d.busy && d.losses != losses
		d.vague = gone // nor does its client write it any more
		return gone
	})
	owned := slices.Clone(w.ledger.owned)
	w.ledger.mu.Unlock()
	for _, d := range owned {
		if d.busy {
			continue
		}
		row, err := o.row(ctx, d.table, d.key)
		if err != nil {
			return err
		}
		w.count("ledger: documents of one client")
		if text := d.judge(row); text != "" {
			d.client.violation("an acknowledged push is applied, and nothing else", "%s/%s, which only this client writes: %s\n  its answers: %s", d.table.name, d.id, text, strings.Join(d.trail, "; "))
			d.vague = true
		}
	}
	w.ledger.mu.Lock()
	defer w.ledger.mu.Unlock()
	w.ledger.owned = slices.DeleteFunc(w.ledger.owned, func(d *ownDocument) bool { return d.vague || !d.there && !d.busy })
	return nil
}

// judge says what is wrong with a document's row, nil where there is none.
func (d *ownDocument) judge(row map[string]rawJSON) string {
	if mark, ok := row[d.table.spec.SoftDelete]; ok && string(mark) != "null" && string(mark) != "false" {
		row = nil
	}
	switch {
	case d.there && row == nil:
		return "it is not there"
	case !d.there && row != nil:
		return fmt.Sprintf("it is there: %s", row)
	case !d.there || d.table.rewrite:
		return ""
	}
	for name, want := range d.values {
		if has := row[name]; strings.Trim(string(has), `"`) != strings.Trim(string(want), `"`) {
			return fmt.Sprintf("%s is %s, and should be %s", name, has, want)
		}
	}
	return ""
}
