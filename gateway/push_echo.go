package gateway

import (
	"context"
	"slices"

	"github.com/walgate/walgate/changelog"
)

// pushEcho is a push's way back: what was committed comes through the log, which gives it its versions.
type pushEcho struct {
	own    *awaitedPush // nil: nothing was committed now
	firsts []int64      // pushes that its duplicates first came with
}

// awaitedPush is a mark that the hub waits for.
type awaitedPush struct {
	id     int64
	done   <-chan echo
	forget func()
}

// echoOfDuplicates adds the earlier pushes whose changes came again.
func (x *pushTx) echoOfDuplicates(own *awaitedPush) *pushEcho {
	e := &pushEcho{own: own}
	for i := range x.changes {
		if first := x.changes[i].result.first; first != 0 && !slices.Contains(e.firsts, first) {
			e.firsts = append(e.firsts, first)
		}
	}
	return e
}

// end stops waiting.
func (e *pushEcho) end() {
	if e.own != nil {
		e.own.forget()
	}
}

// await fills in the versions. What was committed is durable: a log that is late or away only leaves them out.
func (e *pushEcho) await(ctx context.Context, p *push) {
	if e.own == nil && len(e.firsts) == 0 {
		return
	}
	defer e.end()
	ctx, cancel := context.WithTimeout(ctx, p.g.o.EchoTimeout)
	defer cancel()
	ids := slices.Clone(e.firsts)
	var found []changelog.PushedChanges
	if e.own != nil {
		select {
		case at := <-e.own.done:
			if found = append(found, at.PushedChanges); !at.whole {
				found, ids = nil, append(ids, e.own.id)
			}
		case <-ctx.Done():
			p.g.metrics.echoesMissed.Inc()
			return
		}
	}
	if len(ids) > 0 {
		earlier, err := p.pushed(ctx, ids)
		if err == nil && len(earlier) < len(ids) {
			// An earlier push was committed a moment ago: it is below a fence.
			if err = p.g.passFence(ctx); err == nil {
				earlier, err = p.pushed(ctx, ids)
			}
		}
		if err != nil {
			p.g.metrics.echoesMissed.Inc()
			return
		}
		found = append(found, earlier...)
	}
	for i := range found {
		p.g.hub.hear(found[i].Last)
	}
	p.echoed(found)
}

// pushed reads where pushes stand in the log.
func (p *push) pushed(ctx context.Context, ids []int64) ([]changelog.PushedChanges, error) {
	release, err := p.g.admitReader(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return p.g.o.Log.Pushed(ctx, ids)
}

// echoed gives the results the versions that their pushes have in the feed.
func (p *push) echoed(found []changelog.PushedChanges) {
	head, _ := p.g.hub.position()
	type written struct {
		push       int64
		collection int32
		doc        string
	}
	versions := map[written]changelog.Version{}
	last := changelog.Version(0)
	for _, f := range found {
		last = max(last, f.Last)
		for _, c := range f.Changes {
			versions[written{f.ID, c.Collection, c.DocID}] = c.Version
		}
	}
	if last != 0 {
		p.visibleAt = last.Text(head.History)
	}
	for i := range p.changes {
		c := &p.changes[i]
		st := stateOf(&p.head, c.collection)
		if st == nil || !c.result.written && !c.result.duplicate {
			continue
		}
		push := p.id
		if c.result.duplicate {
			push = c.result.first
		}
		if v := versions[written{push, st.ID, c.result.docID}]; v != 0 {
			c.result.version = v.Text(head.History)
		}
	}
}
