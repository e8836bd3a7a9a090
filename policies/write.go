package policies

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/walgate/walgate/schema"
)

// WriteSpec says who may write what.
type WriteSpec struct {
	Roles      []string          // nil: any authenticated caller
	Operations []string          // of insert, update and delete; nil: all three
	Columns    []string          // nil: every ordinary column but excluded ones, the soft-delete column and those of Set
	Set        map[string]string // column -> "claims.NAME": what inserts put there, whoever asks
	Check      string            // CEL over row and claims, of the row as written
}

// Operation is what a pushed change asks for.
type Operation string

// The operations of pushed changes.
const (
	PushInsert Operation = "insert"
	PushUpdate Operation = "update"
	PushUpsert Operation = "upsert" // an update of a row that is there, an insert of one that isn't
	PushDelete Operation = "delete"
)

// ErrClaimMissing says that a caller's token lacks a claim that the rules of writing need. Who pushes checks for it and
// rejects the change.
var ErrClaimMissing = errors.New("the token lacks a claim that the collection's write.set needs")

// MayWrite says whether the caller has a role that may write and the collection takes the operation. Of an upsert it
// says whether it may be one of the two; Decide knows which it is.
func (c *Collection) MayWrite(caller *Caller, op Operation) bool {
	if caller == nil || !c.writes(caller.Roles) {
		return false
	}
	if op == PushUpsert {
		return c.Takes(PushInsert) || c.Takes(PushUpdate)
	}
	return c.Takes(op)
}

func (c *Collection) writes(roles []string) bool {
	w := c.Spec.Write
	if w == nil {
		return false
	}
	return w.Roles == nil || slices.ContainsFunc(roles, func(role string) bool { return slices.Contains(w.Roles, role) })
}

// Takes says whether the collection takes the operation from anybody: insert, update or delete.
func (c *Collection) Takes(op Operation) bool {
	w := c.Spec.Write
	if w == nil {
		return false
	}
	taken := w.Operations
	if taken == nil {
		taken = operations
	}
	return slices.Contains(taken, string(op))
}

// Writable says whether a change's data may name the column. Key columns are not among them: doc_id names the key, and
// data may only repeat it.
func (c *Collection) Writable(column string) bool { return c.writable[column] }

// Shown says whether documents have the column: only such columns may be named by a condition or in an answer.
func (c *Collection) Shown(column string) bool {
	i := c.Table.Column(column)
	return i >= 0 && !c.Table.Columns[i].Generated && !c.exclude[column]
}

// SoftDelete returns the column that marks a row as deleted, "" where there is none. Where it is a boolean, true marks
// it and false doesn't; else any time marks it and NULL doesn't.
func (c *Collection) SoftDelete() (column string, boolean bool) {
	if c.soft < 0 {
		return "", false
	}
	return c.Table.Columns[c.soft].Name, c.softBool
}

// InsertValues returns what an insert of the caller puts into the columns of write.set, as JSON. The error is
// ErrClaimMissing where a claim is absent, null, or a list or object for a column that holds a single value.
func (c *Collection) InsertValues(caller *Caller) (map[string]json.RawMessage, error) {
	values := make(map[string]json.RawMessage, len(c.set))
	for _, s := range c.set {
		value, ok := lookup(caller.raw, s.claim)
		if !ok || value == nil || !s.nested && isNested(value) {
			return nil, ErrClaimMissing
		}
		values[s.column] = appendCanonical(nil, value)
	}
	return values, nil
}

// setColumn is a column that inserts take from a claim.
type setColumn struct {
	column string
	claim  claimPath
	nested bool // it may hold a list or an object
}

func isNested(value any) bool {
	switch value.(type) {
	case []any, map[string]any:
		return true
	}
	return false
}

// ClaimsJSON returns all claims of the caller as a JSON object.
func (c *Caller) ClaimsJSON() []byte { return appendCanonical(nil, c.raw) }

// InScope says whether the row is in one of the scopes that the caller's claims select. It looks neither at where nor at
// soft delete, and also knows the scopes of a caller who may write and not read.
func (b *Binding) InScope(row schema.Row, caller *Caller) bool {
	v := caller.view(b.Collection)
	if v == nil || row == nil || b.check(row) != nil {
		return false
	}
	b.newKeys = b.appendKeys(b.newKeys[:0], row)
	return slices.ContainsFunc(b.newKeys, func(key ScopeKey) bool { return slices.Contains(v.keys, key) })
}

// Checks says whether the row as written passes write.check. With an error it doesn't.
func (b *Binding) Checks(row schema.Row, caller *Caller) (bool, error) {
	c := b.Collection
	if c.check == nil {
		return true, nil
	}
	if err := b.check(row); err != nil {
		return false, err
	}
	if b.verify == nil {
		return false, fmt.Errorf("collection %s: write.check needs a column of %s that rows no longer have: correct the collection and restart", c.Name, c.Table)
	}
	pass, err := b.verify.run(row, caller.claims)
	if err != nil {
		err = fmt.Errorf("collection %s: write.check can't be decided, so the row is refused: %w", c.Name, err)
	}
	return pass, err
}
