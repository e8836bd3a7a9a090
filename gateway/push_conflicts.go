package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// judge decides over changes whose rows are locked, and returns what is to be written.
func (x *pushTx) judge(ctx context.Context, run []*pending) (works []pushWork, writes []schema.Write, err error) {
	for _, c := range run {
		if c.state, err = x.stateOf(c); err != nil {
			return nil, nil, err
		}
	}
	if err := x.consult(ctx, run); err != nil {
		return nil, nil, err
	}
	for _, c := range run {
		s := x.situation(c)
		d := c.plan.c.Decide(s)
		if d.Action == policies.DoResolve {
			x.asked = c
			if d, err = x.callResolver(ctx, c, s); err != nil {
				return nil, nil, err
			}
		}
		if d.Action == policies.DoNothing || d.Status == policies.Rejected {
			if err := x.leave(c, d); err != nil {
				return nil, nil, err
			}
			continue
		}
		w, write, err := x.prepareWrite(c, d)
		if errors.Is(err, policies.ErrClaimMissing) {
			c.fail(policies.CodePermission, "the token lacks a claim that rows of this collection are written with")
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		works, writes = append(works, w), append(writes, write)
	}
	return works, writes, nil
}

// leave notes the outcome of a change that writes nothing.
func (x *pushTx) leave(c *pending, d policies.Decision) error {
	found := x.found[c]
	if d.Status == policies.Rejected {
		c.fail(d.Code, rejections[d.Code])
	}
	r := &c.result
	r.status, r.policy, r.columns = d.Status, d.Policy, d.Columns
	if found.Key != nil {
		r.docID = string(schema.AppendDocID(nil, found.Key))
	}
	if !d.Document || found.Row == nil {
		return nil
	}
	b, err := c.plan.binding()
	if err != nil {
		return err
	}
	defer c.plan.release(b)
	return x.show(c, b, found.Row)
}

// rejections say in words what a code of package policies means.
var rejections = map[string]string{
	policies.CodePermission:           "the token's roles may not do this in this collection",
	policies.CodeUniqueViolation:      schema.Classify(&pgconn.PgError{Code: "23505"}).Message,
	policies.CodeNotFound:             "there is no such row",
	policies.CodeDeleted:              "the row was deleted",
	policies.CodeConflict:             "the row has changed since it was read",
	policies.CodeResolverFailed:       "the conflict could not be resolved",
	policies.CodeInvalidParentVersion: "parent_version was never given out: send the version that came with the row",
}

// consult asks the log about rows that are gone and about parent versions. The log must have passed everything that the
// locks were taken after: a commit that it doesn't hold yet counts too. Whether it is asked, which takes time and fails where
// it is late, doesn't depend on rows that the caller may not see.
func (x *pushTx) consult(ctx context.Context, run []*pending) error {
	var asks []changelog.DocumentAsk
	var of []*pending
	for _, c := range run {
		found, looked := x.found[c]
		there := c.state == policies.RowLive || c.state == policies.RowSoft
		if !looked || c.operation == "insert" || c.operation == "delete" && !there || there && (!c.hasParent || c.hasBase) {
			continue
		}
		st := stateOf(&x.head, c.collection)
		asks = append(asks, changelog.DocumentAsk{Collection: st.ID, DocID: schema.AppendDocID(nil, found.Key), Since: c.parent})
		of = append(of, c)
	}
	if len(asks) == 0 {
		return nil
	}
	if err := x.learn(ctx, of, asks); err != nil {
		return err
	}
	return x.lockMade(ctx, of, asks)
}

// learn asks the log about documents.
func (x *pushTx) learn(ctx context.Context, of []*pending, asks []changelog.DocumentAsk) error {
	if err := x.passFence(ctx); err != nil {
		return err
	}
	known, head, err := x.documents(ctx, asks)
	if err != nil {
		return err
	}
	if x.known == nil {
		x.known = map[*pending]changelog.DocumentKnown{}
	}
	for i, c := range of {
		x.known[c] = known[i]
	}
	x.logHead = head
	return nil
}

// lockMade looks for rows that weren't there to be locked, and that the log knows meanwhile: others made them before the
// fence. If there is none again, it was deleted again, or by this push; then the log says what it is by now.
func (x *pushTx) lockMade(ctx context.Context, of []*pending, asks []changelog.DocumentAsk) error {
	var made []*pending
	for _, c := range of {
		if x.found[c].Row == nil && x.known[c].LatestOp == byte(policies.Upsert) {
			made = append(made, c)
		}
	}
	if len(made) == 0 {
		return nil
	}
	if err := x.lockRows(ctx, slices.Clone(made)); err != nil {
		return err
	}
	if slices.ContainsFunc(made, func(c *pending) bool { return x.found[c].Row != nil }) {
		return fmt.Errorf("%w: a row was made meanwhile", errAgain)
	}
	x.fenced = false
	return x.learn(ctx, of, asks)
}

// passFence waits until the log holds everything that the locked rows show.
func (x *pushTx) passFence(ctx context.Context) error {
	if x.fenced {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, pushFenceMost)
	defer cancel()
	err := x.g.passFence(ctx)
	x.fenced = err == nil
	return err
}

// documents reads what the log knows of documents.
func (x *pushTx) documents(ctx context.Context, asks []changelog.DocumentAsk) ([]changelog.DocumentKnown, *changelog.Head, error) {
	release, err := x.g.admitReader(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer release()
	known, head, err := x.g.o.Log.Documents(ctx, asks)
	return known, head, x.g.logProblem(err)
}

// situation is what the change meets.
func (x *pushTx) situation(c *pending) policies.Situation {
	found := x.found[c]
	s := policies.Situation{Op: policies.Operation(c.operation), Data: names(c.values), State: c.state}
	known, consulted := x.known[c]
	switch reads := c.plan.c.MayRead(x.caller); {
	case c.state == policies.RowNever:
		if mine := x.mine(c); consulted && known.LatestOp == byte(policies.Delete) && !c.plan.c.HasGuard() && slices.ContainsFunc(known.Scopes, mine) {
			s.State = policies.RowGone
			s.Image = known.Image != nil && slices.ContainsFunc(known.ImageScopes, mine)
		}
		return s
	case c.state != policies.RowLive || s.Op == policies.PushInsert: // an insert onto a row fails whatever has changed
		return s
	case !reads && (c.hasBase || c.hasParent): // whether a guess is right is not for who may not read
		s.AllChanged = true
		return s
	case reads:
		s.Equal = slices.DeleteFunc(slices.Clone(found.DataEquals), func(name string) bool { return !c.plan.c.Shown(name) })
	}
	switch {
	case c.hasBase:
		s.Changed = found.BaseDiffers
	case c.hasParent && c.since:
		s.Ahead = !x.logHead.Issued(c.parent)
		// A row that this push brought back may have changed while it was deleted, which isn't logged.
		s.AllChanged = known.All || known.LatestOp == byte(policies.Delete) || x.logHead.History != x.head.History
		s.Changed = changedColumns(c.plan.t, known.Changed)
	case c.hasParent:
		s.AllChanged = true
	}
	return s
}

// mine says whether a scope is one of those that the caller may read.
func (x *pushTx) mine(c *pending) func([16]byte) bool {
	scopes := x.caller.Scopes(c.plan.c)
	return func(scope [16]byte) bool { return slices.Contains(scopes, scope) }
}

// stateOf says what the locked row is to the caller. Of one that isn't there the log may know more.
func (x *pushTx) stateOf(c *pending) (policies.RowState, error) {
	row := x.found[c].Row
	if row == nil {
		return policies.RowNever, nil
	}
	b, err := c.plan.binding()
	if err != nil {
		return policies.RowNever, err
	}
	defer c.plan.release(b)
	if !b.InScope(row, x.caller) || !c.plan.c.MayRead(x.caller) && c.plan.c.Spec.Where != "" { // who may write only is bound by scopes only
		return policies.RowForeign, nil
	}
	passes, err := b.Passes(row, x.caller)
	if err != nil {
		x.g.policyFailed(c.collection, err)
	}
	switch {
	case !passes: // also where it is marked as deleted: who never saw it must not bring it back
		return policies.RowForeign, nil
	case !b.Live(row):
		return policies.RowSoft, nil
	}
	return policies.RowLive, nil
}

// changedColumns names the columns of a bit set by attnum - 1.
func changedColumns(t *schema.Table, set []byte) (out []string) {
	for _, col := range t.Columns {
		if i := int(col.Num) - 1; i/8 < len(set) && set[i/8]&(1<<(i%8)) != 0 {
			out = append(out, col.Name)
		}
	}
	return out
}

func names(columns []pushColumn) []string {
	out := make([]string, len(columns))
	for i := range columns {
		out[i] = columns[i].name
	}
	return out
}

// callResolver lets the application's function settle a conflict, as the application's user.
func (x *pushTx) callResolver(ctx context.Context, c *pending, s policies.Situation) (policies.Decision, error) {
	current, err := schema.RowJSON(ctx, x, c.plan.t, x.found[c].Key)
	if err != nil {
		return policies.Decision{}, x.suspect(err)
	}
	var incoming, base any
	if c.operation != "delete" {
		incoming = string(object(c.values))
	}
	if c.hasBase {
		base = string(object(c.believed))
	}
	schemaName, function, _ := strings.Cut(c.plan.c.Spec.ConflictFunction, ".")
	f := framed{x.conn, []pushStatement{x.asUser()}, []pushStatement{asGateway}}
	if x.blame {
		f.after = []pushStatement{checkConstraints, asGateway}
	} else {
		x.unchecked = true // it may have written: its deferred triggers must not run as the gateway, at the commit
	}
	b := &pgx.Batch{}
	b.Queue(`SELECT `+pgx.Identifier{schemaName, function}.Sanitize()+`($1::text::pg_catalog.jsonb, $2::text::pg_catalog.jsonb, $3::text::pg_catalog.jsonb)::pg_catalog.text`, string(current), incoming, base)
	results := f.SendBatch(ctx, b)
	var answer []byte
	err = results.QueryRow().Scan(&answer)
	if e := results.Close(); err == nil {
		err = e
	}
	var pg *pgconn.PgError
	switch f := schema.Classify(err); {
	case err == nil:
		d := c.plan.c.Resolve(s, current, answer)
		return d, nil
	case f.Again:
		return policies.Decision{}, fmt.Errorf("%w: %w", errAgain, err)
	case !errors.As(err, &pg) || f.Busy:
		return policies.Decision{}, err
	case !x.careful:
		return policies.Decision{}, fmt.Errorf("%w: %w", errCareful, err)
	}
	x.g.o.Logger.Warn("the function that resolves conflicts failed; the change is rejected: mend the function", "collection", c.collection, "function", c.plan.c.Spec.ConflictFunction, "sqlstate", pg.Code)
	if _, err = x.conn.Exec(ctx, `ROLLBACK TO SAVEPOINT walgate_change`); err == nil { // which takes the lock away
		err = x.lock(ctx, []*pending{c})
	}
	return c.plan.c.ResolverFailed(s), err
}

// prepareWrite makes the write of a decision.
func (x *pushTx) prepareWrite(c *pending, d policies.Decision) (pushWork, schema.Write, error) {
	found := x.found[c]
	w := pushWork{c: c, d: d, before: found.Row, named: d.Write}
	write := schema.Write{Table: c.plan.t, Kind: schema.Update, Key: found.Key, Columns: d.Write}
	values := c.values
	if d.Values != nil {
		values = make([]pushColumn, 0, len(d.Values))
		for _, name := range d.Write {
			values = append(values, pushColumn{name, d.Values[name]})
		}
	}
	switch d.Action {
	case policies.DoDelete:
		write.Kind, write.Columns, w.deleting, w.named = schema.Delete, nil, true, nil
		return w, write, nil
	case policies.DoSoftDelete:
		values, write.Columns, w.deleting, w.named = []pushColumn{{c.plan.soft, x.softMark(c.plan)}}, []string{c.plan.soft}, true, nil
	case policies.DoUndelete:
		unmarked := []byte("null")
		if c.plan.softBool {
			unmarked = []byte("false")
		}
		values, write.Columns = withColumn(values, c.plan.soft, unmarked), append(slices.Clone(d.Write), c.plan.soft)
	case policies.DoInsert, policies.DoInsertImage:
		set, err := c.plan.c.InsertValues(x.caller)
		if err != nil {
			return w, write, err
		}
		write.Kind = schema.Insert
		if d.Action == policies.DoInsertImage {
			values = x.image(c, values)
		}
		for name, value := range set {
			values = withColumn(values, name, value)
			w.named = append(slices.Clone(w.named), name)
		}
		write.Columns = names(values)
	}
	write.Data = object(values)
	return w, write, nil
}

// softMark is what marks a row as deleted: true, or the transaction's time.
func (x *pushTx) softMark(p *pushPlan) []byte {
	if p.softBool {
		return []byte("true")
	}
	mark, _ := json.Marshal(x.now) // a text
	return mark
}

// image overlays the last image that the log has of a row with the change's data.
func (x *pushTx) image(c *pending, values []pushColumn) []pushColumn {
	var out []pushColumn
	for _, col := range columnsOf(x.known[c].Image) {
		i := c.plan.t.Column(col.name)
		known := i >= 0 && !c.plan.t.Columns[i].Generated && !c.plan.t.Columns[i].AlwaysAssigned && !slices.Contains(c.plan.t.Key, i)
		if known && !slices.ContainsFunc(values, func(v pushColumn) bool { return v.name == col.name }) {
			out = append(out, col)
		}
	}
	return append(out, values...)
}

// versions finds the versions of documents that are shown as they were found, while their rows are locked: a version read
// later could be newer than the document.
func (x *pushTx) versions(ctx context.Context) {
	var asks []changelog.DocumentAsk
	var of []*pending
	for i := range x.changes {
		if c := &x.changes[i]; c.result.document != nil && !c.result.written && !c.result.duplicate {
			asks = append(asks, changelog.DocumentAsk{Collection: stateOf(&x.head, c.collection).ID, DocID: []byte(c.result.docID)})
			of = append(of, c)
		}
	}
	if len(asks) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, x.g.o.EchoTimeout)
	defer cancel()
	if x.passFence(ctx) != nil {
		return // the log is late: who wants the versions has to pull
	}
	known, head, err := x.documents(ctx, asks)
	if err != nil {
		return
	}
	for i, c := range of {
		if known[i].Latest != 0 {
			c.result.version = known[i].Latest.Text(head.History)
		}
	}
}
