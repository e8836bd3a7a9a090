package replication

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/schema"
)

// tenure ties the catalog's watcher to one stream: it binds relations and raises floors when shapes change.
type tenure struct {
	leader *Leader
	stream *stream
	mu     sync.Mutex
	ids    map[string]changelog.Collection // what the log has stored, by name
}

// resolve makes a target of a Relation message; nil where no collection wants its rows. It runs on the stream's goroutine.
func (t *tenure) resolve(ctx context.Context, r *relation) (*target, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	w := t.leader.o.Watcher
	d := w.Current()
	c := d.Set.ByTable(r.oid)
	if c == nil || !matches(r, c.Table) {
		if err := w.Reload(ctx); err != nil {
			return nil, err
		}
		d = w.Current()
		c = d.Set.ByTable(r.oid)
	}
	if c == nil {
		return nil, nil // not configured, or stopped as a whole: changed has said so in the log
	}
	id, ok := t.id(c.Name)
	if !ok {
		return nil, nil
	}
	out := &target{relation: r, collection: c, id: id, guarded: c.HasGuard()}
	cols, err := t.layout(ctx, r, c.Table)
	if err != nil {
		return nil, err
	}
	for _, col := range cols {
		out.attnums = append(out.attnums, col.Num)
	}
	if r.identity != 'f' && c.Spec.ReplicaIdentity != "default" {
		out.stopped = fmt.Sprintf("table %s.%s has no REPLICA IDENTITY FULL any more, so changes of its rows can't be followed: run walgate init", r.schema, r.name)
		return out, nil
	}
	if out.binding, err = c.Bind(cols); err != nil {
		out.stopped = err.Error()
	}
	return out, nil
}

func (t *tenure) id(name string) (int32, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, ok := t.ids[name]
	return c.ID, ok
}

// matches says whether the relation looks like the table in the catalog.
func matches(r *relation, table *schema.Table) bool {
	for _, c := range r.columns {
		i := table.Column(c.name)
		if i < 0 || table.Columns[i].Type.OID != c.typ {
			return false
		}
	}
	return true
}

// layout describes the relation's columns by the catalog. The WAL may be older than the catalog: a column that is gone
// has no attnum, a type that is gone is taken as text.
func (t *tenure) layout(ctx context.Context, r *relation, table *schema.Table) ([]schema.Column, error) {
	types := t.leader.o.Watcher.Types()
	oids := make([]uint32, 0, len(r.columns))
	for _, c := range r.columns {
		oids = append(oids, c.typ)
	}
	if err := types.Load(ctx, t.leader.o.Source, oids...); err != nil {
		return nil, err
	}
	cols := make([]schema.Column, len(r.columns))
	for i, c := range r.columns {
		cols[i] = schema.Column{Name: c.name, Type: types.Lookup(c.typ), TypMod: c.typmod}
		if cols[i].Type == nil {
			cols[i].Type = &schema.Type{OID: c.typ, Name: "a dropped type", Kind: schema.KindText}
		}
		if j := table.Column(c.name); j >= 0 {
			cols[i].Num, cols[i].Generated, cols[i].NotNull = table.Columns[j].Num, table.Columns[j].Generated, table.Columns[j].NotNull
		}
	}
	return cols, nil
}

// changed compares the catalog with what the log has stored and raises floors where documents look different now. A
// raise waits until the stream has passed the place where the change was seen: documents logged after the floor are then
// of the new shape.
func (t *tenure) changed() {
	o := t.leader.o
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	d := o.Watcher.Current()
	var raises []changelog.Raise
	t.mu.Lock()
	for _, c := range d.Set.Collections {
		stored, ok := t.ids[c.Name]
		shape := c.Table.Shape()
		if !ok || stored.Fingerprint != c.Fingerprint {
			t.stream.post(0, func() {
				t.stream.failed = fmt.Errorf("collection %s compiles to another policy since its table changed: taking the change log over anew", c.Name)
			})
			continue
		}
		if stored.Shape == shape && stored.Stopped == "" {
			continue
		}
		r := changelog.Raise{Collection: stored.ID, Shape: shape}
		if !c.Table.KeepsShape(stored.Shape) {
			r.Reason = "the table's shape changed"
		}
		if stored.Stopped != "" {
			r.Reason, r.SetStopped = "was stopped: "+stored.Stopped, true
		}
		stored.Shape, stored.Stopped = shape, ""
		t.ids[c.Name] = stored
		raises = append(raises, r)
	}
	for name, why := range d.Stopped {
		if stored, ok := t.ids[name]; ok && stored.Stopped != why {
			stored.Stopped = why
			t.ids[name] = stored
			raises = append(raises, changelog.Raise{Collection: stored.ID, SetStopped: true, Stopped: why})
		}
	}
	t.mu.Unlock()
	if len(raises) == 0 {
		return
	}
	after, err := Fence(ctx, o.Source)
	if err != nil {
		o.Logger.Warn("a change of the source's tables could not be placed in the order; reconnecting", "error", err)
		t.stream.post(0, func() { t.stream.failed = err })
		return
	}
	t.stream.post(after, func() {
		for _, r := range raises {
			o.Logger.Warn("a synced table changed", "collection_id", r.Collection, "reason", r.Reason, "stopped", r.Stopped)
			t.stream.seq.raise(r)
		}
	})
}
