package policies

import (
	"encoding/json"
	"slices"

	"github.com/walgate/walgate/schema"
)

// The conflict policies: what happens to a change of a row that has changed since the client saw it.
const (
	LastWriteWins = "last_write_wins" // the default: in the order of arrival
	ServerWins    = "server_wins"
	ClientWins    = "client_wins"
	Merge         = "merge" // by column; columns changed on both sides stay as they are
	Reject        = "reject"
	Function      = "function" // Spec.ConflictFunction decides
)

// The delete policies: what happens to an update of a row that was deleted.
const (
	ResurrectOnUpdate = "resurrect_on_update" // the default
	RejectUpdate      = "reject_update"
	DeleteWins        = "delete_wins"
)

// ConflictPolicies and DeletePolicies list the names as a configuration may have them; Function is not among them, as
// it comes with the function's name.
var (
	ConflictPolicies = []string{LastWriteWins, ServerWins, ClientWins, Merge, Reject}
	DeletePolicies   = []string{ResurrectOnUpdate, RejectUpdate, DeleteWins}
)

// RowState is a document as the caller may know it.
type RowState uint8

// The row states.
const (
	RowLive    RowState = iota // there, in scope, where passes, not soft-deleted
	RowSoft                    // there and in scope, soft-deleted
	RowGone                    // no row; the log's last entry of it is a delete in one of the caller's scopes
	RowNever                   // no row, and no such entry
	RowForeign                 // there, but not for this caller
)

// Situation is a pushed change with what it meets, the row locked.
type Situation struct {
	Op    Operation
	State RowState
	Data  []string // columns that the change's data names, without those of the key
	// Equal lists those of Data whose value the row has already.
	Equal []string

	// Changed lists the columns that changed since the client saw the row. It matters for live rows only.
	Changed    []string
	AllChanged bool // which they are is not known, so all of them
	// Ahead says that the change's parent_version is above the log's newest version.
	Ahead bool

	// Image says that the log has the last image of a row that is gone, in one of the caller's scopes.
	Image bool
}

// Action is what is done to the table.
type Action uint8

// The actions.
const (
	DoNothing     Action = iota
	DoInsert             // of Write
	DoInsertImage        // of the last logged image, overlaid with Write
	DoUpdate             // of Write
	DoUndelete           // take the soft-delete mark off, and update Write
	DoDelete             // by DELETE
	DoSoftDelete         // by setting the soft-delete mark
	DoResolve            // call the resolver; Resolve then decides
)

// Status is how a change ended.
type Status string

// The statuses that are decided here.
const (
	Accepted         Status = "accepted"
	ConflictResolved Status = "conflict_resolved"
	Rejected         Status = "rejected"
)

// The codes of rejections that are decided here.
const (
	CodePermission           = "permission"
	CodeUniqueViolation      = "unique_violation"
	CodeNotFound             = "not_found"
	CodeDeleted              = "deleted"
	CodeConflict             = "conflict"
	CodeResolverFailed       = "resolver_failed"
	CodeInvalidParentVersion = "invalid_parent_version"
)

// Decision is what to do and what to answer. The writes may still fail, or their result be refused.
type Decision struct {
	Action Action
	Write  []string // columns, in the order of Data or, of a resolver's answer, by name
	// Values holds what a resolver wants in the columns of Write; nil: they are in the change's data.
	Values map[string]json.RawMessage

	Status   Status
	Code     string   // of a rejection
	Policy   string   // that settled a conflict, or refused to
	Columns  []string // in conflict, in table order; only columns that documents have
	Document bool     // the answer shows the row as it then stands
}

// Decide says what becomes of a change whose caller passed MayWrite.
func (c *Collection) Decide(s Situation) Decision {
	d := c.decide(s)
	if !c.permits(s, d.Action) {
		return Decision{Status: Rejected, Code: CodePermission}
	}
	if d.Action == DoUpdate && len(d.Write) == 0 {
		d.Action = DoNothing
	}
	return d
}

// permits says whether the collection takes what a change turned out to be. A row comes into being by insert only,
// also where an update brings it back; and an upsert of a foreign row is the insert that it would be if there were none.
func (c *Collection) permits(s Situation, a Action) bool {
	there := s.State == RowLive || s.State == RowSoft
	if a == DoInsert || a == DoInsertImage || s.Op == PushUpsert && !there {
		return c.Takes(PushInsert)
	}
	return s.Op != PushUpsert || c.Takes(PushUpdate)
}

func (c *Collection) decide(s Situation) Decision {
	switch s.Op {
	case PushInsert:
		if s.State == RowGone || s.State == RowNever {
			return Decision{Action: DoInsert, Write: s.Data, Status: Accepted}
		}
		return Decision{Status: Rejected, Code: CodeUniqueViolation, Document: s.State == RowLive}
	case PushDelete:
		if s.State != RowLive {
			return Decision{Status: Accepted}
		}
		return c.change(s)
	}
	switch s.State {
	case RowLive:
		return c.change(s)
	case RowSoft, RowGone:
		return c.revive(s)
	case RowNever:
		if s.Op == PushUpsert {
			return Decision{Action: DoInsert, Write: s.Data, Status: Accepted}
		}
	case RowForeign:
		if s.Op == PushUpsert {
			return Decision{Status: Rejected, Code: CodeUniqueViolation}
		}
	}
	return Decision{Status: Rejected, Code: CodeNotFound}
}

