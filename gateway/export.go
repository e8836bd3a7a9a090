package gateway

import (
	"context"
	"errors"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

const (
	fenceTimeout     = 10 * time.Second
	snapshotAttempts = 4
)

// export reads a caller's rows from the source's tables, chunk by chunk.
//
// The first chunk's snapshot S decides L: with a fence passed after S was taken, everything that S shows is durable and
// in the log, and L is the last version below the first logged transaction that S doesn't show. So S shows every
// transaction up to L, pulling from L misses nothing, and later snapshots only show more. Where the log, or a collection in
// it, begins anew after S was taken, that doesn't hold: what was committed between S and the beginning is in neither.
type export struct {
	g     *Gateway
	feed  *feed
	cur   *fullCursor
	rows  int // limits of one chunk
	bytes int
	buf   []byte
	parts *parts // where buf goes as it fills; nil: a page, which is kept
	given int    // bytes of this chunk that went there
	count int    // documents so far

	first   *snapshot         // of the first chunk, until its rows are read
	beyond  changelog.Version // not 0: some snapshot may show more than L
	fetched int               // rows of this chunk
	average int               // bytes of a row, about
	file    uint32            // the storage of the table that is read in stored order
	ended   bool              // the next row doesn't fit into this chunk
}

// begin computes L, or checks the cursor of an earlier page.
func (x *export) begin(ctx context.Context, since *changelog.Cursor) error {
	if x.cur != nil {
		return x.resume(ctx)
	}
	for attempt := 1; ; attempt++ {
		before, err := x.g.o.Log.Head(ctx)
		if err != nil {
			return x.g.logProblem(err)
		}
		s, err := x.open(ctx, x.feed.collections[0])
		if err != nil {
			return err
		}
		err = x.anchor(ctx, s, before, since, attempt == snapshotAttempts)
		if err == nil {
			x.first = s
			return nil
		}
		s.close(ctx)
		if !errors.Is(err, errRetry) {
			return err
		}
	}
}

// anchor finds L for a snapshot that was taken after the log stood at before.
func (x *export) anchor(ctx context.Context, s *snapshot, before *changelog.Head, since *changelog.Cursor, lastAttempt bool) error {
	if err := x.g.passFence(ctx); err != nil {
		return err
	}
	first, shown, h, err := x.g.o.Log.FirstInvisible(ctx, s.Xmax, s.Running)
	if err != nil {
		return x.g.logProblem(err)
	}
	if err := x.feed.usable(h); err != nil {
		return err
	}
	if !x.feed.unbroken(before, h) {
		if !lastAttempt {
			return errRetry
		}
		return &Problem{Code: LogBehind, Detail: "the log begins anew, or a collection does, again and again", RetryAfter: 2 * time.Second}
	}
	last := h.Version
	if first != 0 {
		last = first - 1
		if shown {
			if !lastAttempt {
				return errRetry
			}
			x.beyond = h.Version
		}
	}
	x.cur = &fullCursor{Last: last, History: h.History, ScopeHash: x.feed.caller.ScopeHash, Collections: x.feed.names()}
	for _, c := range x.feed.collections {
		x.cur.Floors = append(x.cur.Floors, stateOf(h, c.Name).Floor)
	}
	if since != nil && x.feed.check(*since, h) == nil && since.Version <= last {
		x.cur.Merge, x.cur.Tombstones = true, since.Version
	} else {
		x.cur.Tombstones = last
	}
	return nil
}

// passFence waits until everything that was visible when it was called is durable and logged.
func (g *Gateway) passFence(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, g.limits.fence)
	defer cancel()
	lsn, err := g.o.Fence(ctx)
	if err != nil {
		return (&Problem{Code: SourceUnavailable}).Because(err)
	}
	if err := g.hub.waitLSN(ctx, lsn); err != nil {
		return (&Problem{Code: LogBehind, Detail: "the change log has not reached the source's present state in time", RetryAfter: 2 * time.Second}).Because(err)
	}
	return nil
}

// settle returns the version from which the client's replica is whole, if that isn't L: a chunk after the first, or a
// snapshot that is no prefix of the commit order, shows later states of some rows.
func (x *export) settle(ctx context.Context) (changelog.Version, error) {
	if x.beyond == 0 {
		return 0, nil
	}
	if err := x.g.passFence(ctx); err != nil { // what the later snapshots showed is durable and logged now
		return 0, err
	}
	h, err := x.g.o.Log.Head(ctx)
	if err != nil {
		return 0, x.g.logProblem(err)
	}
	return h.Version, nil
}

func (x *export) done() bool {
	return x.cur.Index >= len(x.cur.Collections) && x.cur.Tombstones >= x.cur.Last
}

