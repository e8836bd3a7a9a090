package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
)

// pushLedger remembers every batch, and holds it at the end against the tables' history.
type pushLedger struct {
	t       *testing.T
	mu      sync.Mutex
	batches []*batch

	documents map[string][]committed // by table/id, in the order of their commits
	writes    map[uint64]int         // rows written by each transaction
	outcomes  map[string]stored      // by subject, client and change
	milder    bool                   // knowledge was lost with a slot
}

// committed is one state of a document.
type committed struct {
	xid    uint64
	row    modelRow
	claims string
}

// stored is an outcome that was committed.
type stored struct {
	pushID  int64
	xid     uint64
	outcome pushResult
}

func (l *pushLedger) add(b *batch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.batches = append(l.batches, b)
}

// verify compares everything that devices were told, and everything that the gateway has committed, with the model.
func (l *pushLedger) verify(v *pushConvergence) {
	l.read(v)
	l.milder = v.faults["slot dropped"] > 0
	explained := map[uint64]int{}
	var changes, answers, duplicates int
	for _, b := range l.batches {
		byPush := map[uint64][]int{} // the changes that each transaction committed
		for i := range b.changes {
			if s, ok := l.outcomes[b.key(i)]; ok {
				byPush[s.xid] = append(byPush[s.xid], i)
				changes++
			}
		}
		for _, xid := range slices.Sorted(maps.Keys(byPush)) {
			explained[xid] += l.committed(v, b, xid, byPush[xid])
		}
		for _, a := range b.answers {
			answers++
			duplicates += l.answered(v, b, a)
		}
		if b.atomic && len(byPush) > 0 && (len(byPush) > 1 || len(slices.Collect(maps.Values(byPush))[0]) != len(b.changes)) {
			l.t.Errorf("%s: an atomic push was committed in parts: %v", b.device.name, byPush)
		}
	}
	for xid, n := range l.writes {
		if explained[xid] != n {
			l.t.Errorf("the push of transaction %d wrote %d rows; its outcomes explain %d", xid, n, explained[xid])
		}
	}
	if changes == 0 || answers == 0 {
		l.t.Errorf("%d changes were committed, %d answers came: the run shows nothing", changes, answers)
	}
	v.count(fmt.Sprintf("%d batches, %d answers, %d committed changes, %d duplicates", len(l.batches), answers, changes, duplicates))
}

func (b *batch) key(i int) string {
	return b.device.caller.sub + " " + b.device.device + " " + b.changes[i].ChangeID
}

// read takes over what is in the source.
func (l *pushLedger) read(v *pushConvergence) {
	ctx := l.t.Context()
	conn, err := pgx.Connect(ctx, v.dsn)
	must(l.t, err)
	defer conn.Close(context.WithoutCancel(ctx))
	pushes := map[int64]uint64{} // the low half of the transaction's id
	var id int64
	var xid uint64
	rows, err := conn.Query(ctx, `SELECT id, xmin::text::int8 FROM walgate.pushes`)
	must(l.t, err)
	_, err = pgx.ForEachRow(rows, []any{&id, &xid}, func() error { pushes[id] = xid; return nil })
	must(l.t, err)
	isPush := map[uint64]bool{}
	for _, xid := range pushes {
		isPush[xid] = true
	}

	l.documents, l.writes, l.outcomes = map[string][]committed{}, map[uint64]int{}, map[string]stored{}
	var table, document string
	var row, claims *string
	rows, err = conn.Query(ctx, `SELECT xid::text::int8, "table", id, new::text, claims FROM history ORDER BY seq`)
	must(l.t, err)
	_, err = pgx.ForEachRow(rows, []any{&xid, &table, &document, &row, &claims}, func() error {
		c := committed{xid: xid}
		if row != nil {
			if err := json.Unmarshal([]byte(*row), &c.row); err != nil {
				return err
			}
			c.row = normalised(c.row, "deleted_at")
		}
		if claims != nil {
			c.claims = *claims
		}
		if isPush[xid&0xffffffff] {
			l.writes[xid]++
			if c.claims == "" {
				l.t.Errorf("transaction %d wrote %s %s without request.jwt.claims", xid, table, document)
			}
		} else if c.claims != "" {
			l.t.Errorf("transaction %d is no push, but wrote %s %s with request.jwt.claims", xid, table, document)
		}
		l.documents[table+"/"+document] = append(l.documents[table+"/"+document], c)
		return nil
	})
	must(l.t, err)
	var subject, client, change, outcome string
	rows, err = conn.Query(ctx, `SELECT subject, client_id, change_id, push_id, outcome::text FROM walgate.outcomes`)
	must(l.t, err)
	_, err = pgx.ForEachRow(rows, []any{&subject, &client, &change, &id, &outcome}, func() error {
		s := stored{pushID: id, xid: pushes[id]}
		l.outcomes[subject+" "+client+" "+change] = s
		if s.xid == 0 {
			return fmt.Errorf("the push %d of %s isn't in walgate.pushes", id, change)
		}
		err := json.Unmarshal([]byte(outcome), &s.outcome)
		l.outcomes[subject+" "+client+" "+change] = s
		return err
	})
	must(l.t, err)
}

