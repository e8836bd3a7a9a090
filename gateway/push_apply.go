package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// apply carries the changes out: in request order but for what foreign keys link, and as many at a time as can be.
func (x *pushTx) apply(ctx context.Context) error {
	var todo []*pending
	for i := range x.changes {
		if c := &x.changes[i]; c.result.status == "" {
			todo = append(todo, c)
		}
	}
	x.findCreators(todo)
	if x.careful {
		for _, c := range x.ordered(todo) {
			if err := x.applyAlone(ctx, c); err != nil {
				return err
			}
			if x.r.atomic && c.result.status == policies.Rejected {
				return nil
			}
		}
		return nil
	}
	if err := x.lockAll(ctx, todo); err != nil {
		return err
	}
	if b := x.ahead; b != nil { // there was no row to lock
		x.ahead = nil
		if err := x.sendOpening(ctx, b); err != nil {
			return err
		}
	}
	rest := x.ordered(todo)
	for first := true; len(rest) > 0; first = false {
		n := x.runLength(rest)
		if !first {
			if err := x.lock(ctx, rest[:n]); err != nil {
				return err
			}
		}
		err := x.applyRun(ctx, rest[:n])
		if err != nil {
			return err
		}
		if x.r.atomic && x.anyRejected() {
			return nil
		}
		rest = rest[n:]
	}
	return nil
}

// applyAlone carries one change out within a savepoint: if it fails, nothing of it stays.
func (x *pushTx) applyAlone(ctx context.Context, c *pending) error {
	if _, err := x.conn.Exec(ctx, `SAVEPOINT walgate_change`); err != nil {
		return err
	}
	one := []*pending{c}
	err := x.lock(ctx, one)
	locked := err == nil
	x.fenced, x.wrote = false, false
	if locked {
		err = x.applyRun(ctx, one)
	}
	if err != nil {
		var problem *Problem
		var batch *schema.BatchError
		var pg *pgconn.PgError
		f := schema.Classify(err)
		if errors.As(err, &problem) || errors.Is(err, errAgain) || !errors.As(err, &batch) && !errors.As(err, &pg) || f.Busy || x.conn.IsClosed() {
			return err
		}
		if f.Code == schema.CodeInternal {
			x.g.o.Logger.Warn("a pushed change could not be written; its client tries again", "collection", c.collection, "sqlstate", sqlState(err))
		}
		if f.Code == schema.CodeInvalidValue && x.asked == c {
			c.fail(policies.CodeResolverFailed, rejections[policies.CodeResolverFailed])
		} else {
			c.fail(f.Code, x.explain(c, f))
		}
	}
	if c.result.status == policies.Rejected && (err != nil || x.wrote) { // else the row stays locked, for its version
		_, err = x.conn.Exec(ctx, `ROLLBACK TO SAVEPOINT walgate_change`)
		if err == nil && !locked && c.result.code == schema.CodeInvalidValue {
			err = x.checkKey(ctx, c)
		}
		return err
	}
	_, err = x.conn.Exec(ctx, `RELEASE SAVEPOINT walgate_change`)
	return err
}

// checkKey finds out whether it is the key that can't be converted.
func (x *pushTx) checkKey(ctx context.Context, c *pending) error {
	faults, err := schema.CheckAsks(ctx, x, c.plan.t, []schema.Ask{{Key: c.key}})
	if err == nil && faults[0] != nil {
		f := schema.Classify(faults[0])
		c.fail(f.Code, f.Message)
	}
	return err
}

// sqlState is what the log may say of a database's error: its text can hold values of rows.
func sqlState(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}

// explain says what is wrong, and with which column, as far as the caller may know it.
func (x *pushTx) explain(c *pending, f schema.Failure) string {
	if f.Column != "" && c.plan.c.Shown(f.Column) {
		return f.Message + " (" + f.Column + ")"
	}
	return f.Message
}

// lockAll locks the rows of all changes, a table after the other and each in the order of keys, so that pushes don't
// deadlock. What it finds is what the first change of each document meets.
func (x *pushTx) lockAll(ctx context.Context, todo []*pending) error {
	of := map[string]*pending{} // the first of each document, as it is spelled
	var first, later []*pending
	for _, c := range todo {
		x.resolve(c)
		if c.result.status != "" || c.key == nil {
			continue
		}
		if name := c.document(); of[name] == nil {
			of[name] = c
			first = append(first, c)
		} else {
			later = append(later, c)
		}
	}
	if err := x.lockRows(ctx, first); err != nil {
		return err
	}
	for _, c := range later {
		c.key = x.found[of[c.document()]].Key
	}
	for _, c := range first {
		c.key = x.found[c].Key
	}
	return nil
}

