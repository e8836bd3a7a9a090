package replication

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// tenure ties the catalog's watcher to one stream: it binds relations and raises floors when shapes change.
type tenure struct {
	leader *Leader
	stream *stream
	filler *filler
	placed sync.Mutex // held while what was found is compared and put in the stream's order: two looks at a time would swap theirs
	mu     sync.Mutex
	ids    map[string]changelog.Collection // what the log has stored, by name
	halted map[string]bool                 // collections that the stream has stopped at a Relation message
	gaps   map[string]uint64               // collections whose place in the publication changed while transactions below this xid ran
}

// resolve makes a target of a Relation message; nil where no collection wants its rows. It runs on the stream's goroutine.
func (t *tenure) resolve(ctx context.Context, r *relation) (*target, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	w := t.leader.o.Watcher
	d := w.Current()
	c := d.Set.ByTable(r.oid)
	if (c == nil || !matches(r, c.Table)) && !w.knows(t.stream.seq.ends) {
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
	out, err := t.bind(ctx, r, c, id)
	if err == nil {
		t.halt(c.Name, out.stopped != "" || t.stream.halts(id, r.oid))
	}
	return out, err
}

// bind makes the target of a relation that belongs to a collection.
func (t *tenure) bind(ctx context.Context, r *relation, c *policies.Collection, id int32) (*target, error) {
	out := &target{relation: r, collection: c, id: id, guarded: c.HasGuard()}
	if c.HasAttachments() {
		out.fill = t.stream.seq.fills[id]
	}
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

// halt remembers whether the stream has stopped a collection: the next look at a catalog in order lets it go on, for a table
// that nobody writes to would never tell.
func (t *tenure) halt(name string, stopped bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if delete(t.halted, name); stopped {
		t.halted[name] = true
	}
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

// errReclaim ends a session whose collections compile to other policies than the log was taken over with.
var errReclaim = errors.New("taking the change log over anew")

// changed compares the catalog with what the log has stored and raises floors where documents look different now. A
// raise waits until the stream has passed the place where the change was seen: documents logged after the floor are then
// of the new shape.
func (t *tenure) changed() {
	o := t.leader.o
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	t.placed.Lock()
	defer t.placed.Unlock()
	raises, other := t.compare(o.Watcher.Current())
	raises = append(raises, t.closeGaps(ctx)...)
	if other != "" {
		t.stream.post(0, func() {
			t.stream.failed = fmt.Errorf("collection %s compiles to another policy since its table changed: %w", other, errReclaim)
		})
		return
	}
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
			t.renew(r.Collection, r.SetStopped && r.Stopped == "")
		}
	})
}

// renew binds a collection's relations to the catalog as it is now: a type may have changed without a Relation message.
// Those that were left out or don't fit, and where the collection goes on those that were stopped, are forgotten: their next
// row comes after such a message; if it did not, it would end the session, and the next one starts from what is there. It
// runs on the stream's goroutine.
func (t *tenure) renew(id int32, goesOn bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	set, targets := t.leader.o.Watcher.Current().Set, t.stream.seq.targets
	for oid, old := range targets {
		c := set.ByTable(oid)
		if c == nil {
			continue
		}
		if mine, ok := t.id(c.Name); !ok || mine != id {
			continue
		}
		if old != nil && old.stopped != "" && !goesOn {
			continue
		}
		delete(targets, oid)
		if old == nil || old.stopped != "" {
			continue
		}
		if fresh, err := t.bind(ctx, old.relation, c, id); err == nil && fresh.stopped == "" {
			targets[oid] = fresh
		}
	}
}

// compare returns what must be raised for the log to agree with the catalog, or a collection that needs another tenure.
func (t *tenure) compare(d *Definitions) (raises []changelog.Raise, other string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range d.Set.Collections {
		stored, ok := t.ids[c.Name]
		if bare := t.leader.o.Watcher.bare(c); bare != "" { // its next row would stop it, and may have: with an older look at the catalog
			if ok && stored.Stopped == "" {
				stored.Stopped = withoutFullReason(bare)
				t.ids[c.Name] = stored
				raises = append(raises, changelog.Raise{Collection: stored.ID, SetStopped: true, Stopped: stored.Stopped})
			}
			continue
		}
		if !ok || stored.Fingerprint != c.Fingerprint {
			return nil, c.Name
		}
		shape, healed := c.Table.Shape(), t.halted[c.Name] && withoutFull(c) == ""
		if stored.Shape == shape && stored.Stopped == "" && !healed {
			continue
		}
		r := changelog.Raise{Collection: stored.ID, Shape: shape}
		if !c.Table.KeepsShape(stored.Shape) {
			r.Reason = "the table's shape changed"
		}
		if !c.Table.KeepsPublication(stored.Shape) {
			t.gaps[c.Name] = 0
		}
		if _, open := t.gaps[c.Name]; open {
			r.Shape = schema.OpenGap(shape)
		}
		if stored.Stopped != "" {
			r.Reason, r.SetStopped = "was stopped: "+stored.Stopped, true
		} else if healed {
			r.Reason, r.SetStopped = "was stopped: changes of its rows could not be followed", true
		}
		if r.SetStopped {
			delete(t.halted, c.Name)
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
	return raises, ""
}

// closeGaps raises floors a second time. Who alters a publication waits for no writer: a transaction that is open meanwhile
// may lack changes in the stream, and ends after the first raise. Once all that were open then have ended, no more can be missing.
func (t *tenure) closeGaps(ctx context.Context) (raises []changelog.Raise) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.gaps) == 0 {
		return nil
	}
	var oldest, next int64 // of those that run, and of those to come
	err := t.leader.o.Source.QueryRow(ctx, `SELECT pg_snapshot_xmin(s)::text::int8, pg_snapshot_xmax(s)::text::int8 FROM pg_current_snapshot() AS s`).Scan(&oldest, &next)
	if err != nil {
		return nil // with the next look
	}
	for name, below := range t.gaps {
		switch {
		case below == 0 && oldest == next: // none is open: the first raise covers all
			delete(t.gaps, name)
			raises = append(raises, changelog.Raise{Collection: t.ids[name].ID, Shape: t.ids[name].Shape})
		case below == 0:
			t.gaps[name] = uint64(next)
		case uint64(oldest) >= below:
			delete(t.gaps, name)
			raises = append(raises, changelog.Raise{Collection: t.ids[name].ID, Shape: t.ids[name].Shape, Reason: "the publication changed while transactions were open"})
		}
	}
	return raises
}