// change decides over an update or delete of a live row.
func (c *Collection) change(s Situation) Decision {
	if s.Ahead {
		return Decision{Status: Rejected, Code: CodeInvalidParentVersion, Document: true}
	}
	d := c.write(s.Op, s.Data)
	changed := func(column string) bool {
		return (s.AllChanged && c.ordinary(column) || slices.Contains(s.Changed, column)) && !slices.Contains(s.Equal, column)
	}
	conflict := slices.ContainsFunc(c.Table.Columns, func(col schema.Column) bool { return changed(col.Name) })
	policy := c.conflictPolicy()
	if policy == Merge && s.Op != PushDelete {
		both := changed
		changed = func(column string) bool { return slices.Contains(s.Data, column) && both(column) }
		conflict = slices.ContainsFunc(s.Data, changed)
		d.Write = slices.DeleteFunc(slices.Clone(s.Data), changed)
	}
	if !conflict {
		return d
	}
	d.Status, d.Policy, d.Columns = ConflictResolved, policy, c.shown(changed)
	d.Document = d.Action == DoUpdate
	switch policy {
	case ServerWins:
		d.Action, d.Write, d.Document = DoNothing, nil, true
	case Merge:
		if s.Op == PushDelete {
			d.Action, d.Document = DoNothing, true
		}
	case Reject:
		return d.reject(CodeConflict)
	case Function:
		d.Action, d.Write, d.Document = DoResolve, nil, true
	}
	return d
}

// write is the change itself, unopposed.
func (c *Collection) write(op Operation, data []string) Decision {
	switch {
	case op != PushDelete:
		return Decision{Action: DoUpdate, Write: data, Status: Accepted}
	case c.soft >= 0:
		return Decision{Action: DoSoftDelete, Status: Accepted}
	}
	return Decision{Action: DoDelete, Status: Accepted}
}

func (d Decision) reject(code string) Decision {
	return Decision{Status: Rejected, Code: code, Policy: d.Policy, Columns: d.Columns, Document: true}
}

// revive decides over an update of a row that was deleted.
func (c *Collection) revive(s Situation) Decision {
	d := Decision{Status: ConflictResolved, Policy: c.deletePolicy()}
	switch d.Policy {
	case DeleteWins:
		return d
	case RejectUpdate:
		d.Status, d.Code = Rejected, CodeDeleted
		return d
	}
	d.Write, d.Document = s.Data, true
	switch {
	case s.State == RowSoft:
		d.Action = DoUndelete
	case s.Image:
		d.Action = DoInsertImage
	default:
		d.Action = DoInsert
	}
	return d
}

// Resolve decides by the resolver's answer, JSON as jsonb prints it; nil: NULL. current is the row that the resolver
// was given.
func (c *Collection) Resolve(s Situation, current, answer []byte) Decision {
	d := c.change(s)
	if answer == nil {
		return d.reject(CodeConflict)
	}
	if s.Op == PushDelete && string(answer) == "null" {
		deleted := c.write(s.Op, nil)
		d.Action, d.Document = deleted.Action, false
		return d
	}
	var now, want map[string]json.RawMessage
	if json.Unmarshal(current, &now) != nil || json.Unmarshal(answer, &want) != nil || want == nil {
		return d.reject(CodeResolverFailed)
	}
	d.Action, d.Values = DoNothing, map[string]json.RawMessage{}
	for name, value := range want {
		if was, known := now[name]; known && string(was) == string(value) {
			continue
		}
		if !c.ordinary(name) {
			return d.reject(CodeResolverFailed)
		}
		d.Action, d.Values[name] = DoUpdate, value
		d.Write = append(d.Write, name)
	}
	slices.Sort(d.Write)
	return d
}

// ResolverFailed is the decision where the resolver raised an error.
func (c *Collection) ResolverFailed(s Situation) Decision {
	return c.change(s).reject(CodeResolverFailed)
}

func (c *Collection) conflictPolicy() string {
	if c.Spec.Conflict == "" {
		return LastWriteWins
	}
	return c.Spec.Conflict
}

func (c *Collection) deletePolicy() string {
	if c.Spec.OnDeleted == "" {
		return ResurrectOnUpdate
	}
	return c.Spec.OnDeleted
}

// shown lists the columns of documents, but for the key, that f is true of.
func (c *Collection) shown(f func(column string) bool) []string {
	columns := []string{}
	for i, col := range c.Table.Columns {
		if c.Shown(col.Name) && !slices.Contains(c.Table.Key, i) && f(col.Name) {
			columns = append(columns, col.Name)
		}
	}
	return columns
}

// ordinary says whether an update may write the column at all.
func (c *Collection) ordinary(column string) bool {
	i := c.Table.Column(column)
	return i >= 0 && !c.Table.Columns[i].Generated && !slices.Contains(c.Table.Key, i)
}