// lock locks the rows of a run anew: what an earlier one left of them is what the changes meet.
func (x *pushTx) lock(ctx context.Context, run []*pending) error {
	var keyed []*pending
	for _, c := range run {
		x.resolve(c)
		if c.result.status == "" && c.key != nil {
			keyed = append(keyed, c)
		}
	}
	return x.lockRows(ctx, keyed)
}

func (x *pushTx) lockRows(ctx context.Context, changes []*pending) error {
	slices.SortStableFunc(changes, func(a, b *pending) int { return int(int64(a.plan.t.OID) - int64(b.plan.t.OID)) })
	for len(changes) > 0 {
		plan := changes[0].plan
		n := slices.IndexFunc(changes, func(c *pending) bool { return c.plan != plan })
		if n < 0 {
			n = len(changes)
		}
		asks := make([]schema.Ask, n)
		for i, c := range changes[:n] {
			asks[i].Key = c.key
			if c.hasBase || c.hasParent {
				asks[i].Data = object(c.values)
			}
			if c.hasBase {
				asks[i].Base = object(c.believed)
			}
		}
		found, err := schema.LockRows(ctx, x, plan.t, asks)
		if err == nil {
			err = x.lockMissed(ctx, changes[:n], asks, found)
		}
		if err != nil {
			return x.suspect(err)
		}
		for i, c := range changes[:n] {
			x.found[c] = found[i]
		}
		changes = changes[n:]
	}
	return nil
}

// lockMissed looks once more for rows that aren't there: one that another transaction deleted and inserted anew, while
// its lock was waited for, shows in a new snapshot only. An insert onto such a row notices by itself.
func (x *pushTx) lockMissed(ctx context.Context, changes []*pending, asks []schema.Ask, found []schema.Found) error {
	var at []int
	var missed []schema.Ask
	for i, c := range changes {
		if found[i].Row == nil && (c.operation == "update" || c.operation == "delete") {
			at, missed = append(at, i), append(missed, asks[i])
		}
	}
	if len(missed) == 0 {
		return nil
	}
	again, err := schema.LockRows(ctx, x, changes[0].plan.t, missed)
	for i := range again {
		found[at[i]] = again[i]
	}
	return err
}

// suspect decides what becomes of the transaction after an error of a statement on rows.
func (x *pushTx) suspect(err error) error {
	var batch *schema.BatchError
	var problem *Problem
	switch f := schema.Classify(err); {
	case f.Again:
		return fmt.Errorf("%w: %w", errAgain, err)
	case f.Busy, errors.As(err, &problem), !errors.As(err, &batch), x.careful, x.conn.IsClosed():
		return err
	}
	return fmt.Errorf("%w: %w", errCareful, err)
}

// ordered brings parents before their children and children's deletes before their parents'.
func (x *pushTx) ordered(todo []*pending) []*pending {
	linked := slices.ContainsFunc(todo, func(c *pending) bool { return len(c.plan.t.ForeignKeys) > 0 })
	if len(todo) < 2 || !linked {
		return todo
	}
	changes := make([]schema.Change, len(todo))
	for i, c := range todo {
		changes[i] = schema.Change{Table: c.plan.t, Kind: schema.Update, Key: c.key, Data: object(c.data)}
		found, looked := x.found[c]
		changes[i].Row = found.Row
		switch {
		case c.operation == "delete":
			changes[i].Kind = schema.Delete
		case c.operation == "insert", c.operation == "upsert" && (looked || c.key == nil) && found.Row == nil:
			changes[i].Kind = schema.Insert
		}
	}
	order := make([]*pending, 0, len(todo))
	placed := map[*pending]bool{}
	var place func(c *pending)
	place = func(c *pending) {
		if placed[c] {
			return
		}
		placed[c] = true
		for _, id := range x.references(c) {
			if creator := x.creators[id]; creator != nil {
				place(creator)
			}
		}
		order = append(order, c)
	}
	for _, i := range schema.OrderChanges(changes) {
		place(todo[i])
	}
	return order
}