// committed holds what one transaction committed of a batch against the model, and says how many of its rows it explains.
func (l *pushLedger) committed(v *pushConvergence, b *batch, xid uint64, changes []int) (explained int) {
	after := window{}
	if n := len(b.answers); n > 0 && n == b.sent { // else it may have been committed after all answers
		after = b.answers[n-1].after
	}
	results := map[int]pushResult{}
	for _, i := range changes {
		results[i] = l.outcomes[b.key(i)].outcome
	}
	for key, group := range b.groups(changes) {
		wrote := 0
		for _, c := range l.documents[key] {
			if c.xid&0xffffffff == xid {
				wrote++
			}
		}
		explained += wrote
		l.explain(v, b, key, group, results, xid, b.first, after, true)
	}
	return explained
}

// answered holds an answer against the model and against what is committed, and counts duplicates.
func (l *pushLedger) answered(v *pushConvergence, b *batch, a batchAnswer) (duplicates int) {
	results := map[int]pushResult{}
	var judged []int
	if len(a.got.Results) != len(b.changes) {
		l.t.Errorf("%s: %d results for %d changes", b.device.name, len(a.got.Results), len(b.changes))
		return 0
	}
	reasons := 0
	for i, r := range a.got.Results {
		s, done := l.outcomes[b.key(i)]
		switch {
		case r.Status == "duplicate":
			duplicates++
			if !done {
				l.t.Errorf("%s: %s is called a duplicate, but was never committed", b.device.name, b.changes[i].ChangeID)
			}
			continue
		case r.Status != "rejected" && (!done || a.got.TxID == nil || uint64(*a.got.TxID)&0xffffffff != s.xid):
			l.t.Errorf("%s: %s was acknowledged as %s in transaction %v; committed in %+v (%t)", b.device.name, b.changes[i].ChangeID, r.raw, a.got.TxID, s, done)
		case r.Status == "rejected" && done && len(b.answers) == b.sent && !l.acknowledged(b, i):
			l.t.Errorf("%s: %s was rejected whenever it was sent, but is committed: %s", b.device.name, b.changes[i].ChangeID, r.raw)
		case r.Code == "batch_rejected":
			if !b.atomic {
				l.t.Errorf("%s: %s is no part of an atomic push: %s", b.device.name, b.changes[i].ChangeID, r.raw)
			}
		case r.Status == "rejected":
			reasons++
		}
		judged = append(judged, i)
		results[i] = r
	}
	if reasons == 0 && strings.Contains(string(a.got.body), "batch_rejected") {
		l.t.Errorf("%s: a batch was rejected without a reason: %s", b.device.name, a.got.body)
	}
	xid := uint64(0)
	if a.got.TxID != nil {
		xid = uint64(*a.got.TxID) & 0xffffffff
	}
	for key, group := range b.groups(judged) {
		l.explain(v, b, key, group, results, xid, a.before, a.after, false)
	}
	return duplicates
}

func (l *pushLedger) acknowledged(b *batch, i int) bool {
	return slices.ContainsFunc(b.answers, func(a batchAnswer) bool { return a.got.Results[i].Status != "rejected" })
}

// groups sorts changes by document.
func (b *batch) groups(changes []int) map[string][]int {
	out := map[string][]int{}
	for _, i := range changes {
		key := b.changes[i].Collection + "/" + b.changes[i].DocID
		out[key] = append(out[key], i)
	}
	return out
}

