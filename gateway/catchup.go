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
			err = s.sendPage(p)
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

// sendPage writes a page of the log as frames, with a checkpoint after each complete transaction.
func (s *session) sendPage(p *changelog.Page) error {
	changes := s.sub.feed.judgePage(p, s.g.policyFailed)
	var frames []frame
	size := 0
	add := func(data []byte, kind frameKind) error {
		frames = append(frames, frame{data: data, kind: kind})
		if size += len(data); size < gatherBytes || s.batch {
			return nil
		}
		err := s.send(frames) // encoding the page at once would hold it twice
		frames, size = frames[:0], 0
		return err
	}
	checkpoint := func() error {
		v := s.open.version
		if s.open.version, s.open.tx = 0, 0; v == 0 {
			return nil
		}
		return add(checkpointFrame(s.sub.feed, v, s.history), frameCheckpoint)
	}
	for i := range changes {
		c := &changes[i]
		if s.open.tx != c.entry.Tx {
			if err := checkpoint(); err != nil {
				return err
			}
		}
		s.open.version, s.open.tx = c.entry.Version, c.entry.Tx
		if err := add(appendChange(nil, c.collection, c.entry, c.op, s.history, c.own), frameChange); err != nil {
			return err
		}
	}
	if !p.Partial || s.open.tx != p.Entries[len(p.Entries)-1].Tx {
		if err := checkpoint(); err != nil {
			return err
		}
	}
	return s.send(frames)
}