// fill adds the next chunk to buf: tombstones first, then documents, until a limit is reached or all is read.
func (x *export) fill(ctx context.Context) error {
	x.fetched, x.ended = 0, false
	defer x.drop(ctx)
	if x.cur.Tombstones < x.cur.Last {
		if err := x.tombstones(ctx); err != nil {
			return err
		}
	}
	for x.cur.Tombstones >= x.cur.Last && x.cur.Index < len(x.cur.Collections) && !x.full() {
		ended, err := x.documents(ctx, x.feed.collections[x.cur.Index])
		if err != nil {
			return err
		}
		if ended {
			x.cur.Index++
			x.cur.Key = nil
		}
	}
	return nil
}

func (x *export) full() bool { return x.ended || x.fetched >= x.rows || x.given+len(x.buf) >= x.bytes }

// drop ends the first snapshot where nothing was read in it.
func (x *export) drop(ctx context.Context) {
	x.first.close(ctx)
	x.first = nil
}

// tombstones adds what was deleted for the caller between its since and L.
func (x *export) tombstones(ctx context.Context) error {
	for x.cur.Tombstones < x.cur.Last && !x.full() {
		p, room, err := x.g.readPage(ctx, changelog.Request{Scopes: x.feed.scopes, Since: x.cur.Tombstones, Until: x.cur.Last, Limit: min(pullMost, x.rows-x.fetched), MaxBytes: x.g.limits.page})
		if err != nil {
			return err
		}
		room.release() // what becomes of it is a few bytes each
		if x.feed.check(changelog.Cursor{Version: x.cur.Tombstones, History: x.cur.History}, &p.Head) != nil {
			return &Problem{Code: CursorExpired, Detail: "the log no longer reaches back to where the resync began"}
		}
		for _, c := range lastStates(x.feed.judge(p.Entries, &p.Head, x.g.policyFailed)) {
			if c.op == policies.Upsert {
				continue
			}
			x.buf = append(x.buf, `{"collection":"`...)
			x.buf = append(x.buf, c.collection...)
			x.buf = append(x.buf, `","doc_id":`...)
			x.buf = schema.AppendString(x.buf, c.entry.DocID)
			x.buf = append(x.buf, `,"deleted":true,"version":"`...)
			x.buf = c.entry.Version.AppendText(x.buf, x.cur.History)
			x.buf = append(x.buf, "\"}\n"...)
			x.fetched++
		}
		x.cur.Tombstones = p.Last
	}
	return nil
}

// documents adds rows of one collection in key order; true: the collection is read to its end.
func (x *export) documents(ctx context.Context, c *policies.Collection) (ended bool, err error) {
	s := x.first
	x.first = nil
	if s == nil {
		if s, err = x.open(ctx, c); err != nil {
			return false, err
		}
		x.beyond = max(x.beyond, 1)
	}
	defer s.close(ctx)
	ended, err = s.read(ctx, x, c)
	if err != nil {
		return false, sourceProblem(err)
	}
	return ended, nil
}

func sourceProblem(err error) error {
	var p *Problem
	if errors.As(err, &p) {
		return err
	}
	return (&Problem{Code: SourceUnavailable}).Because(err)
}

// appendRow appends the document of a row that the caller may see. One that exceeds the chunk's bytes ends it, unless it
// is the first.
func (x *export) appendRow(c *policies.Collection, b *policies.Binding, row schema.Row) error {
	sees, err := b.Sees(row, x.feed.caller)
	if err != nil {
		x.g.policyFailed(c.Name, err)
	}
	if !sees {
		return nil
	}
	from := len(x.buf)
	x.buf = append(x.buf, `{"collection":"`...)
	x.buf = append(x.buf, c.Name...)
	x.buf = append(x.buf, `","doc_id":`...)
	if x.buf, err = appendDocIDString(x.buf, b, row); err == nil {
		x.buf = append(x.buf, `,"data":`...)
		x.buf, err = b.AppendDocument(x.buf, row)
	}
	if err != nil {
		x.buf = x.buf[:from]
		return err
	}
	x.buf = append(x.buf, "}\n"...)
	if x.given+len(x.buf) > x.bytes && x.given+from > 0 {
		x.buf, x.ended = x.buf[:from], true
		return nil
	}
	x.count++
	if len(x.buf) >= partBytes {
		x.handOver(false)
	}
	return nil
}

// appendDocIDString appends the document's id as a JSON string.
func appendDocIDString(dst []byte, b *policies.Binding, row schema.Row) ([]byte, error) {
	var room [128]byte
	id, err := b.AppendDocID(room[:0], row)
	return schema.AppendString(dst, id), err
}
