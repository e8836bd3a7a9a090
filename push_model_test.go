package main

import (
	"maps"
	"reflect"
	"slices"
)

// The model says what a push must do, from the policy and from what was committed before. It is written from the
// documentation alone and knows nothing of the gateway's code, its SQL and its log.

// modelRow is a row by column, its values as encoding/json reads them. A nil row doesn't exist.
type modelRow map[string]any

// modelPolicy is a collection as one caller sees it.
type modelPolicy struct {
	key       string
	columns   []string // but the key
	conflict  string
	onDeleted string
	soft      string              // column that marks a row as deleted: null, or modelSet
	set       modelRow            // columns that an insert fills from the caller's claims
	sees      func(modelRow) bool // whether a row is the caller's
	resolve   func(current, incoming, base modelRow) resolution
}

// modelSet is what the model knows of a value that the database chooses.
const modelSet = "set"

// resolution is what a conflict function returned.
type resolution struct {
	refuse bool     // SQL null
	remove bool     // JSON null
	row    modelRow // an object
}

// modelChange is a change together with what its sender had seen.
type modelChange struct {
	operation string
	id        string
	data      modelRow
	base      modelRow // nil: none
	parent    int      // so many states had been seen when parent_version was current; below 0: no parent_version
	forgotten bool     // nobody knows any more what changed since
	before    int      // so many states are from before the push; 0: all of them
}

// modelOutcome is what must become of a change.
type modelOutcome struct {
	status, code, policy string
	columns              []string
	shown                bool // the answer carries the row as it is now
	wrote                bool // the row was written
	row                  modelRow
}

// judge says what a change must do to a document, whose committed states are given in their order; before the first it
// didn't exist.
func (p modelPolicy) judge(history []modelRow, c modelChange) modelOutcome {
	var current modelRow
	if len(history) > 0 {
		current = history[len(history)-1]
	}
	known := history // what a push itself has deleted is as if it had never been
	if c.before > 0 {
		known = history[:c.before]
	}
	image, gone := p.lastSeen(known)
	switch {
	case current != nil && !p.sees(current):
		return p.ofForeign(current, c)
	case current != nil && p.softDeleted(current):
		return p.ofDeleted(current, current, c)
	case current != nil:
		return p.ofLive(history, current, c)
	case gone:
		return p.ofDeleted(nil, image, c)
	}
	switch c.operation {
	case "insert", "upsert":
		return p.inserted(c.data, c)
	case "update":
		return modelOutcome{status: "rejected", code: "not_found"}
	}
	return modelOutcome{status: "accepted"}
}

// lastSeen is the last image of a row that is gone, and whether the caller was told that it went: what is done to a row that
// is marked as deleted, nobody is told.
func (p modelPolicy) lastSeen(history []modelRow) (image modelRow, gone bool) {
	last := len(history) - 1
	if last >= 0 && history[last] != nil {
		return nil, false
	}
	for ; last >= 0; last-- {
		if row := history[last]; row != nil && !p.softDeleted(row) {
			return row, p.sees(row)
		}
	}
	return nil, false
}

func (p modelPolicy) softDeleted(row modelRow) bool { return p.soft != "" && row[p.soft] != nil }

func (p modelPolicy) ofForeign(current modelRow, c modelChange) modelOutcome {
	switch c.operation {
	case "insert", "upsert":
		return modelOutcome{status: "rejected", code: "unique_violation", row: current}
	case "update":
		return modelOutcome{status: "rejected", code: "not_found", row: current}
	}
	return modelOutcome{status: "accepted", row: current}
}

// ofDeleted settles a change of a deleted document; current is nil where its row is gone.
func (p modelPolicy) ofDeleted(current, image modelRow, c modelChange) modelOutcome {
	switch c.operation {
	case "delete":
		return modelOutcome{status: "accepted", row: current}
	case "insert":
		if current != nil {
			return modelOutcome{status: "rejected", code: "unique_violation", row: current}
		}
		return p.inserted(c.data, c)
	}
	switch p.onDeleted {
	case "reject_update":
		return modelOutcome{status: "rejected", code: "deleted", policy: p.onDeleted, row: current}
	case "delete_wins":
		return modelOutcome{status: "conflict_resolved", policy: p.onDeleted, row: current}
	}
	back := overlaid(image, c.data)
	o := modelOutcome{wrote: true, row: back}
	if current == nil {
		o = p.inserted(back, c)
	}
	if p.soft != "" {
		o.row[p.soft] = nil
	}
	o.status, o.policy, o.shown = "conflict_resolved", p.onDeleted, true
	return o
}

