package policies

import (
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/walgate/walgate/schema"
)

var functionName = regexp.MustCompile(`^[^.\x00]+\.[^.\x00]+$`)

// IsFunctionName says whether the text names a SQL function as schema.name.
func IsFunctionName(text string) bool { return functionName.MatchString(text) }

// checkConflict holds the names of policies, which need no table.
func (k *compiler) checkConflict() {
	spec := k.c.Spec
	switch {
	case spec.Conflict == Function && !IsFunctionName(spec.ConflictFunction):
		k.fault("conflict.function", strconv.Quote(spec.ConflictFunction), "a SQL function as schema.name", "")
	case spec.Conflict != "" && spec.Conflict != Function && !slices.Contains(ConflictPolicies, spec.Conflict):
		k.fault("conflict", spec.Conflict, strings.Join(ConflictPolicies, ", ")+" or {function: schema.name}", didYouMean(spec.Conflict, ConflictPolicies))
	}
	if spec.OnDeleted != "" && !slices.Contains(DeletePolicies, spec.OnDeleted) {
		k.fault("on_deleted", spec.OnDeleted, strings.Join(DeletePolicies, ", "), didYouMean(spec.OnDeleted, DeletePolicies))
	}
}

// operations are what write.operations may list: an upsert is an insert or an update.
var operations = []string{string(PushInsert), string(PushUpdate), string(PushDelete)}

func (k *compiler) compileWrite() {
	w := k.c.Spec.Write
	if w == nil {
		return
	}
	k.checkNames("write.roles", w.Roles, "the name of a role", "leave roles out if every authenticated caller may write", func(role string) (bool, string) { return role != "", "" })
	k.checkNames("write.operations", w.Operations, "insert, update or delete", "leave operations out for all three", func(op string) (bool, string) {
		if op == string(PushUpsert) {
			return false, "an upsert is an insert or an update: name both"
		}
		return slices.Contains(operations, op), didYouMean(op, operations)
	})
	k.compileSet()
	k.compileColumns()
	k.c.check = k.compileFilter("write.check", w.Check)
}

// checkNames reports each name that right refuses, with its hint, and a list that is there but empty.
func (k *compiler) checkNames(key string, names []string, want, whenEmpty string, right func(name string) (ok bool, hint string)) {
	if names != nil && len(names) == 0 {
		k.fault(key, "an empty list", "at least one entry", whenEmpty)
	}
	for i, name := range names {
		if ok, hint := right(name); !ok {
			k.fault(key+"."+strconv.Itoa(i), strconv.Quote(name), want, hint)
		}
	}
}

func (k *compiler) compileSet() {
	set := k.c.Spec.Write.Set
	if set != nil && len(set) == 0 {
		k.fault("write.set", "no column", "at least one column: claims.NAME", "leave set out if inserts take nothing from claims")
	}
	for _, name := range slices.Sorted(maps.Keys(set)) {
		path, claim := "write.set."+name, set[name]
		ok := claimPattern.MatchString(claim)
		if !ok {
			k.fault(path, claim, "claims.NAME", didYouMeanClaim(claim))
		}
		if !k.dataColumn(path, name) || !ok {
			continue
		}
		var nested bool
		switch k.c.Table.Columns[k.c.Table.Column(name)].Type.Underlying().Kind {
		case schema.KindJSON, schema.KindArray, schema.KindComposite, schema.KindHstore:
			nested = true
		}
		k.c.set = append(k.c.set, setColumn{column: name, claim: strings.Split(claim, ".")[1:], nested: nested})
	}
}

// compileColumns works out what data may name: the columns that are listed, or every ordinary one.
func (k *compiler) compileColumns() {
	c, w := k.c, k.c.Spec.Write
	if w.Columns == nil {
		for i, col := range c.Table.Columns {
			_, forced := w.Set[col.Name]
			c.writable[col.Name] = c.ordinary(col.Name) && !c.exclude[col.Name] && i != c.soft && !forced
		}
		return
	}
	k.checkNames("write.columns", w.Columns, "a column of "+c.Table.String(), "leave columns out for every column, or operations without insert and update for none", func(name string) (bool, string) {
		return c.Table.Column(name) >= 0, didYouMean(name, k.names)
	})
	for i, name := range w.Columns {
		path := "write.columns." + strconv.Itoa(i)
		_, forced := w.Set[name]
		switch {
		case c.Table.Column(name) < 0: // reported
		case forced:
			k.fault(path, name+", which write.set takes from a claim", "a column that clients fill in", "name it in one of the two")
		case k.dataColumn(path, name):
			c.writable[name] = true
		}
	}
}

// dataColumn refuses what a written value can't be put into.
func (k *compiler) dataColumn(path, name string) bool {
	t := k.c.Table
	i := t.Column(name)
	const want = "an ordinary column"
	switch {
	case i < 0:
		k.fault(path, name, "a column of "+t.String(), didYouMean(name, k.names))
	case slices.Contains(t.Key, i):
		k.fault(path, name+", a key column", "a column outside the key", "doc_id names the key; scope says whose keys a caller may use")
	case t.Columns[i].Generated:
		k.fault(path, name+", a generated column", want, "PostgreSQL fills it in")
	case i == k.c.soft:
		k.fault(path, name+", the soft_delete column", want, "deletes and updates of deleted rows set it")
	default:
		return true
	}
	return false
}
