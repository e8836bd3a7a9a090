package gateway

import (
	"slices"
	"sync"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// pushPlans is what pushes need to know of the collections of one Set, worked out once.
type pushPlans struct {
	set    *policies.Set
	byName map[string]*pushPlan
}

// pushPlan is what pushes need to know of one collection.
type pushPlan struct {
	c        *policies.Collection
	t        *schema.Table
	cols     []schema.Column // of rows
	keyAt    []int           // in cols
	place    map[string]int  // of a column in cols
	soft     string          // the column that marks a deleted row; empty: none
	softBool bool
	parents  []pushParent
	bindings sync.Pool // of *policies.Binding
}

// pushParent is a foreign key into a synced collection.
type pushParent struct {
	fk   schema.ForeignKey
	plan *pushPlan
	at   []int // its columns in cols
	// to are the referenced columns in the parent's cols; byKey says that they are its key.
	to    []int
	byKey bool
}

// plansFor returns the plans of the set. A set is replaced whole whenever a table or a policy changes.
func (g *Gateway) plansFor(set *policies.Set) *pushPlans {
	if p := g.plans.Load(); p != nil && p.set == set {
		return p
	}
	p := &pushPlans{set: set, byName: make(map[string]*pushPlan, len(set.Collections))}
	for _, c := range set.Collections {
		plan := &pushPlan{c: c, t: c.Table, cols: c.Table.Ordinary(), place: map[string]int{}}
		for i, col := range plan.cols {
			plan.place[col.Name] = i
		}
		for _, k := range c.Table.Key {
			plan.keyAt = append(plan.keyAt, plan.place[c.Table.Columns[k].Name])
		}
		plan.soft, plan.softBool = c.SoftDelete()
		p.byName[c.Name] = plan
	}
	for _, plan := range p.byName {
		for _, fk := range plan.t.ForeignKeys {
			if parent := set.ByTable(fk.Parent); parent != nil && parent.Table.OID == fk.Parent {
				plan.refer(fk, p.byName[parent.Name])
			}
		}
	}
	g.plans.Store(p)
	return p
}

func (p *pushPlan) refer(fk schema.ForeignKey, parent *pushPlan) {
	r := pushParent{fk: fk, plan: parent}
	for i, name := range fk.Columns {
		at, known := p.place[name]
		to, also := parent.place[fk.ParentColumns[i]]
		if !known || !also {
			return // a generated column, which no client writes
		}
		r.at, r.to = append(r.at, at), append(r.to, to)
	}
	r.byKey = slices.Equal(r.to, parent.keyAt)
	p.parents = append(p.parents, r)
}

// binding returns what judges rows; give it back with release.
func (p *pushPlan) binding() (*policies.Binding, error) {
	if b, ok := p.bindings.Get().(*policies.Binding); ok {
		return b, nil
	}
	b, err := p.c.Bind(p.cols)
	if err != nil {
		return nil, (&Problem{Code: CollectionUnavailable, Detail: "the table of collection " + p.c.Name + " changed"}).Because(err)
	}
	return b, nil
}

func (p *pushPlan) release(b *policies.Binding) { p.bindings.Put(b) }

// localParent returns the collection whose rows the column refers to by their key alone, or nil.
func (p *pushPlan) localParent(column string) *pushPlan {
	for i := range p.parents {
		if r := &p.parents[i]; r.byKey && len(r.fk.Columns) == 1 && r.fk.Columns[0] == column {
			return r.plan
		}
	}
	return nil
}