// inserted is what an insert makes; a column that isn't named is null.
func (p modelPolicy) inserted(data modelRow, c modelChange) modelOutcome {
	row := modelRow{p.key: c.id}
	for _, column := range p.columns {
		row[column] = nil
	}
	return modelOutcome{status: "accepted", wrote: true, row: overlaid(overlaid(row, data), p.set)}
}

func (p modelPolicy) ofLive(history []modelRow, current modelRow, c modelChange) modelOutcome {
	changed := p.changed(history, current, c)
	switch {
	case c.operation == "insert":
		return modelOutcome{status: "rejected", code: "unique_violation", shown: true, row: current}
	case len(changed) == 0 && c.operation == "delete":
		return p.deleted(current)
	case len(changed) == 0:
		return modelOutcome{status: "accepted", wrote: true, row: overlaid(current, c.data)}
	}
	o := p.settle(current, changed, c)
	o.shown = o.row != nil && !p.softDeleted(o.row)
	if o.status != "accepted" {
		o.policy = p.conflict
		if o.columns == nil && o.code != "resolver_failed" {
			o.columns = changed
		}
	} else {
		o.shown = false
	}
	return o
}

// settle applies the conflict policy to a row of which others changed some columns.
func (p modelPolicy) settle(current modelRow, changed []string, c modelChange) modelOutcome {
	deleting := c.operation == "delete"
	kept := modelOutcome{status: "conflict_resolved", row: current}
	refused := modelOutcome{status: "rejected", code: "conflict", row: current}
	switch p.conflict {
	case "server_wins":
		return kept
	case "reject":
		return refused
	case "merge":
		if deleting {
			return kept
		}
		mine, both := modelRow{}, []string{}
		for column, value := range c.data {
			if slices.Contains(changed, column) {
				both = append(both, column)
			} else {
				mine[column] = value
			}
		}
		slices.Sort(both)
		o := modelOutcome{status: "conflict_resolved", columns: both, wrote: len(mine) > 0, row: overlaid(current, mine)}
		if len(both) == 0 {
			o.status, o.columns, o.wrote = "accepted", nil, true
		}
		return o
	case "function":
		var incoming modelRow
		if !deleting {
			incoming = c.data
		}
		r := p.resolve(current, incoming, c.base)
		if r.refuse {
			return refused
		}
		if !r.remove {
			row := overlaid(current, r.row)
			return modelOutcome{status: "conflict_resolved", wrote: !reflect.DeepEqual(row, current), row: row}
		}
		deleting = true
	}
	var o modelOutcome
	if deleting {
		o = p.deleted(current)
	} else {
		o = modelOutcome{wrote: true, row: overlaid(current, c.data)}
	}
	o.status = "conflict_resolved"
	return o
}

func (p modelPolicy) deleted(current modelRow) modelOutcome {
	if p.soft != "" {
		return modelOutcome{status: "accepted", wrote: true, row: overlaid(current, modelRow{p.soft: modelSet})}
	}
	return modelOutcome{status: "accepted", wrote: true}
}

// changed lists the columns that others changed since the sender looked, but for those that they made what the sender
// wants anyway.
func (p modelPolicy) changed(history []modelRow, current modelRow, c modelChange) (columns []string) {
	switch {
	case c.base != nil:
		for column, believed := range c.base {
			if !reflect.DeepEqual(current[column], believed) {
				columns = append(columns, column)
			}
		}
	case c.forgotten:
		columns = slices.Clone(p.columns)
	case c.parent >= 0:
		if c.before > 0 {
			history = history[:c.before]
		}
		for i := c.parent; i < len(history); i++ {
			var before modelRow
			if i > 0 {
				before = history[i-1]
			}
			for _, column := range p.columns {
				if before == nil || history[i] == nil || !reflect.DeepEqual(before[column], history[i][column]) {
					columns = append(columns, column)
				}
			}
		}
	}
	slices.Sort(columns)
	return slices.DeleteFunc(slices.Compact(columns), func(column string) bool {
		wanted, named := c.data[column]
		return named && reflect.DeepEqual(wanted, current[column])
	})
}

func overlaid(row, with modelRow) modelRow {
	out := modelRow{}
	maps.Copy(out, row)
	maps.Copy(out, with)
	return out
}