// runLength is how many of the changes can be judged and written together: each of another document, and none that needs
// a key which an earlier one of them gets.
func (x *pushTx) runLength(changes []*pending) int {
	seen := make(map[string]bool, len(changes))
	making := map[localID]bool{}
	for i, c := range changes {
		if name := c.document(); name != "" {
			if seen[name] {
				return i
			}
			seen[name] = true
		}
		for _, id := range x.references(c) {
			if making[id] {
				return i
			}
		}
		if id := (localID{c.collection, c.localID}); c.localID != "" {
			if x.creators[id] != c && making[id] {
				return i
			}
			making[id] = true
		}
	}
	return len(changes)
}

// document names the row that the change is about, by its key as PostgreSQL writes it where that is known.
func (c *pending) document() string {
	if c.key == nil {
		return ""
	}
	return c.collection + "\x00" + strings.Join(c.key, "\x00")
}

// pushWork is what is to be done to one row.
type pushWork struct {
	c        *pending
	d        policies.Decision
	named    []string // columns that the caller, or its claims, filled in
	before   schema.Row
	deleting bool // or marking as deleted
}

// applyRun judges and writes changes of different documents.
func (x *pushTx) applyRun(ctx context.Context, run []*pending) error {
	live := run[:0:0]
	for _, c := range run {
		x.resolve(c)
		if c.result.status == "" {
			live = append(live, c)
		}
	}
	works, writes, err := x.judge(ctx, live)
	if err != nil {
		return err
	}
	if len(writes) == 0 || x.r.atomic && x.anyRejected() {
		return nil
	}
	rows, err := x.write(ctx, writes)
	if err != nil {
		return x.raced(ctx, err, works, writes)
	}
	if err := x.withheld(ctx, works, writes, rows); err != nil {
		return err
	}
	later := x.careful && !x.blame                                                                                              // see close
	if err := x.examineParents(ctx, works, rows, func(p *pushParent) bool { return !(later && p.fk.Deferrable) }); err != nil { // first, as the database does
		return err
	}
	for i := range works {
		if err := x.examine(&works[i], rows[i]); err != nil {
			return err
		}
	}
	if err := x.examineAttachments(ctx, works, writes, rows); err != nil {
		return err
	}
	for i := range works {
		if later && works[i].c.result.status != policies.Rejected {
			x.written, x.rows = append(x.written, works[i]), append(x.rows, rows[i])
		}
	}
	// What was written of a rejected change has to go. Of those without a parent, a database that finds none names one.
	if !x.careful && slices.ContainsFunc(works, func(w pushWork) bool {
		return w.c.result.status == policies.Rejected && (!x.r.atomic || w.c.result.code == schema.CodeForeignKeyMissing)
	}) {
		return errCareful
	}
	for i := range works {
		x.assigned(works[i].c)
	}
	return nil
}

// write carries the writes out as the application's user. Deferred constraints and triggers run before that ends, for at the
// commit they would as the gateway. Where one fails, care finds out whether it would hold in the end.
func (x *pushTx) write(ctx context.Context, writes []schema.Write) ([]schema.Row, error) {
	x.wrote = true
	f := framed{conn: x.conn, before: []pushStatement{x.asUser()}}
	switch {
	case x.blame:
		f.before, f.after = append(f.before, deferConstraints), []pushStatement{checkConstraints, asGateway}
	case x.careful:
		f.before, f.after, x.unchecked = append(f.before, deferConstraints), []pushStatement{asGateway}, true
	case x.g.o.PushRole != "": // statements are prepared before those of their batch run, and that role may not name our tables
		f.after = []pushStatement{checkConstraints, asGateway}
	default: // often nothing follows but the commit
		f.after, x.ahead = []pushStatement{checkConstraints}, &pgx.Batch{}
		x.ahead.Queue(asGateway.sql)
	}
	return schema.ExecWrites(ctx, f, writes)
}

// raced tells an insert that lost against another transaction's insert of the same key from one that fails by itself.
func (x *pushTx) raced(ctx context.Context, err error, works []pushWork, writes []schema.Write) error {
	var batch *schema.BatchError
	if errors.As(err, &batch) {
		for i := batch.From; i < batch.To && i < len(writes); i++ {
			// A key that the database assigns is taken only where its sequence is behind the table.
			if writes[i].Kind == schema.Insert && writes[i].Key != nil && writes[i].Table.KeyTaken(err) && x.races < pushAttempts-1 {
				x.races++
				return fmt.Errorf("%w: %w", errAgain, err)
			}
		}
	}
	return x.suspect(err)
}
