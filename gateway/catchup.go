package gateway

import (
	"context"

	"github.com/walgate/walgate/changelog"
)

const (
	catchUpPage  = 500
	catchUpBytes = 256 << 10
)

// catchUp reads the log from where the session stands until it can go live.
func (s *session) catchUp(ctx context.Context) error {
	s.g.metrics.slow.Inc()
	s.sent = max(s.sent, s.sub.reached(0))
	until := changelog.Version(0) // once live: where the queue begins
	for {
		p, room, err := s.g.readPage(ctx, changelog.Request{Scopes: s.sub.feed.scopes, Since: s.sent, Until: until, Limit: catchUpPage, MaxBytes: s.g.memory.share(catchUpBytes),
			Subject: s.sub.client.subject, ClientID: s.sub.client.id})
		if err != nil {
			return err
		}
		since := changelog.Cursor{Version: s.sent, History: s.history}
		if !s.ready {
			since = s.since
		}
		if r := s.sub.feed.check(since, &p.Head); r != nil {
			room.release()
			return s.resyncClosing(r)
		}
		if err = s.sub.feed.usable(&p.Head); err == nil {
			s.history = p.Head.History
			err = s.sendPage(ctx, p)
		}
		room.release()
		if err != nil {
			return err
		}
		s.sent = p.Last
		if err := s.attend(ctx, false); err != nil { // the client's pings and renewals don't wait for the log's end
			return err
		}
		switch {
		case p.More:
			continue
		case until == 0:
			if err := s.g.hub.awaitStart(ctx); err != nil {
				return s.goodbye()
			}
			until = s.g.hub.join(s.sub, p.Last)
		}
		if s.sent >= until {
			return s.markReady()
		}
	}
}

// markReady tells the client once that it has caught up.
func (s *session) markReady() error {
	if s.ready {
		return nil
	}
	s.ready = true
	return s.writeText([]byte(`{"type":"ready","last_seq":"` + s.sub.feed.cursor(s.sent, s.history) + `"}`))
}

// pageSender writes a page of the log as frames.
type pageSender struct {
	*session
	frames []frame
	size   int
}

// sendPage writes a page of the log, and what its range says of attachments, in the order of versions, with a checkpoint
// after each complete transaction.
func (s *session) sendPage(ctx context.Context, p *changelog.Page) error {
	out := pageSender{session: s}
	changes := s.sub.feed.judgePage(p, s.g.policyFailed)
	operations := operationReader{session: s, since: s.sent, until: p.Last}
	for len(changes) > 0 || operations.more() {
		o, err := operations.peek(ctx)
		if err != nil {
			return err
		}
		switch {
		case o == nil && len(changes) == 0:
		case o == nil || len(changes) > 0 && changes[0].entry.Version <= o.Version:
			c := &changes[0]
			err = out.add(c.entry.Version, c.entry.Tx, appendChange(nil, c.collection, c.entry, c.op, s.history, c.own), frameChange)
			changes = changes[1:]
		default:
			tx := o.Version // as of delivery.transaction
			if s.open.version == o.Version {
				tx = s.open.tx
			} else if len(changes) > 0 {
				tx = min(tx, changes[0].entry.Tx)
			}
			err = out.add(o.Version, tx, s.g.hub.appendOperation(nil, o, o.Delete, s.history), frameAttachment)
			operations.next()
		}
		if err != nil {
			return err
		}
	}
	if !p.Partial || s.open.tx != p.Entries[len(p.Entries)-1].Tx {
		if err := out.checkpoint(); err != nil {
			return err
		}
	}
	return s.send(out.frames)
}

// add takes a frame of transaction tx. Encoding the page at once would hold it twice, so it is sent piece by piece.
func (o *pageSender) add(v, tx changelog.Version, data []byte, kind frameKind) error {
	if o.open.tx != tx {
		if err := o.checkpoint(); err != nil {
			return err
		}
	}
	o.open.version, o.open.tx = v, tx
	return o.put(data, kind)
}

func (o *pageSender) put(data []byte, kind frameKind) error {
	o.frames = append(o.frames, frame{data: data, kind: kind})
	if o.size += len(data); o.size < gatherBytes || o.batch && kind == frameChange {
		return nil
	}
	err := o.send(o.frames)
	o.frames, o.size = o.frames[:0], 0
	return err
}

// checkpoint ends the open transaction.
func (o *pageSender) checkpoint() error {
	v := o.open.version
	if o.open.version, o.open.tx = 0, 0; v == 0 {
		return nil
	}
	return o.put(checkpointFrame(o.sub.feed, v, o.history), frameCheckpoint)
}

// operationsPage is how many operations a stream that catches up holds at a time.
const operationsPage = 100

// operationReader reads a stream's operations in (since, until], a few at a time. What is overtaken while it reads comes
// later, in its new place.
type operationReader struct {
	*session
	since, until changelog.Version
	page         []changelog.Operation
}

// more says whether there may be more.
func (r *operationReader) more() bool {
	return r.sub.feed.files != nil && (len(r.page) > 0 || r.since < r.until)
}

// peek returns the next operation; nil: there is none.
func (r *operationReader) peek(ctx context.Context) (*changelog.Operation, error) {
	for len(r.page) == 0 && r.more() {
		p, err := r.g.operations(ctx, changelog.OperationsRequest{Scopes: r.sub.feed.files.keys, Since: r.since, Until: r.until, Limit: operationsPage})
		switch {
		case err != nil:
			return nil, err
		case p.Head.History != r.history:
			return nil, r.resyncClosing(&resync{Collections: r.sub.feed.names(), Attachments: true, Reason: reasonHistory})
		case r.since < p.Floor && (r.ready || r.session.since.Version != 0):
			return nil, r.resyncClosing(&resync{Attachments: true, Reason: reasonTooOld})
		}
		if r.page, r.since = p.Operations, p.Last; !p.More {
			r.since = r.until
		}
	}
	if len(r.page) == 0 {
		return nil, nil
	}
	return &r.page[0], nil
}

func (r *operationReader) next() { r.page = r.page[1:] }