// explain looks for a point in a document's history from which the model leads to the results, and to the rows that
// the transaction wrote.
func (l *pushLedger) explain(v *pushConvergence, b *batch, key string, group []int, results map[int]pushResult, xid uint64, before, after window, rows bool) {
	all := l.documents[key]
	first, last := 0, len(all)
	var wrote []modelRow
	for i, c := range all {
		if xid != 0 && c.xid&0xffffffff == xid {
			if wrote == nil {
				first, last = i, i
			}
			wrote = append(wrote, c.row)
		}
	}
	if wrote == nil {
		for first < len(all) && before.known && before.shows(all[first].xid) {
			first++
		}
		for last > first && after.known && !after.shows(all[last-1].xid) {
			last--
		}
	}
	var faults []string
	for at := first; at <= last; at++ {
		if at > 0 && at < len(all) && all[at-1].xid == all[at].xid {
			continue // within a transaction
		}
		for mild := range 3 {
			fault := l.replay(v, b, all[:at], key, group, results, wrote, rows, mild)
			if fault == "" {
				return
			}
			faults = append(faults, fmt.Sprintf("after state %d: %s", at, fault))
		}
	}
	var text strings.Builder
	for i, c := range all {
		if i >= first-4 && i <= last+len(wrote) {
			fmt.Fprintf(&text, "\n    %d by %d: %v", i+1, c.xid, c.row)
		}
	}
	sent, _ := json.Marshal(b.changes) // from JSON
	l.t.Errorf("%s: %s in transaction %d, atomic %t: no state of the row from %d to %d explains the outcome:\n  %s\n  policy %+v, changes (revisions %q)\n  %s\n  history%s", b.device.name, key, xid,
		b.atomic, first, last, strings.Join(slices.Compact(faults), "\n  "), v.policies[b.changes[group[0]].Collection], b.seen, sent, text.String())
}

// replay says how the results differ from what the model makes of the changes after a history. A mild one lets
// the gateway remember less: 1 not that the row was there, 2 not what it was.
func (l *pushLedger) replay(v *pushConvergence, b *batch, past []committed, key string, group []int, results map[int]pushResult, wrote []modelRow, rows bool, mild int) (fault string) {
	policy := v.policies[b.changes[group[0]].Collection]
	policy.set = modelRow{"owner_id": b.device.caller.sub}
	policy.sees = func(r modelRow) bool { return r["owner_id"] == b.device.caller.sub }
	var history []modelRow
	for _, c := range past {
		history = append(history, c.row)
	}
	before := len(history)
	var predicted []modelRow
	for _, i := range group {
		c := b.changes[i]
		m := modelChange{operation: c.Operation, id: c.DocID, data: modelRow(c.Data), base: modelRow(c.Base), parent: -1, before: before}
		if c.ParentVersion != "" {
			m.parent = 1 + slices.IndexFunc(history[:before], func(r modelRow) bool { return r != nil && fmt.Sprint(r["rev"]) == b.seen[i] })
			if m.parent == 0 {
				return "the device held a state that isn't in the history: revision " + b.seen[i]
			}
			m.forgotten = mild > 0 && (l.milder || policy.visibilityChanged(history[m.parent-1:before]))
		}
		judged := history
		want := policy.judge(judged, m)
		if mild == 1 && l.milder && want.policy == policy.onDeleted {
			m.before = 0
			want = policy.judge(nil, m) // the log has lost the document
		}
		got := results[i]
		if got.Code == "batch_rejected" { // nobody said what it would have been
			if want.wrote {
				history = append(slices.Clone(history), want.row)
			}
			continue
		}
		columns := slices.Sorted(slices.Values(got.Columns))
		if got.Status != want.status || got.Code != want.code || want.policy != "" && got.Policy != want.policy || !slices.Equal(columns, want.columns) && len(columns)+len(want.columns) > 0 {
			return fmt.Sprintf("%s is %s policy %q columns %q, the model says %s %s policy %q columns %q", c.ChangeID, got, got.Policy, got.Columns, want.status, want.code, want.policy, want.columns)
		}
		if mild == 2 && l.milder && want.policy == "resurrect_on_update" {
			rows = false // the log may have lost what the row was
		}
		if want.wrote {
			history = append(slices.Clone(history), want.row)
			predicted = append(predicted, want.row)
		}
	}
	if !rows {
		return ""
	}
	without := func(list []modelRow) (out []modelRow) {
		for _, r := range list {
			if r != nil {
				r = overlaid(r, modelRow{"rev": nil}) // by the application's trigger
			}
			out = append(out, r)
		}
		return out
	}
	if !reflect.DeepEqual(without(predicted), without(wrote)) {
		return fmt.Sprintf("the push wrote %v to %s, the model says %v", wrote, key, predicted)
	}
	return ""
}

// visibilityChanged says whether a document came or went between its states, for somebody: of such changes the log knows
// no columns.
func (p modelPolicy) visibilityChanged(states []modelRow) bool {
	for i := 1; i < len(states); i++ {
		a, b := states[i-1], states[i]
		if a == nil || b == nil || p.sees(a) != p.sees(b) || p.softDeleted(a) != p.softDeleted(b) {
			return true
		}
	}
	return false
}
